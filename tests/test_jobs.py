"""Job files, names and sizes as people give them; what is refused is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overcrank.errors import UserError, safe_text
from overcrank.models import check_shape, resolve
from overcrank.runtime.render.names import check_name
from overcrank.runtime.render.request import RenderRequest, prompts_of, read_jobs, require_memory
from overcrank.runtime.render.results import SUFFIXES
from PIL import Image

DEMO = resolve("ltx-demo")


def jobs_of(folder: Path, content: bytes) -> list[RenderRequest]:
    (folder / "jobs.jsonl").write_bytes(content)
    return read_jobs(folder / "jobs.jsonl", DEMO)


# ── files ────────────────────────────────────────────────────────────────────────────

TEXT = '{"prompt": "a red\u2028circle\u0085of\x0bone line"}\r\n\n{"prompt": "zwei Kreise ü"}'.replace("\x0b", "\\u000b")
PROMPTS = ["a red\u2028circle\u0085of\x0bone line", "zwei Kreise ü"]


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),  # PowerShell's >
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n{", "\n\ufeff{").encode(),  # files with marks, one after the other
    ],
    ids=["utf-8", "utf-8 with a mark", "utf-16", "utf-16 of the other order", "mark within"],
)
def test_jobs_in_every_encoding(content: bytes, tmp_path: Path) -> None:
    assert [job.prompt for job in jobs_of(tmp_path, content)] == PROMPTS


def test_prompts_are_lines_that_end_in_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red\u2028circle\r\n\r\nzwei\x1eKreise\n".encode())
    assert prompts_of(tmp_path / "prompts.txt", DEMO) == ["a red\u2028circle", "zwei\x1eKreise"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "x"}'.encode("utf-16-le"), "has NUL characters, as UTF-16 without its mark has"),
        (b'{"prompt": "\xe4"}', "is not UTF-8 (byte 12); save it as UTF-8"),
        (b"[" * 100_000, "line 1: no valid JSON: brackets within brackets, too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "line 1: no valid JSON"),
        (b'{"prompt": "x", "width": ' + b"9" * 4000 + b"}", "line 1: width: input should be less than or equal to"),
        (b'{"prompt": "x", "width": 1e999}', "line 1: width: input should be a finite number"),
        (b'{"prompt": "x", "fps": 0.0004}', "line 1: fps: input should be greater than or equal to 0.1 (got 0.0004)"),
        (b'{"prompt": "\\ud800"}', "line 1: prompt"),
        (b'{"prompt": "x", "image": "/dev/null"}', "line 1: image /dev/null is no file"),
        (
            b'{"prompt": "x", "crop": [64, 65, 17]}',
            "line 1: crop [64, 65, 17]: give height, width and frames within [64, 64",
        ),
        (b'{"prompt": "x", "frames": 9, "seconds": 1}', "line 1: seconds and frames both say how long"),
    ],
)
def test_refused_job_files(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        jobs_of(tmp_path, content)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 600


def test_an_endless_job_file() -> None:
    with pytest.raises(UserError, match=r"/dev/zero has more than 64\.0 MB"):
        read_jobs(Path("/dev/zero"), DEMO)


def test_jobs_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"echo '{{\"prompt\": \"x\"}}' > '{tmp_path / 'pipe'}'"])
    assert [job.prompt for job in read_jobs(tmp_path / "pipe", DEMO)] == ["x"]
    writer.wait()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_job_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    fields = [
        "prompt",
        "output",
        "seed",
        "width",
        "frames",
        "seconds",
        "fps",
        "image",
        "formats",
        "crop",
        "fit",
        "sigmas",
    ]
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
    content = bytearray(json.dumps(data.draw(st.dictionaries(st.sampled_from(fields), values))).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        jobs = jobs_of(tmp_path, bytes(content))
    except UserError:
        return
    for job in jobs:
        check_shape(DEMO, job.shape)
        check_name(job.output, "output")
        assert 0.1 <= (job.fps or 0) <= 240


# ── names ────────────────────────────────────────────────────────────────────────────

WRONG_NAMES = {
    "CON": "a device on Windows",
    "con.v2": "a device on Windows",
    "Lpt9": "a device on Windows",
    "com¹": "a device on Windows",
    "x:y": "has ':' in it",
    "a?b": "has '?' in it",
    "tab\tbed": "has '\\t' in it",
    "shot.": "ends in a dot or a space",
    "shot ": "ends in a dot or a space",
    "../up": "a plain file name without a folder",
    "a\\b": "a plain file name without a folder",
    ".hidden": "not begin with a dot",
    "n" * 245: "has 245 bytes, and at most 191 leave room",
    "ü" * 100: "has 200 bytes, and at most 191 leave room",
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_some_file_system_refuses(name: str, tmp_path: Path, run: Any) -> None:
    with pytest.raises(UserError) as refused:
        jobs_of(tmp_path, json.dumps({"prompt": "x", "output": name}).encode())
    assert WRONG_NAMES[name] in str(refused.value)
    if "/" not in name:
        result = run("overcrank", "render", "x", "--quiet", "-o", tmp_path / f"{name}.mp4")
        assert result.exit_code == 2
        assert f"--out '{safe_text(name)}' " in result.output
        assert [p.name for p in tmp_path.iterdir()] == ["jobs.jsonl"]


@pytest.mark.parametrize("name", ["shot_v1.2", "console", "com10", "a.b.c", "Ünï", "写真", "x" * 191, "nul-space"])
def test_names_that_every_file_system_takes(name: str, tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, json.dumps({"prompt": "x", "output": name}).encode())
    for suffix in SUFFIXES.values():
        (tmp_path / f"{job.output}{suffix}").touch()


def test_names_that_some_file_system_takes_for_one(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "Fläche")
    for twins in ((composed, unicodedata.normalize("NFD", composed)), ("Take", "tAKE"), ("STRASSE", "straße")):
        lines = "\n".join(json.dumps({"prompt": "x", "output": name}) for name in twins)
        with pytest.raises(UserError, match="is also that of line 1"):
            jobs_of(tmp_path, lines.encode())


def test_a_dot_in_a_name_begins_no_suffix(run: Any, tmp_path: Path) -> None:
    words = ["render", "x", "--steps", 1, "--backend", "eager", "--quiet", "--formats", "sheet"]
    assert run("overcrank", *words, "-o", tmp_path / "shot_v1.2").exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"shot_v1.2.sheet.png", "shot_v1.2.json"}
    for suffix in (".avi", ".mkv", ".jpg", ".wav"):
        refused = run("overcrank", *words, "-o", tmp_path / f"shot{suffix}")
        assert f"unknown suffix {suffix}; use .mp4" in refused.output


# ── sizes and lengths ────────────────────────────────────────────────────────────────


def completed(**values: Any) -> RenderRequest:
    return RenderRequest(prompt="x", **values).completed(DEMO)


def test_seconds_are_frames_of_the_grid() -> None:
    assert completed(seconds=2, fps=8).frames == 17
    assert completed(seconds=2.3, fps=10).frames == 25, "23 lies next to 21 and 25, nearer to neither: even steps"
    assert completed(seconds=0.01).frames == 1
    fitted = completed(seconds=2.3, fps=10, fit=True, formats=("gif",))
    assert (fitted.frames, fitted.kept.frames) == (25, 23)


def test_a_size_that_is_not_made_is_refused_and_fit_is_offered() -> None:
    with pytest.raises(
        UserError, match=r"height 60 is not a multiple of 32 .* With fit=True, or \"fit\": true in a job"
    ):
        completed(height=60)
    fitted = completed(height=60, width=64, frames=16, fit=True)
    assert str(fitted.shape) == "64x64x17"
    assert str(fitted.kept) == "64x60x16"
    assert completed(height=64, width=64, frames=17, fit=True).digest("m") == completed().digest("m")
    with pytest.raises(UserError, match="An MP4 has even sides, and 64x61 has not"):
        completed(height=61, fit=True)


def test_a_size_beyond_the_machine_s_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"its frames alone are 96\.6 TB, and this machine has"):
        require_memory(completed(height=16384, width=16384, frames=29993))
    require_memory(completed())


def test_fit_computes_more_and_keeps_the_middle(run: Any, tmp_path: Path) -> None:
    words = ["render", "a red ring", "--steps", 2, "--backend", "eager", "--quiet", "--formats", "png"]
    sizes = ["--width", 50, "--height", 41, "--frames", 15, "--fit"]
    assert run("overcrank", *words, *sizes, "-o", tmp_path / "fit.png").exit_code == 0
    assert run("overcrank", *words, "--frames", 17, "-o", tmp_path / "whole.png").exit_code == 0
    frames = {
        n: [np.asarray(Image.open(p)) for p in sorted((tmp_path / f"{n}-frames").iterdir())] for n in ("fit", "whole")
    }
    assert [len(frames[n]) for n in ("fit", "whole")] == [15, 17]
    for kept, whole in zip(frames["fit"], frames["whole"], strict=False):
        assert np.array_equal(kept, whole[11:52, 7:57])
    request = json.loads((tmp_path / "fit.json").read_text())["request"]
    (tmp_path / "jobs.jsonl").write_text(json.dumps({**request, "output": "again"}))
    assert (
        run("overcrank", "batch", tmp_path / "jobs.jsonl", "-o", tmp_path, "--backend", "eager", "--quiet").exit_code
        == 0
    )
    digests = [json.loads((tmp_path / f"{n}.json").read_text())["frames_sha256"] for n in ("fit", "again")]
    assert digests[0] == digests[1]


def test_a_picture_that_is_fitted_lies_where_it_is_kept(tmp_path: Path) -> None:
    from overcrank.runtime.render.media import cropped, media_of

    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    request = completed(height=40, width=50, frames=15, fit=True, image=tmp_path / "p.png", formats=("png",))
    picture = np.asarray(media_of(request, DEMO).images[0])
    assert picture.shape == (64, 64, 3)
    assert np.array_equal(cropped(picture[None], request.kept)[0], pixels)


# ── streams ──────────────────────────────────────────────────────────────────────────


def shell(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m overcrank {words}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize("words", ["models", "models --json", "render é --steps 0", "-h"])
@pytest.mark.parametrize(
    "streams", [">/dev/full", ">&-", "2>&-", "<&- >&- 2>&-", "| head -c 20 >/dev/null; exit ${PIPESTATUS[0]}"]
)
def test_streams_that_take_nothing_change_no_exit_status(words: str, streams: str) -> None:
    done = shell(f"{words} {streams}")
    assert done.returncode == (2 if "render" in words else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "full" in streams and "render" not in words:
        assert done.stderr == "warning: not all of the output could be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1"])
def test_an_encoding_that_lacks_characters(encoding: str, tmp_path: Path) -> None:
    done = shell(f"render 'ü → 写' --steps 0 -o '{tmp_path}/写'", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert "error: --steps" in done.stderr
    done = shell(f"render 'ü' --out '{tmp_path}/写.avi'", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert "写.avi" in done.stderr or "\\u5199.avi" in done.stderr
    assert "Traceback" not in done.stderr
