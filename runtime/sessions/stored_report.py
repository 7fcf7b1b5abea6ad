"""One line on how an engine multiplies the layers of a quantized file, and what that costs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

from overcrank.export.files.parts import anew_line
from overcrank.export.quantization.formats import NUMBERS
from overcrank.export.quantization.packing import packed_layer, unpacked_fp4
from overcrank.export.quantization.recipe import LayerFormat, Recipe
from overcrank.export.quantization.rotation import rotated
from overcrank.runtime.sessions.stored_linear import StoredLinear

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("overcrank")
_told: set[str] = set()
SAMPLED = 4
"""Layers of a kind in which the error is measured."""


def report_stored(part: str, module: nn.Module, formats: Mapping[str, LayerFormat], compute: str) -> None:
    """Tell how the layers that a file quantizes are multiplied; a warning where not as the file has them.

    `formats`: the graph's quantized layers. `compute`: torch's name of the type of their factors.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    counts: Counter[str] = Counter()
    stored = {name: own for name, own in module.named_modules() if isinstance(own, StoredLinear)}
    for name, own in stored.items():
        form = formats.get(name)
        if form is not None and own.is_bound_to(form):
            counts[own.format] += 1
        else:
            kinds.setdefault((own.format, form.format if form else "16 bit"), []).append(name)
    parts = [f"{count} in {form} as they are" for form, count in counts.items()]
    for (own_format, other), names in kinds.items():
        cost = ""
        if other != "16 bit":
            errors = [requantization_error(stored[n], formats[n], compute) for n in islice(names, SAMPLED)]
            cost = f", which costs {100 * sum(errors) / len(errors):.1f} % of their size"
        parts.append(f"{len(names)} in {own_format} {'quantized anew as' if cost else 'widened to'} {other}{cost}")
    if parts:
        say = log.warning if kinds else log.info
        say("%s: layers of %s are multiplied: %s.", part, next(iter(stored.values())).file.name, "; ".join(parts))


def warn_anew(recipe: Recipe, target: str) -> None:
    """Say once which layers of files the card does not multiply as they are stored, and what is done instead."""
    line = anew_line(recipe, target)
    if line and line not in _told:
        _told.add(line)
        log.warning("%s", line)


def requantization_error(layer: StoredLinear, form: LayerFormat, compute: str) -> float:
    """‖W' − W‖ / ‖W‖ (Frobenius) of a layer's weight W as the file has it, and W' as `form` packs it."""
    weight = layer.values()
    number = NUMBERS[form.format]
    packed = packed_layer(str(layer.file), weight, form._replace(activations="dynamic"), None, compute)
    if form.format == "nvfp4":
        values = unpacked_fp4(packed["weight"], packed["block_scale"])[0]
    else:
        values = packed["weight"].float()[0]
    turned = rotated(weight, form.rotation) if form.rotation else weight
    again = values * (number.step * number.reach) * packed["behind"][0, 0].float()[:, None]
    return float((again - turned).norm() / weight.norm().clamp_min(1e-30))
