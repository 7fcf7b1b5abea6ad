"""Which bundle's engine serves a pipeline on a card, and why one does not."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.engines.manifest import (
    BundledEngine,
    ComponentEntry,
    Manifest,
    ShapeEntry,
    check_files,
    read_manifest,
)
from overcrank.engines.module_refusals import LoraUnfit, lora_unfit
from overcrank.engines.refusals import (
    BUILD,
    CannotServe,
    Damaged,
    NoComponent,
    NoEngine,
    OtherCard,
    OtherPrecision,
    OtherType,
    Refusal,
    Untrusted,
)
from overcrank.engines.store import Store
from overcrank.engines.targets import serves
from overcrank.engines.trust import Keyring
from overcrank.errors import IntegrityError, OutdatedBundle, OvercrankError, UserError
from overcrank.export.quantization.recipe import QUANTIZED
from overcrank.models import family
from overcrank.models.base import Component, Variant
from overcrank.models.network import differences, network
from overcrank.options import option

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("overcrank")


def build_command(variant: Variant, card: str, layout: Sequence[str] = ()) -> str:
    """That builds the engines of a variant for a card, for layers as files PART=FILE have them."""
    words = (f" --layout {shlex.quote(word)}" for word in layout)
    return f"{BUILD} --model {shlex.quote(variant.where)} --gpu {card}{''.join(words)}"


Bundle = tuple[Path, Manifest]


def fitting_bundles(candidates: Sequence[Path], variant: Variant, card: str, precision: str) -> list[Bundle]:
    """Bundles with a network of this variant's, for this card, whose weights the pipeline can bind.

    The newest come first, portable ones last. Raises CannotServe with the nearest miss: no bundle, other networks and
    the field they differ in, other card, another precision than the pipeline's weights, weights embedded.
    """
    bundles, outdated = _read(candidates)
    own = family(variant.family).components(variant)
    alike = [(p, m) for p, m in bundles if m.family == variant.family and any(_entry(c, m) for c in own)]
    if not alike:
        near = _nearest_miss(own, [m for _, m in bundles if m.family == variant.family])
        raise CannotServe(NoEngine(variant.name, (*near, *map(str, outdated[:1]))))
    here = [(p, m) for p, m in alike if serves(m.target, m.precision, card)]
    if not here:
        raise CannotServe(OtherCard(variant.name, tuple(sorted({m.target for _, m in alike})), card))
    bindable = [(p, m) for p, m in here if m.weights == "inputs" and m.precision == precision]
    if not bindable:
        have = tuple(sorted({f"{m.precision} with weights as {m.weights}" for _, m in here}))
        raise CannotServe(OtherPrecision(variant.name, card, have, precision))
    return sorted(bindable, key=lambda bundle: (bundle[1].target == card, bundle[1].created), reverse=True)


def bundles_with_graphs(candidates: Sequence[Path], variant: Variant) -> list[Bundle]:
    """Bundles with a graph of this variant's networks that any processor runs, whatever card they are for.

    Their weights are inputs, no layer is quantized. Those in fp32 come first, then the newest.
    """
    own = family(variant.family).components(variant)
    bundles = [
        (path, manifest)
        for path, manifest in _read(candidates)[0]
        if manifest.family == variant.family
        and manifest.weights == "inputs"
        and manifest.precision not in QUANTIZED
        and any(_entry(component, manifest) for component in own)
    ]
    return sorted(bundles, key=lambda bundle: (bundle[1].precision == "fp32", bundle[1].created), reverse=True)


def _read(candidates: Sequence[Path]) -> tuple[list[Bundle], list[OutdatedBundle]]:
    bundles: list[Bundle] = []
    outdated = []
    for path in candidates:
        try:
            bundles.append((path, read_manifest(path)))
        except OutdatedBundle as error:
            outdated.append(error)
        except IntegrityError as error:
            log.warning("a bundle is left out: %s", error)
    return bundles, outdated


def _entry(component: Component, manifest: Manifest) -> ComponentEntry | None:
    """The bundle's engine of this very network, if it has one."""
    return next((e for e in manifest.components if _is_of(e, component)), None)


def _is_of(entry: ComponentEntry, component: Component) -> bool:
    return (entry.name, entry.cls) == (component.name, component.cls) and entry.config == network(component)


def _nearest_miss(own: Sequence[Component], others: Sequence[Manifest]) -> tuple[str, ...]:
    """In what the most similar engine of the same class differs, if there is one."""
    misses = [
        (len(fields), f"the {c.name} of {m.model} differs in {fields[0]}")
        for c in own
        for m in others
        for e in m.components
        if (e.name, e.cls) == (c.name, c.cls) and (fields := differences(network(c), e.config, "in the engine"))
    ]
    return (min(misses)[1],) if misses else ()


NO_LORAS: Mapping[str, int] = {}


def engine_of(
    component: Component, bundles: Sequence[Bundle], compute: str | None = None, loras: Mapping[str, int] = NO_LORAS
) -> BundledEngine:
    """The first engine of this very network whose bundle is whole and signed as it must be.

    `compute`: the type that the module's weights have; None for a session to which it does not matter. `loras`: layer →
    the rank of LoRAs beside its weight. Raises CannotServe with what is wrong with the first that is of this network;
    where it is LoRAs, with the one that takes most of them.
    """
    misses: list[Refusal] = []
    without: list[LoraUnfit] = []
    own = [(path, manifest, entry) for path, manifest in bundles if (entry := _entry(component, manifest)) is not None]
    for path, manifest, entry in own:
        if compute is not None and entry.compute != compute:
            misses.append(OtherType(component.name, component.subfolder, entry.compute, compute))
        elif unfit := _unfit_for(loras, entry, manifest):
            without.append(unfit)
        elif wrong := check_files(path, manifest):
            misses.append(Damaged(path.name, wrong[0]))
        else:
            try:
                Keyring().check(path)
                return BundledEngine(path, manifest, entry)
            except IntegrityError as error:
                misses.append(Untrusted(str(error).rstrip(".")))
    if without:
        raise CannotServe(max(without, key=lambda why: why.have))
    if misses:
        raise CannotServe(misses[0])
    near = _nearest_miss([component], [m for _, m in bundles])
    raise CannotServe(NoComponent(component.name, near))


def cheapest_first(component: Component, bundles: Sequence[Bundle]) -> list[Bundle]:
    """By the rank of LoRAs that the component's engine multiplies at every call, be there any or not."""

    def rank(bundle: Bundle) -> int:
        entry = _entry(component, bundle[1])
        return entry.lora_rank if entry is not None else 0

    return sorted(bundles, key=rank)


def _unfit_for(loras: Mapping[str, int], entry: ComponentEntry, manifest: Manifest) -> LoraUnfit | None:
    return lora_unfit(entry.name, loras, entry.lora_layers, manifest.precision)


def compute_type(module: nn.Module) -> str:
    """bf16, fp16 or fp32: the type that most of the module's weights have."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    ((dtype, _),) = sizes.most_common(1)
    return names.get(dtype, str(dtype).removeprefix("torch."))


def engines_of(store: Store, variant: Variant) -> list[tuple[ComponentEntry, ShapeEntry]]:
    """Of each component of this network that the store has engines of, the one that works on the largest videos."""
    engines: dict[str, tuple[ComponentEntry, ShapeEntry]] = {}
    for _, manifest in store.list():
        if isinstance(manifest, Manifest) and manifest.family == variant.family:
            for component in family(variant.family).components(variant):
                entry, largest = _entry(component, manifest), engines.get(component.name)
                if entry and (not largest or (entry.activation_bytes or 0) > (largest[0].activation_bytes or 0)):
                    engines[component.name] = entry, manifest.max
    return list(engines.values())


def require_same_network(variant: Variant, manifest: Manifest, bundle: str) -> None:
    """Raise UserError when a bundle that is named has no network of the variant's, with the field that differs."""
    own = family(variant.family).components(variant)
    if manifest.family == variant.family and any(_entry(c, manifest) for c in own):
        return
    near = _nearest_miss(own, [manifest] if manifest.family == variant.family else [])
    what = ": ".join((f"another network than {variant.name}", *near))
    raise UserError(f"{option('bundle', bundle)} is of {manifest.model}, {what}.")


def pull_missing(url: str, variant: Variant, precision: str, store: Store, ring: Keyring) -> None:
    """Fetch this network's bundle for each kind of card here from `url`, unless the store has one that fits.

    `precision`: a quantized one, or "auto" for the card's 16-bit type. What keeps it from being fetched is a
    warning: the render falls back as without it.
    """
    from overcrank.engines.download import pull
    from overcrank.engines.place import Remote
    from overcrank.engines.remote import fitting, read_index
    from overcrank.engines.targets import precision_for, targets_for
    from overcrank.engines.types import own_precision

    try:
        for card in targets_for(["auto"], "tensorrt_rtx"):
            own = precision_for(card, precision, own_precision(variant))
            try:
                fitting_bundles([path for path, _ in store.list()], variant, card.name, own)
                continue
            except CannotServe:
                pass
            remote = Remote(url)
            bundle = fitting(read_index(remote, ring), variant.where, card.name, own)
            log.info("fetching %s from %s", bundle.name, url)
            pull(remote, bundle, store, ring, lambda name, there, size: None)
    except OvercrankError as error:
        log.warning("%s: %s", option("pull", url), error)
