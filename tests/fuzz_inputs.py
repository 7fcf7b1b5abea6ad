"""What users are given by strangers: job files, sidecars beside results, pictures; what tests/fuzz.py does with them.

Pictures are decoded under a limit of memory: a file of a few bytes may say that it is a gigapixel.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from overcrank.errors import OvercrankError, RequestError, safe_text
from overcrank.models import resolve
from overcrank.runtime.render import names, pictures, request, results
from overcrank.runtime.render.pictures import picture_of
from overcrank.runtime.render.request import read_jobs
from overcrank.runtime.render.results import (
    is_complete,
    place,
    remove_partial_results,
    require_free,
    sidecar_path,
    staging,
)
from PIL import Image, ImageCms

JOB: dict[str, Any] = {
    "prompt": "a red circle moving right", "negative_prompt": "blurry", "output": "one", "seed": 3, "steps": 4,
    "guidance": 3.0, "height": 64, "width": 96, "frames": 9, "fps": 8, "strength": 0.5, "guidance_rescale": 0.1,
    "sigmas": [1.0, 0.5], "image": "picture.png", "formats": ["mp4", "gif"],
    "lora": [{"file": "picture.png", "scale": 0.8, "part": "transformer"}],
}  # fmt: skip
SECOND = {"prompt": "a blue square", "output": "two", "seconds": 1.5, "fit": True, "shift": 2}
MODELS = ("ltx-demo", "ltx", "svd", "wan-2.2-i2v-a14b")
SPARE = 1 << 30
"""Bytes that a picture's decoding may take beside what is there."""
SHAPE = (6, 8)


class JobTargets:
    """As tests.fuzz.Targets: job files, and sidecars of results that are in the way."""

    followed = (request, names, results)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variants = [resolve(name) for name in MODELS]
        Image.new("RGB", (8, 6)).save(folder / "picture.png")
        self.stem = folder / "results" / "one"
        self.stem.parent.mkdir()
        files = [
            {"name": "one.gif", "bytes": 3, "sha256": "ab" * 32},
            {"name": "one-frames", "count": 2, "sha256": "ab" * 32},
        ]
        sidecar = {"overcrank": "1", "request": SECOND, "request_sha256": "cd" * 32, "files": files}
        self.valid = {"jobs": json.dumps(JOB).encode(), "sidecar": json.dumps(sidecar).encode()}
        self.all: dict[str, Callable[[bytes], None]] = {"jobs": self.jobs, "sidecar": self.sidecar}

    def jobs(self, content: bytes) -> None:
        file = self.folder / "jobs.jsonl"
        file.write_bytes(content + b"\n" + json.dumps(SECOND).encode())
        for variant in self.variants:
            try:
                for job in read_jobs(file, variant):
                    assert job.shape
                    assert job.digest(variant.name)
                    assert (self.stem.parent / job.output).parent == self.stem.parent
            except RequestError as error:
                _says(error, str(file))

    def sidecar(self, content: bytes) -> None:
        """None makes a stranger's file go, or a result count as whole that is not there."""
        folder = self.stem.parent
        stranger = folder / "one.txt"
        stranger.write_text("mine")
        (folder / "one.gif").write_bytes(b"GIF")
        sidecar_path(self.stem).write_bytes(content)
        try:
            if is_complete(self.stem, "cd" * 32):
                files = json.loads(content)["files"]
                assert files
                assert all((folder / entry["name"]).exists() for entry in files)
            require_free(self.stem, ("gif", "png"), "own")
            with staging(self.stem) as work:
                for name in ("one.gif", "one.json"):
                    (work / name).write_bytes(b"new" if name == "one.gif" else self.valid["sidecar"])
                place(work, self.stem, ("gif",), "own")
            assert (folder / "one.gif").read_bytes() == b"new"
        except OvercrankError as error:
            _says(error, "one")
        with staging(self.stem) as work:  # of a process that was killed
            (work / "one.json").write_bytes(content)
            (work / "former").mkdir()
            (work / "former" / "one.gif").write_bytes(b"old")
            sidecar_path(self.stem).unlink(missing_ok=True)
            remove_partial_results(self.stem)
        assert stranger.read_text() == "mine"
        assert {path.name for path in folder.iterdir()} <= {"one.txt", "one.gif", "one.json"}


class PictureTargets:
    """A picture of each kind that has a decoder of its own."""

    followed = (pictures, Image)

    def __init__(self, folder: Path) -> None:
        self.file = folder / "picture"
        self.valid = _pictures()
        self.all: dict[str, Callable[[bytes], None]] = {kind: partial(self.picture, kind) for kind in self.valid}

    def picture(self, kind: str, content: bytes) -> None:
        self.file.write_bytes(_summed(content) if kind.startswith("png") else content)
        with little_memory():
            try:
                picture = picture_of(self.file)
                assert picture.mode == "RGB"
                assert min(picture.size) > 0
            except RequestError as error:
                _says(error, str(self.file))


def _says(error: OvercrankError, name: str) -> None:
    """It names what it is of, gives a reason, and a terminal can print it as its own lines."""
    said = str(error)
    assert name in said, said
    assert not said.endswith((": .", ":", " .")), said
    assert safe_text(said).encode(), said


@contextmanager
def little_memory(spare: int = SPARE) -> Iterator[None]:
    """No more than `spare` bytes beside what this process has."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def _summed(png: bytes) -> bytes:
    """With the checksums of what the chunks hold now, without which no edit gets past the first one."""
    content, at = bytearray(png), 8
    while at + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        end = at + 8 + size
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)


def _pictures() -> dict[str, bytes]:
    values = np.arange(SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE)
    colours = Image.fromarray(np.stack([values * 5] * 3, -1).astype(np.uint8))
    clear = colours.copy()
    clear.putalpha(128)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (clear, "PNG", {"icc_profile": profile}),
        "png 16 bit": (Image.fromarray((values * 999).astype(np.uint16)), "PNG", {"transparency": 999}),
        "jpeg": (colours, "JPEG", {"exif": turned, "icc_profile": profile}),
        "jpeg cmyk": (colours.convert("CMYK"), "JPEG", {}),
        "mpo": (colours, "MPO", {"save_all": True, "append_images": [colours]}),
        "webp": (clear, "WEBP", {"save_all": True, "append_images": [clear]}),
        "avif": (clear, "AVIF", {}),
        "gif": (clear.convert("P"), "GIF", {"transparency": 3, "save_all": True, "append_images": [clear]}),
        "bmp": (colours, "BMP", {}),
        "tiff float": (Image.fromarray(values), "TIFF", {}),
        "tiff lzw": (clear, "TIFF", {"compression": "tiff_lzw", "exif": turned}),
        "jpeg2000": (colours, "JPEG2000", {}),
        "ppm": (colours, "PPM", {}),
        "tga": (clear, "TGA", {"compression": "tga_rle"}),
        "ico": (clear.resize((16, 16)), "ICO", {"sizes": [(16, 16)]}),
        "dds": (clear, "DDS", {}),
    }
    found = {}
    for name, (picture, kind, options) in made.items():
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        found[name] = stream.getvalue()
    return found
