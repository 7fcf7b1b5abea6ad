"""The layouts in which LoRAs are published, a tiny file of each: what they add is what their formulas, or PEFT, say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.errors import CheckpointError, UserError
from overcrank.runtime.pipeline.adapters import merge
from overcrank.runtime.pipeline.lora_names import LayerNames
from overcrank.runtime.pipeline.lora_parts import lora_of, read_loras
from safetensors.torch import save_file

from tests.pipelines import CASES

Tensors = dict[str, torch.Tensor]
ALPHA = 3.0
LTX = {
    "transformer_blocks.0.attn1.to_q": 4,
    "transformer_blocks.2.ff.net.0.proj": 2,
    "transformer_blocks.4.attn2.to_out.0": 3,
}
"""Layer → rank."""
WAN = {"blocks.0.attn1.to_q": 4, "blocks.1.ffn.net.0.proj": 2, "condition_embedder.time_embedder.linear_1": 3}
ORIGINAL = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0"}
ORIGINAL |= {"condition_embedder.time_embedder.linear_1": "time_embedding.0"}


@pytest.fixture(scope="module")
def pipes() -> Mapping[str, Any]:
    torch.manual_seed(0)
    return {name: CASES[name].make() for name in ("ltx", "wan", "hunyuan_video")}


def pairs(module: Any, ranks: Mapping[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator, made = torch.Generator().manual_seed(1), {}
    for layer, rank in ranks.items():
        outputs, inner = module.get_parameter(f"{layer}.weight").shape
        made[layer] = torch.randn(rank, inner, generator=generator), torch.randn(outputs, rank, generator=generator)
    return made


def written(
    module: Any, ranks: Mapping[str, int], key: Callable[[str, str], str], alpha: bool
) -> tuple[Tensors, Tensors]:
    """A file, and what it adds; `key`: of a layer and "A", "B" or "alpha"."""
    tensors: Tensors = {}
    added: Tensors = {}
    for layer, (a, b) in pairs(module, ranks).items():
        tensors |= {key(layer, "A"): a, key(layer, "B"): b}
        if alpha:
            tensors[key(layer, "alpha")] = torch.tensor(ALPHA)
        added[f"{layer}.weight"] = b @ a * (ALPHA / len(a) if alpha else 1)
    return tensors, added


def halves(layer: str, what: str, down: str, up: str) -> str:
    return f"{layer}.alpha" if what == "alpha" else f"{layer}.{down if what == 'A' else up}.weight"


def diffusers(module: Any) -> tuple[Tensors, Tensors]:
    return written(module, LTX, lambda n, w: halves(f"transformer.{n}", w, "lora_A", "lora_B"), alpha=False)


def older_diffusers(module: Any) -> tuple[Tensors, Tensors]:
    return written(module, LTX, lambda n, w: halves(f"transformer.{n}", w, "lora.down", "lora.up"), alpha=True)


def peft(module: Any) -> tuple[Tensors, Tensors]:
    """With adapter_config.json beside it, which the test writes."""
    tensors, added = written(
        module, LTX, lambda n, w: halves(f"base_model.model.{n}", w, "lora_A", "lora_B"), alpha=False
    )
    return tensors, {name: value * ALPHA / LTX[name.removesuffix(".weight")] for name, value in added.items()}


def original(module: Any) -> tuple[Tensors, Tensors]:
    """As ComfyUI's and most trainers' files are."""
    return written(
        module, WAN, lambda n, w: halves(f"diffusion_model.{ORIGINAL[n]}", w, "lora_A", "lora_B"), alpha=False
    )


def bare(module: Any) -> tuple[Tensors, Tensors]:
    return written(module, WAN, lambda n, w: halves(ORIGINAL[n], w, "lora_down", "lora_up"), alpha=True)


def kohya(module: Any) -> tuple[Tensors, Tensors]:
    def key(name: str, what: str) -> str:
        return halves(f"lora_unet_{name.replace('.', '_')}", what, "lora_down", "lora_up")

    return written(module, LTX, key, alpha=True)


def fused(module: Any, flat: bool = False) -> tuple[Tensors, Tensors]:
    """HunyuanVideo's own names: one A for query, key and value."""
    generator, tensors, added = torch.Generator().manual_seed(1), Tensors(), Tensors()
    own = {
        "double_blocks.1.img_attn_qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_mlp.fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
        "single_blocks.2.linear2": ["single_transformer_blocks.2.proj_out"],
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
            f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{x}" for x in "qkv"
        ],
    }
    for rank, (name, parts) in enumerate(own.items(), 2):
        rows = [len(module.get_parameter(f"{part}.weight")) for part in parts]
        a = torch.randn(rank, module.get_parameter(f"{parts[0]}.weight").shape[1], generator=generator)
        b = torch.randn(sum(rows), rank, generator=generator)
        layer = f"lora_unet_{name.replace('.', '_')}" if flat else f"transformer.{name}"
        tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": torch.tensor(ALPHA)}
        for part, own_rows in zip(parts, b.split(rows), strict=True):
            added[f"{part}.weight"] = own_rows @ a * ALPHA / rank
    return tensors, added


def fused_kohya(module: Any) -> tuple[Tensors, Tensors]:
    return fused(module, flat=True)


def distilled(module: Any) -> tuple[Tensors, Tensors]:
    """LoRA pairs, and whole differences of weights and biases."""
    tensors, added = written(
        module, WAN, lambda n, w: halves(f"diffusion_model.{ORIGINAL[n]}", w, "lora_down", "lora_up"), alpha=True
    )
    norm, head, bias = torch.randn(32), torch.randn(16, 32), torch.randn(32)
    tensors |= {"diffusion_model.blocks.2.norm3.diff": norm, "diffusion_model.head.head.diff": head}
    tensors |= {"diffusion_model.blocks.0.self_attn.q.diff_b": bias}
    return tensors, added | {
        "blocks.2.norm2.weight": norm, "proj_out.weight": head, "blocks.0.attn1.to_q.bias": bias
    }  # fmt: skip


def by_peft(module: Any, config: Any, names: Mapping[str, str]) -> tuple[Tensors, Tensors]:
    """Trained and merged by PEFT; `names`: its own → the file's."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(2)
    trained = inject_adapter_in_model(config, copy.deepcopy(module), "own")
    for name, value in trained.named_parameters():
        if "own" in name:
            torch.nn.init.uniform_(value.data, 0.5, 1.5) if "magnitude" in name else torch.nn.init.normal_(value.data)
    tensors = {}
    for key, value in get_peft_model_state_dict(trained, adapter_name="own").items():
        for old, new in names.items():
            key = key.replace(old, new)
        tensors[f"diffusion_model.{key}"] = value.detach().contiguous()
    added = {}
    for name in LTX:
        layer = trained.get_submodule(name)
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        added[f"{name}.weight"] = layer.get_base_layer().weight.detach() - before
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(ALPHA)
    return tensors, added


def dora(module: Any) -> tuple[Tensors, Tensors]:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=list(LTX), init_lora_weights=False)
    return by_peft(
        module, config, {"lora_magnitude_vector.weight": "dora_scale", "lora_magnitude_vector": "dora_scale"}
    )


def loha(module: Any) -> tuple[Tensors, Tensors]:
    from peft import LoHaConfig

    return by_peft(module, LoHaConfig(r=4, alpha=3, target_modules=list(LTX), init_weights=False), {})


def lokr(module: Any) -> tuple[Tensors, Tensors]:
    from peft import LoKrConfig

    config = LoKrConfig(r=2, alpha=3, target_modules=list(LTX), init_weights=False, decompose_factor=4)
    return by_peft(module, config, {})


LAYOUTS: dict[Callable[[Any], tuple[Tensors, Tensors]], str] = {
    diffusers: "ltx", older_diffusers: "ltx", peft: "ltx", original: "wan", bare: "wan", kohya: "ltx",
    fused: "hunyuan_video", fused_kohya: "hunyuan_video", distilled: "wan", dora: "ltx", loha: "ltx", lokr: "ltx",
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.__name__)
def test_every_layout_adds_what_it_says(pipes: Mapping[str, Any], tmp_path: Path, layout: Any) -> None:
    pipe = pipes[LAYOUTS[layout]]
    module = copy.deepcopy(pipe.transformer).requires_grad_(False)
    tensors, added = layout(module)
    save_file(tensors, tmp_path / "l.safetensors")
    config = {"r": 1, "lora_alpha": ALPHA, "rank_pattern": LTX, "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    before = {name: value.clone() for name, value in module.named_parameters()}
    loras = read_loras([lora_of(f"{tmp_path / 'l.safetensors'}:0.5")], type(pipe), {"transformer": module}, {})
    merge(loras, {"transformer": module})
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == added.keys()
    for name in changed:
        assert torch.allclose(module.get_parameter(name), before[name] + 0.5 * added[name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore")  # diffusers' of keys that it has not expected
@pytest.mark.parametrize("layout", [diffusers, original, fused, distilled], ids=lambda x: x.__name__)
def test_diffusers_makes_the_same_of_what_it_reads(pipes: Mapping[str, Any], tmp_path: Path, layout: Any) -> None:
    pipe = pipes[LAYOUTS[layout]]
    module = copy.deepcopy(pipe.transformer).requires_grad_(False)
    tensors, added = layout(module)
    pairs_alone = {name: value for name, value in tensors.items() if ".diff" not in name and "time_emb" not in name}
    if layout is fused:  # its converter knows neither alphas nor the refiner's names
        pairs_alone = {n: v for n, v in tensors.items() if "double_blocks.1" in n and "lora" in n}
        renamed = {n.removeprefix("transformer.").replace("down", "A").replace("up", "B"): n for n in pairs_alone}
        pairs_alone = {new: pairs_alone[old] for new, old in renamed.items()}
    save_file(pairs_alone, tmp_path / "l.safetensors")
    stock = type(pipe)(**{**pipe.components, "transformer": copy.deepcopy(module)})
    stock.load_lora_weights(str(tmp_path / "l.safetensors"), adapter_name="own")
    stock.transformer.fuse_lora(adapter_names=["own"])
    stock.transformer.unload_lora()
    merge(
        read_loras([lora_of(str(tmp_path / "l.safetensors"))], type(pipe), {"transformer": module}, {}),
        {"transformer": module},
    )
    wanted = dict(stock.transformer.named_parameters())
    assert all(torch.allclose(value, wanted[name], atol=1e-5) for name, value in module.named_parameters())
    assert added


@pytest.mark.parametrize("name", ["single_blocks.2.linear1", "lora_unet_single_blocks_2_linear1"])
def test_a_layer_that_is_four_falls_apart_as_it_does(name: str) -> None:
    """Of the published width, which diffusers' own function takes for granted."""
    from accelerate import init_empty_weights
    from diffusers import HunyuanVideoTransformer3DModel

    with init_empty_weights():
        module = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=3, num_refiner_layers=1)
    block, width = "single_transformer_blocks.2", 3072
    parts = [*(f"{block}.attn.to_{x}" for x in "qkv"), f"{block}.proj_mlp"]
    ends = [width, 2 * width, 3 * width, 7 * width]
    found = LayerNames(module).find(name, 7 * width)
    assert found == {part: ((start, end),) for part, start, end in zip(parts, [0, *ends], ends, strict=False)}


def test_layers_that_a_model_has_not_are_counted_and_named(
    pipes: Mapping[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, file = pipes["ltx"], tmp_path / "l.safetensors"
    parts = {"transformer": pipe.transformer}
    tensors, _ = kohya(pipe.transformer)
    strange = {f"lora_te1_layers_{i}_mlp.lora_{x}.weight": torch.zeros(4, 4) for i in range(7) for x in ("down", "up")}
    save_file(tensors | strange, file)
    (lora,) = read_loras([lora_of(str(file))], type(pipe), parts, {})
    assert len(lora.pairs) == len(LTX)
    said = caplog.records[-1].getMessage()
    assert "7 of its 10 layers and biases are none of this model's, and are left out: lora_te1_layers_0_mlp" in said
    assert said.endswith("and 2 more.")
    save_file(strange, file)
    with pytest.raises(CheckpointError, match=r"nothing here matches|kohya's layout"):
        read_loras([lora_of(str(file))], type(pipe), parts, {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lokr_w1": torch.ones(4, 4)}, r"attn1\.to_q is LoKr that is not whole \(lokr_w2 is missing\); merge it"),
        ({"hada_w1_a": torch.ones(32, 2)}, r"is LoHa that is not whole \(hada_w1_b is missing\)"),
        ({"hada_t1": torch.ones(2, 2), "hada_w1_a": torch.ones(32, 2)}, "is LoHa with a Tucker decomposition"),
        ({"dora_scale": torch.ones(32, 1)}, r"is DoRA that is not whole \(A is missing\)"),
        ({"oft_diag": torch.ones(2, 2)}, r"is OFT \(rotations\), which is not merged here"),
    ],
)
def test_kinds_that_are_not_whole_are_told(
    pipes: Mapping[str, Any], tmp_path: Path, change: Tensors, says: str
) -> None:
    file = tmp_path / "l.safetensors"
    save_file(
        {f"diffusion_model.transformer_blocks.0.attn1.to_q.{name}": value for name, value in change.items()}, file
    )
    with pytest.raises(UserError, match=says):
        read_loras([lora_of(str(file))], type(pipes["ltx"]), {"transformer": pipes["ltx"].transformer}, {})


def test_a_strength_that_is_a_schedule_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "l.safetensors")
    for words in ("0.5,0.8", "0.8@0-10", "[0:1,0.5:0]"):
        with pytest.raises(UserError, match=r"is no number; give one such as 0\.8, which holds for all steps"):
            lora_of(f"{tmp_path / 'l.safetensors'}:{words}")


def test_pefts_own_layout_needs_its_config(pipes: Mapping[str, Any], tmp_path: Path) -> None:
    tensors, _ = peft(pipes["ltx"].transformer)
    save_file(tensors, tmp_path / "l.safetensors")
    for config, says in (
        (None, r"is in PEFT's own layout \(base_model\.model\.…\), whose alpha is in adapter_config\.json; put that"),
        ("[]", r"adapter_config\.json is no JSON object; save the LoRA again"),
        ('{"fan_in_fan_out": true}', r"adapter_config\.json has fan_in_fan_out=True; it is not merged"),
    ):
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(config, "utf-8")
        with pytest.raises(UserError, match=says):
            read_loras(
                [lora_of(str(tmp_path / "l.safetensors"))],
                type(pipes["ltx"]),
                {"transformer": pipes["ltx"].transformer},
                {},
            )


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["lora_unet_{", "lora_unet_blocks_0_{}_q", "lora_unet_#_0_q", "lora_unet_a_#", "lora_unet_{0}"]
)
def test_odd_names_are_of_no_layer(name: str) -> None:
    """Braces and hashes, found by fuzzing."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        module = WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=16)
    assert LayerNames(module).find(name, 4) == {}
