"""Parity figures of a test run, for docs/models.md: every graph against its module, every pipeline against eager.

    ./build.sh test-all --junitxml=report.xml
    python bench/parity.py report.xml …

Writes bench/results/parity.json. The graphs are those of the tests' tiny networks, fp32 in ONNX Runtime, random;
each figure is the worst of three shapes.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from overcrank import models

RESULTS = Path(__file__).parent / "results" / "parity.json"


def main() -> None:
    components, pipelines = [], []
    for case in (c for report in sys.argv[1:] for c in ElementTree.parse(report).iter("testcase")):
        found = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if "parity" in found:
            (component,) = models.components(models.resolve(found["like"]), (found["component"],))
            parity = float(f"{float(found['parity']):.1e}")
            components.append({**found, "class": component.cls, "parity": parity})
        if "psnr" in found:
            pipelines.append({**found, "psnr": round(float(found["psnr"]), 1)})
    if not components or not pipelines:
        raise SystemExit(f"{sys.argv[1]} has no parity figures; ./build.sh test-all makes a report that has.")
    table = {
        "command": "python bench/parity.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "onnxscript", "onnxruntime-gpu")},
        "components": sorted(components, key=lambda c: (c["like"], c["component"])),
        "pipelines": sorted(pipelines, key=lambda p: (p["pipeline"], p["media"])),
    }
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    worst = max(components, key=lambda c: c["parity"])
    print(f"{len(components)} components, worst {worst['parity']:g} ({worst['like']} {worst['component']})")
    lowest = min(pipelines, key=lambda p: p["psnr"])
    print(f"{len(pipelines)} pipelines, lowest {lowest['psnr']} dB ({lowest['pipeline']} {lowest['media']})")


if __name__ == "__main__":
    main()
