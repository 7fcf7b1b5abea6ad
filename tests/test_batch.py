"""Many jobs: what is refused, what fails alone, what resumes, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

OVERCRANK = [sys.executable, "-c", "from overcrank.cli import main; main()"]


def write_jobs(path: Path, jobs: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(j) for j in jobs) + "\n")
    return path


def results(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.json"))


@pytest.mark.quick
def test_every_wrong_line_is_named_at_once_and_nothing_is_written(run: Any, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        '{"prompt": "fine", "output": "same"}',
        '{"prompt": "fine", "step": 4}',
        '{"prompt": "fine", "image": "nowhere.png"}',
        "",
        '{"prompt": "fine", "height": 60, "frames": 16}',
        '{"prompt": "   "}',
        '{"prompt": "fine",',
        '{"prompt": "fine", "output": "../up"}',
        '{"prompt": "fine", "output": "Same"}',
        '{"steps": "many"}',
        '["a list"]',
    ]
    jobs.write_text("\n".join(lines))
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out")
    assert result.exit_code == 2
    for text in (
        "error: " + str(jobs) + " has 9 wrong lines:",
        "line 2: step: no such field; there are prompt,",
        "line 3: image nowhere.png does not exist.",
        "line 5: ltx-demo cannot make 64x60x16: height 60 is not a multiple of 32 (nearest: 32 or 64); frames 16 is",
        "line 6: prompt: ltx-demo needs one, and it is empty",
        "line 7: no valid JSON:",
        "line 8: output '../up' must be a plain file name",
        "line 9: output 'Same' is also that of line 1",
        "line 10: steps: input should be a valid integer",
        "line 11: no JSON object",
    ):
        assert text in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no jobs"), ("\n \n", "holds no jobs"), (None, "cannot be read")],
)
@pytest.mark.quick
def test_a_job_file_without_jobs(content: str | None, says: str, run: Any, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    if content is not None:
        jobs.write_text(content)
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--prompt x --frames 18", "frames 18 is not 4k+1 (nearest: 17 or 21)"),
        ("--prompt x --steps 0", "--steps: input should be greater than or equal to 1 (got 0)"),
        ("--prompt x --guidance nan", "--guidance: input should be a finite number"),
        ("--prompt x --seed -1", "--seed: input should be greater than or equal to 0"),
        ("--prompt x --image none.png", "image none.png does not exist"),
        ("--prompt x --audio {here}/text.txt", "cannot be read as sound"),
        ("--prompt x -o clip.avi", "unknown suffix .avi"),
        ("--prompt x -o {here}", "is a folder; give a file name"),
        ("--prompt x --formats mp5", "unknown format 'mp5'"),
        ("--prompt x -o {here}/text.txt/clip.mp4", "a file of that name is in the way"),
        ("--prompt x --model ltx-dema", "did you mean ltx-demo"),
        ("--prompt x --model ltx-2b-0.9.0 --last-image {here}/text.txt", "cannot do first-last-frame"),
        ("--prompt x --device tpu", "--device tpu: use cpu, cuda, or cuda:N"),
        ("--prompt x --model ltx-2b-0.9.5", "is not in the local hub cache"),
    ],
)
def test_render_refusals(arguments: str, says: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no sound, no picture")
    before = sorted(tmp_path.rglob("*"))
    result = run("overcrank", "render", "--quiet", *arguments.format(here=tmp_path).split())
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_of_another_aspect_ratio_is_cropped_and_said_so(run: Any, tmp_path: Path) -> None:
    pixels = np.full((100, 300, 3), 200, np.uint8)
    pixels[:, :100] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    options = ["--prompt", "x", "--steps", 1, "--quiet", "--backend", "eager", "--image", tmp_path / "wide.png"]
    result = run("overcrank", "render", *options, "-o", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "wide.png is 300x100 and the video 64x64: its middle 100x100 is used, the rest is cut off." in said


def test_a_broken_job_does_not_stop_the_rest_and_finished_ones_are_skipped(run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    jobs = [{"prompt": f"a red circle {i}", "steps": 2, "seed": i, "formats": ["gif"]} for i in range(4)]
    jobs[1]["image"] = "broken.png"
    file = write_jobs(tmp_path / "jobs.jsonl", jobs)
    out = tmp_path / "out"
    result = run("overcrank", "batch", file, "-o", out, "--json", "--backend", "eager")
    assert result.exit_code == 3
    rows = json.loads(result.stdout)["jobs"]
    assert [r["status"] for r in rows] == ["done", "failed", "done", "done"]
    assert "cannot be read as a picture" in rows[1]["error"]
    assert results(out) == ["0001", "0003", "0004"]
    (out / "0003.gif").write_bytes(b"damaged")
    write_jobs(file, [*jobs[:3], {**jobs[3], "seed": 99}])
    Image.new("RGB", (64, 64)).save(tmp_path / "broken.png")
    again = json.loads(run("overcrank", "batch", file, "-o", out, "--json", "--backend", "eager").stdout)["jobs"]
    assert [r["status"] for r in again] == ["skipped", "done", "done", "done"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_overlapping_jobs_give_the_frames_of_jobs_one_by_one(run: Any, tmp_path: Path) -> None:
    jobs = [{"prompt": f"a blue square moving {d}", "steps": 3, "formats": ["png"]} for d in ("up", "down", "left")]
    file = write_jobs(tmp_path / "jobs.jsonl", jobs)
    for name, lanes in (("one", 1), ("two", 2)):
        options = ["--quiet", "--lanes", lanes, "--backend", "eager"]
        assert run("overcrank", "batch", file, "-o", tmp_path / name, *options).exit_code == 0
    for picture in sorted((tmp_path / "one").rglob("0*.png")):
        twin = tmp_path / "two" / picture.relative_to(tmp_path / "one")
        assert picture.read_bytes() == twin.read_bytes()


def started(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [*OVERCRANK, "batch", str(file), "-o", str(out), "--backend", "eager", "--quiet", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_hangs_up)


def _hangs_up() -> None:
    """As of a terminal's own, also where the tests run under nohup, which a batch obeys."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_twelve_jobs_one_broken_one_cancelled_then_resumed(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    jobs: list[dict[str, Any]] = [{"prompt": f"job {i}", "steps": 20, "formats": ["gif"]} for i in range(12)]
    jobs[1]["image"] = "broken.png"
    file, out = write_jobs(tmp_path / "jobs.jsonl", jobs), tmp_path / "out"
    batch = started(file, out)
    wait_for(lambda: len(results(out)) >= 3)
    batch.send_signal(signal.SIGINT)
    _, said = batch.communicate(timeout=120)
    assert batch.returncode == 130, said
    assert "cancelling after the current step" in " ".join(said.split())
    assert "1 failed" in said
    kept = results(out)
    assert 3 <= len(kept) < 11
    assert not [p for p in out.iterdir() if p.name.startswith(".") or "preview" in p.name]
    stamps = {name: (out / f"{name}.json").stat().st_mtime_ns for name in kept}
    second = started(file, out)
    _, said = second.communicate(timeout=240)
    assert second.returncode == 3
    assert f"{11 - len(kept)} done, {len(kept)} skipped, 1 failed" in said
    assert len(results(out)) == 11
    assert stamps == {name: (out / f"{name}.json").stat().st_mtime_ns for name in kept}


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT, signal.SIGTERM], 143),
    ],
)
def test_what_stops_at_once_leaves_nothing_half_written(signals: list[int], status: int, tmp_path: Path) -> None:
    long = {"prompt": "long", "steps": 20, "height": 256, "width": 256, "frames": 33}
    file = write_jobs(tmp_path / "jobs.jsonl", [{**long, "output": "a"}, {**long, "output": "b"}])
    out = tmp_path / "out"
    batch = started(file, out, "--preview")
    wait_for(lambda: (out / "a.preview.png").exists())
    for number in signals:
        batch.send_signal(number)
        time.sleep(0.05)
    batch.communicate(timeout=60)
    assert batch.returncode == status
    assert list(out.iterdir()) == []


def test_a_full_disk_while_encoding_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the same failing write, EFBIG in place of ENOSPC."""
    jobs = [{"prompt": "x", "steps": 1, "formats": ["png", "latents", "mp4"]}]
    file = write_jobs(tmp_path / "jobs.jsonl", jobs)
    out = tmp_path / "out"
    limit = 4000

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*OVERCRANK, "batch", str(file), "-o", str(out), "--backend", "eager", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert done.returncode == 2, done.stderr
    (row,) = json.loads(done.stdout)["jobs"]
    assert "The disk that holds" in row["error"]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says", "statuses"),
    [
        ("AcceleratorError", "the card failed: CUDA error: unspecified launch failure; see nvidia-smi", 1),
        ("OutOfMemoryError", "out of memory; render fewer frames, a smaller size, with --vram low", 2),
    ],
)
def test_what_the_card_does_to_a_batch(
    error: str, says: str, statuses: int, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure of the card nothing more can be computed; after a lack of memory the next job may fit."""
    import torch
    from overcrank.runtime.render import renderer as driver

    def fails(*_: Any) -> Any:
        raise getattr(torch, error)("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")

    monkeypatch.setattr(driver, "encoded", fails)
    jobs = write_jobs(tmp_path / "jobs.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out", "--backend", "eager", "--json")
    report = json.loads(result.output)["jobs"]
    failed = [job for job in report if job["status"] == "failed"]
    assert len(failed) == statuses
    assert says in failed[0]["error"]
    assert results(tmp_path / "out") == []
