"""Single files as people have them: ltx-demo's weights under the publisher's names, in the formats of ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from overcrank.models import local_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

DENOISER = "model.diffusion_model."
_LTX = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
LAYER = f"{DENOISER}transformer_blocks.0.attn1.to_q"


def weights(part: str) -> dict[str, Tensor]:
    """Of a part of ltx-demo, by diffusers' names."""
    folder = local_folder("ltx-demo")
    assert folder is not None
    shards = [load_file(file) for file in sorted((folder / part).glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def original(state: Mapping[str, Tensor], prefix: str = DENOISER) -> dict[str, Tensor]:
    """The denoiser under the names of its publisher."""
    return {prefix + _renamed(name): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for ours, theirs in _LTX.items():
        name = name.replace(ours, theirs)
    return name


def fp8(state: Mapping[str, Tensor], scale: str = "weight_scale", told: bool = True) -> dict[str, Tensor]:
    """Layers of the blocks in scaled fp8; `told`: with ComfyUI's tensor that says so, else with its older marker."""
    quantized = dict(state)
    for name, weight in state.items():
        if "block" not in name or weight.dim() != 2 or not name.endswith(".weight") or "bias" in name:
            continue
        layer, step = name.removesuffix(".weight"), weight.float().abs().max() / 448
        quantized[name] = (weight.float() / step).to(torch.float8_e4m3fn)
        quantized[f"{layer}.{scale}"] = step
        if told:
            quantized[f"{layer}.comfy_quant"] = marker({"format": "float8_e4m3fn"})
    return quantized if told else quantized | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers of the blocks in int8 by row."""
    quantized = dict(state)
    for name, weight in state.items():
        if "block" in name and weight.dim() == 2 and name.endswith(".weight"):
            layer, step = name.removesuffix(".weight"), weight.float().abs().amax(1, keepdim=True) / 127
            quantized |= {name: (weight.float() / step).round().to(torch.int8), f"{layer}.weight_scale": step}
            quantized[f"{layer}.comfy_quant"] = marker({"format": "int8_tensorwise"})
    return quantized


def nvfp4(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers of the blocks as nvfp4 files have them, of zeros."""
    quantized = dict(state)
    for name, weight in state.items():
        if "block" in name and weight.dim() == 2 and name.endswith(".weight"):
            layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
            blocks = -(-rows // 128) * 128, -(-(columns // 16) // 4) * 4
            quantized[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            quantized[f"{layer}.weight_scale"] = torch.zeros(blocks).to(torch.float8_e4m3fn)
            quantized[f"{layer}.weight_scale_2"] = torch.ones(())
            quantized[f"{layer}.comfy_quant"] = marker({"format": "nvfp4"})
    return quantized


def marker(about: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def saved(file: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
    return file


def header(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A file of tensors of these shapes, two bytes a value, which takes no room: it is a hole."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return raw(file, entries, end)


def raw(file: Path, entries: Mapping[str, Any], size: int) -> Path:
    """A safetensors file with this very header, and `size` bytes of zeros behind it."""
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + size)
    return file


def gguf(file: Path, state: Mapping[str, Tensor], architecture: str = "ltxv") -> Path:
    """Matrices whose rows are whole blocks in Q8_0, the rest in fp32."""
    import gguf as library

    writer = library.GGUFWriter(file, architecture)
    kind = library.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, library.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def sharded(folder: Path, state: Mapping[str, Tensor], count: int = 2) -> Path:
    """The index of several files."""
    folder.mkdir()
    places = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        own = {key: tensor for n, (key, tensor) in enumerate(state.items()) if n % count == i}
        saved(folder / name, own)
        places |= dict.fromkeys(own, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def lora(file: Path, form: str = "transformer.{}.lora_{}.weight", names: tuple[str, str] = ("A", "B")) -> Path:
    """Of two layers of ltx-demo, rank 4."""
    layers = [f"transformer_blocks.{i}.attn1.to_q" for i in range(2)]
    own = weights("transformer")
    state = {}
    for layer in layers:
        rows, columns = own[f"{layer}.weight"].shape
        bare = layer.replace(".", "_") if form.startswith("lora_unet") else layer
        state[form.format(bare, names[0])] = torch.ones(4, columns) / 100
        state[form.format(bare, names[1])] = torch.ones(rows, 4) / 100
    return saved(file, state)
