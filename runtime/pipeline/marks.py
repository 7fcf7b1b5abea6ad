"""Configurations that an editor saved with a byte order mark, which diffusers and transformers do not read."""

from __future__ import annotations

import codecs
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The checkpoint's folder, or one that stands in its place meanwhile: links to its files, and plain copies."""
    marked = {file for file in (*folder.glob("*.json"), *folder.glob("*/*.json")) if _is_marked(file)}
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="overcrank-") as text:
        for file in (*folder.glob("*"), *folder.glob("*/*")):
            place = Path(text) / file.relative_to(folder)
            if file.is_dir():
                place.mkdir(exist_ok=True)
            elif file in marked:
                place.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                _stand_in(file, place)
        yield Path(text)


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _stand_in(file: Path, place: Path) -> None:
    """A link; a copy where there are none, as for most users of Windows."""
    try:
        os.symlink(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
