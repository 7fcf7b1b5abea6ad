"""Everything that only a card can say: one command, in parts of a few minutes that each run alone and resume.

    ./build.sh bench-gpu [--model MODEL …] [--way WAY …] [--device cpu]

For each network (LTX-Video 2B at two sizes, Wan 1.3B, SVD-XT with random weights; the demo model, or a diffusers
folder, with its own): milliseconds of a call in eager PyTorch, torch.compile and engines of every precision, how
far each is from eager, memory, build, load and first-call times; for those with weights also whole renders with and
without the step cache. Every part is a process of its own; what fails or takes too long is reported as that, and
the rest goes on. Results: parts/*.json, README.md and plots in bench/results/CARD-DATE; measurements also go to the
store, where `overcrank render` finds that an engine loses to eager.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_report
from gpu_ways import CASES, Case, Way, ways_on
from overcrank.engines.store import Store
from overcrank.models import local_folder, resolve
from overcrank.runtime.render.sidecar import versions

RESULTS = Path(__file__).parent / "results"
LIMIT = 480  # seconds of a part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[default: cuda where there is a card, else cpu]")
    parser.add_argument("--model", action="append", help="[default: all of them; on cpu the demo model]")
    parser.add_argument("--way", action="append", help="[default: all of them]")
    parser.add_argument("--out", type=Path, help="[default: bench/results/CARD-DATE]")
    parser.add_argument("--store", type=Path, help="where engines and measurements go [default: the user's store]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring one call")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--part", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no card that PyTorch sees; --device cpu walks through every part without one")
    cases = _cases(options.model, device, parser)
    ways = [w for w in ways_on(device) if not options.way or w.name in options.way]
    if not ways:
        parser.error(f"--way: there are {', '.join(w.name for w in ways_on(device))}")
    if options.part:
        _run_part(cases, ways, options, device)
        return
    about = _about(device, options.seconds)
    name = re.sub(r"\W+", "-", str(about["card"])).strip("-").lower()
    folder: Path = options.out or RESULTS / f"{name}-{about['date']}"
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    about["peak"] = _peak(folder, device, min(3.0, options.seconds), options.again)
    for case in cases:
        for way in ways:
            _in_process(case, way, folder, device, options)
            gpu_report.write(folder, about, gpu_report.read_parts(folder))
        _record(case, folder, Store(options.store))
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    print(folder / "README.md")


def _cases(models: list[str] | None, device: str, parser: argparse.ArgumentParser) -> list[Case]:
    if not models:
        return list(CASES if device == "cuda" else CASES[:1])
    found = []
    for model in models:
        known = [c for c in CASES if model in (c.model, resolve(c.model).family)]
        found += known or [Case(model, resolve(model).native)]
        if not known and local_folder(model) is None:
            parser.error(f"--model {model}: use one of {', '.join({c.model: 0 for c in CASES})}, or a diffusers folder")
    return found


def _about(device: str, seconds: float) -> dict[str, Any]:
    import torch

    found = {"card": "no card", "date": datetime.now(UTC).date().isoformat(), "device": device, "dtype": "fp32"}
    if device == "cuda":
        from overcrank.runtime.sessions.card import card_of

        card = card_of(torch.device("cuda"))
        found |= {"card": card.name, "driver": card.driver, "architecture": card.target, "dtype": "bf16"}
    command = f"./build.sh bench-gpu --device {device} --seconds {seconds:g}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {**found, "machine": machine, "versions": versions(), "command": command}


def _peak(folder: Path, device: str, seconds: float, again: bool) -> dict[str, float]:
    import torch
    from gpu_part import Setting, peak

    file = folder / "peak.json"
    if again or not file.is_file():
        at = Setting(torch.device(device), Store(None), seconds)
        file.write_text(json.dumps(peak(at), indent=1) + "\n", "utf-8")
    tflops: dict[str, float] = json.loads(file.read_text("utf-8"))["tflops"]
    return tflops


def _in_process(case: Case, way: Way, folder: Path, device: str, options: argparse.Namespace) -> None:
    """One part, unless it is there; a crash or the limit becomes its result."""
    file = folder / "parts" / case.name / f"{way.name}.json"
    if file.is_file() and not options.again:
        print(f"{case.name}/{way.name}: there already", flush=True)
        return
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--device", device, "--model", case.model, "--seconds", str(options.seconds)]
    command += ["--out", str(folder), "--part", case.name, way.name]
    command += ["--store", str(options.store)] if options.store else []
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        said = (done.stderr.strip().splitlines() or [""])[-1]
        failure = f"the process ended with status {done.returncode}: {said[:300]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"not done within {LIMIT} seconds"
    if failure:
        file.write_text(json.dumps({"denoiser": {"error": failure}}, indent=1) + "\n", "utf-8")
    print(f"{case.name}/{way.name}: {failure or 'measured'} ({time.monotonic() - start:.0f} s)", flush=True)


def _run_part(cases: list[Case], ways: list[Way], options: argparse.Namespace, device: str) -> None:
    import torch
    from gpu_part import Setting, measured
    from gpu_render import rendered

    case = next(c for c in cases if c.name == options.part[0])
    way = next(w for w in ways if w.name == options.part[1])
    at = Setting(torch.device(device), Store(options.store), options.seconds)
    found = measured(case, way, at)
    if local_folder(case.model) is not None and not way.embedded and "error" not in found["denoiser"]:
        try:
            found["render"] = rendered(case, way, at, options.out / "parts" / case.name / "reference.npz")
        except Exception as error:
            found["render"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    file = options.out / "parts" / case.name / f"{way.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _record(case: Case, folder: Path, store: Store) -> None:
    """Into the store, for renders to see: engines beside eager, both of this run."""
    from overcrank.engines.measurements import Measurement, record
    from overcrank.runtime.sessions.card import card_of

    parts = {n.partition("/")[2]: p for n, p in gpu_report.read_parts(folder).items() if n.startswith(f"{case.name}/")}
    date = datetime.now(UTC).date().isoformat()
    for found in parts.values():
        for name, row in found.items():
            eager = parts.get("eager", {}).get(name, {}).get("ms")
            if eager and row.get("engine_key"):
                import torch

                card = card_of(torch.device("cuda"))
                made = Measurement(
                    component=name,
                    shape=str(case.shape),
                    engine_ms=row["ms"],
                    eager_ms=eager,
                    date=date,
                    kernels="eager",
                )
                record(store, card.name, card.driver, row["engine_key"], made)


if __name__ == "__main__":
    main()
