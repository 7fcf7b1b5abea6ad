"""What a user asks for: one render, or a file with one job a line (JSON Lines)."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from overcrank.errors import RequestError, ShapeError, UserError, present
from overcrank.files import user_path
from overcrank.models import check_shape, family, local_folder
from overcrank.models._schedulers import RESCALING
from overcrank.models.base import Rendering, Variant, VideoShape
from overcrank.options import option
from overcrank.runtime.render.job_loras import JobLora
from overcrank.runtime.render.media import length_of, rate_of, require_sound, size_of_picture
from overcrank.runtime.render.names import check_name, same_name
from overcrank.runtime.render.schedule import scheduled
from overcrank.units import human_bytes
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Format = Literal["mp4", "gif", "png", "sheet", "latents"]
FORMATS: tuple[Format, ...] = ("mp4", "gif", "png", "sheet", "latents")
log = logging.getLogger("overcrank")
PROMPTS = Path(__file__).parents[2] / "calibration" / "data" / "prompts.txt"
FILES = ("image", "last_image", "video", "audio")
LONGEST_SIDE, MOST_FRAMES = 16_384, 100_000
SLOWEST, FASTEST = 0.1, 240.0  # frames a second
LARGEST_TEXT = 64_000_000
"""Bytes of a file of jobs or prompts."""


class RenderRequest(BaseModel):
    """One video. Unset fields take the values of the model's publisher (`completed`); sizes in pixels.

    `output` is the name of the results without a suffix: NAME.mp4, NAME.json and so on. `guidance_until` is the share
    of the steps that are guided; the rest are not, and make one call in place of two. `guidance_2` is that of the
    low-noise expert of a model with two. `sigmas` (falling, from at most 1) or `timesteps` (of 1000) list the steps:
    they are final, no shift is laid over them. A `negative_prompt` of "" is none. `seconds` stands in place
    of `frames`. With `fit` a size that the model cannot make is rounded up, and `crop` (height, width, frames) is what
    is kept: the middle of the picture, the first of the frames. `lora`: files in the place of those that the pipeline
    was loaded with; an empty list is none.
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
    height: int | None = Field(default=None, ge=1, le=LONGEST_SIDE)
    width: int | None = Field(default=None, ge=1, le=LONGEST_SIDE)
    frames: int | None = Field(default=None, ge=1, le=MOST_FRAMES)
    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)
    fit: bool = False
    crop: tuple[int, int, int] | None = None
    fps: float | None = Field(default=None, ge=SLOWEST, le=FASTEST, allow_inf_nan=False)
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    strength: float = Field(default=0.8, ge=0, le=1, allow_inf_nan=False)
    audio: Path | None = None
    lora: tuple[JobLora, ...] | None = None
    formats: tuple[Format, ...] = Field(default=("mp4", "sheet"), min_length=1)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds half of a character, or bytes that are not UTF-8; write it as text in UTF-8")
        return value

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
            what = variant.name + (f" with {option('preset', variant.preset)}" if variant.preset else "")
            raise RequestError(f"{what} cannot do {self.task}: it does {', '.join(variant.tasks)}.")
        rendering = variant.rendering(self.task)
        if self.guidance_until < 1 and not family(variant.family).guides_apart:
            raise RequestError(
                f"guidance_until: {variant.name} computes both sides of guidance in one call, so no call would be "
                f"saved; leave it out."
            )
        paths = self._paths(folder)
        values = self._guided(variant, rendering) | scheduled(self, variant, rendering) | paths
        if self.lora is not None:
            files = [_file_in(folder, lora.file, "lora") for lora in self.lora]
            values["lora"] = tuple(x.model_copy(update={"file": f}) for x, f in zip(self.lora, files, strict=True))
        if self.fps is None:
            values["fps"] = self._rate(variant, rendering, paths)
        timed = self.model_copy(update={"fps": values.get("fps", self.fps)})
        values |= timed._sized(variant, rendering, paths)
        return self.model_copy(update=values | timed._fitted(variant, values))

    def _paths(self, folder: Path | None) -> dict[str, Path]:
        """The files it names, absolute."""
        paths = {}
        for field in FILES:
            path: Path | None = getattr(self, field)
            if path is not None:
                paths[field] = _file_in(folder, path, field)
        if "audio" in paths:
            require_sound(paths["audio"])
        return paths

    def _rate(self, variant: Variant, rendering: Rendering, paths: Mapping[str, Path]) -> float:
        """Frames a second where none are asked for: what is made of a video plays as fast as it."""
        own = float(rendering.fps or variant.fps)
        rate = (rate_of(paths["video"]) if "video" in paths else 0) or own
        if not SLOWEST <= rate <= FASTEST:
            raise RequestError(f"video {paths['video']} has {rate:g} frames a second; give fps, such as {own:g}.")
        return rate

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
        usual = {"height": native.height, "width": native.width, "frames": self._count(variant, native.frames, paths)}
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

    def _count(self, variant: Variant, usual: int, paths: Mapping[str, Path]) -> int:
        """Frames where no number is asked for: of `seconds`, or as long as a short video that is fitted."""
        if self.seconds is not None and self.frames is not None:
            raise RequestError("seconds and frames both say how long the video is; give one of them.")
        if self.seconds is not None:
            step, offset = family(variant.family).grid(variant)["frames"]
            count = max(1, round(self.seconds * present(self.fps, "fps of the request")))
            return count if self.fit else max(offset or step, round((count - offset) / step) * step + offset)
        if self.fit and "video" in paths and not family(variant.family).clip_of(variant, variant.native)[1]:
            return length_of(paths["video"], usual)
        return usual

    def _fitted(self, variant: Variant, values: Mapping[str, object]) -> dict[str, object]:
        """The size that is computed, and of it what is kept; raises ShapeError for one that has to be rounded first."""
        shape = self.model_copy(update=dict(values)).shape
        if not self.fit:
            try:
                check_shape(variant, shape)
            except ShapeError as error:
                fitting = f'With {option("fit", True)}, or "fit": true in a job, it is rounded up and cropped back.'
                raise ShapeError(f"{error} {fitting}") from error
            computed = (shape.height, shape.width, shape.frames)
            if self.crop and any(not 1 <= length <= whole for length, whole in zip(self.crop, computed, strict=True)):
                raise RequestError(f"crop {list(self.crop)}: give height, width and frames within {list(computed)}.")
            return {"seconds": None}
        sizes = {}
        for axis, (step, offset) in family(variant.family).grid(variant).items():
            sizes[axis] = max(offset or step, -(-(getattr(shape, axis) - offset) // step) * step + offset)
        crop = (shape.height, shape.width, shape.frames)
        if "mp4" in self.formats and (shape.height % 2 or shape.width % 2):
            raise ShapeError(f"An MP4 has even sides, and {shape.width}x{shape.height} has not; ask for even ones.")
        whole = all(sizes[axis] == getattr(shape, axis) for axis in sizes)
        return {"seconds": None, "fit": False, **sizes} | ({} if whole else {"crop": crop})

    @property
    def shape(self) -> VideoShape:
        """Of a completed request: what is computed."""
        sizes = {"height": self.height, "width": self.width, "frames": self.frames}
        return VideoShape(**{name: present(value, f"{name} of the request") for name, value in sizes.items()})

    @property
    def kept(self) -> VideoShape:
        """Of a completed request: what is written."""
        return self.shape if self.crop is None else VideoShape(*self.crop)

    def digest(self, model: str, settings: Mapping[str, object] | None = None) -> str:
        """SHA-256 of what decides the frames and files of a completed request, the content of its files included.

        `settings`: what is not usual about the pipeline, such as LoRAs, those of the request among them.
        """
        later = {"seconds", "fit", "lora", *(["crop"] if self.crop is None else [])}  # so that older results are known
        described = self.model_dump(mode="json", exclude={"output", *later}) | {"model": model} | dict(settings or {})
        for field in FILES:
            path: Path | None = getattr(self, field)
            if path is not None:
                with path.open("rb") as stream:
                    described[field] = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _file_in(folder: Path | None, path: Path, field: str) -> Path:
    """The absolute path of a file that a request names, of `folder` if it is relative."""
    file = ((folder or Path()) / user_path(path, field)).absolute()
    if not file.exists():
        raise RequestError(f"{field} {path} does not exist.")
    if not file.is_file():
        raise RequestError(f"{field} {path} is no file.")
    return file


def require_memory(request: RenderRequest) -> None:
    """Raise RequestError if this machine has not the memory for a completed request's frames alone, in fp32."""
    import psutil

    shape, whole = request.shape, int(psutil.virtual_memory().total)
    size = 12 * shape.height * shape.width * shape.frames
    if size > whole:
        raise RequestError(
            f"{shape}: its frames alone are {human_bytes(size)}, and this machine has {human_bytes(whole)} of memory; "
            f"ask for fewer, or smaller ones."
        )


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
    lines = _lines(file, str(file))
    jobs: list[RenderRequest] = []
    wrong: list[str] = []
    outputs: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _job(line, number).completed(variant, file.parent)
        except UserError as error:
            wrong.append(f"line {number}: {error}")
            continue
        first = outputs.setdefault(same_name(job.output), number)
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
    lines = [line.strip() for line in _lines(file or default, option("prompts", str(file))) if line.strip()]
    if not lines:
        raise RequestError(f"{option('prompts', str(file))} is empty; write one prompt a line.")
    return lines


def _lines(file: Path, what: str) -> list[str]:
    """Lines of a text file in UTF-8, or in UTF-16 with a byte order mark, as PowerShell writes it.

    Only line feeds end a line: JSON, and prompts, may hold what Unicode calls a line separator.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise RequestError(f"{what} cannot be read: {error.strerror}.") from error
    if len(content) > LARGEST_TEXT:
        raise RequestError(
            f"{what} has more than {human_bytes(LARGEST_TEXT)}; such a file is no list of jobs or prompts."
        )
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    if "\0" in text:
        raise RequestError(f"{what} has NUL characters, as UTF-16 without its mark has; save it as UTF-8.")
    return [line.removesuffix("\r").removeprefix("\ufeff") for line in text.split("\n")]


def _job(line: str, number: int) -> RenderRequest:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise RequestError(f"no valid JSON: {error}.") from error
    except RecursionError as error:
        raise RequestError("no valid JSON: brackets within brackets, too deep.") from error
    if not isinstance(values, dict):
        raise RequestError('no JSON object; a job looks like {"prompt": "…"}.')
    values.setdefault("output", f"{number:04}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = RenderRequest.model_validate(values)
    except ValidationError as error:
        raise RequestError("; ".join(_reason(e) for e in error.errors()) + ".") from error
    check_name(job.output, "output")
    return job


def _reason(error: Mapping[str, Any]) -> str:
    """One pydantic error as "field: what is wrong"."""
    field = ".".join(map(str, error["loc"])) or "job"
    if error["type"] == "extra_forbidden":
        owner = JobLora if len(error["loc"]) > 1 else RenderRequest
        return f"{field}: no such field; there are {', '.join(owner.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = "" if error["type"] in ("missing", "value_error") else f" (got {shorten(repr(error['input']), 80)})"
    return f"{field}: {message[0].lower()}{message[1:]}{value}"
