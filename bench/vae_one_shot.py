"""Activation memory of Wan 2.1's VAE decoder in one piece, beside the streaming engines that overcrank builds.

    python bench/vae_one_shot.py

Both at 1280 × 720 × 81 in bf16 for sm_89, compiled in one run; nothing is executed.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from overcrank.engines.compile import engine_from_graph
from overcrank.engines.profiles import Profile
from overcrank.engines.targets import BY_NAME
from overcrank.export.graph import onnx_from_component
from overcrank.models import components, resolve
from overcrank.models._common import patched
from overcrank.models.base import Component, TensorSpec

RESULTS = Path(__file__).parent / "results"


def _resampled(block: Any, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
    """WanResample of all frames at once: the first is not doubled in time, the others are."""
    if block.mode == "upsample3d":
        doubled = block.time_conv(x[:, :, 1:]).unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], doubled], dim=2)
    frames = x.shape[2]
    y = block.resample(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], frames)).transpose(1, 2)


def _traced(module: Any, x: torch.Tensor) -> torch.Tensor:
    with patched(module, {"WanResample": _resampled}):
        out: torch.Tensor = module(x, first_chunk=True)
    return out


def one_shot(streaming: Component) -> Component:
    channels = streaming.config["z_dim"]
    return replace(
        streaming,
        name="one_shot",
        inputs=(TensorSpec("x", (1, channels, "frames", "height", "width")),),
        outputs=(TensorSpec("out", (1, 3, "f", "h", "w")),),
        forward=_traced,
        sizes=lambda s: {"frames": (s.frames - 1) // 4 + 1, "height": s.height // 8, "width": s.width // 8},
        trace_sizes={"frames": 4, "height": 3, "width": 5},
        affine_axes={},
        bounds={"frames": (3, None)},
    )


def main() -> None:
    variant = resolve("wan-2.1-t2v-14b")
    (streaming,) = components(variant, ("vae_decoder",))
    low, high = replace(variant.native, height=256, width=256, frames=17), variant.native
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for component in (streaming, one_shot(streaming)):
            ir.save(onnx_from_component(component, "bf16").model, f"{folder}/g.onnx")
            ranges = Profile(low, high, high).ranges(component)
            made = engine_from_graph(Path(folder) / "g.onnx", BY_NAME["sm_89"], ranges)
            figures[component.name] = round((made.activation_bytes or 0) / 1e9, 2)
    result = {
        "what": f"activation memory in GB, Wan 2.1 VAE decoder, {high}, bf16, sm_89",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python bench/vae_one_shot.py",
        "streaming": figures["vae_decoder"],
        "one_shot": figures["one_shot"],
        "ratio": round(figures["one_shot"] / figures["vae_decoder"], 1),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / f"vae-one-shot-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
