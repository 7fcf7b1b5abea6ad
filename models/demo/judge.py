"""What a clip shows, by plain image processing: colour, shape and motion of its one shape.

No network takes part, so a checkpoint cannot please its judge. Used to accept the demo
checkpoint, and wherever quality under quantization is measured.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from overcrank.models.demo import captions
from scipy import ndimage

Array = np.ndarray


@dataclass(frozen=True)
class Verdict:
    colour: str
    shape: str
    motion: str


def judge(video: Array) -> Verdict:
    """`video`: [frames, height, width, 3] in [0, 1]. Each field is a word of captions.py, or "none"."""
    masks = [_mask(frame) for frame in video]
    if min(mask.sum() for mask in masks) < 60:
        return Verdict("none", "none", "none")
    middle = len(video) // 2
    return Verdict(
        colour=_colour(video[middle], masks[middle]),
        shape=_vote([_shape(mask) for mask in masks]),
        motion=_motion(masks),
    )


def _mask(frame: Array) -> Array:
    """The largest region that differs from the background, holes filled."""
    border = np.concatenate([frame[:3].reshape(-1, 3), frame[-3:].reshape(-1, 3)])
    differs = np.abs(frame - np.median(border, axis=0)).max(-1) > 0.2
    labels, count = ndimage.label(ndimage.binary_opening(differs))
    if count == 0:
        return np.zeros(frame.shape[:2], bool)
    sizes = ndimage.sum_labels(differs, labels, range(1, count + 1))
    return np.asarray(ndimage.binary_fill_holes(labels == 1 + int(np.argmax(sizes))))


def _colour(frame: Array, mask: Array) -> str:
    inner = ndimage.binary_erosion(mask, iterations=2)
    rgb = np.median(frame[inner if inner.any() else mask], axis=0)
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb)
    if saturation < 0.3:
        return "none"
    hues = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in captions.COLOURS.items()}
    return min(hues, key=lambda name: min(abs(hues[name] - hue), 1 - abs(hues[name] - hue)))


def _shape(mask: Array) -> str:
    """By area and outline, both blind to rotation and size.

    A circle fills its enclosing circle; a triangle's outline repeats after a third of a turn, a
    square's and a cross's after a quarter; a square's nearest edge lies at 0.71 of its corner's
    distance, a cross's inner corner at 0.43.
    """
    y, x = np.nonzero(mask)
    cy, cx = y.mean(), x.mean()
    radii = np.hypot(y - cy, x - cx)
    reach = np.percentile(radii, 99.5) + 0.7
    filled = mask.sum() / (np.pi * reach**2)
    if filled > 0.85:
        return "circle"
    profile = _profile(mask, cy, cx, reach)
    waves = np.abs(np.fft.rfft(profile - profile.mean()))
    if waves[3] > waves[4]:
        return "triangle"
    return "square" if np.percentile(profile, 5) > 0.65 * profile.max() else "cross"


def _profile(mask: Array, cy: float, cx: float, reach: float) -> Array:
    """How far the shape extends from its centre, in 72 directions."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    steps = np.linspace(0, reach * 1.2, 80)
    rows = cy + np.sin(angles)[:, None] * steps
    columns = cx + np.cos(angles)[:, None] * steps
    inside = ndimage.map_coordinates(mask.astype(float), [rows, columns], order=1)
    return np.asarray((inside > 0.5).sum(1) * (steps[1] - steps[0]))


def _motion(masks: list[Array]) -> str:
    """Largest of: displacement of the centre, change of size, turning of the outline."""
    centres = np.array([ndimage.center_of_mass(m) for m in masks])
    sizes = np.sqrt([float(m.sum()) for m in masks])
    down, right = centres[-3:].mean(0) - centres[:3].mean(0)
    growth = sizes[-3:].mean() / sizes[:3].mean()
    travelled = max(abs(down), abs(right)) / sizes.mean()
    if travelled > 0.4 and travelled > abs(np.log(growth)):
        if abs(right) > abs(down):
            return "moving right" if right > 0 else "moving left"
        return "moving down" if down > 0 else "moving up"
    if abs(np.log(growth)) > 0.2:
        return "growing" if growth > 1 else "shrinking"
    return "rotating" if _turns(masks, centres) else "none"


def _turns(masks: list[Array], centres: Array) -> bool:
    """Whether the outline of some later frame differs from the first one's, size and place removed."""

    def outline(mask: Array, centre: Array) -> Array:
        profile = _profile(mask, centre[0], centre[1], np.sqrt(mask.sum()))
        return np.asarray(profile / profile.mean())

    first = outline(masks[0], centres[0])
    changes = [np.abs(outline(m, c) - first).mean() for m, c in zip(masks[4:], centres[4:], strict=True)]
    return float(np.max(changes)) > 0.08


def _vote(words: list[str]) -> str:
    return max(sorted(set(words)), key=words.count)
