"""What it costs to ask, before a call, whether a module is still the one that was bound.

    python bench/fingerprint.py [--layers 40] [--json FILE]

Wan's blocks at tiny width: as many parameters and submodules as the published network has. Side by side, the bare loop
over its parameters. Predicted before the first run: 50 µs for 1,000 parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from overcrank.export.module import random_module
from overcrank.models import components
from overcrank.runtime.sessions.fingerprint import Fingerprint
from overcrank.runtime.sessions.stock import kinds_of

from tests import tiny


def microseconds(ask: Callable[[], object], times: int = 500) -> float:
    """The median of `times` runs."""
    taken = []
    for _ in range(times + 20):
        start = time.perf_counter()
        ask()
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken[20:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    component = components(tiny.variant("tiny-wan-2.1"), ("denoiser",))[0]
    component = replace(component, config={**component.config, "num_layers": options.layers})
    module = random_module(component, component.config, "fp32")
    parameters = list(module.parameters())
    made = time.perf_counter()
    kinds = kinds_of([component])
    stock = time.perf_counter() - made
    follows, copies = (Fingerprint(module, kinds, c) for c in (False, True))
    found = {
        "parameters": len(parameters),
        "submodules": len(list(module.modules())),
        "asked_us": microseconds(follows.same),
        "asked_with_copies_us": microseconds(copies.same),
        "taken_us": microseconds(lambda: Fingerprint(module, kinds, False), 20),
        "bare_loop_us": microseconds(lambda: [p for p in parameters]),  # noqa: C416
        "addresses_loop_us": microseconds(lambda: [p.data_ptr() for p in parameters]),
        "stock_module_ms": stock * 1e3,
        "compared_in_one_call": hasattr(torch._C, "_tensors_data_ptrs_at_indices_equal"),
    }
    assert follows.same()
    for name, value in found.items():
        print(f"{name:<24} {value if isinstance(value, bool | int) else round(value, 1)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
