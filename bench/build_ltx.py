"""What building LTX-Video costs: overcrank against plain torch.onnx.export with the weights inside.

    python bench/build_ltx.py [--only CASE ...]

Each case runs alone, from a clean store, as its own process tree; wall time, peak RAM (shared
pages counted once) and bytes written are measured from outside. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
CASES = {
    "overcrank-2b": ["build-engine", "--model", "ltx-2b-0.9.5", "--gpu", "sm_89", "--precision", "bf16", "--quiet"],
    "plain-2b": [sys.executable, str(Path(__file__).with_name("plain_ltx.py")), "ltx-2b-0.9.5"],
    "overcrank-13b": ["build-engine", "--model", "ltx-13b-0.9.7-dev", "--gpu", "sm_89", "--quiet"],
}
BUDGETS = {"overcrank-2b": (60, 2.0e9), "overcrank-13b": (120, 2.5e9)}


def tree_ram(root: psutil.Process) -> int:
    total = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measured(command: list[str], store: Path) -> dict[str, Any]:
    """Run `command` with its output in `store` and measure it from outside."""
    location = ["--store", str(store)] if command[0] == "build-engine" else [str(store)]
    start = time.monotonic()
    process = subprocess.Popen([*command, *location], stdout=subprocess.PIPE, text=True)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, tree_ram(root))
        time.sleep(0.2)
    seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    written = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    return {
        "seconds": round(seconds, 1),
        "peak_ram_bytes": peak,
        "bytes_written": written,
        "command": " ".join(Path(word).name for word in command),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| case | wall | peak RAM | bytes written |", "|---|---|---|---|"]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['seconds']:.0f} s | {r['peak_ram_bytes'] / 1e9:.2f} GB "
            f"| {r['bytes_written'] / 1e6:,.0f} MB |"
        )
    if {"overcrank-2b", "plain-2b"} <= rows.keys():
        ours, plain = rows["overcrank-2b"], rows["plain-2b"]
        ratios = [plain[k] / ours[k] for k in ("seconds", "peak_ram_bytes", "bytes_written")]
        lines.append("| **plain / overcrank (2B)** | " + " | ".join(f"**{r:.1f}×**" for r in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    chosen = parser.parse_args().only
    rows = {}
    for name in chosen:
        store = Path(tempfile.mkdtemp(prefix=f"overcrank-bench-{name}-"))
        try:
            rows[name] = measured(CASES[name], store)
        finally:
            shutil.rmtree(store, ignore_errors=True)
        print(name, rows[name], flush=True)
        if name in BUDGETS:
            seconds, ram = BUDGETS[name]
            within = rows[name]["seconds"] <= seconds and rows[name]["peak_ram_bytes"] <= ram
            rows[name]["within_budget"] = within
    packages = ("overcrank", "torch", "diffusers", "onnxscript", "tensorrt-rtx")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
        "versions": {p: metadata.version(p) for p in packages},
        "cases": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"build-ltx-{record['date'][:10]}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# Building LTX-Video, {record['date'][:10]}\n\n{record['machine']}; " + ", ".join(
        f"{k} {v}" for k, v in record["versions"].items()
    )
    text = f"{heading}\n\nRepeat with `./build.sh bench`.\n\n{table(rows)}\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
