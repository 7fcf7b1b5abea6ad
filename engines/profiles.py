"""Video shapes → the ranges an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from overcrank.errors import ShapeError
from overcrank.models.base import Component, Variant, VideoShape
from overcrank.options import option

ENCODER = "vae_encoder"
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Profile:
    """Smallest, best-served and largest video an engine takes; TensorRT's optimization profile."""

    min: VideoShape
    opt: VideoShape
    max: VideoShape

    def __post_init__(self) -> None:
        for axis in ("height", "width", "frames", "batch"):
            low, best, high = (getattr(s, axis) for s in (self.min, self.opt, self.max))
            if not low <= best <= high:
                raise ShapeError(
                    f"{axis} {best} lies outside the profile's {low} … {high}; "
                    f"set {option(f'min_{axis}')} or {option(f'max_{axis}')}, or use {option('static', True)}."
                )

    def ranges(self, component: Component) -> dict[str, ShapeRange]:
        """(min, opt, max) shape of each input of `component` that is dynamic.

        A VAE's encoder is given pictures too, also where the shortest video has more frames than one.
        """
        pictures = component.name.startswith(ENCODER) and self.min != self.max
        shortest = replace(self.min, frames=1) if pictures else self.min
        low, best, high = (dict(component.sizes(s)) for s in (shortest, self.opt, self.max))
        low |= dict(component.free_axes)
        return {
            t.name: (t.shape(low), t.shape(best), t.shape(high))
            for t in component.inputs
            if any(isinstance(d, str) for d in t.dims)
        }


@dataclass(frozen=True)
class PartialShape:
    """A video shape of which some is asked for; None is left to the model."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int | None = None

    def over(self, shape: VideoShape) -> VideoShape:
        return replace(shape, **{axis: length for axis, length in vars(self).items() if length is not None})


ANY = PartialShape()


def profile_for(
    variant: Variant,
    best: PartialShape = ANY,
    *,
    minimum: PartialShape = ANY,
    maximum: PartialShape = ANY,
    static: bool = False,
) -> Profile:
    """The profile of a build; every shape is checked by the variant's family.

    Unset bounds come from the variant and widen to include what was asked for; batches of 1 and 2 are always
    among them. Raises ShapeError for a shape that the model cannot make, and for bounds of a static profile.
    """
    from overcrank.models import check_shape

    opt = best.over(replace(variant.native, batch=2))
    check_shape(variant, opt)
    if static:
        if (minimum, maximum) != (ANY, ANY):
            bounds = f"{option('min_…')} and {option('max_…')}"
            raise ShapeError(f"{option('static', True)} fixes every shape; drop the {bounds} options.")
        return Profile(opt, opt, opt)
    axes = ("height", "width", "frames")
    low = {a: min(getattr(variant.minimum, a), getattr(opt, a)) for a in axes}
    high = {a: max(getattr(variant.maximum, a), getattr(opt, a)) for a in axes}
    bottom = minimum.over(VideoShape(**low, batch=1))
    top = maximum.over(VideoShape(**high, batch=max(2, opt.batch)))
    check_shape(variant, bottom)
    check_shape(variant, top)
    return Profile(bottom, opt, top)
