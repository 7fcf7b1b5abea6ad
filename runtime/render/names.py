"""Names of results: such as every file system takes, since batches travel."""

from __future__ import annotations

import mimetypes
import re
import unicodedata
from pathlib import Path

from overcrank.errors import RequestError
from overcrank.files import MOST_BYTES
from overcrank.runtime.render.results import BESIDE_NAME

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
FORBIDDEN = '<>:"/\\|?*'
MEDIA = (".mkv", ".webm", ".avi", ".mov", ".m4v", ".wmv", ".flv", ".webp", ".avif", ".json")


def check_name(name: str, field: str) -> None:
    """Raise RequestError for a name without a suffix that some file system would refuse or change."""
    wrong = _problem(name)
    if wrong:
        raise RequestError(f"{field} '{name}' {wrong}.")


def _problem(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name or name.startswith("."):
        return "must be a plain file name without a folder, and not begin with a dot"
    character = next((c for c in name if c in FORBIDDEN or unicodedata.category(c) in ("Cc", "Cs")), "")
    if character:
        return f"has {character!a} in it, which Windows takes in no name; leave it out"
    if RESERVED.fullmatch(name):
        return "is a device on Windows; give another"
    if name != name.rstrip(". "):
        return "ends in a dot or a space, which Windows drops; leave it out"
    size, most = len(name.encode()), MOST_BYTES - BESIDE_NAME
    return f"has {size} bytes, and at most {most} leave room for what is added; shorten it" if size > most else ""


def same_name(name: str) -> str:
    """The same text for names that some file system takes for one: in another case, or with letters composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def split_suffix(out: Path, suffixes: tuple[str, ...]) -> tuple[Path, str]:
    """A path without one of the suffixes, and that suffix without its dot; what is no suffix of media is name.

    Raises RequestError for a suffix of media that is not among them.
    """
    suffix = out.suffix.lower()
    if suffix.removeprefix(".") in suffixes and suffix:
        return out.with_suffix(""), suffix.removeprefix(".")
    kind = (mimetypes.guess_type(f"x{suffix}", strict=False)[0] or "").partition("/")[0]
    if kind in ("video", "image", "audio") or suffix in MEDIA:
        choices = ", ".join(f".{s}" for s in suffixes)
        raise RequestError(f"--out {out}: unknown suffix {suffix}; use {choices} (png: frames), or none.")
    return out, ""
