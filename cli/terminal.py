"""What others wrote, on a terminal: nothing of it moves the cursor, is taken for markup, or makes a line of its own."""

from __future__ import annotations

from typing import Any

from overcrank.errors import safe_text
from rich.console import Console
from rich.text import Text


class SafeConsole(Console):
    """Strings are printed as they are, line by line, with control characters spelled out; style is in `Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"soft_wrap": True, "highlight": False, "markup": False, "emoji": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(safe_text, text.split("\n"))), **options)
