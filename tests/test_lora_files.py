"""LoRA files as PEFT and other trainers write them: merged as PEFT merges them, or told what they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.errors import CheckpointError, UserError
from overcrank.runtime.pipeline.adapters import merge
from overcrank.runtime.pipeline.lora_parts import lora_of, read_loras
from safetensors.torch import load_file, save_file

from tests.test_lora import LAYERS, RANK, distilled_file, experts, lora_file, module, read

__all__ = ["experts", "module"]  # fixtures


def pipeline_of(module: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, module)


SETTINGS: list[dict[str, Any]] = [
    {"lora_alpha": 4},
    {"lora_alpha": 16},
    {"lora_alpha": 4, "use_rslora": True},
    {"lora_alpha": 16, "use_rslora": True, "lora_bias": True},
    {"lora_alpha": 4, "lora_bias": True},
    {"lora_alpha": 4, "rank_pattern": {LAYERS[0]: 2}, "alpha_pattern": {"attn1.to_q": 12, r"ff\.net\.\d": 3}},
    {"lora_alpha": 4, "rank_pattern": {LAYERS[0]: 16}, "use_rslora": True, "alpha_pattern": {"to_q": 1}},
]


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases, which it takes for shards
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_peft_trains_is_merged_as_peft_merges_it(module: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Trained by PEFT, written by diffusers, merged by both."""
    from peft import LoraConfig, get_peft_model_state_dict

    trained = pipeline_of(copy.deepcopy(module))
    config = LoraConfig(r=RANK, target_modules=list(LAYERS), init_lora_weights=False, **settings)
    torch.manual_seed(3)
    trained.transformer.add_adapter(config, "own")
    for name, value in trained.transformer.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(value)
    trained.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer, adapter_name="own"),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    trained.transformer.fuse_lora(lora_scale=0.5, adapter_names=["own"])
    trained.transformer.unload_lora()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    before = {n: p.clone() for n, p in module.named_parameters()}
    merge(read_loras([lora_of(f"{file}:0.5")], type(trained), {"transformer": module}, {}), {"transformer": module})
    wanted = dict(trained.transformer.named_parameters())
    assert all(torch.allclose(p, wanted[n], atol=1e-6) for n, p in module.named_parameters())
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{layer}.{k}" for layer in LAYERS for k in ("weight", *("bias",) * ("lora_bias" in settings))}


RECORDS = ["no json", "[1]", "[" * 100_000, '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": 1e999}',
           '{"transformer.alpha_pattern": [1], "transformer.lora_alpha": 1}',
           '{"transformer.alpha_pattern": {"(": 1}, "transformer.lora_alpha": 1}', '{"transformer.use_dora": true}',
           '{"transformer.init_lora_weights": "pissa_niter_4"}']  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r[:40])
def test_a_record_that_is_not_understood_is_told(module: Any, tmp_path: Path, record: str) -> None:
    file = lora_file(tmp_path / "l.safetensors", module)
    save_file(load_file(file), file, {"lora_adapter_metadata": record})
    with pytest.raises(UserError, match=r"lora_adapter_metadata|the alpha of transformer"):
        read_loras([lora_of(str(file))], type(pipeline_of(module)), {"transformer": module}, {})


def test_names_of_another_model_are_told(module: Any, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "l.safetensors", module)
    save_file({key.replace("transformer_blocks", "layers"): value for key, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"is for another model: nothing here matches transformer\.layers\.0"):
        read_loras([lora_of(str(file))], type(pipeline_of(module)), {"transformer": module}, {})


def test_what_diffusers_converters_raise_is_a_sentence(
    experts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_file(distilled_file(tmp_path / "x_low.safetensors"))
    for strange in ("diffusion_model.blocks.x.self_attn.q", "diffusion_model.time_embedding.7", "lora_unet_blocks_x_q"):
        pair = {f"{strange}.lora_down.weight": torch.zeros(4, 32), f"{strange}.lora_up.weight": torch.zeros(32, 4)}
        save_file(pair, tmp_path / "strange_low.safetensors")
        with pytest.raises(CheckpointError, match=r"strange_low\.safetensors'\](?: is|: diffusers drops)"):
            read(experts, tmp_path / "strange_low.safetensors")
        save_file(whole | pair, tmp_path / "strange_low.safetensors")
        (lora,) = read(experts, tmp_path / "strange_low.safetensors")
        assert len(lora.pairs) == 50
        assert f"1 of its 118 layers and biases are none of this model's, and are left out: {strange}." in caplog.text


def test_nan_in_a_lora_is_named(module: Any, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "l.safetensors", module)
    tensors = load_file(file)
    tensors[f"transformer.{LAYERS[1]}.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, file)
    loras = read_loras([lora_of(str(file))], type(pipeline_of(module)), {"transformer": module}, {})
    with pytest.raises(CheckpointError, match=rf"holds NaN or infinities in transformer\.{LAYERS[1]}\.weight"):
        merge(loras, {"transformer": module})
