"""What keeps a file from being a published network: a tensor that is missing or damaged, or another size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from overcrank.export.files.identify import Identified, networks_by_class
from overcrank.export.files.parts import parts_of
from overcrank.export.files.single_file import difference, shape_of
from overcrank.export.module import construct
from overcrank.models.registry import variant_named

BROKEN = 0.9
"""The share of tensors from which on a file is taken for a network that lacks some, not for one of another size."""


@dataclass(frozen=True)
class Nearest:
    """The published network that has the most of a file's tensors."""

    variant: str
    share: float
    """Of the network's tensors."""
    difference: str
    """What the file lacks of it, and so on, in words."""


def nearest(network: Identified, shapes: Mapping[str, tuple[int, ...]]) -> Nearest:
    """Of the network's class; `shapes`: of the file's tensors."""
    given = {name: shape_of(rows, shapes) for name, rows in network.origins.items()}
    best = Nearest(network.nearest, 0.0, "")
    for variants in networks_by_class()[network.cls]:
        wanted = _wanted(variants[0], network.cls)
        share = sum(given.get(name) == shape for name, shape in wanted.items()) / len(wanted)
        if share > best.share:
            best = Nearest(variants[0], share, difference(wanted, network.origins, shapes))
    return best


def unlike(network: Identified, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A sentence's end on a network that is no published one: what it lacks of the nearest, or that it has other sizes.

    `shapes`: of the file's tensors.
    """
    best = nearest(network, shapes)
    if best.share < BROKEN:
        return f"is a {network.cls} of other sizes than any published one, named as {best.variant}"
    return f"is the {network.part} of {best.variant} but for this: it {best.difference}"


@lru_cache
def _wanted(name: str, cls: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published variant's network."""
    from accelerate import init_empty_weights

    variant = variant_named(name)
    own = (c for c in parts_of(variant).values() if c.cls.rpartition(".")[2] == cls) if variant else iter(())
    component = next(own)
    with init_empty_weights():
        module = construct(component.cls, component.config, name)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
