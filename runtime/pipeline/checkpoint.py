"""Is a checkpoint whole, before it is read, and is it the one that a recipe was calibrated on?"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.store import Store
from overcrank.errors import CheckpointError, ModelError, UserError
from overcrank.export.expected import require_part
from overcrank.export.files.weight_file import open_weights
from overcrank.export.headers import Entry, tensors_in, twin_of, weight_files, weights_digest
from overcrank.export.quantization.recipe import Recipe
from overcrank.export.weights import TORCH
from overcrank.files import atomic_write
from overcrank.models import components
from overcrank.models._hub_files import INDEX, OPTIONAL, part_files, parts_in
from overcrank.models.base import Component, Config, Variant
from overcrank.models.hub import read_json

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint_digest(
    folder: Path, parts: Iterable[Component], store: Store, given: Mapping[str, Path] | None = None
) -> str:
    """SHA-256 of these components' weight files, kept in the store as long as they do not change.

    `given`: part → the file that takes the place of its own.
    """
    given = given or {}
    names = dict.fromkeys(name for c in parts for name in (c.subfolder, *c.also_serves))
    own = [folder / name for name in names if name not in given and (folder / name).is_dir()]
    files = [file for each in own for file in weight_files(each)]
    return files_digest([*files, *(file for path in given.values() for file in open_weights(path).files)], store)


def files_digest(files: Iterable[Path], store: Store) -> str:
    """SHA-256 of files in order, kept in the store as long as they do not change."""
    files = list(dict.fromkeys(files))
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    record = store.root / "digests" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    if not record.is_file():
        store.prepare()
        record.parent.mkdir(exist_ok=True)
        with atomic_write(record) as part:
            part.write_text(weights_digest(files), "utf-8")
    return record.read_text("utf-8")


def require_calibrated_on(
    folder: Path, recipe: Recipe | None, variant: Variant, store: Store, given: Mapping[str, Path] | None = None
) -> None:
    """Raise UserError when `recipe` has ranges of another checkpoint; one that names none fits any.

    `given`: as for `checkpoint_digest`.
    """
    about = recipe.calibration if recipe is not None else None
    if recipe is None or about is None or not about.checkpoint:
        return
    parts = [c for c in components(variant) if c.name in recipe.components]
    names = {name for c in parts for name in (c.subfolder, *c.also_serves)}
    own = {part: file for part, file in (given or {}).items() if part in names}
    digest = checkpoint_digest(folder, parts, store, own)
    if digest != about.checkpoint:
        raise UserError(
            f"the recipe was calibrated on another checkpoint: calibration.checkpoint is {about.checkpoint[:16]}…, "
            f"{folder} is {digest[:16]}…; calibrate this one, or empty that field to use its ranges here."
        )


def file_variant(folder: Path, variant: Variant) -> str:
    """The kind of weight files to read ("fp16"): that of the model's repository, where such files are there.

    Else that of a part of which no plain files are there; else "". Raises ModelError for a link that leads nowhere.
    """
    kinds = [source.files for source in variant.sources if source.files]
    published = next((kind for kind in kinds if any(folder.glob(f"*/*.{kind}.*"))), "")
    return published or next(filter(None, (twin_of(_names(part)) for part in sorted(folder.glob("*")))), "")


def require_whole(folder: Path, pipeline: type, kind: str, given: Collection[str] = ()) -> None:
    """Look at every part that a pipeline takes of this checkpoint: its files, and the headers of its weights.

    `kind`: see `file_variant`; `given`: parts that come from elsewhere. Raises ModelError for a part that is missing or
    not whole, CheckpointError for weights that are not what its module needs.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{folder / INDEX} has no _class_name, the pipeline's class; download it again.")
    optional = getattr(pipeline, "_optional_components", ())
    for part, parameter in inspect.signature(pipeline).parameters.items():
        if part in given:
            continue
        absent = part not in parts_in(index)
        if absent and (parameter.default is not inspect.Parameter.empty or part in optional):
            continue
        if absent:
            raise ModelError(f"{folder / INDEX} names no {part}, and {pipeline.__name__} needs one; it is not whole.")
        if part not in OPTIONAL or (folder / part).is_dir():
            _require_part(folder, part, str(index[part][0]), str(index[part][1]), kind)


def broken_weight(pipe: Any) -> str:
    """The first parameter of a pipeline's parts that holds NaN or infinities, as "part's NAME"; "" for none."""
    import torch

    for part, module in pipe.components.items():
        for name, value in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            if value.is_floating_point() and not value.is_meta and not bool(value.isfinite().all()):
                return f"{part}'s {name}"
    return ""


def _names(folder: Path) -> list[str]:
    """Of the files in a folder; raises ModelError for a link to what is not there."""
    files = sorted(folder.glob("*"))
    for file in files:
        if file.is_symlink() and not file.exists():
            raise ModelError(f"{file} is a link to {file.readlink()}, which is not there; download that file again.")
    return [file.name for file in files if file.is_file()]


def _require_part(folder: Path, part: str, library: str, cls: str, kind: str) -> None:
    names = [f"{part}/{name}" for name in _names(folder / part)]
    chosen = part_files(str(folder), names, part, part, kind, lambda name: read_json(folder / name))
    files = [folder / name for name in chosen if name.endswith((".safetensors", ".bin"))]
    if not files:
        return
    config = read_json(folder / part / "config.json")
    if not _quantized_by(folder / part / "config.json", library, config):
        require_part(folder / part, library, cls, config, _tensors_in(files))


def _quantized_by(file: Path, library: str, config: Config) -> bool:
    """Whether its library itself reads a part's quantized weights; raises ModelError for a kind that it does not."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_DIFFUSERS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_TRANSFORMERS

    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    kinds = set(OF_TRANSFORMERS if library == "transformers" else OF_DIFFUSERS) - {"gguf"}  # of single files
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if not any(kind == method or kind.startswith(f"{method}_") for kind in kinds):  # bitsandbytes_4bit
        raise ModelError(
            f"{file}: its quantization_config is of the kind {method!r}, which {library} does not read from a folder; "
            f"take the checkpoint in bf16 or fp16, and let engines quantize it."
        )
    return True


def _tensors_in(files: Iterable[Path]) -> dict[str, Entry]:
    """Of safetensors files, or of PyTorch's own; raises CheckpointError for one that is not whole."""
    import torch

    pickled: dict[str, Entry] = {}
    safe = []
    for file in files:
        if file.suffix == ".safetensors":
            safe.append(file)
            continue
        try:
            content = torch.load(file, map_location="meta", weights_only=True)
            pickled |= {name: Entry(file, _type(t), tuple(t.shape)) for name, t in content.items()}
        except Exception as error:
            raise CheckpointError(f"{file} cannot be read as PyTorch weights ({_first_line(error)}).") from error
    return pickled | tensors_in(safe)


def _type(tensor: Tensor) -> str:
    """safetensors' name of a parameter's type; torch's own of another."""
    own = str(tensor.dtype).removeprefix("torch.")
    return next((name for name, dtype in TORCH.items() if dtype == own), own)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
