"""What keeps a file from being a published network: a tensor that is missing or damaged, or another size."""

from __future__ import annotations

from collections.abc import Mapping

from overcrank.export.files.identify import Identified, networks_by_class
from overcrank.export.files.parts import parts_of
from overcrank.export.files.single_file import difference, shape_of
from overcrank.export.module import construct
from overcrank.models.registry import variant_named

BROKEN = 0.9
"""The share of tensors from which on a file is taken for a network that lacks some, not for one of another size."""


def unlike(network: Identified, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A sentence's end on a network that is no published one: what it lacks of the nearest, or that it has other sizes.

    `shapes`: of the file's tensors.
    """
    given = {name: shape_of(rows, shapes) for name, rows in network.origins.items()}
    best, share, words = network.nearest, 0.0, ""
    for variants in networks_by_class()[network.cls]:
        wanted = _wanted(variants[0], network)
        alike = sum(given.get(name) == shape for name, shape in wanted.items()) / len(wanted)
        if alike > share:
            best, share, words = variants[0], alike, difference(wanted, network.origins, shapes)
    if share < BROKEN:
        return f"is a {network.cls} of other sizes than any published one, named as {best}"
    return f"is the {network.part} of {best} but for this: it {words}"


def _wanted(name: str, network: Identified) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published variant's network."""
    from accelerate import init_empty_weights

    variant = variant_named(name)
    own = (c for c in parts_of(variant).values() if c.cls.rpartition(".")[2] == network.cls) if variant else iter(())
    component = next(own)
    with init_empty_weights():
        module = construct(component.cls, component.config, name)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
