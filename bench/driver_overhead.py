"""What the driver and an EngineModule cost per step, on a denoiser that does nothing.

    python bench/driver_overhead.py

Both sides run the same diffusers loop with guidance: plain, with a denoiser forward that
returns a ready tensor; and overcrank's driver over an EngineModule whose session returns the
same tensor (adapter, progress, cancellation, timing included). The cost of a step is the slope
between a short and a long render, alternating sides; medians go to bench/results/.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from overcrank.models import components, resolve
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.render.renderer import Renderer, RenderJob, Silent
from overcrank.runtime.render.request import RenderRequest
from overcrank.runtime.sessions.engine_module import EngineModule, Slot

RESULTS = Path(__file__).parent / "results"
SHORT, LONG, ROUNDS, BUDGET_US = 20, 520, 9, 200
MODEL = "ltx-demo"


class NullSession:
    backend, engine = "null", ""

    def __init__(self, output: torch.Tensor) -> None:
        self._outputs = {"sample": output}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return self._outputs


def plain(pipe: Any, ready: torch.Tensor, steps: int) -> float:
    """Seconds of plain diffusers' loop."""
    pipe.transformer.forward = lambda *args, **kwargs: (ready,)
    start = time.perf_counter()
    pipe("x", height=64, width=64, num_frames=17, frame_rate=8, num_inference_steps=steps, output_type="np")
    seconds = time.perf_counter() - start
    del pipe.transformer.forward
    return seconds


def driven(pipe: Any, ready: torch.Tensor, steps: int, folder: Path) -> float:
    """Seconds of the driver's loop."""
    variant = resolve(MODEL)
    component = components(variant, ("denoiser",))[0]
    module = EngineModule(pipe.transformer, [Slot(component, lambda: NullSession(ready))], pipe.overcrank.ledger)
    request = RenderRequest(prompt="x", steps=steps, formats=("gif",)).completed(variant)
    start = time.perf_counter()
    (outcome,) = Renderer(pipe, MODEL, Silent()).run([RenderJob(request, folder / "x")])
    seconds = time.perf_counter() - start
    module.remove()
    assert outcome.status == "done", outcome.error
    assert outcome.record.backends()["denoiser"] == {"null": steps}
    return seconds


def main() -> None:
    pipe = load(MODEL, backend="eager", device="cpu")
    ready = torch.zeros(2, 80, 32)
    slopes: dict[str, list[float]] = {"plain": [], "overcrank": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for side, run in (
                ("plain", lambda n: plain(pipe, ready, n)),
                ("overcrank", lambda n: driven(pipe, ready, n, Path(folder))),
            ):
                short, long = run(SHORT), run(LONG)
                slopes[side].append((long - short) / (LONG - SHORT) * 1e6)
    medians = {side: round(statistics.median(values), 1) for side, values in slopes.items()}
    result = {
        "what": "microseconds per denoising step, denoiser that does nothing",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers")},
        "command": "python bench/driver_overhead.py",
        "rounds": ROUNDS,
        **medians,
        "difference": round(medians["overcrank"] - medians["plain"], 1),
        "ratio": round(medians["overcrank"] / medians["plain"], 3),
        "budget": BUDGET_US,
    }
    print(json.dumps(result, indent=1))
    RESULTS.joinpath(f"driver-overhead-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
