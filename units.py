"""Amounts as people write them."""

from __future__ import annotations

import re

from overcrank.errors import UserError

SECONDS = {"d": 86_400.0, "h": 3600.0, "m": 60.0}


def human_bytes(count: int | None) -> str:
    """Such as "1.5 GB", of 10^9 bytes; "unknown" for None."""
    from pydantic import ByteSize

    return "unknown" if count is None else ByteSize(count).human_readable(decimal=True, separator=" ")


def human_seconds(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"; no finer than an estimate is."""
    if seconds < 95:
        return f"{max(10, round(seconds / 10) * 10)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_size(text: str, option: str) -> int:
    """Bytes of "8GB" (10^9 each), "8GiB" (2^30 each) or a plain number; raises UserError naming the option."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    words = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = words[2] if words else ""
    if unit.lower() in ("k", "m", "g", "t"):
        unit += "b"
    try:
        size = TypeAdapter(ByteSize).validate_python(f"{words[1]}{unit}" if words else text)
    except ValidationError as error:
        raise UserError(f"{option} {text}: use an amount such as 8GB, 500MB or 8GiB.") from error
    return int(size)


def parse_age(text: str, option: str) -> float:
    """Seconds of "30d", "12h" or "45m"; raises UserError naming the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhm])", text.strip().lower())
    if not match:
        raise UserError(f"{option} {text}: use a number of days, hours or minutes such as 30d, 12h or 45m.")
    return float(match[1]) * SECONDS[match[2]]
