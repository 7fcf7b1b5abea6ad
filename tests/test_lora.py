"""LoRA files merged into the weights of a render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.errors import CheckpointError, UserError
from overcrank.models.demo import FOLDER
from overcrank.runtime.pipeline.adapters import merge
from overcrank.runtime.pipeline.lora_parts import lora_of, read_loras
from safetensors.torch import save_file

pytestmark = pytest.mark.quick

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
@pytest.mark.heavy
def test_a_lora_is_added_to_the_weights(module: Any, tmp_path: Path, prefix: str, alpha: float | None) -> None:
    from diffusers import LTXPipeline
    from safetensors.torch import load_file

    file = lora_file(tmp_path / "l.safetensors", module, prefix, alpha)
    before = {n: p.clone() for n, p in module.named_parameters()}
    merge(read_loras([lora_of(f"{file}:0.5")], LTXPipeline, {"transformer": module}, {}), {"transformer": module})
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
        read_loras([lora_of(str(file))], LTXPipeline, {"transformer": module}, {})
    wide = {
        "transformer.proj_in.lora_A.weight": torch.zeros(2, 7),
        "transformer.proj_in.lora_B.weight": torch.zeros(9, 2),
    }
    save_file(wide, file)
    with pytest.raises(CheckpointError, match=r"transformer\.proj_in"):
        read_loras([lora_of(str(file))], LTXPipeline, {"transformer": module}, {})
    with pytest.raises(UserError, match="does not exist; give FILE or FILE:SCALE"):
        lora_of(str(tmp_path / "none.safetensors:2"))
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_loras([lora_of(str(file))], LTXPipeline, {"transformer": module}, {})


@pytest.mark.heavy
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


# ── one of several parts ─────────────────────────────────────────────────────────────

WORDS = {"high": "transformer", "low": "transformer_2"}


def distilled_file(path: Path, seed: int = 0, names: str = "diffusion_model.") -> Path:
    """As lightx2v publishes them: Wan's own names, alphas, and differences of biases, norms and the head."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {f"{names}head.head.diff": values(16, 32), f"{names}head.head.diff_b": values(16)}
    for block in range(5):
        for layer in (*(f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2"):
            outer, inner = {"ffn.0": (48, 32), "ffn.2": (32, 48)}.get(layer, (32, 32))
            key = f"{names}blocks.{block}.{layer}"
            tensors |= {f"{key}.lora_down.weight": values(RANK, inner), f"{key}.lora_up.weight": values(outer, RANK)}
            tensors |= {f"{key}.alpha": torch.tensor(2.0), f"{key}.diff_b": values(outer)}
        tensors |= {f"{names}blocks.{block}.norm3.diff": values(32), f"{names}blocks.{block}.norm3.diff_b": values(32)}
        tensors |= {f"{names}blocks.{block}.self_attn.norm_q.diff": values(32)}
    save_file(tensors, path)
    return path


def plain_file(path: Path, seed: int = 0) -> Path:
    """PEFT's names, LoRA pairs alone: what diffusers' own loader takes."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for block in range(5):
        for layer in ("attn1.to_q", "attn2.to_v"):
            key = f"transformer.blocks.{block}.{layer}"
            pairs |= {f"{key}.lora_A.weight": torch.randn(RANK, 32, generator=generator) * 0.3}
            pairs |= {f"{key}.lora_B.weight": torch.randn(32, RANK, generator=generator) * 0.3}
    save_file(pairs, path)
    return path


@pytest.fixture
def experts() -> Any:
    from tests.pipelines import CASES

    torch.manual_seed(0)
    return CASES["wan-two-experts"].make()


def parts_of(pipe: Any) -> dict[str, Any]:
    return {n: m for n, m in pipe.components.items() if hasattr(m, "named_parameters")}


def read(pipe: Any, *arguments: object, words: Any = WORDS) -> Any:
    return read_loras([lora_of(str(a)) for a in arguments], type(pipe), parts_of(pipe), words)


def test_each_expert_gets_its_own_as_diffusers_loads_them(experts: Any, tmp_path: Path) -> None:
    import copy

    pytest.importorskip("peft")  # without it diffusers loads none
    high, low = plain_file(tmp_path / "a.safetensors", 1), plain_file(tmp_path / "b.safetensors", 2)
    stock = type(experts)(**{k: copy.deepcopy(v) for k, v in experts.components.items()}, boundary_ratio=0.875)
    stock.load_lora_weights(str(high), adapter_name="high")
    stock.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    for part, name, scale in (("transformer", "high", 0.5), ("transformer_2", "low", 1.0)):
        getattr(stock, part).fuse_lora(lora_scale=scale, adapter_names=[name])
        getattr(stock, part).unload_lora()
    merge(read(experts, f"high={high}:0.5", f"transformer_2={low}"), parts_of(experts))
    for part in ("transformer", "transformer_2"):
        wanted = dict(getattr(stock, part).named_parameters())
        own = dict(getattr(experts, part).named_parameters())
        assert own.keys() == wanted.keys()
        assert all(torch.allclose(own[n], wanted[n], atol=1e-6) for n in own), part
    assert not torch.equal(
        experts.transformer.blocks[0].attn1.to_q.weight, experts.transformer_2.blocks[0].attn1.to_q.weight / 1.05
    )


def test_a_distilled_file_is_merged_whole(experts: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = distilled_file(tmp_path / "wan_low_noise_4step.safetensors")
    before = {n: {k: p.clone() for k, p in m.named_parameters()} for n, m in parts_of(experts).items()}
    merge(read(experts, f"{file}:0.5"), parts_of(experts))
    tensors = load_file(file)
    for name, after in experts.transformer.named_parameters():
        assert torch.equal(after, before["transformer"][name]), name
    after = dict(experts.transformer_2.named_parameters())
    key = "diffusion_model.blocks.3"
    pair = tensors[f"{key}.cross_attn.k.lora_up.weight"] @ tensors[f"{key}.cross_attn.k.lora_down.weight"] * (2 / RANK)
    wanted = {
        "blocks.3.attn2.to_k.weight": pair,
        "blocks.3.attn2.to_k.bias": tensors[f"{key}.cross_attn.k.diff_b"],
        "blocks.3.ffn.net.2.bias": tensors[f"{key}.ffn.2.diff_b"],
        "blocks.3.norm2.weight": tensors[f"{key}.norm3.diff"],
        "blocks.3.norm2.bias": tensors[f"{key}.norm3.diff_b"],
        "blocks.3.attn1.norm_q.weight": tensors[f"{key}.self_attn.norm_q.diff"],
        "proj_out.weight": tensors["diffusion_model.head.head.diff"],
        "proj_out.bias": tensors["diffusion_model.head.head.diff_b"],
    }
    for name, added in wanted.items():
        assert torch.allclose(after[name], before["transformer_2"][name] + 0.5 * added, atol=1e-6), name
    changed = [n for n, p in after.items() if not torch.equal(p, before["transformer_2"][n])]
    assert len(changed) == sum(".diff" in k or "lora_up" in k for k in tensors)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["style"], r"does not say which it is for; write loras=\['high=\S+style\S+', 'low=\S+style"),
        (
            ["a_high_noise", "b_HIGH_fp16"],
            r"both go into transformer; say .* loras=\['high=\S+a_high.*', 'low=\S+b_HI",
        ),
        (["high=x_low_noise"], r"the file's name says low, and high is the other expert; write loras=\['low="),
        (["transformer_2=my-HighNoise"], r"says high, and transformer_2 is the other expert"),
        (
            ["middle=style"],
            r"WanPipeline has no part 'middle'; it has text_encoder, transformer \(high\), transformer_2",
        ),
        (["vae=style"], "for another model: nothing here matches vae.blocks.0"),
    ],
)
def test_a_part_that_is_not_clear_is_asked_for(experts: Any, tmp_path: Path, names: list[str], says: str) -> None:
    arguments = []
    for name in names:
        part, _, stem = name.rpartition("=")
        file = plain_file(tmp_path / f"{stem}.safetensors")
        arguments.append(f"{part}={file}" if part else str(file))
    with pytest.raises(UserError, match=says):
        read(experts, *arguments)


def test_a_name_or_what_fits_says_the_part(experts: Any, tmp_path: Path) -> None:
    for stem, part in {
        "x_low_noise_v1": "transformer_2",
        "x-HighNoise": "transformer",
        "lora_LOW": "transformer_2",
    }.items():
        assert [x.parts for x in read(experts, plain_file(tmp_path / f"{stem}.safetensors"))] == [[part]]
    style = plain_file(tmp_path / "style.safetensors")
    assert [x.parts for x in read(experts, f"high={style}", f"low={style}")] == [["transformer"], ["transformer_2"]]
    from overcrank.runtime.pipeline.lora_parts import said_by

    assert not any(said_by(f"{n}.safetensors", WORDS) for n in ("flow_v2", "high_res", "HighRes", "low_light", "slow"))
    experts.transformer.blocks[0].attn1.to_q = torch.nn.Linear(32, 48)
    assert [x.parts for x in read(experts, style)] == [["transformer_2"]]


def test_a_model_of_one_expert_needs_no_part(module: Any, tmp_path: Path) -> None:
    from diffusers import LTXPipeline

    file = lora_file(tmp_path / "low_noise.safetensors", module)
    for argument in (str(file), f"transformer={file}:1"):
        (lora,) = read_loras([lora_of(argument)], LTXPipeline, {"transformer": module}, {})
        assert lora.parts == ["transformer"]
    with pytest.raises(UserError, match="LTXPipeline has no part 'high'; it has transformer"):
        read_loras([lora_of(f"high={file}")], LTXPipeline, {"transformer": module}, WORDS)
    with pytest.raises(UserError, match="scale nan is no number"):
        lora_of(f"{file}:nan")


def test_halves_and_kinds_that_nothing_comes_of_are_named(module: Any, tmp_path: Path) -> None:
    from diffusers import LTXPipeline
    from safetensors.torch import load_file

    file = lora_file(tmp_path / "l.safetensors", module)
    whole = load_file(file)
    first = f"transformer.{LAYERS[0]}"
    for more, says in (
        ({f"{first}.lora_A.weight": None}, rf"is not whole: {first} has lora_B alone"),
        ({f"{first}.lora_B.weight": None}, rf"is not whole: {first} has lora_A alone"),
        ({f"{first}.lora_B.weight": torch.zeros(128, 8)}, f"{first} has rank 4 in lora_A and 8 in lora_B"),
        ({f"{first}.lora_B.weight": torch.zeros(9, 4)}, rf"nothing here matches {first}\.weight"),
        ({f"{first}.lora_A.bias": torch.zeros(4)}, rf"nothing here matches {first}\.lora_A\.bias"),
        ({f"{first}.lora_A.other.weight": torch.zeros(4, 128)}, "holds several adapters, such as"),
        ({"transformer.proj_out.alpha": torch.ones(())}, r"nothing here matches transformer\.proj_out\.alpha"),
        ({f"{first}.alpha": torch.tensor(float("nan"))}, "the alpha of transformer.transformer_blocks"),
        ({f"{first}.lokr_w1": torch.zeros(2, 2)}, r"is LoKr that is not whole \(lokr_w2 is missing\); merge it"),
        ({f"{first}.lora_B.weight": torch.zeros(128, 4, dtype=torch.int8)}, r"is torch\.int8, no floating type"),
    ):
        save_file({k: v for k, v in {**whole, **more}.items() if v is not None}, file)
        with pytest.raises(UserError, match=says):
            read_loras([lora_of(str(file))], LTXPipeline, {"transformer": module}, {})


def test_a_pack_of_other_loras_is_refused(tmp_path: Path) -> None:
    from overcrank.export.quantization.pack import require_loras

    pack, merged = (
        tmp_path / "pack",
        [{"file": "l.safetensors", "sha256": "ab", "scale": 1.0, "parts": ["transformer"]}],
    )
    save_file({"x": torch.zeros(1)}, pack, {"loras": json.dumps([["ab", 1.0, ["transformer"]]])})
    require_loras(pack, merged)
    for others, said in (([], "none"), ([merged[0] | {"parts": ["transformer_2"]}], r"l\.safetensors")):
        with pytest.raises(
            UserError, match=rf"packed with other LoRAs than this render merges \({said}\); pack it again"
        ):
            require_loras(pack, others)
