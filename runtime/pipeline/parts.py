"""Parts of a pipeline out of files of their own: those that become engines, and text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from overcrank.engines.targets import BY_NAME
from overcrank.errors import CheckpointError
from overcrank.export.files.contents import contents_of
from overcrank.export.files.kinds import LORA
from overcrank.export.files.parts import (
    PartFile,
    engines_of,
    part_file,
    parts_of,
    recipe_of_components,
    recipe_of_layers,
)
from overcrank.models.base import Component, Variant
from overcrank.options import option
from overcrank.runtime.pipeline.encoders import encoder_of
from overcrank.runtime.pipeline.weights import empty_module, module_of
from overcrank.runtime.sessions.card import card_of
from overcrank.runtime.sessions.stored_report import warn_anew
from torch import nn


def require_parts(files: Mapping[str, Path], variant: Variant) -> dict[str, PartFile]:
    """The files of the parts that have engines, each compared with what its part needs, by its header alone.

    Raises CheckpointError for a file that is not the part's.
    """
    own = _of_diffusers(variant)
    for part in files.keys() - own.keys():
        _require_encoder(files[part], part)
    return {part: part_file(p, own[part], empty_module(own[part], p)) for part, p in files.items() if part in own}


def _require_encoder(path: Path, part: str) -> None:
    """What can be said of it before the checkpoint that it belongs to is there."""
    contents = contents_of(path)
    network = next(iter(contents.networks), None)
    if contents.kind == LORA:
        raise CheckpointError(f"{path} is not the {part}: it is a LoRA; give {option('loras', [path])}.")
    if network is not None and not contents.encoder:
        where = option("weights", [f"{network.part}={path}"])
        raise CheckpointError(f"{path} is not the {part}: it is a {network.part} ({network.cls}); give {where}.")


def warn_of_card(parts: Mapping[str, PartFile], variant: Variant, device: str) -> None:
    """Say what the card does not multiply as files have it, and what is done instead."""
    if not device.startswith("cuda"):
        return
    target = card_of(torch.device(device)).target
    recipes = {}
    for part, file in parts.items():
        layers = {name: (layer.format, layer.rotation) for name, layer in file.formats().items()}
        precisions = BY_NAME[target].precisions if target in BY_NAME else None
        for component in engines_of(part, variant):
            if (recipe := recipe_of_layers(layers, component, precisions)) is not None:
                recipes[component.name] = recipe
    if (whole := recipe_of_components(recipes, variant)) is not None:
        warn_anew(whole, target)


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

    return {part: c for part, c in parts_of(variant).items() if "." in c.cls or hasattr(diffusers, c.cls)}
