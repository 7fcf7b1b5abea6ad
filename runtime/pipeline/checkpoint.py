"""Which checkpoint a recipe was calibrated on, told by its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from overcrank.engines.store import Store
from overcrank.errors import UserError
from overcrank.export.quantization.recipe import Recipe
from overcrank.export.weights import weight_files, weights_digest
from overcrank.files import atomic_write
from overcrank.models import components
from overcrank.models.base import Component, Variant


def checkpoint_digest(folder: Path, parts: Iterable[Component], store: Store) -> str:
    """SHA-256 of these components' weight files, kept in the store as long as they do not change."""
    folders = [folder / name for c in parts for name in (c.subfolder, *c.also_serves) if (folder / name).is_dir()]
    files = list(dict.fromkeys(file for each in folders for file in weight_files(each)))
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    known = store.root / "digests" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    if not known.is_file():
        store.prepare()
        known.parent.mkdir(exist_ok=True)
        with atomic_write(known) as part:
            part.write_text(weights_digest(files), "utf-8")
    return known.read_text("utf-8")


def require_calibrated_on(folder: Path, recipe: Recipe | None, variant: Variant, store: Store) -> None:
    """Raise UserError when `recipe` has ranges of another checkpoint; one that names none fits any."""
    about = recipe.calibration if recipe is not None else None
    if recipe is None or about is None or not about.checkpoint:
        return
    parts = [c for c in components(variant) if c.name in recipe.components]
    found = checkpoint_digest(folder, parts, store)
    if found != about.checkpoint:
        raise UserError(
            f"the recipe was calibrated on another checkpoint: calibration.checkpoint is {about.checkpoint[:16]}…, "
            f"{folder} is {found[:16]}…; calibrate this one, or empty that field to use its ranges here."
        )
