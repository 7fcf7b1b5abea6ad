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
from overcrank.export.module import abstract_module
from overcrank.models import components, resolve
from overcrank.models.base import Component

VIDEO = (None, None, "frames", "height", "width")
AXES: dict[str, dict[str, tuple[str | None, ...]]] = {
    "denoiser": {
        "hidden_states": ("batch", "tokens"),
        "encoder_hidden_states": ("batch", "text"),
        "encoder_attention_mask": ("batch", "text"),
        "timestep": ("batch",),
        "video_coords": ("batch", None, "tokens"),
    },
    "vae_decoder": {"hidden_states": VIDEO},
    "vae_encoder": {"hidden_states": VIDEO},
}


class Stock(torch.nn.Module):
    """The stock module, called with tensors in the order of `names`."""

    def __init__(self, module: torch.nn.Module, names: list[str], extra: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.names, self.extra = module, names, extra

    def forward(self, *tensors: torch.Tensor) -> Any:
        out = self.module(**dict(zip(self.names, tensors, strict=True)), **self.extra)
        return out[0] if isinstance(out, tuple) else out


def materialized(component: Component) -> torch.nn.Module:
    """Filled, not initialized at random: loading a checkpoint is not what is measured."""
    module = abstract_module(component, component.config, "bf16")
    for owner in module.modules():
        for name, old in owner.named_parameters(recurse=False):
            value = torch.full(tuple(old.shape), 0.01, dtype=old.dtype)
            owner.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return module


def export(component: Component, graph: Path) -> dict[str, tuple[int, ...]]:
    """Stock module, materialized bf16 weights, the exporter's defaults; returns the traced shapes."""
    module = materialized(component)
    call = component.sample(module, dict(component.trace_sizes), torch.Generator().manual_seed(0))
    extra = {k: v for k, v in call.items() if not isinstance(v, torch.Tensor)}
    wide = ("timestep", "video_coords")
    tensors = {k: v if k in wide else v.to(torch.bfloat16) for k, v in call.items() if k not in extra}
    roots: dict[str, Any] = {}

    def axis(name: str) -> Any:
        root, scale, offset = component.affine_axes.get(name, (name, 1, 0))
        base = roots.setdefault(root, torch.export.Dim(root))
        scaled = base if scale == 1 else base * scale
        return scaled + offset if offset else scaled

    names = AXES[component.name]
    dynamic = tuple({i: axis(n) for i, n in enumerate(names.get(k, ())) if n} for k in tensors)
    stock = Stock(module, list(tensors), extra)
    program = torch.export.export(stock, tuple(tensors.values()), dynamic_shapes=(dynamic,), strict=False)
    out = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False, input_names=list(tensors))
    assert out is not None
    out.save(str(graph), external_data=True)
    return {k: tuple(v.shape) for k, v in tensors.items()}


def ranges(component: Component, profile: Profile, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The profile overcrank would use, for the stock module's inputs."""
    sides = [dict(component.sizes(s)) for s in (profile.min, profile.opt, profile.max)]
    sides[0] |= dict(component.free_axes)
    return {
        name: tuple(
            tuple(s[axes[i]] if i < len(axes) and axes[i] else d for i, d in enumerate(shapes[name])) for s in sides
        )
        for name, axes in AXES[component.name].items()
    }


def main() -> None:
    variant, folder = resolve(sys.argv[1]), Path(sys.argv[2])
    for component in components(variant):
        graph = folder / f"{component.name}.onnx"
        shapes = export(component, graph)
        made = engine_from_graph(graph, BY_NAME["sm_89"], ranges(component, profile_for(variant), shapes))
        (folder / f"{component.name}.engine").write_bytes(memoryview(made.plan))
        print(component.name, made.activation_bytes, flush=True)


if __name__ == "__main__":
    main()
