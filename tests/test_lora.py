"""LoRA files merged into the weights of a render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.calibration.lora import merge, read_lora
from overcrank.errors import CheckpointError, UserError
from overcrank.models.demo import FOLDER
from safetensors.torch import save_file

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.5.ff.net.2")
RANK = 4


def lora_file(path: Path, module: Any, prefix: str = "transformer.", alpha: float | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors, metadata = {}, {}
    for layer in LAYERS:
        outputs, inner = module.get_parameter(f"{layer}.weight").shape
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.3
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.3
    if alpha is not None:
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": alpha})}
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def module() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel.from_pretrained(FOLDER / "transformer").requires_grad_(False)


@pytest.mark.parametrize(
    ("prefix", "alpha"), [("transformer.", None), ("diffusion_model.", None), ("transformer.", 2.0)]
)
def test_a_lora_is_added_to_the_weights(module: Any, tmp_path: Path, prefix: str, alpha: float | None) -> None:
    from diffusers import LTXPipeline
    from safetensors.torch import load_file

    file = lora_file(tmp_path / "l.safetensors", module, prefix, alpha)
    before = {n: p.clone() for n, p in module.named_parameters()}
    merge([read_lora(f"{file}:0.5", LTXPipeline, {"transformer": module})], {"transformer": module})
    pairs = load_file(file)
    factor = 0.5 * (1 if alpha is None else alpha / RANK)
    for name, after in module.named_parameters():
        layer = name.removesuffix(".weight")
        added = torch.zeros(())
        if layer in LAYERS:
            halves = (pairs[f"{prefix}{layer}.lora_{h}.weight"] for h in "BA")
            added = torch.linalg.multi_dot(tuple(halves)) * factor
        assert torch.allclose(after, before[name] + added, atol=1e-6), name


def test_a_lora_of_another_model_is_refused_with_its_keys(module: Any, tmp_path: Path) -> None:
    from diffusers import LTXPipeline

    file = lora_file(tmp_path / "l.safetensors", module, "transformer.somewhere.")
    with pytest.raises(CheckpointError, match="for another model: nothing here matches"):
        read_lora(str(file), LTXPipeline, {"transformer": module})
    wide = {
        "transformer.proj_in.lora_A.weight": torch.zeros(2, 7),
        "transformer.proj_in.lora_B.weight": torch.zeros(9, 2),
    }
    save_file(wide, file)
    with pytest.raises(CheckpointError, match=r"transformer\.proj_in"):
        read_lora(str(file), LTXPipeline, {"transformer": module})
    with pytest.raises(UserError, match="does not exist; give FILE or FILE:SCALE"):
        read_lora(str(tmp_path / "none.safetensors:2"), LTXPipeline, {"transformer": module})
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(str(file), LTXPipeline, {"transformer": module})


def test_a_render_takes_loras_and_says_so(module: Any, tmp_path: Path, run: Any) -> None:
    file = lora_file(tmp_path / "l.safetensors", module)
    for name, more in {"plain": (), "none": ("--lora", f"{file}:0"), "much": ("--lora", f"{file}:4")}.items():
        options = ["--prompt", "a red circle", "--steps", 2, "--formats", "latents", "--backend", "eager", "--quiet"]
        result = run("overcrank", "render", *options, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    contents = {n: (tmp_path / f"{n}.latents.safetensors").read_bytes() for n in ("plain", "none", "much")}
    assert contents["plain"] == contents["none"] != contents["much"]
    (said,) = json.loads((tmp_path / "much.json").read_text())["loras"]
    assert (said["file"], said["scale"]) == ("l.safetensors", 4.0)
    digests = {json.loads((tmp_path / f"{n}.json").read_text())["request_sha256"] for n in contents}
    assert len(digests) == 3  # a batch does not take one for the other
