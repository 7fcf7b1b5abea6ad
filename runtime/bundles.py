"""Which bundle's engine serves a pipeline on a card, and why one does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overcrank.engines.manifest import Manifest, check_files, read_manifest
from overcrank.engines.store import Store
from overcrank.engines.targets import SIXTEEN_BIT, serves
from overcrank.engines.trust import Keyring
from overcrank.errors import IntegrityError, OvercrankError
from overcrank.models import components, variant_from_manifest
from overcrank.models.base import Variant
from overcrank.runtime.session import CannotServe

log = logging.getLogger("overcrank")


def rebuild_command(variant: Variant, card: str) -> str:
    return f"build-engine --model {variant.name} --gpu {card}"


Bundle = tuple[Path, Manifest]


def fitting_bundles(candidates: Sequence[Path], variant: Variant, card: str, precision: str) -> list[Bundle]:
    """Bundles of this network for this card whose weights the pipeline can bind, the newest first, portable ones last.

    Raises CannotServe with the nearest miss: no bundle, other network, other card, another
    precision than the pipeline's weights, weights embedded.
    """
    rebuild = rebuild_command(variant, card)
    known = []
    for path in candidates:
        try:
            known.append((path, read_manifest(path)))
        except IntegrityError:
            continue
    alike = [(p, m) for p, m in known if m.family == variant.family and same_network(variant, m)]
    if not alike:
        others = f"; {len(known)} of other networks" if known else ""
        raise CannotServe(f"there is no engine of {variant.name}{others}", rebuild)
    here = [(p, m) for p, m in alike if serves(m.target, m.precision, card)]
    if not here:
        have = ", ".join(sorted({m.target for _, m in alike}))
        raise CannotServe(f"the engines of {variant.name} are for {have}, this card is {card}", rebuild)
    bindable = [(p, m) for p, m in here if m.weights == "inputs" and m.precision == precision]
    if not bindable:
        have = ", ".join(sorted({f"{m.precision} with weights as {m.weights}" for _, m in here}))
        raise CannotServe(
            f"the engines of {variant.name} for {card} are {have}, and the pipeline's weights are {precision}",
            f"{rebuild} --precision {precision}" if precision in SIXTEEN_BIT else "load the pipeline in bf16 or fp16",
        )
    return sorted(bindable, key=lambda bundle: (bundle[1].target == card, bundle[1].created), reverse=True)


def bundle_of(component: str, bundles: Sequence[Bundle], rebuild: str) -> Bundle:
    """The first bundle that has the component, whose files are what its manifest says, and whose signature holds."""
    damage: list[tuple[str, str]] = []
    for path, manifest in bundles:
        if any(entry.name == component for entry in manifest.components):
            wrong = check_files(path, manifest)
            if wrong:
                damage.append(
                    (f"bundle {path.name} is damaged: {wrong[0]}", f"overcrank engines rm it, then {rebuild}")
                )
                continue
            try:
                Keyring().check(path)
            except IntegrityError as error:
                damage.append((str(error).rstrip("."), f"or {rebuild}"))
                continue
            return path, manifest
    if damage:
        raise CannotServe(*damage[0])
    raise CannotServe(f"no bundle has an engine of {component}", f"{rebuild} --components {component}")


def activation_bytes(store: Store, variant: Variant) -> int:
    """The most that an engine of this network in the store takes for activations; 0 without one."""
    known = [m for _, m in store.list() if isinstance(m, Manifest) and m.family == variant.family]
    entries = [entry for m in known if same_network(variant, m) for entry in m.components]
    return max((entry.activation_bytes or 0 for entry in entries), default=0)


def same_network(variant: Variant, manifest: Manifest) -> bool:
    """Whether a bundle's configurations describe the same networks as the variant's."""
    built = variant_from_manifest(manifest)
    return all(
        _plain(c.config) == _plain(b.config) for c, b in zip(components(variant), components(built), strict=True)
    )


def _plain(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def pull_missing(url: str, variant: Variant, precision: str, store: Store, ring: Keyring) -> None:
    """Fetch this network's bundle for the card here from `url`, unless the store has one that fits.

    `precision`: a quantized one, or "auto" for the card's 16-bit type. What keeps it from being fetched is a
    warning: the render falls back as without it.
    """
    from overcrank.engines.remote import Remote, fitting, pull, read_index
    from overcrank.engines.targets import precision_for, targets_for

    try:
        (card,) = targets_for(["auto"], "tensorrt_rtx")
        wanted = precision_for(card, precision)
        try:
            fitting_bundles([path for path, _ in store.list()], variant, card.name, wanted)
            return
        except CannotServe:
            pass
        remote = Remote(url)
        listed = fitting(read_index(remote, ring, store), variant.name, card.name, wanted)
        log.info("fetching %s from %s", listed.name, url)
        pull(remote, listed, store, ring, lambda name, there, size: None)
    except OvercrankError as error:
        log.warning("--pull %s: %s", url, error)
