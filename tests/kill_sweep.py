"""A write of results killed before each of its calls to the system, in turn; run by test_results.py.

    python -m tests.kill_sweep FOLDER CASE

Prints how many points there were. Raises AssertionError where what a kill leaves is not as it must be.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from overcrank.owners import this_process
from overcrank.runtime.render.output import Video, Writing, write_results
from overcrank.runtime.render.results import Replace, is_complete, remove_partial_results, sidecar_path

CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Replace]] = {  # former formats, new ones
    "first": ((), ("png", "gif", "sheet"), "nothing"),
    "again": (("png", "sheet"), ("png", "sheet"), "own"),
    "other formats": (("gif", "png"), ("sheet", "latents"), "all"),
}


def write(stem: Path, formats: tuple[str, ...], shade: int, replace: Replace) -> None:
    video = Video(np.full((3, 16, 16, 3), shade, np.uint8), 8, np.zeros(4, np.float32))
    about = {"overcrank": "0", "request_sha256": str(shade)}
    write_results(video, stem, Writing(formats, about, replace=replace))


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed(work: Callable[[], Any], point: int) -> bool:
    """Whether a process that did the work ended at its `point`th call to the file system, and not of itself."""
    child = os.fork()
    if child == 0:
        left = [point]

        def count(event: str, _: Any) -> None:
            if event == "open" or event.startswith(("os.", "shutil.")):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def sweep(folder: Path, case: str) -> int:
    former, formats, replace = CASES[case]
    stem, point = folder / "take", 0
    while True:
        point += 1
        shutil.rmtree(folder, ignore_errors=True)
        running = folder / f".take.v2.{this_process().tag()}.part"  # of a job whose name begins alike
        running.mkdir(parents=True)
        for mine in (running / "frames", folder / "take.txt", folder / "take.v2.json"):
            mine.write_text("a user's")
        others = contents(folder)
        if former:
            write(stem, former, 1, "nothing")
        before = contents(folder)
        ended = not killed(lambda: write(stem, formats, 2, replace), point)
        check(stem, others)
        killed(lambda: remove_partial_results(stem), 1 + point % 9)
        check(stem, others)
        remove_partial_results(stem)
        check(stem, others)
        after = contents(folder)
        assert not [p for p in folder.glob(".take.*") if p != running], (point, "leavings")
        assert after == before or is_complete(stem, "2"), (point, sorted(after))
        assert not (after == before and ended)
        if is_complete(stem, "2"):
            assert {p.split("/")[0] for p in set(after) - set(others)} == names(formats), point
        write(stem, formats, 2, "all")
        if ended:
            return point


def names(formats: tuple[str, ...]) -> set[str]:
    suffixes = {"png": "-frames", "gif": ".gif", "sheet": ".sheet.png", "latents": ".latents.safetensors"}
    return {f"take{suffixes[f]}" for f in formats} | {"take.json"}


def check(stem: Path, others: dict[str, str]) -> None:
    """What is another's is untouched, and a result that has a sidecar is whole."""
    now = contents(stem.parent)
    assert {name: now.get(name) for name in others} == others
    if sidecar_path(stem).exists():
        assert is_complete(stem, "1") or is_complete(stem, "2")


if __name__ == "__main__":
    print(sweep(Path(sys.argv[1]), sys.argv[2]))
