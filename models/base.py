"""The nouns of a model family. Pure data: imports neither torch nor TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Config = dict[str, Any]
Arguments = dict[str, Any]
"""Of a pipeline's call."""
Sizes = Mapping[str, int]
"""Axis name → length, for example {"batch": 2, "tokens": 6144, "text": 128}."""
Latents = tuple[int, int, int]
"""Frames, height and width of a latent video."""


class Call(Mapping[str, Any]):
    """Arguments of a stock module's call, which remembers those that were read.

    What no `adapt` reads is not understood: `unread` tells what keeps an engine from serving the call.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._read = {"return_dict"}  # the results are made after it

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def ignored(self, *names: str) -> None:
        """These are arguments that the module, as it is configured, does not look at either."""
        self._read.update(names)

    def unread(self, defaults: Mapping[str, Any]) -> list[str]:
        """Arguments that were not read and are neither empty nor their default."""

        def told(name: str) -> bool:
            value, default = self._arguments[name], defaults.get(name)
            if value is None or value is default or (isinstance(value, Mapping | tuple | list) and not value):
                return False
            return not (isinstance(value, bool | int | float | str) and value == default)

        return [name for name in self._arguments if name not in self._read and told(name)]


@dataclass(frozen=True)
class VideoShape:
    """What a user asks for: pixels, frames, and how many videos go through one call."""

    height: int
    width: int
    frames: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


LatentOf = Callable[[VideoShape], Latents]


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output.

    `dtype` is "compute" (the engine's 16-bit type, fp32 when verified) or a fixed
    "float32", "int64", "bool". A dimension is a length, or the name of a dynamic axis.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "compute"

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.dims)


@dataclass(frozen=True)
class Repeat:
    """A chain of identical submodules: traced `traced` deep, repeated in the graph to `full`.

    `after` submodules of another kind follow at the same path.
    """

    path: str
    traced: int
    full: int
    after: int = 0


def _only_output(outputs: Mapping[str, Any], call: Mapping[str, Any]) -> Any:
    (output,) = outputs.values()
    return output


@dataclass(frozen=True)
class Component:
    """A submodule that becomes an engine.

    `cls` is a diffusers class (dotted where it is not at the top), else one of transformers,
    built from `config`; `attribute` is the part of it that
    runs ("" is the whole, "decoder" a VAE's decoder); one that is not `default` is built on
    request. The rest are plain functions:

    - `forward(module, *inputs)` is what is traced: tensors in the order of `inputs` to a
      tensor, or a tuple in the order of `outputs`. What follows those keeps the last block of
      a chain like the others, until it is repeated (export/repeat.py), and is no output.
    - `adapt(module, call)` turns a call of the stock module into the named inputs; it reads every argument it
      understands, and raises ShapeError for a value that the graph does not take.
    - `returns(outputs, call)` turns the named outputs into what the stock call returns.
    - `sample(module, sizes, generator)` makes such a call with seeded random tensors.
    - `sizes(shape)` gives the axis lengths of a video shape.

    `traced_config` and `repeats` describe the shallow module that is traced in place of
    the full one (export/repeat.py); `trace_sizes` are the axis lengths it is traced at.
    `affine_axes` maps an axis to (root, scale, offset) where torch.export must know that its
    length is scale * root + offset; `bounds` maps an axis to the smallest and largest length it
    is traced for; `backed_size_oblivious` has torch.export take every length for neither 0 nor 1, where its
    guards ask for no more; `free_axes` maps an axis that no video shape sets to its smallest
    length. `variations` are classes that its `adapt` knows in the place of submodules of the stock module.
    `fed` are stored buffers whose values `adapt` passes on; others are constants of the graph.
    `also_serves` are other parts of the pipeline, of the same architecture, that the same
    engine serves with their own weights, if the pipeline has them.
    """

    name: str
    cls: str
    subfolder: str
    config: Config
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    forward: Callable[..., Any]
    adapt: Callable[..., dict[str, Any]]
    sample: Callable[..., dict[str, Any]]
    sizes: Callable[[VideoShape], Sizes]
    trace_sizes: Sizes
    attribute: str = ""
    default: bool = True
    also_serves: tuple[str, ...] = ()
    variations: tuple[str, ...] = ()
    fed: tuple[str, ...] = ()
    returns: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] = _only_output
    free_axes: Sizes = field(default_factory=dict)
    traced_config: Config = field(default_factory=dict)
    repeats: tuple[Repeat, ...] = ()
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    backed_size_oblivious: bool = False
    affine_axes: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)

    def at_depth(self, config: Config) -> Component:
        """The same component traced as it is, with no chain repeated."""
        return replace(self, config=config, traced_config={}, repeats=())


@dataclass(frozen=True)
class Media:
    """What conditions a render besides text: PIL images by frame index, and the frames of a video.

    `strength` is how much of the video is made anew, from 0 to 1.
    """

    images: Mapping[int, Any] = field(default_factory=dict)
    video: Sequence[Any] = ()
    strength: float = 0.8
    fps: float = 24.0


@dataclass(frozen=True)
class Rendering:
    """How the publisher renders one task: what a render does unless it is told otherwise.

    `pipeline` is the diffusers class. `scheduler` is laid over the checkpoint's own scheduler configuration;
    a `_class_name` in it is the scheduler's class. `timesteps` (falling, of 1000) or `sigmas` (falling, of 1,
    without the last 0) take the place of the scheduler's own spacing of `steps`. `guidance_2` is that of the
    low-noise expert of a model with two; `negative_prompt` None is none. `shape` and `fps`
    are the variant's unless they are given, and `sized` is off where the pipeline makes the size of its picture's
    shape; `contrasted` is off where the network takes its guidance as an input, so that negative prompts do nothing.
    `arguments` are further ones of the pipeline's call. `source` says where the publisher does so, `differs` what is
    not done as there and why.
    """

    pipeline: str
    steps: int = 30
    guidance: float = 1.0
    guidance_2: float | None = None
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    shape: VideoShape | None = None
    fps: float | None = None
    sized: bool = True
    contrasted: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    differs: str = ""

    @property
    def listed(self) -> tuple[float, ...]:
        """Its own schedule, in timesteps or sigmas; empty where the scheduler spaces the steps."""
        return self.timesteps or self.sigmas


def renderings(tasks: Mapping[str, str], **alike: Any) -> dict[str, Rendering]:
    """Of tasks by their pipeline class, rendered alike."""
    return {task: Rendering(pipeline, **alike) for task, pipeline in tasks.items()}


@dataclass(frozen=True)
class PublishedLora:
    """A LoRA on the hub: `file` of `repository`, merged into `part` of the pipeline times `strength`."""

    part: str
    repository: str
    file: str
    strength: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A published way to render a model in few steps.

    `name` may stand for several, each for `variants` of its own. `tasks` are those it was published for, () being
    all of the variant's. `changes` maps fields of `Rendering` to what they are here. `checkpoint` is the hub id of
    the checkpoint that takes the place of the variant's own, where no LoRA makes one of the other. `source` says
    where the publisher renders so.
    """

    name: str
    title: str
    variants: tuple[str, ...]
    changes: Mapping[str, Any]
    source: str
    tasks: tuple[str, ...] = ()
    loras: tuple[PublishedLora, ...] = ()
    checkpoint: str = ""


@dataclass(frozen=True)
class Repository:
    """A hub repository that a render's checkpoint, or a part of it, is fetched from.

    `parts` are the parts of the pipeline taken from it; none are all that its model_index.json names. `top` is the
    part whose files lie at the top of the repository, where parts usually have folders. `files` is the file variant
    to take where a part has it ("fp16"), in place of the plain one. `former` are ids that lead to it: older
    addresses, and other places of the same files.
    """

    id: str
    revision: str = "main"
    parts: tuple[str, ...] = ()
    top: str = ""
    files: str = ""
    former: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One published checkpoint layout of a family.

    `renders` maps what the checkpoint can do to how that is done; `text_length` is 0 for a model without text.
    `configs["scheduler"]` is the scheduler configuration that the checkpoint carries. `dtypes` maps a part of the
    pipeline to its type on a card ("fp32", "fp16", "bf16"), "" standing for the parts that are not named.
    `saved_as` are pipeline classes that such a checkpoint names beside those of its tasks. `like` names the published
    variant that one of a user's own follows, `where` is what `--model` calls it, and `preset` names the preset that
    `renders` are of. `repositories` are those that a render needs, the one that the variant is known by first; none
    are the one of `hub_id`. `hub_file` is the single file of a checkpoint that is published in no other form.
    """

    name: str
    family: str
    title: str
    hub_id: str
    configs: Mapping[str, Config]
    native: VideoShape
    minimum: VideoShape
    maximum: VideoShape
    fps: int
    renders: Mapping[str, Rendering]
    text_length: int = 128
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"": "bf16"})
    saved_as: tuple[str, ...] = ()
    hub_file: str = ""
    repositories: tuple[Repository, ...] = ()
    packaged: str = ""  # folder in this package that holds the checkpoint
    like: str = ""
    where: str = ""
    preset: str = ""

    @property
    def tasks(self) -> dict[str, str]:
        """Task → diffusers pipeline class."""
        return {task: rendering.pipeline for task, rendering in self.renders.items()}

    def dtype_of(self, part: str) -> str:
        """The type of a part of the pipeline on a card."""
        return self.dtypes.get(part, self.dtypes.get("", "bf16"))

    @property
    def sources(self) -> tuple[Repository, ...]:
        """The repositories that a render needs."""
        return self.repositories or ((Repository(self.hub_id),) if self.hub_id else ())

    def rendering(self, task: str = "") -> Rendering:
        """Of a task; of the first one without a name."""
        return self.renders[task] if task else next(iter(self.renders.values()))
