"""How commands show their work: bars on a terminal, a line where a stage begins and ends elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from overcrank.cli.display import Display, Renders, building, counting, downloading, transferring, watching
from overcrank.runtime.render.renderer import DONE, Outcome, RenderJob

pytestmark = pytest.mark.quick


class Request(NamedTuple):
    steps: int


CLOCK = r"^\[ *\d+\.\d s\] "


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Of stderr, without the clock; stdout is for results."""
    captured = capsys.readouterr()
    assert not captured.out
    return [re.sub(CLOCK, "", line) for line in captured.err.splitlines()]


def some_build(show: Any) -> None:
    show("all", "2 engines, 1 graphs to export, 2 at a time: about 40 s, 31.0 MB")
    for left in range(90, 0, -10):
        show("all", f"building · about {left} s left")
    show("denoiser", "exporting")
    for phase in ("parsing", "generating kernels", "timing"):
        show("denoiser", f"compiling · {phase}")
    show("denoiser", "done")
    show("vae_decoder", "done, failed")
    show("all", "done")


def test_a_build_in_a_pipe_is_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with building(quiet=False) as show:
        some_build(show)
    assert lines(capsys) == [
        "2 engines, 1 graphs to export, 2 at a time: about 40 s, 31.0 MB",
        "all: building",
        "denoiser: exporting",
        "denoiser: compiling",
        "denoiser: done",
        "vae_decoder: done, failed",
        "all: done",
    ]


def test_a_build_on_a_terminal_shows_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with building(quiet=False) as show:
        show("all", "building · about 90 s left")
        show("denoiser", "compiling · generating kernels")
    shown = capsys.readouterr().err
    assert "all: building · about 90 s left" in shown
    assert "denoiser: compiling · generating kernels" in shown


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for forced in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", forced)
        with building(quiet=True) as show:
            some_build(show)
        with downloading("ltx: 5.0 GB", 5_000_000_000, quiet=True) as advance:
            advance(5_000_000_000)
        with counting("calibrating", "samples", quiet=True) as at:
            at(1, 2)
        with Display(quiet=True) as display, display.stage("loading ltx"):
            pass
    assert lines(capsys) == []


def test_a_download_and_a_transfer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with downloading("ltx: 5.0 GB in 3 files from Lightricks/LTX", 5_000_000_000, quiet=False) as advance:
        for _ in range(1000):
            advance(5_000_000)
    first, second, third = lines(capsys)
    assert (first, second) == ("ltx: 5.0 GB in 3 files from Lightricks/LTX", "downloading")
    assert re.fullmatch(r"downloading: done in \d+\.\d s", third)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(quiet=False) as display:
        display.row("downloading", 5_000_000_000, "bytes").advance(2_500_000_000)
    assert "2.5 GB of 5.0 GB" in capsys.readouterr().err
    with transferring() as show:
        show("denoiser.engine", 1_000_000, 4_000_000)
    assert "1.0 MB of 4.0 MB" in capsys.readouterr().err


def test_the_stages_of_a_render_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [RenderJob(Request(30), Path(name)) for name in ("a", "b")]  # type: ignore[arg-type]
    with Display(quiet=False) as display, watching(display, jobs, quiet=False) as watcher:
        assert isinstance(watcher, Renders)
        with display.stage("loading ltx"):
            pass
        watcher.started(jobs[0])
        for name in ("encoding", "denoising"):
            watcher.stage(jobs[0], name)
        for step in range(30):
            watcher.stepped(jobs[0], step + 1, 30)
        watcher.stage(jobs[0], "decoding")
        watcher.ended(Outcome(jobs[0], status=DONE, seconds=2.0))
        watcher.ended(Outcome(jobs[1], status="skipped"))
    told = lines(capsys)
    assert told[0] == "loading ltx"
    assert re.fullmatch(r"loading ltx: done in \d+\.\d s", told[1])
    assert told[2:] == ["a: encoding", "a: denoising", "a: decoding", "a: done in 2.0 s; eager", "b: skipped"]
