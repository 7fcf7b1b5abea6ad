"""Weight files from their headers: what they are, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from overcrank.errors import CheckpointError
from overcrank.export.files.contents import contents_of
from overcrank.export.files.identify import TABLE
from overcrank.export.files.parts import parts_of
from overcrank.export.files.weight_file import open_weights
from overcrank.export.module import construct
from overcrank.models import resolve
from overcrank.runtime.inspect import inspect_file
from overcrank.runtime.pipeline.parts import require_parts
from overcrank.runtime.pipeline.weights import module_of
from torch import Tensor

from bench.index_networks import indexed
from tests import single_files as files
from tests.servers import Nginx

pytestmark = pytest.mark.quick

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain() -> State:
    return files.original(files.weights("transformer"))


@pytest.fixture(scope="module")
def quantized(plain: State) -> State:
    return files.fp8(plain)


@pytest.mark.heavy
def test_the_table_of_networks_is_what_the_models_make() -> None:
    assert indexed() == json.loads(TABLE.read_text("utf-8")), "run python bench/index_networks.py"


# ── what a file is ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_network_is_told_by_its_names_and_shapes(prefix: str, tmp_path: Path) -> None:
    state = files.original(files.weights("transformer"), prefix)
    (network,) = contents_of(files.saved(tmp_path / "anything.safetensors", state)).networks
    assert (network.part, network.variants) == ("transformer", ("ltx-demo",))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_network_under_diffusers_names_too(part: str, tmp_path: Path) -> None:
    inspection = inspect_file(str(files.saved(tmp_path / "a.safetensors", files.weights(part))))
    assert [(n.part, n.variants) for n in inspection.networks] == [(part, ("ltx-demo",))]
    assert inspection.keys == "diffusers names"


def test_an_all_in_one_file_has_several_networks(plain: State, tmp_path: Path) -> None:
    vae = {f"vae.{name}": tensor for name, tensor in files.weights("vae").items()}
    inspection = inspect_file(str(files.saved(tmp_path / "all.safetensors", plain | vae)))
    assert [n.part for n in inspection.networks] == ["transformer", "vae"]
    assert "prefix model.diffusion_model.; diffusers names, prefix vae." in inspection.keys
    assert "--weights transformer=" in inspection.commands()[-1]
    assert "--weights vae=" in inspection.commands()[-1]


def test_a_command_names_the_picture_that_its_model_needs(tmp_path: Path) -> None:
    commands = inspect_file(str(files.header(tmp_path / "i2v.safetensors", shapes_of("wan-2.2-i2v-a14b")))).commands()
    assert commands[-1].endswith(f"--weights high={tmp_path / 'i2v.safetensors'} --image first.png")


@pytest.mark.heavy
def test_large_files_are_told_by_their_headers(tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text("utf-8"))
    for cls in ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "LTX2VideoTransformer3DModel"):
        variants = next(iter(table[cls]["networks"].values()))
        file = files.header(tmp_path / f"{cls}.safetensors", shapes_of(variants[0]))
        (network, *_) = contents_of(file).networks
        assert network.variants[: len(variants)] == tuple(variants)


def shapes_of(variant: str, part: str = "transformer") -> dict[str, tuple[int, ...]]:
    component = parts_of(resolve(variant))[part]
    with init_empty_weights():
        module = construct(component.cls, component.config, variant)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_scales_and_formats_are_told(quantized: State, plain: State, tmp_path: Path) -> None:
    scaled = inspect_file(str(files.saved(tmp_path / "fp8.safetensors", quantized, {"author": "someone"})))
    assert (scaled.layers, scaled.scales) == ({"fp8_e4m3": 60}, {"fp8_e4m3": "of the tensor"})
    assert (scaled.precision, scaled.metadata["author"]) == ("fp8", "someone")
    assert scaled.parameters == sum(tensor.numel() for tensor in plain.values())
    rows = inspect_file(str(files.saved(tmp_path / "int8.safetensors", files.int8(plain))))
    assert (rows.layers, rows.scales) == ({"int8": 60}, {"int8": "for each row"})
    older = files.fp8(plain, "scale_weight", told=False)
    assert inspect_file(str(files.saved(tmp_path / "older.safetensors", older))).layers == {"fp8_e4m3": 60}


def test_an_index_of_several_files(quantized: State, tmp_path: Path) -> None:
    index = files.sharded(tmp_path / "shards", quantized)
    inspection = inspect_file(str(index))
    assert (inspection.networks[0].variants, inspection.layers) == (("ltx-demo",), {"fp8_e4m3": 60})
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        inspect_file(str(index))


def test_gguf(plain: State, tmp_path: Path) -> None:
    file = files.gguf(tmp_path / "q8.gguf", {k.removeprefix(files.DENOISER): v for k, v in plain.items()})
    inspection = inspect_file(str(file))
    assert inspection.networks[0].variants == ("ltx-demo",)
    assert inspection.layers["Q8_0"] > 60
    assert inspection.scales == {"Q8_0": "in its blocks"}
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"is not a whole GGUF file|is truncated"):
        open_weights(file)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Nginx]:
    (tmp_path / "served").mkdir()
    server = Nginx(tmp_path / "served", tmp_path / "nginx")
    server.start()
    yield server
    server.kill()


def test_a_file_elsewhere_is_read_in_ranges(served: Nginx, quantized: State, plain: State, tmp_path: Path) -> None:
    files.saved(served.folder / "fp8.safetensors", quantized)
    files.gguf(served.folder / "q8.gguf", {k.removeprefix(files.DENOISER): v for k, v in plain.items()})
    here = inspect_file(str(served.folder / "fp8.safetensors"))
    there = inspect_file(f"{served.url}/fp8.safetensors")
    assert (there.networks, there.layers, there.scales, there.bytes) == (
        here.networks,
        here.layers,
        here.scales,
        here.bytes,
    )
    assert there.commands()[0] == f"curl -L -O {served.url}/fp8.safetensors"
    assert "--layout transformer=fp8.safetensors" in there.commands()[1]
    assert inspect_file(f"{served.url}/q8.gguf").layers["Q8_0"] > 60
    whole = (served.folder / "fp8.safetensors").stat().st_size
    asked = [line for line in served.served() if "fp8" in line and "bytes=" in line]
    read = sum(int(stop) - int(start) + 1 for start, stop in (x.rpartition("bytes=")[2].split("-") for x in asked))
    assert 0 < read < whole
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect_file(f"{served.url}/nothing.safetensors")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("form", "halves", "layout"),
    [
        ("transformer.{}.lora_{}.weight", ("A", "B"), "diffusers (transformer.…)"),
        ("diffusion_model.{}.lora_{}.weight", ("A", "B"), "original names (diffusion_model.…)"),
        ("lora_unet_{}.lora_{}.weight", ("down", "up"), "kohya (lora_unet_…)"),
        ("base_model.model.{}.lora_{}.weight", ("A", "B"), "PEFT (base_model.model.…)"),
    ],
)
def test_a_lora_and_what_it_fits(form: str, halves: tuple[str, str], layout: str, tmp_path: Path) -> None:
    file = files.lora(tmp_path / "l.safetensors", form, halves)
    inspection = inspect_file(str(file))
    facts = inspection.lora
    assert facts is not None
    assert (inspection.kind, facts.kind, facts.layout, facts.ranks, facts.layers) == ("LoRA", "LoRA", layout, {4: 2}, 2)
    assert (facts.fits, facts.matched) == (("ltx-demo",), 1.0)
    assert inspection.commands() == [f'overcrank render "a prompt" --model ltx-demo --lora {file}']


# ── what can be wrong ────────────────────────────────────────────────────────────────


def without_scale(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != f"{files.LAYER}.weight_scale"}


def of_two_values(state: State) -> State:
    return state | {f"{files.LAYER}.weight_scale": torch.ones(2)}


def scale_of_nothing(state: State) -> State:
    return state | {"model.diffusion_model.proj_out.weight_scale": torch.ones(())}


def unknown_format(state: State) -> State:
    return state | {f"{files.LAYER}.comfy_quant": files.marker({"format": "int3_magic"})}


def no_json(state: State) -> State:
    return state | {f"{files.LAYER}.comfy_quant": torch.tensor([123, 45], dtype=torch.uint8)}


def unknown_scale(state: State) -> State:
    return state | {f"{files.LAYER}.weight_scale_2": torch.ones(())}


def of_another_type(state: State) -> State:
    return state | {"model.diffusion_model.proj_out.bias": torch.ones(128, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_scale, "attn1.to_q' is in fp8_e4m3 and has no scale; its values are unknown"),
        (of_two_values, "attn1.to_q.weight_scale' is [2], which does not fit 128 × 128"),
        (scale_of_nothing, "proj_out.weight_scale' is a scale, and"),
        (unknown_format, "attn1.to_q' is in the format 'int3_magic' (float8_e4m3fn), which is not read here"),
        (no_json, "attn1.to_q.comfy_quant is no JSON table"),
        (unknown_scale, "is in fp8_e4m3, for which"),
        (of_another_type, "proj_out.bias' is int8, which only layers' weights are"),
    ],
)
def test_what_is_not_understood_is_named(damage: Any, says: str, quantized: State, tmp_path: Path) -> None:
    file = files.saved(tmp_path / "f.safetensors", damage(quantized))
    with pytest.raises(CheckpointError) as caught:
        inspect_file(str(file))
    assert says in str(caught.value)
    with pytest.raises(CheckpointError, match=r"f\.safetensors"):
        require_parts({"transformer": file}, resolve("ltx-demo"))


def test_an_older_file_without_one_of_its_scales(plain: State, tmp_path: Path) -> None:
    state = files.fp8(plain, "scale_weight", told=False)
    del state[f"{files.LAYER}.scale_weight"]
    with pytest.raises(CheckpointError, match=r"to_q' is in fp8_e4m3 and has no scale"):
        inspect_file(str(files.saved(tmp_path / "f.safetensors", state)))


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_scale_that_is_none(value: float, quantized: State, tmp_path: Path) -> None:
    state = quantized | {f"{files.LAYER}.weight_scale": torch.tensor(value)}
    file = files.saved(tmp_path / "f.safetensors", state)
    component = parts_of(resolve("ltx-demo"))["transformer"]
    with pytest.raises(CheckpointError, match=r"the scale of '.*attn1\.to_q' has values that are none"):
        module_of(file, component, torch.float32)


ENTRY = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}
LONG = {"dtype": "F16", "shape": [400], "data_offsets": [0, 800]}


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda f: files.raw(f, {"a": LONG}, 8),
            "is truncated: tensor 'a'",
        ),
        (lambda f: files.raw(f, {"a": ENTRY, "b": ENTRY}, 16), "is not a whole safetensors file"),
        (lambda f: files.raw(f, {"a": ENTRY}, 800), "is not a whole safetensors file"),
        (lambda f: files.raw(f, {"a": ENTRY | {"shape": [5]}}, 8), "is not a whole safetensors file"),
        (lambda f: f.write_bytes(b"\xff" * 64), "is not a whole safetensors file"),
        (lambda f: f.write_bytes(b""), "it is empty"),
        (lambda f: f.write_bytes(b"GGUF" + bytes(8)), "is not a whole GGUF file"),
        (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    ],
)
def test_headers_that_lie(write: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    write(file)
    with pytest.raises(CheckpointError) as caught:
        open_weights(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("ending", ["pt", "pth", "ckpt", "bin"])
def test_a_pickle_is_never_read(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"f.{ending}"
    file.write_bytes(b"\x80\x04evil")
    with pytest.raises(CheckpointError, match=r"is a pickle, .* save it as safetensors"):
        inspect_file(str(file))


@pytest.mark.heavy
def test_a_file_of_another_size_is_told_from_a_broken_one(tmp_path: Path) -> None:
    small = shapes_of("wan-2.1-t2v-1.3b")
    large = resolve("wan-2.1-t2v-14b")
    file = files.header(tmp_path / "wan.safetensors", small)
    with pytest.raises(CheckpointError, match=r"it is that of wan-2\.1-t2v-1\.3b; give model='wan-2"):
        require_parts({"transformer": file}, large)
    name = next(iter(small))
    broken = files.header(tmp_path / "broken.safetensors", {n: s for n, s in small.items() if n != name})
    with pytest.raises(CheckpointError, match=f"it lacks {name}; give a file of this model"):
        require_parts({"transformer": broken}, resolve("wan-2.1-t2v-1.3b"))
    assert inspect_file(str(broken)).unlike == (
        f"is the transformer of wan-2.1-t2v-1.3b but for this: it lacks {name}",
    )
    odd = {n: tuple(2 * d if d == 1536 else d for d in s) for n, s in small.items()}
    (words,) = inspect_file(str(files.header(tmp_path / "odd.safetensors", odd))).unlike
    assert "of other sizes than any published one" in words


def test_files_of_other_kinds_are_named_with_the_option_that_takes_them(tmp_path: Path) -> None:
    variant = resolve("ltx-demo")
    lora = files.lora(tmp_path / "l.safetensors")
    encoder = files.saved(tmp_path / "t5.safetensors", files.weights("text_encoder"))
    vae = files.saved(tmp_path / "v.safetensors", files.weights("vae"))
    denoiser = files.saved(tmp_path / "d.safetensors", files.weights("transformer"))
    for part, file, says in (
        ("transformer", lora, r"it is a LoRA; give loras=\['"),
        ("transformer", encoder, r"it is a T5 text encoder; give weights=\['text_encoder="),
        ("transformer", vae, r"it is the vae of ltx-demo; give weights=\['vae="),
        ("vae", denoiser, r"it is the transformer of ltx-demo; give weights=\['transformer="),
        ("text_encoder", denoiser, r"it is a transformer \(LTXVideoTransformer3DModel\); give weights=\['transformer="),
        ("text_encoder", lora, r"it is a LoRA; give loras=\['"),
    ):
        with pytest.raises(CheckpointError, match=says):
            require_parts({part: file}, variant)
