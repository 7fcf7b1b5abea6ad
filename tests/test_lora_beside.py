"""LoRAs beside the quantized layers of a file: eager PyTorch, ONNX Runtime and the simulated engine have them alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.engines.store import Store
from overcrank.errors import BackendError, UserError
from overcrank.export.quantization.lora import LoraInputs
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.models import resolve
from overcrank.models.demo import FOLDER
from overcrank.runtime.pipeline.accelerate import accelerate
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.sessions.lora_layer import held_ranks
from overcrank.runtime.sessions.stored_linear import StoredLinear
from safetensors.torch import load_file, save_file

from tests.quantized_files import quantized_file
from tests.simulated_tensorrt import Simulated, bundle_of
from tests.test_lora import LAYERS, module
from tests.test_simulated_batch import PROFILE

__all__ = ["module"]  # a fixture
CALL = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
ALIKE = {"int8": 0.999, "convrot": 0.999, "fp8": 0.998}
"""Cosine of frames with activations in the format, as a graph has them, and in 16 bit, as eager PyTorch has."""
IN_16_BIT = "proj_in"
"""A layer that the files leave in 16 bit."""


def latents(pipe: Any) -> torch.Tensor:
    own = {"output_type": "latent", "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
    made: torch.Tensor = pipe(**CALL, **own).frames
    return made.float()


def lora(path: Path, module: Any, seed: int = 0, layers: tuple[str, ...] = (*LAYERS, IN_16_BIT), rank: int = 4) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        outputs, inner = module.get_parameter(f"{layer}.weight").shape
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * 0.3
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
    save_file(tensors, path)
    return path


def together(path: Path, *files: tuple[Path, float]) -> Path:
    """One file whose LoRA is the sum of these."""
    read = [(load_file(file), scale) for file, scale in files]
    tensors = {}
    for name in read[0][0]:
        half = "lora_A" in name
        tensors[name] = torch.cat([t[name] * (1 if half else scale) for t, scale in read], 0 if half else 1)
    save_file(tensors, path)
    return path


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the exported graph for all of these tests."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("form", ["int8", "fp8", "convrot"])
def test_a_graph_with_lora_inputs_computes_what_eager_does(module: Any, tmp_path: Path, store: Path, form: str) -> None:
    """Loaded, made stronger, with a second one, and taken out: in one session, whose graph is never made anew."""
    file = quantized_file(tmp_path / "q.safetensors", module, form)
    first, second = (lora(tmp_path / f"{i}.safetensors", module, i, LAYERS) for i in (1, 2))
    pipe = load_quantized(file, store, loras=[f"{first}:0.5"])
    layer = pipe.transformer.get_submodule(LAYERS[0])
    assert isinstance(layer, StoredLinear)
    assert held_ranks(pipe.transformer) == dict.fromkeys(LAYERS, 4)
    made, sessions, raw = [], [], layer.weight.clone()
    for loras in ([f"{first}:0.5"], [f"{first}:1"], [f"{first}:0.5", f"{second}:0.7"], [f"{first}:0"], []):
        pipe.overcrank.set_loras(loras)
        made.append(latents(pipe))
        sessions.append(pipe.overcrank.modules[0].slots[0].session)
        with pipe.overcrank.ledger.eagerly():
            assert cosine(made[-1], latents(pipe)) > ALIKE[form], loras
    assert torch.equal(layer.weight, raw)
    assert len({id(session) for session in sessions}) == 1
    assert pipe.overcrank.ledger.record.backends() == {"denoiser": {"eager": 5, "onnxruntime": 5}}
    assert all(cosine(made[i], made[j]) < 0.99 for i in range(3) for j in range(i + 1, 4))
    assert torch.equal(made[3], made[4])
    assert torch.equal(made[4], latents(load_quantized(file, store)))


def test_layers_in_16_bit_are_merged_and_had_back(module: Any, tmp_path: Path, store: Path) -> None:
    file, own = quantized_file(tmp_path / "q.safetensors", module, "int8"), lora(tmp_path / "a.safetensors", module)
    plain, tensors = load_file(file)[f"model.diffusion_model.{IN_16_BIT}.weight"].float(), load_file(own)
    pipe = load_quantized(file, store, loras=[str(own)])
    assert held_ranks(pipe.transformer) == dict.fromkeys(LAYERS, 4)
    a, b = (tensors[f"transformer.{IN_16_BIT}.lora_{half}.weight"] for half in "AB")
    for strength in (1, 0.25):
        pipe.overcrank.set_loras([f"{own}:{strength}"])
        assert torch.allclose(pipe.transformer.proj_in.weight, plain + strength * (b @ a), atol=1e-6)
    pipe.overcrank.set_loras([])
    assert torch.equal(pipe.transformer.proj_in.weight, plain)
    accelerate(pipe, backend="eager")  # knows what the one before has done
    pipe.overcrank.set_loras([f"{own}:1"])
    pipe.overcrank.set_loras([])
    assert torch.equal(pipe.transformer.proj_in.weight, plain)


def load_quantized(file: Path, store: Path | None = None, **more: Any) -> Any:
    backend = "eager" if store is None else "onnxruntime"
    return load(str(FOLDER), weights=[f"transformer={file}"], **{"backend": backend, "store": store, **more})


def test_several_loras_are_the_sum_of_them(module: Any, tmp_path: Path) -> None:
    file = quantized_file(tmp_path / "q.safetensors", module, "int8")
    first, second = (lora(tmp_path / f"{i}.safetensors", module, i, LAYERS, rank=4 * i) for i in (1, 2))
    pipe = load_quantized(file, loras=[f"{first}:0.5", f"{second}:-0.7"])
    assert held_ranks(pipe.transformer) == dict.fromkeys(LAYERS, 12)
    two = latents(pipe)
    pipe.overcrank.set_loras([str(together(tmp_path / "sum.safetensors", (first, 0.5), (second, -0.7)))])
    assert torch.allclose(latents(pipe), two, atol=1e-4)
    assert [entry["file"] for entry in pipe.overcrank.settings()["loras"]] == ["sum.safetensors"]
    layer, x = pipe.transformer.get_submodule(LAYERS[0]), torch.randn(3, 128)
    pipe.overcrank.set_loras([f"{first}:0.5", f"{second}:-0.7"])
    halves = [(load_file(f), s) for f, s in ((first, 0.5), (second, -0.7))]
    name = f"transformer.{LAYERS[0]}"
    added = sum(t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] * s for t, s in halves)
    wanted = torch.nn.functional.linear(x, layer.values() + added, layer.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-4)


def test_layers_in_16_bit_hold_loras_beside_on_request(module: Any, tmp_path: Path, store: Path) -> None:
    file = lora(tmp_path / "a.safetensors", module, 1)
    pipe = load(str(FOLDER), loras=[str(file)], fuse_loras=False, backend="onnxruntime", store=store)
    assert held_ranks(pipe.transformer) == dict.fromkeys((*LAYERS, IN_16_BIT), 4)
    merged = load(str(FOLDER), loras=[str(file)], backend="onnxruntime", store=store)
    assert held_ranks(merged.transformer) == {}
    with_lora = latents(pipe)
    assert torch.allclose(with_lora, latents(merged), atol=1e-3)
    pipe.overcrank.set_loras([])
    without = latents(load(str(FOLDER), backend="onnxruntime", store=store))
    assert torch.equal(latents(pipe), without)
    assert cosine(with_lora, without) < 0.9995
    with pytest.raises(UserError, match=r"merged into transformer .* with nothing kept; load with fuse_loras=False"):
        merged.overcrank.set_loras([])
    plain = load(str(FOLDER), backend="onnxruntime", store=store)
    plain.overcrank.set_loras([str(file)])
    assert torch.allclose(latents(plain), latents(merged), atol=1e-5)
    plain.overcrank.set_loras([])
    assert torch.equal(latents(plain), without)


def test_what_has_no_low_rank_is_refused_beside_a_quantized_layer(module: Any, tmp_path: Path) -> None:
    file = quantized_file(tmp_path / "q.safetensors", module, "int8")
    pipe = load(
        str(FOLDER), weights=[f"transformer={file}"], backend="eager", loras=[str(lora(tmp_path / "a", module))]
    )
    before, kept = latents(pipe), held_ranks(pipe.transformer)
    name = f"transformer.{LAYERS[0]}"
    for tensors, says in (
        (
            {f"{name}.diff": torch.ones(128, 128)},
            r"has a whole difference \(diff\) of transformer.transformer_blocks.0",
        ),
        ({f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(64, 64)}, "has a LoKr of transformer"),
    ):
        save_file(tensors, tmp_path / "whole.safetensors")
        with pytest.raises(UserError, match=rf"{says}.*, which is in int8 and takes plain LoRA pairs alone; take such"):
            pipe.overcrank.set_loras([str(tmp_path / "whole.safetensors")])
    broken = load_file(tmp_path / "a")
    broken[f"{name}.lora_B.weight"][0, 0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=rf"NaN or infinities in transformer\.{LAYERS[0]}; save it again"):
        pipe.overcrank.set_loras([str(tmp_path / "nan.safetensors")])
    assert held_ranks(pipe.transformer) == kept
    assert torch.equal(latents(pipe), before)
    bias = {f"diffusion_model.{LAYERS[0]}.diff_b": torch.ones(128)}
    save_file(bias, tmp_path / "bias.safetensors")
    own = pipe.transformer.get_submodule(LAYERS[0]).bias.clone()
    pipe.overcrank.set_loras([f"{tmp_path / 'bias.safetensors'}:0.5"])
    assert torch.equal(pipe.transformer.get_submodule(LAYERS[0]).bias, own + 0.5)


def test_diffusers_own_functions_say_what_to_use(module: Any, tmp_path: Path) -> None:
    file, own = quantized_file(tmp_path / "q.safetensors", module, "fp8"), lora(tmp_path / "a.safetensors", module)
    pipe = load_quantized(file, loras=[str(own)])
    with pytest.raises(UserError, match=r"PEFT cannot wrap; use pipe\.overcrank\.set_loras\(\['FILE:SCALE'\]\)"):
        pipe.load_lora_weights(str(own))
    with pytest.raises(UserError, match=r"use pipe\.overcrank\.set_loras\(\[\]\)"):
        pipe.unload_lora_weights()
    pipe.overcrank.set_loras([])
    pipe.unload_lora_weights()


# ── engines, through the simulated runtime ───────────────────────────────────────────

INT8 = LayerFormat("int8", "dynamic")


def engines(store: Path, simulated: Simulated, lora: LoraInputs) -> Path:
    built = bundle_of(resolve("ltx-demo"), PROFILE, Store(store), "denoiser", wide=False, layers=INT8, lora=lora)
    return simulated.plans.register(built)


def test_an_engine_takes_loras_of_its_rank_and_others_say_what_to_build(
    module: Any, tmp_path: Path, simulated: Simulated
) -> None:
    file = quantized_file(tmp_path / "q.safetensors", module, "int8")
    first = lora(tmp_path / "a.safetensors", module, 1)
    wide = lora(tmp_path / "wide.safetensors", module, 2, LAYERS, rank=17)
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "backend": "eager"}
    pipe = load_quantized(file, **options)
    store = tmp_path / "store"
    engines(store, simulated, LoraInputs())
    accelerate(pipe, backend="tensorrt", store=store)
    without = latents(pipe)
    pipe.overcrank.set_loras([str(first)])
    with pytest.raises(
        BackendError, match=r"takes no LoRA beside its weights, .* rank 4; .* --layout \S+ --lora-rank 16\."
    ):
        latents(pipe)
    engines(store, simulated, LoraInputs(16, "quantized"))
    accelerate(pipe, backend="tensorrt", store=store)
    pipe.overcrank.set_loras([str(first)])
    with pytest.raises(
        BackendError, match=r"no LoRA beside transformer_blocks\.0\.\S+, .* --lora-rank 16 --lora-layers all"
    ):
        latents(pipe)
    ranked = engines(store, simulated, LoraInputs(16, "all"))
    pipe.overcrank.set_loras([])
    accelerate(pipe, backend="tensorrt", store=store)
    assert torch.equal(latents(pipe), without)
    assert pipe.overcrank.bundles["denoiser"] != ranked.name  # without LoRAs the engine that takes none is faster
    pipe.overcrank.set_loras([f"{first}:1"])
    one, session = latents(pipe), pipe.overcrank.modules[0].slots[0].session
    assert pipe.overcrank.bundles["denoiser"] == ranked.name
    with pipe.overcrank.ledger.eagerly():
        assert cosine(one, latents(pipe)) > 0.999
    pipe.overcrank.set_loras([f"{first}:2"])
    assert cosine(latents(pipe), one) < 0.9995
    pipe.overcrank.set_loras([f"{first}:0"])
    none = latents(pipe)
    pipe.overcrank.set_loras([])
    assert torch.equal(latents(pipe), none)
    assert cosine(none, without) > 0.9999  # of another engine
    assert pipe.overcrank.modules[0].slots[0].session is session
    pipe.overcrank.set_loras([str(wide)])
    with pytest.raises(
        BackendError, match=r"takes LoRAs of rank 16 together, .* rank 17; build-engine .* --lora-rank 32"
    ):
        latents(pipe)
