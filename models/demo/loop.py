"""The training loop both stages share: resumable, with a decaying average of the weights and a log."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WARMUP, SAVE_EVERY, LOG_EVERY = 100, 500, 50


def fit(
    name: str, module: nn.Module, loss: Callable[[int], torch.Tensor], steps: int, rate: float, work: Path
) -> nn.Module:
    """Train `module` for `steps` calls of `loss(step)`; returns it with its averaged weights.

    State is kept in `work/name.pt`, and a run that was killed goes on from there. `loss`
    must draw its randomness from the step number, so that a resumed run sees the same data.
    """
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "scale": 1.0}, {"params": vectors, "scale": 3.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(module, avg_fn=_decayed, use_buffers=False)
    file, first = work / f"{name}.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"{name}: goes on from step {first}", flush=True)
    started, total = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"] * _schedule(step, steps)
        torch.manual_seed(step)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(module)
        total += value.item()
        done = step + 1
        if done % LOG_EVERY == 0:
            _log(work / f"{name}.csv", done, total / LOG_EVERY)
            pace = (time.monotonic() - started) / (done - first)
            print(
                f"{name} {done}/{steps} loss {total / LOG_EVERY:.4f}, {pace * (steps - done) / 60:.1f} min left",
                flush=True,
            )
            total = 0.0
        if done % SAVE_EVERY == 0 or done == steps:
            state = {"module": module.state_dict(), "average": average.state_dict(), "step": done}
            torch.save(state | {"optimizer": optimizer.state_dict()}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
    module.load_state_dict(average.module.state_dict())
    return module


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def _decayed(average: torch.Tensor, now: torch.Tensor, count: Any) -> torch.Tensor:
    decay = min(0.999, (1 + float(count)) / (10 + float(count)))
    return average * decay + now * (1 - decay)


def _log(file: Path, step: int, value: float) -> None:
    new = not file.exists()
    with file.open("a", newline="") as out:
        if new:
            csv.writer(out).writerow(["step", "loss"])
        csv.writer(out).writerow([step, f"{value:.6f}"])
