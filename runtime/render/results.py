"""Results on disk: their names, whose they are, and how they take their places.

Files are written in a hidden folder beside their places, whose name says which process writes there. Whole and
synced, they are renamed into place, the sidecar last: a result that has one is complete. What they replace waits in
the hidden folder until then, so a process that was killed at any point can be undone by the next.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from overcrank.engines.manifest import file_entry
from overcrank.errors import RequestError
from overcrank.files import sync, sync_folder, write_errors
from overcrank.owners import owner_of, this_process

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {"mp4": ".mp4", "gif": ".gif", "png": "-frames", "sheet": ".sheet.png", "latents": ".latents.safetensors"}
FRAME, MOST_FRAMES = "{:05}.png", 1_000_000
BESIDE_NAME = 64
"""Bytes that the longest name of a result has beside the result's own: a hidden folder's."""
Replace = Literal["nothing", "own", "all"]
"""What a render may put its results in the place of: what overcrank wrote, by its sidecar, or any file."""
log = logging.getLogger("overcrank")
_placing = threading.Lock()  # held while hidden folders come and results take their places


def prepare_folder(folder: Path) -> None:
    """Make the folder; raises StoreError when nothing can be written into it."""
    with write_errors(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def result_paths(stem: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """Format → its file (PNG frames: a folder) beside `stem`."""
    return {f: stem.with_name(stem.name + SUFFIXES[f]) for f in formats}


def sidecar_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def preview_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.preview.png")


def is_complete(stem: Path, digest: str) -> bool:
    """Whether a result of this request lies there whole, by its sidecar and its files' sizes."""
    about = _read(sidecar_path(stem))
    if about is None or about.get("request_sha256") != digest or not about["files"]:
        return False
    return all(_is_there(stem.with_name(entry["name"]), entry) for entry in about["files"])


def described(path: Path) -> dict[str, Any]:
    """What a sidecar says of a result: bytes and SHA-256 of a file; number and SHA-256 of a folder's frames."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        lines = [f"{name} {file_entry(path / name).sha256}\n" for name in names]
        return {"count": len(names), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    entry = file_entry(path)
    return {"bytes": entry.bytes, "sha256": entry.sha256}


# ── what is in the way ───────────────────────────────────────────────────────────────


def require_free(stem: Path, formats: tuple[str, ...], replace: Replace) -> None:
    """Raise RequestError if results would take the place of what they may not; strangers' folders never go."""
    own = {entry["name"]: entry for entry in _listed(stem)}
    for name, path in {**result_paths(stem, formats), "json": sidecar_path(stem)}.items():
        if not os.path.lexists(path):
            continue
        if replace == "nothing":
            raise RequestError(f"{path} is there already; add --overwrite to replace it, or give another --out.")
        kind = "folder" if path.is_dir() and not path.is_symlink() else "file"
        if kind != ("folder" if name == "png" else "file"):
            raise RequestError(f"{path} is in the way, a {kind}; move it, or give another name.")
        if kind == "folder":
            _require_own_frames(path, own.get(path.name, {}))
        elif replace == "own" and path.name not in own and not (name == "json" and own):
            raise RequestError(f"{path} is there and overcrank did not write it; move it, or give another name.")


def _require_own_frames(folder: Path, entry: dict[str, Any]) -> None:
    own = {FRAME.format(i) for i in range(entry.get("count", 0))}
    others = sorted(p.name for p in folder.iterdir() if p.name not in own)
    if others:
        raise RequestError(f"{folder} holds {others[0]}, which overcrank did not write; move it, or give another name.")


def _read(sidecar: Path) -> dict[str, Any] | None:
    """A sidecar's content; None for a file that is missing or no sidecar."""
    try:
        about = json.loads(sidecar.read_text("utf-8"))
        if about["overcrank"] and all(map(_is_entry, about["files"])):
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether it tells of a file, or a folder of frames, beside its sidecar."""
    name, kind = entry["name"], "count" if "count" in entry else "bytes"
    beside = bool(name) and Path(name).name == name and name not in (".", "..") and "\0" not in name
    return beside and type(entry[kind]) is int and 0 <= entry[kind] < (MOST_FRAMES if kind == "count" else 2**63)


def _listed(stem: Path) -> list[dict[str, Any]]:
    return list((_read(sidecar_path(stem)) or {"files": []})["files"])


def _is_there(path: Path, entry: dict[str, Any]) -> bool:
    try:
        if "count" in entry:
            return path.is_dir() and all((path / FRAME.format(i)).is_file() for i in range(entry["count"]))
        return bool(path.stat().st_size == entry["bytes"])
    except (OSError, KeyError, TypeError):
        return False


def _is_unchanged(path: Path, entry: dict[str, Any]) -> bool:
    """Whether these are the bytes that the sidecar tells of."""
    try:
        return "sha256" in entry and described(path)["sha256"] == entry["sha256"]
    except OSError:
        return False


# ── into place ───────────────────────────────────────────────────────────────────────


@contextmanager
def staging(stem: Path) -> Iterator[Path]:
    """A hidden folder of this process beside the results, gone afterwards."""
    work = _hidden(stem)
    with _placing:
        work.mkdir()
    try:
        yield work
    finally:
        _discard(work, stem)


def place(work: Path, stem: Path, formats: tuple[str, ...], replace: Replace) -> None:
    """Rename the results in `work`, its sidecar among them, into place; a former result goes as a whole.

    Raises RequestError for what is in the way and may not go.
    """
    sync(work)
    sidecar = sidecar_path(stem)
    with _placing:
        require_free(stem, formats, replace)
        targets = list(result_paths(stem, formats).values())
        unchanged = [p for e in _listed(stem) if _is_unchanged(p := stem.with_name(e["name"]), e)]
        former = _former(work)
        former.mkdir()
        for path in dict.fromkeys((sidecar, *targets, *unchanged)):  # the sidecar first: nothing is complete now
            if os.path.lexists(path):
                path.replace(former / path.name)
        for path in targets:
            (work / path.name).replace(path)
        sync_folder(stem.parent)
        (work / sidecar.name).replace(sidecar)
        sync_folder(stem.parent)


def remove_partial_results(stem: Path) -> None:
    """Undo what an interrupted write of this result left behind, of this process or one that is gone."""
    for work in stem.parent.glob(f".{glob.escape(stem.name)}.*.part"):
        token = work.name.removeprefix(f".{stem.name}.").removesuffix(".part")
        if not _may_go(token.removesuffix(".gone")):
            continue
        if token != this_process().tag() and not token.endswith(".gone"):
            try:
                work = work.rename(_hidden(stem))  # of several processes that find it, one undoes it
            except OSError:
                continue
        _discard(work, stem)
    if _may_go(_previewer(preview_path(stem))):
        preview_path(stem).unlink(missing_ok=True)


def stop_writing(stems: list[Path]) -> None:
    """Remove what is half written, for a process that ends at once; none of its threads writes results afterwards."""
    _placing.acquire(timeout=10)
    for stem in stems:
        remove_partial_results(stem)


def _may_go(token: str) -> bool:
    owner = owner_of(token)
    return owner is not None and (owner == this_process() or owner.gone() is True)


def _hidden(stem: Path) -> Path:
    return stem.with_name(f".{stem.name}.{this_process().tag()}.part")


def _former(work: Path) -> Path:
    return work / "former"


def _discard(work: Path, stem: Path) -> None:
    """Remove a hidden folder; if its results are in place without their sidecar, what was there before comes back."""
    if not os.path.lexists(work):  # `stop_writing` was here
        return
    sidecar, former = sidecar_path(stem), _former(work)
    about = _read(work / sidecar.name)
    if about is not None and former.is_dir() and not os.path.lexists(sidecar):
        for entry in about["files"]:
            path = stem.with_name(entry["name"])
            if not os.path.lexists(work / path.name) and _is_unchanged(path, entry):
                path.replace(work / path.name)
        for path in sorted(former.iterdir(), key=lambda p: p.name == sidecar.name):  # the sidecar last
            if not os.path.lexists(stem.with_name(path.name)):
                path.replace(stem.with_name(path.name))
    gone = work
    if not work.name.endswith(".gone.part"):
        gone = work.rename(
            work.with_name(f"{work.name.removesuffix('.part')}.gone.part")
        )  # who still writes there fails
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)


# ── previews ─────────────────────────────────────────────────────────────────────────


def write_preview(image: np.ndarray, stem: Path) -> None:
    """Replace the preview picture, but not a file that overcrank did not write; `image`: [H, W, 3] in [0, 1]."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path, notes = preview_path(stem), PngInfo()
    if os.path.lexists(path) and not _may_go(_previewer(path)):
        log.warning("%s is not overcrank's, or of another render; no preview is written.", path.name)
        return
    notes.add_text(OWNER, this_process().tag())
    with _placing, write_errors(stem.parent, "--out"):
        part = _hidden(stem)
        Image.fromarray((image * 255).round().astype(np.uint8)).save(part, format="PNG", pnginfo=notes)
        part.replace(path)


OWNER = "overcrank preview of"


def _previewer(path: Path) -> str:
    """The token of the process that wrote a preview; "" if it is none."""
    if not path.exists():
        return ""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return str(picture.info.get(OWNER, ""))
    except Exception:  # whatever a parser makes of another's file
        return ""
