"""The fuzzing of what strangers give to users, in small, and what it found."""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from overcrank.errors import RequestError
from overcrank.runtime.render.pictures import picture_of
from overcrank.runtime.render.results import is_complete

from tests import fuzz
from tests.fuzz_checkpoints import CheckpointTargets
from tests.fuzz_inputs import JobTargets, PictureTargets, little_memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", [JobTargets, PictureTargets, CheckpointTargets])
def test_what_strangers_give(
    kind: type[JobTargets] | type[PictureTargets] | type[CheckpointTargets], tmp_path: Path
) -> None:
    targets = kind(tmp_path)
    for name in targets.all:
        targets.all[name](targets.valid[name])
        assert fuzz.by_hypothesis(targets, name, 50, 30) >= 50


@pytest.mark.quick
def test_a_small_file_of_many_pixels_says_that_there_is_too_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    content = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
    with (
        little_memory(200_000_000),
        pytest.raises(RequestError, match=f"image {file}.*too little memory for its pixels"),
    ):
        picture_of(file)


@pytest.mark.quick
@pytest.mark.parametrize("files", [[], [{"name": "one-frames", "count": 0, "sha256": "ab" * 32}]])
def test_a_sidecar_that_lists_nothing_is_no_result(files: list[object], tmp_path: Path) -> None:
    about = {"overcrank": "1", "request_sha256": "cd" * 32, "files": files}
    (tmp_path / "one.json").write_text(json.dumps(about))
    assert not is_complete(tmp_path / "one", "cd" * 32)
