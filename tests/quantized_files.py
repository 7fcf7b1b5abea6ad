"""Quantized single files as ComfyUI writes them, of a module's own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def quantized_file(path: Path, module: Any, form: str, layers: str = "transformer_blocks.") -> Path:
    """Linear layers whose names begin with `layers` in "int8", "fp8" or "convrot", all else in bf16."""
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in module.named_parameters()}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(layers) and ".norm" not in name:
            tensors |= _layer(name, layer.weight.detach().float(), form)
    save_file({f"model.diffusion_model.{name}": value for name, value in tensors.items()}, path)
    return path


def _layer(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    about: dict[str, object] = {"format": "float8_e4m3fn" if form == "fp8" else "int8_tensorwise"}
    if form == "convrot":
        from overcrank.export.quantization.stored import rotated

        about |= {"convrot": True, "convrot_groupsize": 16}
        weight = rotated(weight, 16)
    if form == "fp8":
        scale = weight.abs().max() / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
    else:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        stored = (weight / scale).round().to(torch.int8)
    said = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {f"{name}.weight": stored, f"{name}.weight_scale": scale, f"{name}.comfy_quant": said}
