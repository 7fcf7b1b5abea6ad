"""Parts of a pipeline out of files of their own: those that become engines, and text encoders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from overcrank.engines.refusals import unmultiplied
from overcrank.models.base import Component, Variant
from overcrank.runtime.pipeline.encoders import encoder_of
from overcrank.runtime.pipeline.naming import part_components
from overcrank.runtime.pipeline.weights import PartFile, empty_module, module_of, part_file
from overcrank.runtime.sessions.card import card_of
from overcrank.runtime.sessions.stored_linear import ENGINE_FORMATS
from torch import nn

log = logging.getLogger("overcrank")
_told: set[tuple[Path, str]] = set()


def require_parts(files: Mapping[str, Path], variant: Variant) -> dict[str, PartFile]:
    """The files of the parts that have engines, each compared with what its part needs, by its header alone.

    Raises CheckpointError for a file that is not the part's.
    """
    own = _of_diffusers(variant)
    return {part: part_file(p, own[part], empty_module(own[part], p)) for part, p in files.items() if part in own}


def tell_of_card(parts: Mapping[str, PartFile], device: str) -> None:
    """Warn of files whose layers the card does not multiply, once, before anything is downloaded or built."""
    if not device.startswith("cuda"):
        return
    card = card_of(torch.device(device))
    for own in parts.values():
        for precision in sorted({ENGINE_FORMATS[x.format] for x in own.layers.values() if x.format in ENGINE_FORMATS}):
            why = unmultiplied(card.name, card.target, precision)
            if why and (own.file.path, precision) not in _told:
                _told.add((own.file.path, precision))
                log.warning("%s: %s.", own.file.path.name, why.sentence())


def parts_from_files(
    files: Mapping[str, Path], variant: Variant, folder: Path, dtypes: Mapping[str, torch.dtype]
) -> dict[str, nn.Module]:
    """Part of the pipeline → its module with a file's weights; `folder`: the checkpoint that has the other parts.

    Raises UserError for a part that the checkpoint has not, CheckpointError for a file that is not the part's.
    """
    own = _of_diffusers(variant)
    modules: dict[str, nn.Module] = {}
    for part, path in files.items():
        dtype = dtypes.get(part, dtypes.get("", torch.bfloat16))
        modules[part] = module_of(path, own[part], dtype) if part in own else encoder_of(path, folder, part, dtype)
    return modules


def _of_diffusers(variant: Variant) -> dict[str, Component]:
    """Part → component, of the parts whose class diffusers has; encoders are transformers'."""
    import diffusers

    return {part: c for part, c in part_components(variant).items() if "." in c.cls or hasattr(diffusers, c.cls)}
