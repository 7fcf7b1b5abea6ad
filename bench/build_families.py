"""Full-size builds of every family's default variant, as a user would: seconds, RAM, sizes, activation memory.

    python bench/build_families.py [VARIANT …]

Each variant is built alone by the public command `build-engine`, weights as inputs, for sm_89 and sm_120 (the
smallest also for sm_75), with the native shape as the profile's largest, so the activation memory is that of the
native shape. Results are added to bench/results/families.json, one row a component; docs/models.md shows them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from overcrank.engines.estimates import FILE, costs_of
from overcrank.models import families, family, resolve
from overcrank.models.base import Variant

RESULTS = Path(__file__).parent / "results" / "families.json"
COSTS = Path(__file__).parents[1] / "engines" / FILE
BUILD = [sys.executable, "-c", "from overcrank.cli import build_engine; build_engine()"]
TARGETS = "sm_89,sm_120"
SMALLEST = "modelscope-1.7b"
MORE = ("wan-2.1-t2v-14b", "ltx-upsampler-0.9.7")  # one whose budget is stated, 120 s and 3 GB; one of another kind


def built(variant: Variant, store: Path) -> list[dict[str, Any]]:
    """One row a component and target; `build_s` is the time of all targets together."""
    native = variant.native
    targets = TARGETS + (",sm_75" if variant.name == SMALLEST else "")
    limits = [f"--max-{a}={getattr(native, a)}" for a in ("height", "width", "frames")]
    command = [*BUILD, "--model", variant.name, "--gpu", targets, *limits, "--store", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant.name}: {done.stderr[-2000:]}")
    rows = []
    for bundle in json.loads(done.stdout)["bundles"]:
        manifest = json.loads((Path(bundle["path"]) / "manifest.json").read_text("utf-8"))
        for entry in manifest["components"]:
            rows.append(
                {
                    "variant": variant.name,
                    "family": variant.family,
                    "target": manifest["target"],
                    "precision": manifest["precision"],
                    "component": entry["name"],
                    "native": str(native),
                    "export_s": entry["export_seconds"],
                    "compile_s": entry["compile_seconds"],
                    "engine_mb": round(entry["engine"]["bytes"] / 1e6, 1),
                    "activation_gb": round((entry["activation_bytes"] or 0) / 1e9, 3),
                    "plan": entry["plan"],
                    "build_s": manifest["build_seconds"],
                    "peak_ram_gb": round(manifest["peak_ram_bytes"] / 1e9, 2),
                    "date": datetime.now(UTC).date().isoformat(),
                    "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "onnxscript", "tensorrt-rtx")},
                }
            )
    return rows


def shipped() -> str:
    """What the package carries of these figures, by which builds are estimated."""
    quantized = json.loads((RESULTS.parent / "quantized-builds.json").read_text("utf-8"))
    costs = costs_of(json.loads(RESULTS.read_text("utf-8"))["rows"], quantized)
    return json.dumps(costs, indent=1) + "\n"


def main() -> None:
    names = sys.argv[1:] or [*(family(f).default for f in families()), *MORE]
    known = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows = built(resolve(name), Path(folder))
        known = [r for r in known if r["variant"] != name] + rows
        table = {"command": "python bench/build_families.py", "rows": known}
        RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
        COSTS.write_text(shipped(), "utf-8")
        worst = max(rows, key=lambda r: r["compile_s"])
        print(name, f"{rows[0]['build_s']} s, {rows[0]['peak_ram_gb']} GB; slowest {worst['component']}", flush=True)


if __name__ == "__main__":
    main()
