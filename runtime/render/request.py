"""What a user asks for: one render, or a file with one job a line (JSON Lines)."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from overcrank.errors import RequestError, present
from overcrank.models import check_shape, family, local_folder
from overcrank.models._schedulers import RESCALING
from overcrank.models.base import Rendering, Variant, VideoShape
from overcrank.runtime.render.media import rate_of, size_of_picture
from overcrank.runtime.render.schedule import scheduled
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Format = Literal["mp4", "gif", "png", "sheet", "latents"]
FORMATS: tuple[Format, ...] = ("mp4", "gif", "png", "sheet", "latents")
log = logging.getLogger("overcrank")
PROMPTS = Path(__file__).parents[1] / "calibration" / "data" / "prompts.txt"
FILES = ("image", "last_image", "video", "audio")


class RenderRequest(BaseModel):
    """One video. Unset fields take the values of the model's publisher (`completed`); sizes in pixels.

    `output` is the name of the results without a suffix: NAME.mp4, NAME.json and so on. `guidance_until` is the share
    of the steps that are guided; the rest are not, and make one call in place of two. `guidance_2` is that of the
    low-noise expert of a model with two. `sigmas` (falling, from at most 1) or `timesteps` (of 1000) list the steps:
    they are final, no shift is laid over them. A `negative_prompt` of "" is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = ""
    negative_prompt: str | None = None
    output: str = Field(default="", pattern=r"^[^\x00]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    guidance_2: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    guidance_rescale: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    guidance_until: float = Field(default=1, gt=0, le=1, allow_inf_nan=False)
    scheduler: str | None = None
    shift: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    sigmas: tuple[float, ...] | None = Field(default=None, max_length=1000)
    timesteps: tuple[float, ...] | None = Field(default=None, max_length=1000)
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = Field(default=None, gt=0, le=240, allow_inf_nan=False)
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    strength: float = Field(default=0.8, ge=0, le=1, allow_inf_nan=False)
    audio: Path | None = None
    formats: tuple[Format, ...] = Field(default=("mp4", "sheet"), min_length=1)

    @property
    def task(self) -> str:
        if self.video is not None:
            return "video-to-video"
        if self.last_image is not None:
            return "first-last-frame"
        return "text-to-video" if self.image is None else "image-to-video"

    def completed(self, variant: Variant, folder: Path | None = None) -> RenderRequest:
        """Every field set, paths absolute (relative ones are of `folder`); checked for `variant`.

        Raises ShapeError for a size the model cannot make, RequestError for a task it
        lacks, a file that is missing, or a value that its pipeline cannot take.
        """
        if variant.text_length and not self.prompt.strip():
            raise RequestError(f"prompt: {variant.name} needs one, and it is empty.")
        if self.video is not None and (self.image is not None or self.last_image is not None):
            raise RequestError("video and image both condition the render; give one of them.")
        if self.task not in variant.tasks:
            what = variant.name + (f" with --preset {variant.preset}" if variant.preset else "")
            raise RequestError(f"{what} cannot do {self.task}: it does {', '.join(variant.tasks)}.")
        rendering = variant.rendering(self.task)
        if self.guidance_until < 1 and not family(variant.family).guides_apart:
            raise RequestError(
                f"guidance_until: {variant.name} computes both sides of guidance in one call, so no call would be "
                f"saved; leave it out."
            )
        paths = self._paths(folder)
        values = self._guided(variant, rendering) | scheduled(self, variant, rendering) | paths
        values |= self._sized(variant, rendering, paths)
        if self.fps is None:  # what is made of a video plays as fast as it
            values["fps"] = (rate_of(paths["video"]) if "video" in paths else 0) or float(rendering.fps or variant.fps)
        complete = self.model_copy(update=values)
        check_shape(variant, complete.shape)
        return complete

    def _paths(self, folder: Path | None) -> dict[str, Path]:
        """The files it names, absolute."""
        paths = {}
        for field in FILES:
            path: Path | None = getattr(self, field)
            if path is not None:
                paths[field] = ((folder or Path()) / path.expanduser()).absolute()
                if not paths[field].is_file():
                    raise RequestError(f"{field} {path} does not exist.")
        return paths

    def _guided(self, variant: Variant, rendering: Rendering) -> dict[str, object]:
        """Guidance of every kind and the negative prompt."""
        if self.guidance_2 is not None and rendering.guidance_2 is None:
            raise RequestError(f"guidance_2: {variant.name} has one expert; give guidance alone.")
        if self.guidance_rescale and rendering.pipeline not in RESCALING:
            raise RequestError(f"guidance_rescale: {rendering.pipeline} of {variant.name} takes none; leave it out.")
        if self.negative_prompt and not (variant.text_length and rendering.contrasted):
            raise RequestError(
                f"negative_prompt: {variant.name} ({rendering.pipeline}) looks at none; leave it out, or give an empty "
                f"one."
            )
        usual: dict[str, object] = {
            "guidance": rendering.guidance,
            "guidance_2": rendering.guidance_2 if self.guidance is None else self.guidance,
            "guidance_rescale": rendering.guidance_rescale,
            "negative_prompt": rendering.negative_prompt or "",
        }
        if rendering.guidance_2 is None:
            del usual["guidance_2"]
        return {k: v for k, v in usual.items() if getattr(self, k) is None}

    def _sized(self, variant: Variant, rendering: Rendering, paths: Mapping[str, Path]) -> dict[str, int]:
        """Height, width and frames; a size that the pipeline makes of the picture is that, whatever is asked for."""
        native = rendering.shape or variant.native
        usual = {"height": native.height, "width": native.width, "frames": native.frames}
        values = {k: v for k, v in usual.items() if getattr(self, k) is None}
        if rendering.sized:
            return values
        height, width = family(variant.family).size_of(variant, *size_of_picture(paths["image"]))
        if (self.height or height, self.width or width) != (height, width):
            log.warning(
                "%s makes the size of its picture's shape (%s takes none): the video is %dx%d.",
                variant.name, rendering.pipeline, width, height,
            )  # fmt: skip
        return values | {"height": height, "width": width}

    @property
    def shape(self) -> VideoShape:
        """Of a completed request."""
        sizes = {"height": self.height, "width": self.width, "frames": self.frames}
        return VideoShape(**{name: present(value, f"{name} of the request") for name, value in sizes.items()})

    def digest(self, model: str, settings: Mapping[str, object] | None = None) -> str:
        """SHA-256 of what decides the frames and files of a completed request, the content of its files included.

        `settings`: what is not usual about the pipeline, such as LoRAs.
        """
        described = self.model_dump(mode="json", exclude={"output"}) | {"model": model} | dict(settings or {})
        for field in FILES:
            path: Path | None = getattr(self, field)
            if path is not None:
                described[field] = hashlib.sha256(path.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def request_of(values: dict[str, object]) -> RenderRequest:
    """A request of a command's options; raises RequestError naming every wrong one."""
    try:
        return RenderRequest.model_validate(values)
    except ValidationError as error:
        raise RequestError("; ".join(f"--{_reason(e)}" for e in error.errors()) + ".") from error


def read_jobs(file: Path, variant: Variant) -> list[RenderRequest]:
    """The jobs of a JSON Lines file, completed; blank lines are skipped.

    Raises RequestError with every wrong line and its number.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read: {error}.") from error
    jobs: list[RenderRequest] = []
    wrong: list[str] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _job(line, number).completed(variant, file.parent)
        except (RequestError, ValueError) as error:
            wrong.append(f"line {number}: {error}")
            continue
        except Exception as error:  # a shape the model cannot make
            from overcrank.errors import UserError

            if not isinstance(error, UserError):
                raise
            wrong.append(f"line {number}: {error}")
            continue
        first = taken.setdefault(job.output.casefold(), number)
        if first != number:
            wrong.append(f"line {number}: output '{job.output}' is also that of line {first}; give each its own.")
        jobs.append(job)
    if wrong:
        raise RequestError(f"{file} has {len(wrong)} wrong line{'s' * (len(wrong) > 1)}:\n  " + "\n  ".join(wrong))
    if not jobs:
        raise RequestError(
            f'{file} holds no jobs; write one a line, such as {{"prompt": "a red circle moving right"}}.'
        )
    return jobs


def prompts_of(file: Path | None, variant: Variant) -> list[str]:
    """Lines of the file, else of the model's own prompts.txt, else of the set that ships."""
    own = local_folder(variant.name)
    default = own / "prompts.txt" if own is not None and (own / "prompts.txt").is_file() else PROMPTS
    try:
        text = (file or default).read_text("utf-8-sig")
    except OSError as error:
        raise RequestError(f"--prompts {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts {file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"--prompts {file} is empty; write one prompt a line.")
    return lines


def _job(line: str, number: int) -> RenderRequest:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise RequestError(f"no valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise RequestError('no JSON object; a job looks like {"prompt": "…"}.')
    values.setdefault("output", f"{number:04}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = RenderRequest.model_validate(values)
    except ValidationError as error:
        raise RequestError("; ".join(_reason(e) for e in error.errors()) + ".") from error
    name = Path(job.output)
    if not job.output or name.name != job.output or job.output.startswith("."):
        raise RequestError(f"output '{job.output}' must be a plain file name without a folder.")
    return job


def _reason(error: Mapping[str, Any]) -> str:
    """One pydantic error as "field: what is wrong"."""
    field = ".".join(map(str, error["loc"])) or "job"
    if error["type"] == "extra_forbidden":
        return f"{field}: no such field; there are {', '.join(RenderRequest.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return f"{field}: {message[0].lower()}{message[1:]}{given}"
