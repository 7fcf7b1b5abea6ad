"""What the demo model was trained to draw, in the words of its captions."""

from __future__ import annotations

import re
from collections.abc import Iterable

COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.96, 0.88, 0.14),
    "green": (0.12, 0.65, 0.22),
    "blue": (0.12, 0.28, 0.88),
    "purple": (0.56, 0.16, 0.74),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*(f"moving {d}" for d in DIRECTIONS), "growing", "shrinking", "rotating")
BACKGROUNDS = {"black": 0.06, "gray": 0.4, "white": 0.94}
VERBS = {"moving": "moves", "growing": "grows", "shrinking": "shrinks", "rotating": "rotates"}

_ONE = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_MOTION = rf"({'|'.join(MOTIONS)}|moves ({'|'.join(DIRECTIONS)})|{'|'.join(v for v in VERBS.values() if v != 'moves')})"
_BACKGROUND = rf"((,| on|, on)( an?| the)? ({'|'.join(BACKGROUNDS)}|grey)( background)?)?"
_CAPTION = re.compile(rf"((an?|the) )?{_ONE} {_MOTION}{_BACKGROUND}[.!]?", re.IGNORECASE)


def note(prompt: str) -> str:
    """What the model knows, when the prompt is not a caption of that; else empty."""
    if _CAPTION.fullmatch(" ".join(prompt.split())):
        return ""
    return (
        f"this demo model knows one {_either(COLOURS)} {_either(SHAPES)}, moving {_either(DIRECTIONS)}, "
        f"growing, shrinking or rotating, on a {_either(BACKGROUNDS)} background; "
        "for any other prompt it draws something like that"
    )


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
