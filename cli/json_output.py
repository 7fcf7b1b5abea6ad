"""What `--json` prints: one document, whose shape docs/json.md describes.

Every document is an object with `format` (1) and `command`, and what that command reports under names of its own. Sizes
are bytes, times seconds. A name that is there stays what it is while `format` is 1; others may come beside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

FORMAT = 1


def json_option(function: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout (docs/json.md).")(function)


def print_json(command: str, **reported: Any) -> None:
    """On stdout; dataclasses, pydantic models, paths and sets are written as JSON has them."""
    click.echo(json.dumps({"format": FORMAT, "command": command, **reported}, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # a pydantic model, whose library is slow to import
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Counter):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
