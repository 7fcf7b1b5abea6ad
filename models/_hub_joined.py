"""A diffusers folder made of links into the parts of several repositories."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError, StoreError
from overcrank.models._hub_files import INDEX
from overcrank.models.base import Repository, Variant
from overcrank.models.registry import family
from overcrank.options import option

FORM = 2  # of what is written here; raise it when that changes


def joined(variant: Variant, snapshots: Mapping[Path, tuple[Repository, tuple[str, ...]]], home: Path) -> Path:
    """The folder under `home`; `snapshots` maps a repository's folder to it and the parts taken from it."""
    sources = [(str(folder), list(parts)) for folder, (_, parts) in snapshots.items()]
    digest = hashlib.sha256(json.dumps([FORM, variant.name, sources]).encode()).hexdigest()[:16]
    checkpoint = home / "checkpoints" / f"{variant.name}-{digest}"
    if (checkpoint / INDEX).is_file():
        return checkpoint
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}-", dir=checkpoint.parent))
        try:
            _write(work, variant, snapshots)
            if not checkpoint.exists():
                os.replace(work, checkpoint)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if (checkpoint / INDEX).is_file():  # another process was first
            return checkpoint
        raise StoreError(f"{checkpoint} cannot be written: {error.strerror}; see to that folder.") from error
    return checkpoint


def _write(work: Path, variant: Variant, snapshots: Mapping[Path, tuple[Repository, tuple[str, ...]]]) -> None:
    entries: dict[str, Any] = {}
    for folder, (source, parts) in snapshots.items():
        for part in parts:
            (work / part).symlink_to(folder if part == source.top else folder / part, target_is_directory=True)
        if (folder / INDEX).is_file():
            entries |= {k: v for k, v in _json(folder / INDEX).items() if k in parts}
    family(variant.family).join(work)
    index: dict[str, Any] = {"_class_name": variant.rendering().pipeline}
    networks = _networks(variant)  # a part's own file may name its author's class, and `join` makes another of one
    for part in sorted(os.listdir(work)):
        index[part] = networks.get(part) or entries.get(part) or _class_of(work / part, _PLACES)
    for part, entry in index.items():
        if entry is None:
            raise ModelError(
                f"{variant.name}: {work / part} does not say of which class '{part}' is; put the parts together with "
                f"diffusers, save the pipeline (save_pretrained), and give the folder as {option('model')}."
            )
    (work / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


_PLACES = (
    ("config.json", "_class_name", "diffusers"),
    ("config.json", "architectures", "transformers"),
    ("scheduler_config.json", "_class_name", "diffusers"),
    ("preprocessor_config.json", "image_processor_type", "transformers"),
    ("preprocessor_config.json", "feature_extractor_type", "transformers"),
    ("tokenizer_config.json", "tokenizer_class", "transformers"),
)


def _networks(variant: Variant) -> dict[str, list[str]]:
    """[library, class] of the parts that become engines."""
    every = family(variant.family).components(variant)
    return {c.subfolder: [c.cls.rpartition(".")[0] or "diffusers", c.cls.rpartition(".")[2]] for c in every}


def _class_of(folder: Path, places: Iterable[tuple[str, str, str]]) -> list[str] | None:
    """[library, class] of a part, as its own files tell it."""
    for file, key, library in places:
        told = _json(folder / file).get(key) if (folder / file).is_file() else None
        if told:
            return [library, told[0] if isinstance(told, list) else str(told)]
    return None


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text("utf-8-sig"))
    return content
