"""The baseline: stock modules with their weights, torch.onnx.export as it comes, weights in the engine.

python bench/plain_ltx.py VARIANT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from overcrank.engines.compile import engine_from_graph
from overcrank.engines.profiles import Profile, profile_for
from overcrank.engines.targets import BY_NAME
from overcrank.export.module import random_module
from overcrank.models import components, resolve
from overcrank.models.base import Component

AXES = {
    "hidden_states": {"denoiser": ("batch", "tokens"), "vae_decoder": (None, None, "frames", "height", "width")},
    "encoder_hidden_states": {"denoiser": ("batch", "text")},
    "encoder_attention_mask": {"denoiser": ("batch", "text")},
    "timestep": {"denoiser": ("batch",)},
    "video_coords": {"denoiser": ("batch", None, "tokens")},
}


class Stock(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, extra: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.extra = module, extra

    def forward(self, **call: torch.Tensor) -> Any:
        out = self.module(**call, **self.extra)
        return out[0] if isinstance(out, tuple) else out


def export(component: Component, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Stock module, materialized bf16 weights, the exporter's defaults."""
    module = random_module(component, component.config, "bf16")
    call = component.sample(module, dict(component.trace_sizes), torch.Generator().manual_seed(0))
    extra = {k: v for k, v in call.items() if not isinstance(v, torch.Tensor)}
    tensors = {
        k: v.to(torch.bfloat16) if k not in ("timestep", "video_coords") else v
        for k, v in call.items()
        if isinstance(v, torch.Tensor)
    }
    roots: dict[str, Any] = {}

    def axis(name: str) -> Any:
        if name in component.affine_axes:
            root, scale, offset = component.affine_axes[name]
            base = roots.setdefault(root, torch.export.Dim(root))
            return base * scale + offset if offset else base * scale
        return roots.setdefault(name, torch.export.Dim(name))

    dynamic = {}
    for key in tensors:
        names = AXES.get(key, {}).get(component.name) or (
            (None, None, "frames", "height", "width") if component.name == "vae_encoder" else ()
        )
        dynamic[key] = {i: axis(n) for i, n in enumerate(names) if n}
    program = torch.export.export(Stock(module, extra), (), tensors, dynamic_shapes={"call": dynamic}, strict=False)
    graph = folder / f"{component.name}.onnx"
    out = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
    out.save(str(graph), external_data=True)
    return graph, {k: tuple(v.shape) for k, v in tensors.items()} | {"_axes": dynamic}


def ranges(component: Component, profile: Profile, shapes: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, names in ((k, AXES.get(k, {}).get(component.name)) for k in shapes if k != "_axes"):
        if component.name == "vae_encoder":
            names = (None, None, "frames", "height", "width")
        if not names:
            continue
        sides = []
        for shape in (profile.min, profile.opt, profile.max):
            sizes = dict(component.sizes(shape))
            sides.append(tuple(sizes[n] if n else d for n, d in zip((*names, *[None] * 9), shapes[key], strict=False)))
        found[key] = tuple(sides)
    return found


def main() -> None:
    variant, folder = resolve(sys.argv[1]), Path(sys.argv[2])
    for component in components(variant):
        graph, shapes = export(component, folder)
        made = engine_from_graph(graph, BY_NAME["sm_89"], ranges(component, profile_for(variant), shapes))
        (folder / f"{component.name}.engine").write_bytes(memoryview(made.plan))
        print(component.name, made.activation_bytes, flush=True)


if __name__ == "__main__":
    main()
