"""What a bundle is: identity, files, inputs and outputs, as a versioned pydantic schema."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from overcrank.engines.plan import UNKNOWN, PlanCounts
from overcrank.errors import IntegrityError, OutdatedBundle, quoted
from overcrank.export.quantization.recipe import LayerFormat
from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA = 2
LARGEST = 64_000_000
"""Bytes of a manifest; the largest that was built has 2 MB."""
MANIFEST = "manifest.json"


class EngineKey(NamedTuple):
    """Every field that invalidates an engine.

    `graph` digests all a graph is made from (configuration, family and export code, exporter
    versions); the graph file's own SHA-256 stands beside it in the manifest.
    """

    component: str
    graph: str
    recipe: str
    target: str
    profile: str
    flavour: str
    flavour_version: str
    flags: str
    weights: str

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._asdict(), sort_keys=True).encode()).hexdigest()

    def differing(self, other: EngineKey) -> list[str]:
        """Names of the fields in which two keys differ."""
        return [f for f in self._fields if getattr(self, f) != getattr(other, f)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Model):
    name: str
    bytes: int
    sha256: str


class TensorEntry(_Model):
    name: str
    dtype: str
    dims: list[int | str]
    min: list[int] | None = None
    opt: list[int] | None = None
    max: list[int] | None = None


class ParameterEntry(_Model):
    """Graph input ← parameter of the diffusers module; `view` is the shape it is bound with."""

    input: str
    parameter: str
    dtype: str
    shape: list[int]
    view: list[int]


class PackedEntry(_Model):
    """Graph input ← tensor of the weight pack; `role` is its part in the quantized linear layer `layer`."""

    input: str
    layer: str
    role: str
    dtype: str
    shape: list[int]


class ShapeEntry(_Model):
    height: int
    width: int
    frames: int
    batch: int


class ComponentEntry(_Model):
    name: str
    cls: str
    subfolder: str
    attribute: str
    config: dict[str, object]  # the network: as the class sees it, without what no graph reads
    compute: str  # type of its graph: bf16, fp16 or fp32
    key: EngineKey
    engine: File
    graph: File
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    parameters: list[ParameterEntry]
    activation_bytes: int | None
    export_seconds: float
    compile_seconds: float
    plan: PlanCounts | None = None  # None for one that its reader does not know
    lint: str = ""  # the sentence that stands in the place of `plan` in bundles of before
    packed: list[PackedEntry] = []
    formats: dict[str, LayerFormat] = {}

    @property
    def verdict(self) -> str:
        """What the plan does, in one line."""
        return self.lint or (self.plan.verdict() if self.plan else UNKNOWN)


class Manifest(_Model):
    schema_version: Literal[2] = 2
    overcrank: str
    model: str
    like: str  # the published variant that the model is, or follows
    family: str
    hub_id: str
    configs: dict[str, dict[str, object]]
    target: str
    precision: str
    flavour: str
    flavour_version: str
    min: ShapeEntry
    opt: ShapeEntry
    max: ShapeEntry
    weights: str
    versions: dict[str, str]
    created: str
    build_seconds: float
    peak_ram_bytes: int  # of the process tree; 0 on a cluster, where nobody can tell
    components: list[ComponentEntry]
    recipe: File | None = None

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
        _require_schema(bundle, content)
        return Manifest.model_validate_json(content)
    except OSError as error:
        raise IntegrityError(f"{bundle} is not a bundle: {MANIFEST} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = quoted(".".join(map(str, first["loc"]))) or "the file"
        raise IntegrityError(f"{file}: {where}: {first['msg']}; rebuild the bundle.") from error


def _require_schema(bundle: Path, content: bytes) -> None:
    """What cannot be read at all is left to the schema's own complaint."""
    try:
        about = json.loads(content)
        schema = int(about["schema_version"])
        made_by, *words = (quoted(str(about[f])) for f in ("overcrank", "model", "target", "precision"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if schema != SCHEMA:
        model, target, precision = map(shlex.quote, words)
        raise OutdatedBundle(
            f"{bundle.name} was built by overcrank {made_by} in another format of bundles ({schema}; this version "
            f"reads {SCHEMA}); build it again: build-engine --model {model} --gpu {target} --precision {precision}"
        )


def read_small(file: Path) -> bytes:
    """A file of a bundle that is held in memory; raises IntegrityError for one that is too large to be it."""
    if file.stat().st_size > LARGEST:
        raise IntegrityError(f"{file} has {file.stat().st_size:,} bytes, which no bundle's has; get the bundle again.")
    return file.read_bytes()


def file_entry(path: Path) -> File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(name=path.name, bytes=path.stat().st_size, sha256=digest)


def check_files(bundle: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the bundle's files, one sentence each; empty when all match."""
    files = [file for entry in manifest.components for file in (entry.engine, entry.graph)]
    if manifest.recipe is not None:
        files.append(manifest.recipe)
    return [reason for file in files if (reason := _wrong_with(bundle, file))]


def _wrong_with(bundle: Path, file: File) -> str:
    path = bundle / file.name
    if Path(file.name).name != file.name or "\\" in file.name or file.name.startswith("."):
        return f"{quoted(file.name)}: a file name with a path is not allowed"
    if path.is_symlink():
        return f"{quoted(file.name)} is a link, which is not allowed"
    if not path.is_file():
        return f"{quoted(file.name)} is missing"
    if path.stat().st_size != file.bytes:  # before a file of any size is read
        return f"{quoted(file.name)} does not match the manifest (size differs)"
    return "" if file_entry(path) == file else f"{quoted(file.name)} does not match the manifest (SHA-256 differs)"


def profile_line(manifest: Manifest) -> str:
    low, best, high = (f"{s.width}x{s.height}x{s.frames}" for s in (manifest.min, manifest.opt, manifest.max))
    batch = f"batch {manifest.min.batch} … {manifest.max.batch}"
    return f"{best} static, {batch}" if low == high else f"{best} ({low} … {high}), {batch}"
