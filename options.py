"""Options: frozen dataclasses that the command line and Python fill alike, and how messages name them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from overcrank.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

O = TypeVar("O", bound="DataclassInstance")  # noqa: E741
_as_flags = False
_FLAGS = {"loras": "lora"}
"""Of options that hold several values, each of which has a flag."""


def merged(cls: type[O], options: O | None, changes: Mapping[str, Any]) -> O:
    """`options`, or the defaults of `cls`, with `changes` by field name.

    Raises UserError for a name that is no field.
    """
    names = [field.name for field in fields(cls)]
    for name in changes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}."
            raise UserError(f"There is no option '{name}'; {hint}")
    return replace(cls() if options is None else options, **changes)


@contextmanager
def named_as_flags() -> Iterator[None]:
    """Messages of this process name options as the command line does."""
    global _as_flags
    before, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = before


def flags_in_use() -> bool:
    """Whether messages of this process name options as the command line does."""
    return _as_flags


def use_flags(flags: bool) -> None:
    """In a process that works for another, what `flags_in_use` told there."""
    global _as_flags
    _as_flags = flags


def option(name: str, value: object = None) -> str:
    """An option in a message, with a value or without: vram='low', on the command line --vram low.

    One of several values is a list: loras=['a', 'b'], on the command line --lora a --lora b.
    """
    if not _as_flags:
        return name if value is None else f"{name}={_literal(value)}"
    flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
    if isinstance(value, list):
        return " ".join(f"{flag} {each}" for each in value)
    return flag if value is None or value is True else f"{flag} {value}"


def _literal(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value) if isinstance(value, int | float) else repr(str(value))
