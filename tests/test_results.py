"""Where results go: what they may replace, whose what is half written is, and that all of it reaches the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overcrank.errors import RequestError, StoreError
from overcrank.runtime.render.output import Video, Writing, write_results
from overcrank.runtime.render.results import (
    is_complete,
    preview_path,
    remove_partial_results,
    staging,
    write_preview,
)
from PIL import Image

from tests import kill_sweep

ABOUT = {"overcrank": "0", "request_sha256": "1", "request": {"prompt": "x"}}


def video(shade: int = 0) -> Video:
    frames = np.random.default_rng(shade).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    return Video(frames, 8, np.zeros(4, np.float32))


def write(stem: Path, *formats: str, over: Any = "nothing", shade: int = 0, **about: Any) -> list[Path]:
    return write_results(video(shade), stem, Writing(formats, ABOUT | about, replace=over))


def test_a_job_leaves_alone_what_another_of_a_like_name_is_writing(tmp_path: Path) -> None:
    with staging(tmp_path / "s0.v2") as work:
        write(tmp_path / "s0", "gif")
        remove_partial_results(tmp_path / "s0")
        assert work.is_dir()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("case", kill_sweep.CASES)
def test_a_write_is_killed_at_every_point(case: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.kill_sweep", str(tmp_path / "out"), case]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 25


# ── what is in the way ───────────────────────────────────────────────────────────────


def test_files_of_others_never_go(tmp_path: Path) -> None:
    (tmp_path / "x-frames").mkdir()
    (tmp_path / "x-frames" / "holiday.png").write_text("a stranger's")
    for over in ("nothing", "own", "all"):
        with pytest.raises(RequestError, match="x-frames"):
            write(tmp_path / "x", "png", over=over)
    assert (tmp_path / "x-frames" / "holiday.png").read_text() == "a stranger's"
    write(tmp_path / "y", "png")
    (tmp_path / "y-frames" / "notes.txt").write_text("a stranger's")
    with pytest.raises(RequestError, match=r"y-frames holds notes\.txt, which overcrank did not write"):
        write(tmp_path / "y", "png", over="all")
    (tmp_path / "z.gif").write_text("a stranger's")
    with pytest.raises(RequestError, match=r"z\.gif is there and overcrank did not write it"):
        write(tmp_path / "z", "gif", over="own")
    assert is_complete(tmp_path / "y", "1")


def test_a_result_is_replaced_whole_and_only_where_asked(tmp_path: Path) -> None:
    stem = tmp_path / "yc"
    write(stem, "gif", "png")
    first = kill_sweep.contents(tmp_path)
    with pytest.raises(RequestError, match=r"yc\.json is there already; add --overwrite"):
        write(stem, "sheet", over="nothing")
    assert kill_sweep.contents(tmp_path) == first
    (tmp_path / "yc.gif").write_text("edited since")
    write(stem, "sheet", over="all", shade=1)
    assert {p.name for p in tmp_path.iterdir()} == {"yc.gif", "yc.sheet.png", "yc.json"}, "what was edited stays"
    assert [f["name"] for f in json.loads((tmp_path / "yc.json").read_text())["files"]] == ["yc.sheet.png"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "gif", "png")
    first = kill_sweep.contents(tmp_path)
    rename = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "x-frames" and "former" not in str(self) and self.parent != Path(target).parent:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="is full; free space or give --out elsewhere"):
        write(tmp_path / "x", "gif", "png", over="own", shade=1)
    assert kill_sweep.contents(tmp_path) == first


def test_render_asks_and_overwrites(run: Any, tmp_path: Path) -> None:
    words = ["render", "x", "--steps", 1, "--backend", "eager", "--quiet", "-o", tmp_path / "a.png", "--formats", "png"]
    assert run("overcrank", *words).exit_code == 0
    before = kill_sweep.contents(tmp_path)
    refused = run("overcrank", *words, "--seed", 1)
    assert refused.exit_code == 2
    assert "a-frames is there already; add --overwrite to replace it" in refused.output
    assert kill_sweep.contents(tmp_path) == before
    assert run("overcrank", *words, "--seed", 1, "--overwrite").exit_code == 0
    assert kill_sweep.contents(tmp_path) != before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_sidecars_of_an_attacker_take_nothing(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever they list, files that are not beside them, and not as they tell, stay."""
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (tmp_path / "letter.txt").write_text("a user's")
    (folder / "x.txt").write_text("a user's")
    anything = st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    names = st.sampled_from(
        ["x.gif", "x-frames", "..", ".", "", "../letter.txt", "x.txt", str(tmp_path / "letter.txt"), "x\0"]
    )
    entry = st.fixed_dictionaries(
        {"name": names | anything},
        optional={"bytes": anything, "count": anything | st.just(10**15), "sha256": anything},
    )
    about = data.draw(st.fixed_dictionaries({"overcrank": anything, "files": st.lists(entry, max_size=3) | anything}))
    (folder / "x.json").write_text(json.dumps(about | {"request_sha256": "1"}))
    is_complete(folder / "x", "1")
    with contextlib.suppress(RequestError):
        write(folder / "x", "gif", over="own")
    write(folder / "x", "gif", over="all")
    assert is_complete(folder / "x", "1")
    assert (tmp_path / "letter.txt").read_text() == (folder / "x.txt").read_text() == "a user's"
    assert {p.name for p in folder.iterdir()} == {"x.gif", "x.json", "x.txt"}


# ── previews ─────────────────────────────────────────────────────────────────────────


def test_a_preview_is_its_render_s_and_no_one_else_s(tmp_path: Path) -> None:
    stem, image = tmp_path / "p", np.zeros((4, 4, 3), np.float32)
    Image.new("RGB", (2, 2)).save(preview_path(stem))
    write_preview(image, stem)
    remove_partial_results(stem)
    with Image.open(preview_path(stem)) as kept:
        assert kept.size == (2, 2)
    preview_path(stem).unlink()
    write_preview(image, stem)
    write_preview(image, stem)
    assert [p.name for p in tmp_path.iterdir()] == ["p.preview.png"]
    remove_partial_results(stem)
    assert not list(tmp_path.iterdir())


# ── what is written ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_results_are_as_the_umask_has_it(mask: int, tmp_path: Path) -> None:
    former = os.umask(mask)
    try:
        write(tmp_path / "x", "mp4", "gif", "png", "sheet", "latents")
    finally:
        os.umask(former)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path.name


def test_a_result_is_synced_before_it_has_its_name(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not here")
    code = "import pathlib, sys; from tests import test_results as t; t.write(pathlib.Path(sys.argv[1]), 'gif', 'png')"
    log = tmp_path / "log"
    words = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,rename,renameat,renameat2", sys.executable, "-c"]
    done = subprocess.run([*words, code, str(tmp_path / "x")], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("tracing is not allowed")
    assert done.returncode == 0, done.stderr
    events = []
    for line in log.read_text().splitlines():
        synced = re.search(r"fsync\(\d+<(.*?)>", line)
        renamed = re.search(r'rename\w*\("(.*?)", "(.*?)"', line)
        if synced:
            events.append(("synced", synced[1]))
        elif renamed and ".part/" in renamed[1] and ".part/" not in renamed[2]:
            events += [("renamed", renamed[1]), ("named", renamed[2])]
    work = next(path for event, path in events if event == "renamed").rpartition("/")[0]
    for name in ("x.gif", "x-frames", "x.json"):
        assert events.index(("synced", f"{work}/{name}")) < events.index(("named", str(tmp_path / name)))
    for i in range(3):
        assert ("synced", f"{work}/x-frames/{i:05}.png") in events
    sidecar = events.index(("named", str(tmp_path / "x.json")))
    folder = [i for i, event in enumerate(events) if event == ("synced", str(tmp_path))]
    assert folder[0] < sidecar < folder[-1], "the folder is synced before the sidecar has its name, and after"


def test_a_sidecar_tells_of_its_frames_and_names_files_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    request = {"prompt": "/not/a/path", "image": str(tmp_path / "in" / "first.png")}
    write(tmp_path / "out" / "x", "png", "mp4", request=request, source=str(tmp_path / "weights"))
    about = json.loads((tmp_path / "out" / "x.json").read_text())
    assert about["request"] == {"prompt": "/not/a/path", "image": "../in/first.png"}
    assert about["source"] == "../weights"
    frames = sorted((tmp_path / "out" / "x-frames").iterdir())
    pixels = b"".join(Image.open(f).convert("RGB").tobytes() for f in frames)
    assert about["frames_sha256"] == hashlib.sha256(pixels).hexdigest()
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        comment = container.metadata["comment"]
    assert json.loads(comment)["request"]["image"] == "first.png"
    assert str(tmp_path) not in comment


def test_no_metadata_is_none(run: Any, tmp_path: Path) -> None:
    words = ["render", "a very particular ring", "--steps", 1, "--backend", "eager", "--quiet", "--formats", "mp4"]
    for name, extra in (("with", []), ("without", ["--no-metadata"])):
        assert run("overcrank", *words, *extra, "-o", tmp_path / f"{name}.mp4").exit_code == 0
    assert b"particular ring" in (tmp_path / "with.mp4").read_bytes()
    bare = (tmp_path / "without.mp4").read_bytes()
    assert b"particular ring" not in bare
    assert b"overcrank" not in bare
    assert str(tmp_path).encode() not in (tmp_path / "with.mp4").read_bytes()
