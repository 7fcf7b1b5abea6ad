"""The sidecar of a render: all that is needed to make it again, and what made it."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

from overcrank import __version__
from overcrank.runtime.pipeline.accelerate import device_of, main_module
from overcrank.runtime.pipeline.dtypes import of_parts

if TYPE_CHECKING:
    from overcrank.runtime.pipeline.accelerate import Acceleration
    from overcrank.runtime.render.renderer import Outcome
    from overcrank.runtime.render.request import RenderRequest

VERSIONS = ("torch", "diffusers", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt")


def about_render(
    acceleration: Acceleration,
    settings: dict[str, Any],
    model: str,
    pipe: Any,
    request: RenderRequest,
    outcome: Outcome,
) -> dict[str, Any]:
    """`request` is a valid line of a job file: with `settings`, the same one gives the same frames."""
    import torch

    record = outcome.record
    device = device_of(pipe)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "overcrank": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "source": acceleration.source,
        "request": request.model_dump(mode="json", exclude_none=True),
        "request_sha256": request.digest(model, settings),
        "dtypes": of_parts(pipe),
        **settings,
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(scheduler).__name__, **_plain(scheduler.config)} if scheduler else {},
        "dtype": str(main_module(pipe).dtype).removeprefix("torch."),
        "device": device.type,
        "gpu": gpu,
        "machine": platform.machine(),
        "backend": acceleration.backend,
        "calls": record.backends(),
        "bundles": dict(acceleration.bundles),
        "engine_keys": {k: v for k, v in record.engines.items() if v},
        "fallbacks": [asdict(f) for f in record.fallbacks],
        "steps": timing(outcome.steps, lazily=any("tensorrt_rtx" in by for by in record.backends().values())),
        "versions": versions(),
    }


def timing(seconds: list[float], lazily: bool = False) -> dict[str, float]:
    """Steps a second, and the median and 95th percentile of a step in milliseconds; the first step left out.

    `lazily`: kernels for the shape may have been compiled meanwhile. Then the slower steps before they were there
    are left out too, and counted as `settling`.
    """
    import numpy as np

    settling = _settling(seconds) if lazily else 0
    seconds = seconds[settling:]
    if not seconds:
        return {}
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return {
        "per_second": round(len(seconds) / sum(seconds), 3),
        "p50_ms": round(float(p50), 3),
        "p95_ms": round(float(p95), 3),
        **({"settling": settling} if settling else {}),
    }


def _settling(seconds: list[float]) -> int:
    """How many of the first half are a tenth slower than the last half's median, before the first that is not."""
    from statistics import median

    if len(seconds) < 4:
        return 0
    usual = median(seconds[len(seconds) // 2 :])
    first = seconds[: len(seconds) // 2]
    return next((i for i, each in enumerate(first) if each <= 1.1 * usual), len(first))


def _plain(config: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


def versions() -> dict[str, str]:
    packages = {}
    for name in VERSIONS:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return packages
