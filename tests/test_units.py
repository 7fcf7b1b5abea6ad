"""Sizes and ages as people write them."""

from __future__ import annotations

import pytest
from overcrank.errors import UserError
from overcrank.units import human_bytes, parse_age, parse_size

pytestmark = pytest.mark.quick

DAY = 86_400.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * DAY), ("12h", DAY / 2), ("45m", 2700.0), ("1.5 d", 1.5 * DAY)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text, "--older-than") == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 5e10), ("500 mb", 5e8), ("1000", 1e3), ("1.5t", 1.5e12), ("8GiB", 8 * 2**30), (" 7.5 gb", 7.5e9)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--max-size") == size


@pytest.mark.parametrize("text", ["", "soon", "5", "-1d", "5w"])
def test_wrong_ages(text: str) -> None:
    with pytest.raises(UserError, match=r"^--older-than .*such as 30d, 12h or 45m"):
        parse_age(text, "--older-than")


@pytest.mark.parametrize("text", ["", "much", "-1GB", "5 parsecs", "1e9"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match=r"^--max-size .*such as 8GB, 500MB or 8GiB"):
        parse_size(text, "--max-size")


def test_sizes_are_shown_in_powers_of_ten() -> None:
    assert [human_bytes(n) for n in (0, 999, 25_769_803_776, None)] == ["0 B", "999 B", "25.8 GB", "unknown"]
