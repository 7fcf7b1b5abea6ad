"""Procedural training clips: one coloured shape that moves, grows, shrinks or rotates.

Drawn analytically from signed distances, so edges are antialiased and a clip is a pure
function of its description.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from overcrank.models.demo.captions import BACKGROUNDS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, VERBS

SIZE, FRAMES, FPS = 64, 17, 8
TURN = math.radians(120)  # of a rotating shape, clockwise, over the whole clip
HELD_OUT = 24  # (colour, shape, motion) triples that training never shows

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Clip:
    """One video: what a caption says, and the placement it leaves open (in pixels)."""

    colour: str
    shape: str
    motion: str
    background: str
    x: float = 32.0
    y: float = 32.0
    radius: float = 12.0
    reach: float = 24.0  # pixels travelled, or gained in radius x 2


def triples() -> list[Triple]:
    """Every (colour, shape, motion); a rotating circle cannot be seen, so there is none."""
    every = itertools.product(COLOURS, SHAPES, MOTIONS)
    return [t for t in every if t[1:] != ("circle", "rotating")]


def split() -> tuple[list[Triple], list[Triple]]:
    """(trained, held out): the second are never drawn in training, though each word of them is."""
    shuffled = triples()
    Random(20).shuffle(shuffled)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def random_clip(random: Random, triple: Triple) -> Clip:
    colour, shape, motion = triple
    clip = partial(Clip, colour, shape, motion, random.choice(list(BACKGROUNDS)))
    x, y = random.uniform(25, 39), random.uniform(25, 39)
    if motion.startswith("moving"):
        along = random.uniform(31, 33)
        x, y = (along, y) if DIRECTIONS[motion.split()[1]][0] else (x, along)
        return clip(x=x, y=y, radius=random.uniform(10, 13), reach=random.uniform(20, 28))
    if motion == "rotating":
        return clip(x=x, y=y, radius=random.uniform(13, 17))
    return clip(x=x, y=y, radius=random.uniform(12, 13.5), reach=random.uniform(11, 14))


def caption(clip: Clip, random: Random) -> str:
    """One of the wordings a person might use; a third of them leave the background open."""
    verb = clip.motion
    if random.random() < 0.3:
        ing = verb.partition(" ")[0]
        verb = verb.replace(ing, VERBS[ing])
    article = random.choice(("a", "a", "A", "the"))
    article += "n" if article != "the" and clip.colour == "orange" else ""
    words = f"{article} {clip.colour} {clip.shape} {verb}"
    if random.random() < 0.65:
        colour = clip.background if clip.background != "gray" or random.random() < 0.8 else "grey"
        words += random.choice((f" on a {colour} background", f" on {colour}", f", {colour} background"))
    return words + random.choice(("", "", "."))


def render(clips: list[Clip], device: str = "cpu", seed: int = 0, frames: list[int] | None = None) -> torch.Tensor:
    """RGB videos in [-1, 1], [clips, 3, FRAMES, SIZE, SIZE], or those of the given frames only.

    `seed` varies the colours a little.
    """
    generator = torch.Generator().manual_seed(seed)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None, None, None]

    phase = torch.linspace(-0.5, 0.5, FRAMES, device=device)[None, :, None, None]
    phase = phase if frames is None else phase[:, frames]
    towards = [DIRECTIONS.get(c.motion.partition(" ")[2], (0, 0)) for c in clips]
    grows = [{"growing": 0.5, "shrinking": -0.5}.get(c.motion, 0.0) for c in clips]
    reach = column([c.reach for c in clips])
    axis = torch.arange(SIZE, device=device) + 0.5
    x = axis[None, None, None, :] - column([c.x for c in clips]) - column([t[0] for t in towards]) * reach * phase
    y = axis[None, None, :, None] - column([c.y for c in clips]) - column([t[1] for t in towards]) * reach * phase
    radius = column([c.radius for c in clips]) + column(grows) * reach * phase
    angle = (phase + 0.5) * column([TURN if c.motion == "rotating" else 0.0 for c in clips])
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = torch.stack([_distance(c.shape, u[i], v[i], radius[i]) for i, c in enumerate(clips)])
    inside = (0.5 - distance).clamp(0, 1)[:, None]
    jitter = (torch.rand(len(clips), 3, generator=generator) - 0.5) * 0.06
    ink = (torch.tensor([COLOURS[c.colour] for c in clips]) + jitter).to(device)[:, :, None, None, None]
    paper = column([BACKGROUNDS[c.background] for c in clips])[:, None]
    return ((ink * inside + paper * (1 - inside)) * 2 - 1).clamp(-1, 1)


def _distance(shape: str, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels, near the edge at least; y points down. Areas are alike for one radius."""
    if shape == "circle":
        return (u * u + v * v).sqrt() - radius * 0.98
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - radius * 0.87
    if shape == "triangle":  # equilateral, upright
        slope = math.sqrt(3) / 2
        return torch.maximum(u.abs() * slope - v * 0.5, v) - radius * 0.62
    arm, half = radius * 0.36, radius * 1.12  # cross
    across = torch.maximum(u.abs() - half, v.abs() - arm)
    upright = torch.maximum(v.abs() - half, u.abs() - arm)
    return torch.minimum(across, upright)
