"""Names of layers as publishers and trainers write them, in a module of a diffusers class.

diffusers renames, splits and reorders whole checkpoints; the same functions are called on one layer's rows
(export/files/single_file.py), so a LoRA of a fused qkv layer falls apart as the layer does. kohya's names have
underscores for dots: of the ways to read them back, the one is taken that diffusers has a layer for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError
from overcrank.export.files.single_file import origins

if TYPE_CHECKING:
    from torch import nn

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
MOST_DOTS = 7
"""Underscores of one name that may stand for dots."""
Runs = tuple[tuple[int, int], ...]
"""Rows `start` … `stop` - 1 of what the file has, in the order in which the layer has them."""


class LayerNames:
    """Of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._cls = type(module)
        self._layers = {name for name, own in module.named_modules() if getattr(own, "weight", None) is not None}
        self._dotted: dict[str, str] = {}  # a flat name without its numbers → the dotted one

    def find(self, raw: str, rows: int) -> Mapping[str, Runs]:
        """Layer of the module → the rows of a file's layer `raw` that it has; empty for none."""
        name = self.bare(raw)
        if (own := name if name in self._layers else self._flat.get(name)) is not None:
            return {own: ((0, rows),)}
        return self._renamed(name, rows) or self._unflattened(name, rows)

    @cached_property
    def _flat(self) -> dict[str, str]:
        return {name.replace(".", "_"): name for name in self._layers}

    @staticmethod
    def bare(raw: str) -> str:
        """Without what says which part of the pipeline it is of."""
        prefix = next((prefix for prefix in PREFIXES if raw.startswith(prefix)), None)
        return raw if prefix is None else LayerNames.bare(raw.removeprefix(prefix))

    def _renamed(self, name: str, rows: int) -> dict[str, Runs]:
        weight = f"{name}.weight"
        try:
            found = origins(self._cls, {weight: (rows, 1)}, (), "transformer")
        except CheckpointError:
            return {}
        layers = {own.removesuffix(".weight"): tuple((r.start, r.stop) for r in runs) for own, runs in found.items()}
        return layers if layers.keys() <= self._layers else {}

    def _unflattened(self, name: str, rows: int) -> dict[str, Runs]:
        """Of a name with underscores for dots."""
        if "." in name or "#" in name:
            return {}
        numbers = re.findall(r"(?<=_)\d+(?=_|$)", name)
        flat = re.sub(r"(?<=_)\d+(?=_|$)", "#", name)
        known = self._dotted.get(flat)
        for form in [known] if known is not None else _dotted(flat):
            whole = "".join(a + b for a, b in zip(form.split("#"), (*numbers, ""), strict=True))
            if layers := self._renamed(whole, rows):
                self._dotted[flat] = form
                return layers
        return {}


def _dotted(flat: str) -> Iterator[str]:
    """Ways to read "blocks_#_self_attn_q": a number stands between dots, and other underscores are either."""
    plain = re.sub(r"_?#_?", lambda m: m[0].replace("_", "."), flat)
    words = plain.split("_")
    if len(words) - 1 <= MOST_DOTS:
        for joints in product("_.", repeat=len(words) - 1):
            yield "".join(a + b for a, b in zip(words, (*joints, ""), strict=True))


# ── parameters ───────────────────────────────────────────────────────────────────────


def known(parameter: str, part: str, parts: Mapping[str, nn.Module]) -> str:
    """The module's name of a parameter that may go by its publisher's; as it is if it is neither."""
    if part not in parts or _parameter(parts[part], parameter) is not None:
        return parameter
    renamed = _renamed(type(parts[part]).__name__, parameter)
    bare = renamed.removesuffix(".weight")  # of a parameter that belongs to no layer
    return bare if _parameter(parts[part], bare) is not None else renamed


def _renamed(cls: str, parameter: str) -> str:
    """What diffusers calls it when it reads a publisher's single file of that class."""
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert = SINGLE_FILE_LOADABLE_CLASSES.get(cls, {}).get("checkpoint_mapping_fn")
    if convert is None:
        return parameter
    try:
        names = list(convert(checkpoint={parameter: torch.empty(0)}, config={}))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError):
        return parameter  # it wants the whole file, or knows no such name
    return str(names[0]) if len(names) == 1 else parameter


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    try:
        parameter: nn.Parameter = module.get_parameter(name)
    except AttributeError:
        return None
    return parameter


def shape_in(parts: Mapping[str, nn.Module], part: str, name: str) -> tuple[int, ...] | None:
    """Of a parameter; of a quantized layer's weight, as it multiplies. None for one that is not there."""
    parameter = _parameter(parts[part], name) if part in parts else None
    if parameter is None:
        return None
    from overcrank.runtime.sessions.stored_linear import StoredLinear

    owner = parts[part].get_submodule(name.rpartition(".")[0])
    if isinstance(owner, StoredLinear) and name.endswith(".weight"):
        return owner.out_features, owner.in_features
    return tuple(parameter.shape)
