"""What it takes to open a weight file of 14 B parameters: time to inspect it, memory to render with it.

    python bench/open_file.py [FORMAT …]

The file has the names, shapes and scales of a Wan 2.2 A14B transformer whose blocks are quantized, and holes where
their values would be, so it takes next to no disk. `overcrank inspect` reads it in a process of its own, whose time
without importing modules is told beside the whole; another one makes the transformer of it, as a render does, and the
tensors that an engine is bound to, and tells the memory that is its own (Anonymous in /proc/self/smaps_rollup; pages
of the mapped file are not). Limits: 2 s without imports and 1 GB. Results are written to bench/results/open-file.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "open-file.json"
MODEL = "wan-2.2-t2v-a14b"
SECONDS, GIGABYTES = 2.0, 1.0
FORMS = ("fp8", "int8", "nvfp4", "mxfp8")
INSPECTED = """
import sys, time
start = time.monotonic()
import overcrank.cli, overcrank.runtime.inspect, diffusers, torch
from diffusers import loaders, WanTransformer3DModel
from diffusers.loaders import single_file_model
imported, busy = time.monotonic(), time.process_time()
overcrank.runtime.inspect.inspect_file(sys.argv[1])
print(imported - start, time.monotonic() - imported, time.process_time() - busy)
"""
OPENED = """
import sys, time
from pathlib import Path
import torch
from overcrank.models import components, resolve
from overcrank.runtime.pipeline.weights import module_of
from overcrank.export.files.parts import AS_STORED
from overcrank.runtime.sessions.stored_linear import StoredLinear

def own():
    lines = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Anonymous:"]) * 1024

(component,) = components(resolve(sys.argv[2]), ("denoiser",))
from diffusers import WanTransformer3DModel
before, start = own(), time.monotonic()
module = module_of(Path(sys.argv[1]), component, torch.bfloat16)
opened, seconds = own(), time.monotonic() - start
kept = [m.bound(torch.bfloat16) for m in module.modules() if isinstance(m, StoredLinear) and m.format in AS_STORED]
print(opened - before, own() - opened, seconds)
"""


def written(path: Path, form: str) -> dict[str, float]:
    """Parameters in billions, and what the file is long and takes of the disk in GB."""
    from overcrank.models import components, resolve

    from tests.original_names import WAN
    from tests.sparse_files import write

    (component,) = components(resolve(MODEL), ("denoiser",))
    parameters = write(path, component, WAN, form)
    state = path.stat()
    return {
        "parameters_billion": round(parameters / 1e9, 2),
        "file_gb": round(state.st_size / 1e9, 2),
        "disk_gb": round(state.st_blocks * 512 / 1e9, 3),
    }


def run(code: str, *arguments: str) -> list[float]:
    words = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-3:]]


def measured(form: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        file = Path(folder) / f"{form}.safetensors"
        about = written(file, form)
        start = time.monotonic()
        inspect = [sys.executable, "-W", "ignore", "-c", "from overcrank.cli import main; main()", "inspect", str(file)]
        said = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
        wall = time.monotonic() - start
        imports, seconds, busy = run(INSPECTED, str(file))
        opened, bound, opening = run(OPENED, str(file), MODEL)
    return {
        "format": form,
        **about,
        "inspect_s": round(seconds, 2),
        "inspect_processor_s": round(busy, 2),
        "imports_s": round(imports, 2),
        "command_s": round(wall, 2),
        "open_s": round(opening, 2),
        "open_gb": round(opened / 1e9, 3),
        "bound_gb": round(bound / 1e9, 3),
        "said": said.splitlines()[1:4],
    }


def main() -> None:
    sys.path.insert(0, str(ROOT))
    rows = [measured(form) for form in sys.argv[1:] or FORMS]
    for row in rows:
        print(json.dumps(row))
    table = {
        "command": "python bench/open_file.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()}, Python {platform.python_version()}",
        "limits": {"inspect_s": SECONDS, "open_gb": GIGABYTES},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    fp8 = next((row for row in rows if row["format"] == "fp8"), rows[0])
    kept = fp8["inspect_s"] <= SECONDS and fp8["open_gb"] <= GIGABYTES
    print("within the limits" if kept else "BEYOND THE LIMITS")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
