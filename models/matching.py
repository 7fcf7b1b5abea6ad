"""Which published variant a checkpoint or pipeline is, or follows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from overcrank.errors import ModelError
from overcrank.models._family import Family
from overcrank.models.base import Config, Variant, VideoShape
from overcrank.models.network import as_class_sees, class_fields, completed, network, short, unknown_fields
from overcrank.models.registry import families, family, published, variant_named

log = logging.getLogger("overcrank")
MUCH_SMALLER, SMALL = 64, 64
"""The product of what a network's lengths are smaller by; pixels of a side."""
_warned: set[tuple[str, str]] = set()


def variant_from_configs(
    name: str, denoiser: str, configs: Mapping[str, Config], pipeline: str = "", sources: Iterable[str] = ()
) -> Variant:
    """The variant that a checkpoint's configurations describe; its denoiser is of class `denoiser`.

    `pipeline` is the checkpoint's pipeline class, `sources` the folders or hub ids its parts were read from.
    What configurations cannot tell (native shape, how it is rendered) comes from the published variant `like`:
    the one that was published there, else the one most like it. Raises ModelError for a class of no family.
    """
    sources = tuple(sources)
    for owner in families():
        if denoiser not in family(owner).denoiser_classes:
            continue
        alike = [
            v for v in _default_first(family(owner)) if denoiser in {c.rpartition(".")[2] for c in _classes(v).values()}
        ]
        nearest = max(alike, key=lambda v: _likeness(v, configs, pipeline, (name, *sources)))
        classes = _classes(nearest)
        for part, cls in classes.items():
            _warn_of_unknown(part, cls, configs.get(part, {}))
        own_parts = {
            part: as_class_sees(classes[part], config) if part in classes else config
            for part, config in configs.items()
            if part in nearest.configs
        }
        variant = replace(
            nearest, like=nearest.name, where=nearest.name, configs={**completed_variant(nearest).configs, **own_parts}
        )
        same = _built_from(variant, name, lambda variant=variant, nearest=nearest: same_networks(variant, nearest))  # type: ignore[misc]
        if same and published_at(nearest, (name, *sources)):
            return variant
        where = nearest.name if same else next(iter(sources), name)
        variant = variant if same else _sized(variant, alike)
        return replace(
            variant, name=name, title=name, hub_id="", hub_file="", repositories=(), packaged="", where=where
        )
    raise ModelError(f"{name}: no family here runs a {denoiser}; overcrank has {', '.join(families())}.")


def _built_from(variant: Variant, name: str, answer: Callable[[], bool]) -> bool:
    """The answer; raises ModelError, naming fields, where the family makes nothing of the configurations."""
    try:
        return answer()
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        odd = [
            f"{part}/config.json has {field} {short(variant.configs[part].get(field))}, usually {short(default)}"
            for part, cls in _classes(published()[variant.like]).items()
            for field, default in class_fields(cls).items()
            if default is not None and not _of_kind(variant.configs[part].get(field), default)
        ]
        reason = "; ".join(odd[:3]) or f"{type(error).__name__}: {error}"
        raise ModelError(f"{name}: no network is made from its configurations ({reason}); correct them.") from error


def _of_kind(value: Any, default: Any) -> bool:
    numbers = (int, float)
    if isinstance(default, numbers) and not isinstance(default, bool):
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, type(default))


def _sized(variant: Variant, alike: Iterable[Variant]) -> Variant:
    """With the shapes of the variant whose networks are nearest in size: a small one makes no large videos."""
    like = min(alike, key=lambda other: sum(map(abs, _smaller(variant, other))))
    grid = family(variant.family).grid(variant)
    fits = all((getattr(like.native, axis) - offset) % step == 0 for axis, (step, offset) in grid.items())
    if fits:
        variant = replace(variant, native=like.native, minimum=like.minimum, maximum=like.maximum)
    return _small(variant, grid) if sum(_smaller(variant, like)) > math.log(MUCH_SMALLER) else variant


def _smaller(variant: Variant, other: Variant) -> list[float]:
    """By how much each length of its networks is smaller than another's, as a logarithm."""
    pairs = [
        pair
        for part, cls in _classes(other).items()
        for field, value in as_class_sees(cls, other.configs[part]).items()
        if part in variant.configs
        for pair in _pairs(variant.configs[part].get(field), value)
    ]
    return [math.log(theirs / own) for own, theirs in pairs if all(type(n) is int and n > 0 for n in (own, theirs))]


def _pairs(own: Any, theirs: Any) -> list[tuple[Any, Any]]:
    both = (own, theirs)
    return list(zip(*both, strict=False)) if all(isinstance(x, list | tuple) for x in both) else [both]


def _small(variant: Variant, grid: Mapping[str, tuple[int, int]]) -> Variant:
    """With the size that its positions are made for, or a small one: it was made to be tried, on any machine."""
    config = next((variant.configs[part] for part in ("transformer", "unet") if part in variant.configs), {})
    stride = family(variant.family).strides(variant)[0]

    def length(axis: str) -> int:
        own, (step, offset) = config.get(f"sample_{axis}"), grid[axis]
        made_for = own * (1 if axis == "frames" else stride) if type(own) is int else 0
        wanted = made_for or min(getattr(variant.native, axis), variant.native.frames if axis == "frames" else SMALL)
        return max(offset or step, (wanted - offset) // step * step + offset)

    native = VideoShape(length("height"), length("width"), length("frames"))
    sides = (native.height, native.width, native.frames)
    shortest = (variant.minimum.height, variant.minimum.width, variant.minimum.frames)
    minimum = VideoShape(*map(min, sides, shortest))
    renders = {task: replace(rendering, shape=None) for task, rendering in variant.renders.items()}
    return replace(variant, native=native, minimum=minimum, renders=renders)


def variant_from_manifest(manifest: Any) -> Variant:
    """The variant a bundle was built from: the published one it follows, with the bundle's configurations."""
    like = variant_named(manifest.like) or _default_first(family(manifest.family))[0]
    return replace(
        like,
        name=manifest.model,
        title=like.title if manifest.model == like.name else manifest.model,
        configs=manifest.configs,
        hub_id=manifest.hub_id,
        like=like.name,
    )


def completed_variant(variant: Variant) -> Variant:
    """The variant with configurations as the classes see them: every field, whatever the data leaves out."""
    every = family(variant.family).components(variant)
    name = variant.like or variant.name
    return replace(completed(variant, every), like=name, where=variant.where or name)


def same_networks(a: Variant, b: Variant) -> bool:
    """Whether every component of both is one network."""
    ours, theirs = ({c.name: (c.cls, network(c)) for c in family(v.family).components(v)} for v in (a, b))
    return ours == theirs


def _default_first(own: Family) -> list[Variant]:
    return sorted(own.variants, key=lambda v: v.name != own.default)


def _classes(variant: Variant) -> dict[str, str]:
    """Part of the pipeline → class, of the parts that components describe."""
    every = family(variant.family).components(variant)
    return {part: c.cls for c in every for part in (c.subfolder, *c.also_serves) if part in variant.configs}


def _likeness(
    variant: Variant, configs: Mapping[str, Config], pipeline: str, sources: tuple[str, ...]
) -> tuple[bool, bool, bool, int, int, int]:
    """(published there, the same networks, made for this pipeline, fields alike, of the scheduler too, set alike)."""
    views = [
        (as_class_sees(cls, variant.configs[part]), as_class_sees(cls, configs[part]) if part in configs else {})
        for part, cls in _classes(variant).items()
    ]
    parts = {part for v in family(variant.family).variants for part in _classes(v)}
    pairs = [(ours[f], theirs[f]) for ours, theirs in views for f in ours if theirs]
    scheduler = variant.configs.get("scheduler", {})
    return (
        published_at(variant, sources),
        all(ours == theirs for ours, theirs in views) and not (parts & set(configs)) - set(_classes(variant)),
        pipeline in (*variant.tasks.values(), *variant.saved_as),
        sum(a == b for a, b in pairs),
        sum(configs.get("scheduler", {}).get(f) == v for f, v in scheduler.items()),
        sum(bool(a) == bool(b) for a, b in pairs),
    )


def published_at(variant: Variant, sources: Iterable[str]) -> bool:
    """Whether one of these names, folders or hub ids is where the variant is published, or is named after it."""
    ids = {variant.name, variant.hub_id.lower(), variant.hub_id.rpartition("/")[2].lower()} - {""}
    for source in sources:
        words = source.lower().replace("\\", "/").rstrip("/").split("/")
        cached = [w.removeprefix("models--").replace("--", "/") for w in words if w.startswith("models--")]
        if ids & {source.lower(), words[-1], *cached}:
            return True
    return False


def _warn_of_unknown(part: str, cls: str, config: Config) -> None:
    """Once for each field; from_pretrained leaves them out too."""
    for field in unknown_fields(cls, config):
        if (cls, field) not in _warned:
            _warned.add((cls, field))
            log.warning(
                "%s/config.json has the field '%s', which %s of the installed diffusers does not know; it is left out.",
                part, field, cls.rpartition(".")[2],
            )  # fmt: skip
