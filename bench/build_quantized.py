"""Full-size quantized builds beside 16 bit: weight bytes, engine size, activation memory.

    python bench/build_quantized.py [VARIANT …]

Each denoiser is built by the public command `build-engine` without calibration (dynamic activations), weights as
inputs, in bf16 and in every quantized format that each target has, with the native shape as the profile's largest.
Results are added to bench/results/quantized-builds.json and written as a table beside it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from overcrank.engines.targets import BY_NAME
from overcrank.models import resolve
from overcrank.models.base import Variant

RESULTS = Path(__file__).parent / "results" / "quantized-builds.json"
BUILD = [sys.executable, "-c", "from overcrank.cli import build_engine; build_engine()"]
VARIANTS = ("ltx", "wan-2.1-t2v-1.3b", "svd")
TARGETS = ("sm_86", "sm_89", "sm_120")
WAYS = (
    ("bf16", "dynamic"),
    ("fp8", "dynamic"),
    ("int8", "dynamic"),
    ("int8", "16bit"),
    ("nvfp4", "dynamic"),
)
BYTES = {"float32": 4.0, "int8": 1.0, "float8e4m3fn": 1.0, "float4e2m1": 0.5}


def built(variant: Variant, target: str, way: tuple[str, str], store: Path) -> dict[str, Any]:
    native = variant.native
    limits = [f"--max-{a}={getattr(native, a)}" for a in ("height", "width", "frames")]
    options = ["--gpu", target, "--precision", way[0], "--activations", way[1], "--components", "denoiser"]
    command = [*BUILD, "--model", variant.name, *options, *limits, "--store", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant.name} {target} {way}: {done.stderr[-2000:]}")
    (bundle,) = json.loads(done.stdout)["bundles"]
    entry = json.loads((Path(bundle["path"]) / "manifest.json").read_text("utf-8"))["components"][0]
    weights = [(p["shape"], p["dtype"]) for p in (*entry["parameters"], *entry["packed"])]
    return {
        "variant": variant.name,
        "target": target,
        "precision": way[0],
        "activations": "" if way[0] == "bf16" else way[1],
        "native": str(native),
        "weights_gb": round(sum(math.prod(s) * BYTES.get(d, 2.0) for s, d in weights) / 1e9, 3),
        "engine_mb": round(entry["engine"]["bytes"] / 1e6, 1),
        "activation_gb": round((entry["activation_bytes"] or 0) / 1e9, 3),
        "plan": entry["plan"],
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "tensorrt-rtx")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# Full-size denoisers, quantized", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += ["| | target | | weights | of bf16 | engine | activations | of bf16 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    sixteen = {(r["variant"], r["target"]): r for r in rows if r["precision"] == "bf16"}
    for r in rows:
        base = sixteen[r["variant"], r["target"]]
        shares = [f"{r[key] / base[key]:.2f}" for key in ("weights_gb", "activation_gb")]
        kind = {"dynamic": "", "16bit": ", weights only"}.get(r["activations"], "")
        lines.append(
            f"| {r['variant']} | {r['target']} | {r['precision']}{kind} | {r['weights_gb']:.2f} GB | {shares[0]} | "
            f"{r['engine_mb']:.0f} MB | {r['activation_gb']:.2f} GB | {shares[1]} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    rows = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    for name in sys.argv[1:] or VARIANTS:
        rows = [r for r in rows if r["variant"] != name]
        with tempfile.TemporaryDirectory() as folder:
            for target in TARGETS:
                for way in WAYS:
                    if way[0] in BY_NAME[target].precisions:
                        rows.append(built(resolve(name), target, way, Path(folder)))
                        print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        RESULTS.with_suffix(".md").write_text(table(rows), "utf-8")


if __name__ == "__main__":
    main()
