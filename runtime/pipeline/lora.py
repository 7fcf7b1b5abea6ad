"""LoRA files merged into weights, tensor by tensor: W + scale · alpha / rank · B A (arXiv:2106.09685).

diffusers turns the file's names into its own (`lora_state_dict` of the pipeline's class); the
product is taken here, since a weight pack is made without the module. Distilled models come as
LoRA files that also hold whole differences, of biases and norms: those are added as they are.
Which part of the pipeline a file is for is settled in lora_parts.py.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError, UserError, present
from overcrank.options import option
from overcrank.runtime.pipeline.lora_kinds import FullRank
from overcrank.runtime.pipeline.lora_layouts import TRAINER, halves_that_disagree, layout_of, odd_setting
from overcrank.runtime.pipeline.lora_names import known, shape_in

if TYPE_CHECKING:
    from torch import Tensor, nn

Parts = Mapping[str, "nn.Module"]
Place = tuple[str, str]
"""(part of the pipeline, layer or parameter)."""

_HALF = re.compile(
    r"(?P<part>[^.]+)\.(?P<layer>.+?)\.(?:lora_|lora\.)(?P<half>A|B|down|up)(?:\.\w+)?\.(?P<kind>weight|bias)"
)
_UNDERSTOOD = re.compile(r".*\.(?:lora_|lora\.)(?:A|B|down|up)(?:\.\w+)?\.(?:weight|bias)|.*\.alpha")
_HALVES = re.compile(r"(?P<layer>.+?)\.(?:lora_|lora\.)(?P<half>A|B|down|up)(?:\.\w+)?\.weight")
_DIFFERENCE = re.compile(r"(?:(?:model\.)?diffusion_model|transformer|unet)\.(?P<name>.+)\.(?P<kind>diff|diff_b)")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it is asked for.

    `part` of the pipeline that it is for, "" where its names and the file's decide; `repository` on the hub that it
    comes from, "" for a file of the user's own.
    """

    file: Path
    scale: float = 1.0
    part: str = ""
    repository: str = ""


@dataclass(frozen=True)
class Lora:
    """What a file adds: (part of the pipeline, layer) → A [r, in …], B [out, r …] and their factor.

    `differences` are added whole: (part, parameter) → a tensor of its shape. `full` are of kinds whose difference is no
    product of two halves: (part, layer) → what makes it.
    """

    file: Path
    scale: float
    pairs: Mapping[Place, tuple[Tensor, Tensor, float]]
    differences: Mapping[Place, Tensor] = field(default_factory=dict)
    full: Mapping[Place, FullRank] = field(default_factory=dict)
    repository: str = ""

    @property
    def parts(self) -> list[str]:
        return sorted({part for part, _ in (*self.pairs, *self.differences, *self.full)})

    def parameters(self) -> Iterator[Place]:
        """(part, parameter) of all that something is added to."""
        layers = (*self.pairs, *self.full)
        yield from dict.fromkeys([*((p, f"{layer}.weight") for p, layer in layers), *self.differences])

    def delta(self, part: str, parameter: str, weight: Tensor) -> Tensor | None:
        """What is added to a parameter, whose values are `weight`, fp32, as [out, in × kernel]; None if nothing is.

        Raises CheckpointError for one that is not finite.
        """
        layer, _, kind = parameter.rpartition(".")
        added: Tensor | None = None
        if kind == "weight" and (part, layer) in self.pairs:
            a, b, factor = self.pairs[part, layer]
            added = b.float().flatten(1) @ a.float().flatten(1) * (factor * self.scale)
        if kind == "weight" and (part, layer) in self.full:
            added = self.full[part, layer].make(weight.detach().float().flatten(1)) * self.scale
        if (part, parameter) in self.differences:
            whole = self.differences[part, parameter].float() * self.scale
            added = whole if added is None else added + whole.reshape(added.shape)
        if added is not None and not bool(added.isfinite().all()):
            raise CheckpointError(
                f"{lora_option(self.file)} holds NaN or infinities in {part}.{parameter}; save it again."
            )
        return added

    def about(self) -> dict[str, Any]:
        """What a sidecar says of it; reads the file for its SHA-256."""
        about = self.file.stat()
        entry = {
            "file": self.file.name,
            "sha256": _digest(self.file, about.st_mtime_ns),
            "scale": self.scale,
            "parts": self.parts,
        }
        return entry | ({"repository": self.repository} if self.repository else {})


@lru_cache(maxsize=64)
def _digest(file: Path, written: int) -> str:
    """SHA-256 of a file that was written at a time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lora_option(file: object, part: str = "") -> str:
    """A LoRA as it is asked for, in a message."""
    return option("loras", [f"{part}={file}" if part else file])


@dataclass
class Contents:
    """A file's content under the names diffusers has for its own part, `odd` being keys that nothing came of."""

    pairs: dict[Place, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    differences: dict[Place, Tensor] = field(default_factory=dict)
    full: dict[Place, FullRank] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    """Layers of the file that nothing in the modules goes by."""

    def __len__(self) -> int:
        """Layers and parameters that something is added to."""
        return len(self.pairs) + len(self.differences) + len(self.full)

    def parts(self) -> list[str]:
        return sorted({part for part, _ in (*self.pairs, *self.differences, *self.full)})

    def moved(self, part: str) -> Contents:
        """The same of another part."""
        pairs, differences, full = (
            {(part, name): value for (_, name), value in places.items()}
            for places in (self.pairs, self.differences, self.full)
        )
        return Contents(pairs, differences, full, self.odd, self.strange)  # type: ignore[arg-type]

    def unmatched(self, parts: Parts) -> list[str]:
        """Names that fit no parameter of these modules."""
        return self.odd + self.unfit(parts) + self.unknown(parts)

    def unfit(self, parts: Parts) -> list[str]:
        """Those of parameters that are of another shape there."""
        wrong = []
        for (part, layer), (a, b, _) in self.pairs.items():
            shape = shape_in(parts, part, f"{layer}.weight")
            if shape and not (tuple(a.shape[1:]) == shape[1:] and tuple(b.shape[:2]) == (shape[0], a.shape[0])):
                wrong.append(f"{part}.{layer}.weight")
        for (part, name), tensor in self.differences.items():
            if (shape := shape_in(parts, part, name)) and tuple(tensor.shape) != shape:
                wrong.append(f"{part}.{name}")
        return wrong

    def unknown(self, parts: Parts) -> list[str]:
        """Those of none."""
        layers = [(part, f"{layer}.weight") for part, layer in (*self.pairs, *self.full)]
        names = [(part, name) for part, name in (*layers, *self.differences) if shape_in(parts, part, name) is None]
        return [f"{part}.{name}" for part, name in names] + self.strange

    def without(self, unknown: Sequence[str]) -> Contents:
        """Of these names nothing."""
        gone = set(unknown)
        pairs = {(p, n): value for (p, n), value in self.pairs.items() if f"{p}.{n}.weight" not in gone}
        differences = {(p, n): value for (p, n), value in self.differences.items() if f"{p}.{n}" not in gone}
        full = {(p, n): value for (p, n), value in self.full.items() if f"{p}.{n}.weight" not in gone}
        return Contents(pairs, differences, full, self.odd)

    def lora(self, source: LoraFile) -> Lora:
        return Lora(source.file, source.scale, self.pairs, self.differences, self.full, source.repository)


def read_contents(file: Path, pipeline: type, parts: Parts) -> Contents:
    """A LoRA file for a pipeline of class `pipeline` with these modules.

    By diffusers; what it does not understand whole, by the layers' names. Raises UserError for a file that is no LoRA,
    or one of a kind that cannot be merged, and CheckpointError for one that is not whole.
    """
    tensors, adapter = _loaded(file)
    layers = _count_pairs(file, tensors)
    contents, problem = None, None
    try:
        contents = _by_diffusers(file, pipeline, tensors, adapter, parts)
        if contents.pairs and len(contents.pairs) + len(contents.odd) < layers:
            dropped = layers - len(contents.pairs) - len(contents.odd)
            raise CheckpointError(f"{lora_option(file)}: diffusers drops {dropped} of its {layers} layers.")
        if not contents.unmatched(parts):
            return contents
    except CheckpointError as error:
        problem = error
    from overcrank.runtime.pipeline.lora_layers import by_names

    named = by_names(file, tensors, adapter, parts)
    if len(named) and (contents is None or len(named.unmatched(parts)) < len(contents.unmatched(parts))):
        return named
    if contents is None or problem is not None:
        raise present(problem, "why diffusers has nothing")
    return contents


def _by_diffusers(
    file: Path, pipeline: type, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any], parts: Parts
) -> Contents:
    """Raises CheckpointError where it does not understand a name."""
    rest = {key: tensor for key, tensor in tensors.items() if not _DIFFERENCE.fullmatch(key)}
    strange = [key for key in rest if not _UNDERSTOOD.fullmatch(key)]
    if strange:
        problem = layout_of(strange) or f"is for another model: nothing here matches {listed(strange)}"
        raise CheckpointError(f"{lora_option(file)} {problem}.")
    state, alphas = _named(file, pipeline, rest)
    contents = _paired(file, state, alphas, adapter, parts)
    own = next((p for p in ("transformer", "unet") if p in parts), "")
    for match in filter(None, map(_DIFFERENCE.fullmatch, tensors)):
        parameter = f"{match['name']}.{'bias' if match['kind'] == 'diff_b' else 'weight'}"
        contents.differences[own, known(parameter, own, parts)] = tensors[match.string]
    return contents


def _count_pairs(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Raise CheckpointError for a half without the other one, or of another rank; diffusers may drop it wordlessly."""
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _HALVES.fullmatch(key):
            half = "A" if match["half"] in ("A", "down") else "B"
            same = layers.setdefault(match["layer"], {})
            if half in same:
                raise CheckpointError(
                    f"{lora_option(file)} holds several adapters, such as {same[half]} and {key}; save one alone."
                )
            same[half] = key
    for layer, halves in layers.items():
        a, b = (tensors.get(halves.get(half, "")) for half in "AB")
        if wrong := halves_that_disagree(a, b):
            raise CheckpointError(f"{lora_option(file)} is not whole: {layer} {wrong}; download or save it again.")
    return len(layers)


def listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _loaded(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, and diffusers' own record of rank and alpha in its header."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{lora_option(file)} cannot be read as safetensors: {str(error).rstrip('.')}.") from error
    if quantized := next((k for k, tensor in tensors.items() if not tensor.is_floating_point()), ""):
        raise CheckpointError(
            f"{lora_option(file)}: tensor '{quantized}' is {tensors[quantized].dtype}, no floating type; take the file "
            f"in bf16 or fp16."
        )
    try:
        adapter = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        adapter = None
    if not isinstance(adapter, dict):
        raise UserError(f"{lora_option(file)}: its lora_adapter_metadata is no JSON object; save the LoRA again.")
    decomposed = any("magnitude_vector" in key for key in tensors)
    if odd := odd_setting({k: v for k, v in adapter.items() if not (decomposed and k.endswith("use_dora"))}):
        raise UserError(f"{lora_option(file)}: its lora_adapter_metadata has {odd}; it is not merged here: {TRAINER}.")
    return tensors, adapter


def _named(file: Path, pipeline: type, rest: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """The tensors under diffusers' names, and the alphas it does not multiply in."""
    reader: Any = getattr(pipeline, "lora_state_dict", None)
    if reader is None:
        raise UserError(f"{lora_option(file)}: {pipeline.__name__} takes no LoRA.")
    if not rest:
        return {}, {}
    alphas = {} if "return_alphas" not in inspect.signature(reader).parameters else {"return_alphas": True}
    try:
        result = reader({key: tensor.clone() for key, tensor in rest.items()}, **alphas)  # it writes into them
    except Exception as error:  # its converters take the file as they expect it to be
        problem = layout_of(rest) or (
            f"is for another model: diffusers does not understand its names, such as {listed(sorted(rest)[:2])} "
            f"({type(error).__name__}: {str(error)[:160]})"
        )
        raise CheckpointError(f"{lora_option(file)} {problem}.") from error
    state, scales = result if isinstance(result, tuple) else (result, None)
    return state, scales or {}


def _paired(
    file: Path, state: Mapping[str, Tensor], alphas: Mapping[str, float], adapter: Mapping[str, Any], parts: Parts
) -> Contents:
    halves: dict[Place, dict[str, Tensor]] = {}
    contents = Contents()
    factor = Factor(file, state, alphas, adapter)
    for key, tensor in state.items():
        match = _HALF.fullmatch(key)
        if match is None:
            contents.odd += [] if key.endswith(".alpha") else [key]
            continue
        half = "A" if match["half"] in ("A", "down") else "B"
        halves.setdefault((match["part"], match["layer"]), {})[half + match["kind"]] = tensor
    for (part, layer), own in halves.items():
        if not {"Aweight", "Bweight"} <= own.keys() or "Abias" in own:
            contents.odd += [f"{part}.{layer}.lora_{kind[0]}.{kind[1:]}" for kind in own]
            continue
        a, b = own["Aweight"], own["Bweight"]
        scale = factor.of(part, layer, a.shape[0])
        name = known(f"{layer}.weight", part, parts).removesuffix(".weight")
        contents.pairs[part, name] = (a, b, scale)
        if "Bbias" in own:
            contents.differences[part, f"{name}.bias"] = own["Bbias"] * scale
    contents.odd += [key for key in state if key.endswith(".alpha") and key not in factor.used]
    return contents


@dataclass
class Factor:
    """alpha / rank of layers, or by its root where the file says so; one where it says no alpha, as PEFT has it."""

    file: Path
    state: Mapping[str, Any]
    alphas: Mapping[str, float]
    adapter: Mapping[str, Any]
    used: set[str] = field(default_factory=set)

    def of(self, part: str, layer: str, rank: int) -> float:
        config = {k.removeprefix(f"{part}."): v for k, v in self.adapter.items() if k.startswith(f"{part}.")}
        try:
            alpha = self._alpha(config, part, layer)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if alpha is not None else 1.0
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, re.error):
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"{lora_option(self.file)}: the alpha of {part}.{layer} is no number; save the LoRA again.")
        return scale

    def _alpha(self, config: Mapping[str, Any], part: str, layer: str) -> float | None:
        for key in (f"{part}.{layer}.alpha", f"{layer}.alpha"):
            for place in (self.state, self.alphas):
                if key in place:
                    self.used.add(key)
                    return float(place[key])
        if not config:
            return None
        from peft import LoraConfig
        from peft.utils.other import get_pattern_key

        pattern = config.get("alpha_pattern") or {}
        usual = config.get("lora_alpha", LoraConfig().lora_alpha)
        return float(pattern.get(get_pattern_key(list(pattern), layer), usual))
