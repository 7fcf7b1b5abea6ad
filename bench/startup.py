"""How long `overcrank render` of the demo takes to its first denoising step, before and after, and what it imports.

    python bench/startup.py --before 6ca0613 [--pairs 7]

The commit before is checked out in a folder of its own; processes of both alternate. Seconds of wall time since the
process started and of processor time, in median; the ratio is the median of the pairs'. Then the imports that take
longest by themselves, and by package, as `python -X importtime` tells. bench/results/startup.json.
Predicted before the first run: half the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
EXTRAS = ("scipy", "peft")  # diffusers and transformers import them where they are installed
FIRST_STEP = """
import os, sys, time
import psutil
from overcrank.cli import display, main
def stepped(self, job, step, steps):
    print("STEP", time.time() - psutil.Process().create_time(), time.process_time(), flush=True)
    os._exit(0)
display.Bars.stepped = stepped
sys.argv = ["overcrank", "render", "a red circle moving right", "-o", sys.argv[1]]
main(prog_name="overcrank")
"""
HELP = "import sys; from overcrank.cli import main; sys.argv = ['overcrank', sys.argv[1]]; main()"


def process(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree / ".types"), "OVERCRANK_HOME": str(tree / ".types" / "home")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=True
    )


def first_step(tree: Path) -> tuple[float, float]:
    """(wall, processor) seconds until the first denoising step is done."""
    done = process(tree, "-c", FIRST_STEP, str(tree / ".types" / "clip.mp4"))
    _, wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


def help_seconds(tree: Path, option: str) -> float:
    """Processor seconds of `overcrank --help` or `--version`, of five the median."""
    code = f"{HELP[: HELP.index('main()')]}\nimport atexit, time\n"
    code += "atexit.register(lambda: print('CPU', time.process_time()))\nmain()"
    runs = [process(tree, "-c", code, option).stdout.rpartition("CPU")[2] for _ in range(5)]
    return statistics.median(float(run) for run in runs)


def imports(tree: Path) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds that modules, and packages, take to import by themselves."""
    told = process(tree, "-X", "importtime", "-c", FIRST_STEP, str(tree / ".types" / "clip.mp4")).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", told)
    modules: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for microseconds, name in lines:
        modules[name] += int(microseconds) / 1000  # type: ignore[assignment]
        packages[name.partition(".")[0]] += int(microseconds) / 1000  # type: ignore[assignment]
    return modules, packages


def checked_out(commit: str, folder: Path) -> Path:
    tree = folder / "before"
    subprocess.run(["git", "worktree", "add", "--detach", "-f", tree, commit], cwd=ROOT, check=True)
    (tree / ".types").mkdir()
    (tree / ".types" / "overcrank").symlink_to(tree)
    return tree


def measured(before: Path, after: Path, pairs: int) -> dict[str, object]:
    trees = {"before": before, "after": after}
    taken = []
    for pair in range(pairs + 1):
        order = list(trees) if pair % 2 else list(reversed(trees))
        taken.append({name: first_step(trees[name]) for name in order})
    result: dict[str, object] = {}
    for index, clock in enumerate(("wall", "cpu")):
        sides = {n: [each[n][index] for each in taken[1:]] for n in trees}  # the first pair fills the disk's cache
        ratios = [a / b for a, b in zip(sides["after"], sides["before"], strict=True)]
        result[clock] = {n: round(statistics.median(values), 2) for n, values in sides.items()}
        result[f"{clock}_after_of_before"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="commit")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()
    assert options.pairs >= 5
    with tempfile.TemporaryDirectory() as folder:
        before = checked_out(options.before, Path(folder))
        try:
            result = {"before": options.before, "pairs": options.pairs, "predicted_after_of_before": 0.5}
            result |= measured(before, ROOT, options.pairs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    modules, packages = imports(ROOT)
    result |= {
        "installed": {name: name in installed for name in EXTRAS},
        "cpu_of_help": {option: round(help_seconds(ROOT, option), 3) for option in ("--help", "--version")},
        "imports_ms": round(sum(packages.values())),
        "packages_ms": {name: round(ms) for name, ms in packages.most_common(12)},
        "modules_ms": {name: round(ms) for name, ms in modules.most_common(20)},
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(options.json.read_text())


if __name__ == "__main__":
    main()
