"""The header of a weight file that lies elsewhere: its first bytes, in a sparse file of its length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError

if TYPE_CHECKING:
    from overcrank.export.files.weight_file import Stored, WeightFile

FIRST = 64 * 2**10
LARGEST = 256 * 2**20
"""Bytes of a header, at most."""
MOST_RANGES = 64
"""Requests for what lies apart from the header."""


@contextmanager
def local_header(where: str) -> Iterator[Path]:
    """The file that `where` names, or of a URL a file with its header alone, as long as it is needed.

    Raises CheckpointError where a URL cannot be read in ranges; one that is raised meanwhile names the URL.
    """
    if "://" not in where:
        yield Path(where).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="overcrank-header-") as folder:
        twin = header_twin(where, Path(folder))
        try:
            yield twin
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(twin), where)) from error


def header_twin(url: str, folder: Path) -> Path:
    """A file in `folder` with the header of the one at `url`, and holes for the values.

    Of those, what says how layers are stored is fetched, unless it lies in more than MOST_RANGES places.

    Raises CheckpointError where `url` cannot be read in ranges.
    """
    import fsspec
    from overcrank.export.files.weight_file import open_weights

    twin = folder / (url.partition("?")[0].rpartition("/")[2] or "file")
    try:
        fs, path = fsspec.core.url_to_fs(url)
        size = fs.info(path).get("size")
        if size is None:
            raise ValueError("the server does not say how long it is, so its header cannot be read alone")
        head, wanted = b"", min(FIRST, size)
        while len(head) < wanted:
            head += fs.cat_file(path, len(head), wanted)
            twin.write_bytes(head)
            with twin.open("r+b") as stream:
                stream.truncate(size)
            wanted = min(_header_end(twin, head), size, LARGEST)
        for start, stop in _runs([(t.offset, t.offset + t.bytes) for t in marks(open_weights(twin))])[:MOST_RANGES]:
            with twin.open("r+b") as stream:
                stream.seek(start)
                stream.write(fs.cat_file(path, start, stop))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url} cannot be read: {error}.") from error
    return twin


def marks(file: WeightFile) -> list[Stored]:
    """The small tensors in which ComfyUI's files say how each layer is stored."""
    return [t for name, t in file.tensors.items() if name.endswith(".comfy_quant")]


def _runs(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that lie near each other as one."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if runs and start - runs[-1][1] < FIRST:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return runs


def _header_end(twin: Path, head: bytes) -> int:
    """Where the header ends; of GGUF, which does not say, a guess beyond `head` while it is not whole."""
    if head[:4] != b"GGUF":
        return 8 + int.from_bytes(head[:8], "little")
    import gguf

    try:
        end = int(gguf.GGUFReader(twin).data_offset)
    except Exception:  # whatever the zeros behind the head lead its reader to
        return 4 * len(head)
    return max(end, len(head)) if end <= len(head) else 4 * len(head)
