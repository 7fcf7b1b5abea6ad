"""What the step cache costs and saves: the demo model's held-out prompts, each rendered by itself.

    python bench/step_cache.py

Eager fp32 on the CPU, the 72 held-out prompts of models/demo/evaluate.py, 24 steps, the same seeds; every way in the
same run. "slope" is how far the last output is moved on along the line through the last two: 0 repeats it, 1 follows
the line. "time" is that of all renders, decoding included, beside the uncached ones of this run. Cosines are of the
latents after each step: the mean of the prompts at the worst step, and the worst prompt at any step. 100 dB is where
frames are the same. Results go to bench/results/step-cache.json and a table beside it.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from overcrank.models import resolve
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.render import stepcache
from overcrank.runtime.render.stepcache import BACKEND, StepCache, threshold_of
from quantized_demo import MODEL, Rendered, compared, recorded, when

RESULTS = Path(__file__).parent / "results" / "step-cache.json"
WAYS = [("off", 0.5), ("safe", 0.5), ("fast", 0.5), ("0.02", 0.5), ("0.2", 0.5), ("0.3", 0.5)]
WAYS += [("safe", 0.0), ("safe", 1.0), ("fast", 0.0), ("fast", 1.0)]


def rendered(pipe: Any, word: str, slope: float) -> tuple[Rendered, float, float]:
    """Trials and latents, the share of steps that were skipped, and seconds."""
    acceleration = pipe.overcrank
    cache = StepCache(threshold_of(word, acceleration.variant), acceleration.variant, acceleration.ledger)
    stepcache.SLOPE = slope
    start = time.monotonic()
    with acceleration.ledger.recording() as record, cache.over(pipe):
        made = recorded(pipe, cache.stepped, batch=1)
    steps = made[1].shape[0] * made[1].shape[1]
    return made, record.served["denoiser", BACKEND] / steps, time.monotonic() - start


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# The step cache on ltx-demo", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += ["| cache | threshold | slope | skipped | time | colour | shape | motion | same verdict | cosine | PSNR |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        right = " | ".join(f"{r['scores'][a]:.1%}" for a in ("colour", "shape", "motion"))
        cosine, psnr = f"{r['lowest_mean_cosine']} ({r['lowest_cosine']})", f"{r['psnr_db']:.1f} dB"
        same = f"{r['same_verdict']} of {r['prompts']}"
        off = r["threshold"] == 0
        start = f"| {r['cache']} | {r['threshold']} | {r['slope']} | {r['skipped']:.0%} | {r['time_ratio']:.2f} | "
        lines.append(f"{start}{right} | {same} | {'' if off else cosine} | {'' if off else psnr} |")
    lines += ["", f"{rows[0]['date']}, {rows[0]['machine']}, {rows[0]['versions']}, uncached {rows[0]['seconds']} s"]
    return "\n".join([*lines, ""])


def main() -> None:
    pipe = load(MODEL, backend="eager", device="cpu")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    rows: list[dict[str, Any]] = []
    reference, base = None, 0.0
    for word, slope in WAYS:
        made, skipped, seconds = rendered(pipe, word, slope)
        reference, base = reference or made, base or seconds
        figures = {"skipped": round(skipped, 4), "seconds": round(seconds, 1), "time_ratio": round(seconds / base, 3)}
        threshold = threshold_of(word, resolve(MODEL))
        rows.append({"cache": word, "threshold": threshold, "slope": slope, **figures, **compared(made, reference)})
        rows[-1] |= {**when(), "machine": machine}
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    RESULTS.with_suffix(".md").write_text(table(rows), "utf-8")


if __name__ == "__main__":
    main()
