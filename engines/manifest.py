"""What a bundle is: identity, files, inputs and outputs, as a versioned pydantic schema."""

from __future__ import annotations

import hashlib
import json
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from overcrank.engines.plan import UNKNOWN, PlanCounts
from overcrank.errors import CONTROLS, IntegrityError, OutdatedBundle, UserError, safe_text
from overcrank.export.quantization.lora import LORA_A
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.models import families
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

SCHEMA = 2
LARGEST = 64_000_000
"""Bytes of a manifest; the largest that was built has 2 MB."""
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
PULLED = "pulled.json"
"""In a bundle that came from elsewhere, and so must be signed."""
DEEPEST = 16
"""Levels of a network's configuration; those of diffusers have up to 4."""

# ── what a manifest may hold: all of it was written by others ────────────────────────


def _printable(text: str) -> str:
    if CONTROLS.search(text):
        raise ValueError("it holds control characters")
    return text


Label = Annotated[str, StringConstraints(max_length=255), AfterValidator(_printable)]
Text = Annotated[str, StringConstraints(max_length=20_000), AfterValidator(_printable)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,200}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Dim = Annotated[int, Field(ge=0, le=2**40)]
Dims = Annotated[list[Dim], Field(max_length=16)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


def require_label(name: str) -> None:
    """Raise UserError for a model's name that no manifest may have, before anything is built for it."""
    if len(name) > 255 or CONTROLS.search(name):
        raise UserError(
            f"the model's name '{safe_text(name)[:80]}' is too long or holds control characters; rename its folder."
        )


def _bounded(config: dict[str, object]) -> dict[str, object]:
    """JSON of any form, but not of any depth or size; raises ValueError."""
    level: list[object] = [config]
    for _ in range(DEEPEST):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and (len(value) > 20_000 or CONTROLS.search(value)):
                raise ValueError("a text is too long, or holds control characters")
            elif isinstance(value, int | float) and not -(2**63) <= value <= 2**63:  # and what is no number
                raise ValueError("a number is out of bounds")
        level = below
    if level:
        raise ValueError("it is nested too deeply")
    return config


def _counted(plan: PlanCounts) -> PlanCounts:
    """What plan.py counts itself is within bounds; here it is what others wrote."""
    _bounded(vars(plan))
    numbers = [n for value in vars(plan).values() for n in (value.values() if isinstance(value, dict) else [value])]
    if min(numbers) < 0:
        raise ValueError("a count is below zero")
    return plan


Config = Annotated[dict[str, object], AfterValidator(_bounded)]
Plan = Annotated[PlanCounts, AfterValidator(_counted)]


class EngineKey(NamedTuple):
    """Every field that invalidates an engine.

    `graph` digests all a graph is made from (configuration, family and export code, exporter
    versions); the graph file's own SHA-256 stands beside it in the manifest.
    """

    component: Label
    graph: Label
    recipe: Label
    target: Label
    profile: Text
    flavour: Label
    flavour_version: Label
    flags: Label
    weights: Label
    lora: Label = ""  # rank, and of which layers; of engines without, not in the digest, which is as it was

    def digest(self) -> str:
        fields = {name: value for name, value in self._asdict().items() if value or name != "lora"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def differing(self, other: EngineKey) -> list[str]:
        """Names of the fields in which two keys differ."""
        return [f for f in self._fields if getattr(self, f) != getattr(other, f)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(_Model):
    name: FileName
    bytes: Count
    sha256: Digest


class TensorEntry(_Model):
    name: Label
    dtype: Label
    dims: Annotated[list[Dim | Label], Field(max_length=16)]
    min: Dims | None = None
    opt: Dims | None = None
    max: Dims | None = None


class ParameterEntry(_Model):
    """Graph input ← parameter of the diffusers module; `view` is the shape it is bound with."""

    input: Label
    parameter: Label
    dtype: Label
    shape: Dims
    view: Dims


class PackedEntry(_Model):
    """Graph input ← tensor of the weight pack or of a LoRA; `role` is its part in the linear layer `layer`."""

    input: Label
    layer: Label
    role: Label
    dtype: Label
    shape: Dims


class ShapeEntry(_Model):
    height: Annotated[int, Field(ge=1, le=2**20)]
    width: Annotated[int, Field(ge=1, le=2**20)]
    frames: Annotated[int, Field(ge=1, le=2**20)]
    batch: Annotated[int, Field(ge=1, le=2**10)]


class ComponentEntry(_Model):
    name: Label
    cls: Label
    subfolder: Label
    attribute: Label
    config: Config  # the network: as the class sees it, without what no graph reads
    compute: Label  # type of its graph: bf16, fp16 or fp32
    key: EngineKey
    engine: File
    graph: File
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    parameters: list[ParameterEntry]
    activation_bytes: Count | None
    export_seconds: Seconds
    compile_seconds: Seconds
    plan: Plan | None = None  # None for one that its reader does not know
    lint: Text = ""  # the sentence that stands in the place of `plan` in bundles of before
    packed: list[PackedEntry] = []
    formats: dict[Label, LayerFormat] = {}
    loras: list[PackedEntry] = []

    @property
    def lora_layers(self) -> dict[str, int]:
        """Layer that takes a LoRA beside its weight → the rank it takes."""
        return {entry.layer: entry.shape[1] for entry in self.loras if entry.role == LORA_A}

    @property
    def lora_rank(self) -> int:
        return max(self.lora_layers.values(), default=0)

    @property
    def verdict(self) -> str:
        """What the plan does, in one line."""
        return self.lint or (self.plan.verdict() if self.plan else UNKNOWN)


class Manifest(_Model):
    schema_version: Literal[2] = 2
    overcrank: Label
    model: Label
    like: Label  # the published variant that the model is, or follows
    family: Label
    hub_id: Label
    configs: dict[Label, Config]
    target: Label
    precision: Label
    flavour: Label
    flavour_version: Label
    min: ShapeEntry
    opt: ShapeEntry
    max: ShapeEntry
    weights: Label
    versions: dict[Label, Label]
    created: Label
    build_seconds: Seconds
    peak_ram_bytes: Count  # of the process tree; 0 on a cluster, where nobody can tell
    components: Annotated[list[ComponentEntry], Field(max_length=64)]
    recipe: File | None = None

    @model_validator(mode="after")
    def _names_each_file_once(self) -> Self:
        names = [file.name for file in self.files()]
        if len(set(names)) != len(names) or not {MANIFEST, SIGNATURE, PULLED}.isdisjoint(names):
            raise ValueError("a file is named twice, or by a name that is another file's")
        if len({entry.name for entry in self.components}) != len(self.components):
            raise ValueError("a component is there twice")
        return self

    def files(self) -> list[File]:
        """All that the manifest vouches for."""
        files = [file for entry in self.components for file in (entry.engine, entry.graph)]
        return files + ([self.recipe] if self.recipe is not None else [])

    def component(self, name: str) -> ComponentEntry:
        for entry in self.components:
            if entry.name == name:
                return entry
        raise IntegrityError(f"the bundle has no component '{name}'")


@dataclass(frozen=True)
class BundledEngine:
    """One component's engine in the bundle at `folder`."""

    folder: Path
    manifest: Manifest
    entry: ComponentEntry

    @property
    def plan(self) -> Path:
        return self.folder / self.entry.engine.name

    @property
    def graph(self) -> Path:
        return self.folder / self.entry.graph.name


def read_manifest(bundle: Path) -> Manifest:
    """The bundle's manifest; raises IntegrityError naming file and field when it is not one.

    Raises OutdatedBundle, which is one, for a bundle of another schema version.
    """
    file = bundle / MANIFEST
    try:
        content = read_small(file)
    except OSError as error:
        raise IntegrityError(f"{bundle} is not a bundle: {MANIFEST} cannot be read ({error.strerror}).") from error
    return manifest_of(content, bundle.name, str(file))


def manifest_of(content: bytes, bundle: str, file: str) -> Manifest:
    """As `read_manifest`, of what was read; `bundle` and `file` name it in errors."""
    _require_schema(bundle, content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise IntegrityError(f"{file}: {first_of(error)}; rebuild the bundle.") from error
    if manifest.family not in families():
        raise IntegrityError(f"{file}: family: this version of overcrank knows none called '{manifest.family}'.")
    return manifest


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong, with its place, on one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:120] or "the file"
    return f"{where}: {first['msg'][:300]}"


class _About(BaseModel):
    """What manifests of every schema have."""

    schema_version: Annotated[int, Field(ge=0, le=2**31)]
    overcrank: Label
    model: Label
    target: Label
    precision: Label


def _require_schema(bundle: str, content: bytes) -> None:
    """What cannot be read at all is left to the schema's own complaint."""
    try:
        about = _About.model_validate_json(content)
    except ValidationError:
        return
    if about.schema_version != SCHEMA:
        model, target, precision = map(shlex.quote, (about.model, about.target, about.precision))
        raise OutdatedBundle(
            f"{bundle} was built by overcrank {about.overcrank} in another format of bundles ({about.schema_version}; "
            f"this version reads {SCHEMA}); build it again: build-engine --model {model} --gpu {target} "
            f"--precision {precision}"
        )


def read_small(file: Path, largest: int = LARGEST) -> bytes:
    """A plain file of a bundle that is held in memory.

    Raises IntegrityError for a link, what is no file, and one that is too large to be it; OSError.
    """
    about = file.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise IntegrityError(f"{file} is a link or no file, which is not allowed; get the bundle again.")
    if about.st_size > largest:
        raise IntegrityError(f"{file} has {about.st_size:,} bytes, which no bundle's has; get the bundle again.")
    with file.open("rb") as stream:
        return stream.read(largest)


def file_entry(path: Path) -> File:
    """A file on this disk, whatever its name: rules are for names that others wrote."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File.model_construct(name=path.name, bytes=path.stat().st_size, sha256=digest)


def check_files(bundle: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the bundle's files, one sentence each; empty when all match."""
    return [reason for file in manifest.files() if (reason := _wrong_with(bundle, file))]


def _wrong_with(bundle: Path, file: File) -> str:
    path = bundle / file.name
    if path.is_symlink():
        return f"{file.name} is a link, which is not allowed"
    if not path.is_file():
        return f"{file.name} is missing"
    if path.stat().st_size != file.bytes:  # before a file of any size is read
        return f"{file.name} does not match the manifest (size differs)"
    try:
        entry = file_entry(path)
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return "" if entry == file else f"{file.name} does not match the manifest (SHA-256 differs)"


def profile_line(manifest: Manifest) -> str:
    low, best, high = (f"{s.width}x{s.height}x{s.frames}" for s in (manifest.min, manifest.opt, manifest.max))
    batch = f"batch {manifest.min.batch} … {manifest.max.batch}"
    return f"{best} static, {batch}" if low == high else f"{best} ({low} … {high}), {batch}"
