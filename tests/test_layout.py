"""Engines for the layout of a file, and its bytes bound where they are."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank import accelerate, load
from overcrank.engines.build import key_of
from overcrank.engines.manifest import read_manifest
from overcrank.engines.matrix import cells_of, expanded
from overcrank.engines.request import BuildOptions, request_notes, requests_for
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME
from overcrank.errors import CheckpointError, UserError
from overcrank.export.files.parts import layer_format
from overcrank.export.quantization.packing import packed_layer
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.export.quantization.reference import multiplied
from overcrank.models import resolve
from overcrank.models.demo import FOLDER
from overcrank.runtime.pipeline.weights import stored_layout
from overcrank.runtime.sessions import parked
from overcrank.runtime.sessions.parameters import declared, require_packed
from overcrank.runtime.sessions.stored_linear import StoredLinear
from safetensors.torch import load_file

from tests import original_names
from tests.comfy_files import write
from tests.original_names import Original
from tests.simulated_tensorrt import Simulated, bundle_of
from tests.test_simulated_batch import PROFILE

DEMO = resolve("ltx-demo")


def demo_file(path: Path, kind: str) -> Path:
    """ltx-demo's denoiser, its blocks in this kind of file."""
    from diffusers import LTXVideoTransformer3DModel

    module = LTXVideoTransformer3DModel.from_pretrained(FOLDER, subfolder="transformer")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return write(path, module, Original(original_names.LTX, shapes), kind).path


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_file(tmp_path_factory.mktemp("int8") / "demo.safetensors", "int8-rows")


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_file(tmp_path_factory.mktemp("nvfp4") / "demo.safetensors", "nvfp4")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("stored", "turing", "ampere", "ada", "blackwell"),
    [
        ("fp8_e4m3", "int8", "int8", "fp8", "fp8"),
        ("fp8_e5m2", "int8", "int8", "fp8", "fp8"),
        ("int8", "int8", "int8", "int8", "int8"),
        ("nvfp4", "int8", "int8", "fp8", "nvfp4"),
        ("mxfp8", "int8", "int8", "fp8", "fp8"),
        ("Q4_K", "int8", "int8", "fp8", "fp8"),
    ],
)
def test_what_each_card_multiplies(stored: str, turing: str, ampere: str, ada: str, blackwell: str) -> None:
    cards = {"sm_75": turing, "sm_86": ampere, "sm_89": ada, "sm_120": blackwell}
    formats = {card: layer_format(stored, 0, BY_NAME[card].precisions) for card in cards}
    assert {card: form and form.format for card, form in formats.items()} == cards
    assert layer_format(stored, 256, ("fp16", "int8")) == LayerFormat(
        "int8", "dynamic", rotation=256 * (stored == "int8")
    )


@pytest.mark.heavy
def test_a_header_alone_says_the_layout(int8: Path, tmp_path: Path) -> None:
    """The engine of a file whose values are not here is that of the pipeline that has them; with a first frame too."""
    with int8.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        names = json.loads(stream.read(length))
    header = tmp_path / "header.safetensors"
    said = [(e["data_offsets"], name) for name, e in names.items() if name.endswith("comfy_quant")]
    with int8.open("rb") as whole, header.open("wb") as stream:
        stream.write(whole.read(8 + length))
        for (start, end), _ in said:
            whole.seek(8 + length + start)
            stream.seek(8 + length + start)
            stream.write(whole.read(end - start))
        stream.truncate(int8.stat().st_size)
    options = BuildOptions(layout=[f"transformer={header}"])
    (request,) = requests_for(DEMO, ["4090"], options)
    pipe = load("ltx-demo", weights=[f"transformer={int8}"], backend="eager", device="cpu")
    stored = stored_layout(pipe, DEMO, BY_NAME["sm_89"].precisions)
    assert stored is not None
    assert request.recipe == stored.recipe
    assert stored.words == (f"transformer={int8}",)
    assert set(request.recipe.components) == {"denoiser", "denoiser_conditioned"}
    assert {len(entry.rules) for entry in request.recipe.components.values()} == {60}
    plain = requests_for(DEMO, ["4090"], BuildOptions(precision="int8"))[0]
    assert request.precision == "int8"
    assert key_of(request, Store(tmp_path)) != key_of(plain, Store(tmp_path))


@pytest.mark.heavy
def test_what_is_quantized_anew_is_said_before_it_is_built(nvfp4: Path) -> None:
    requests = requests_for(DEMO, ["3090", "4090", "5090"], BuildOptions(layout=[f"transformer={nvfp4}"]))
    assert [r.precision for r in requests] == ["int8", "fp8", "nvfp4"]
    assert [line for line in request_notes(requests) if "anew" in line] == [
        "ltx-demo: 60 layers in nvfp4 are quantized anew as int8, since sm_86 does not multiply them as they are.",
        "ltx-demo: 60 layers in nvfp4 are quantized anew as fp8, since sm_89 does not multiply them as they are.",
    ]
    matrix = expanded(cells_of("ltx-demo", "sm_86,sm_120", "auto", [f"transformer={nvfp4}"]))
    assert [request.precision for request in matrix.requests.values()] == ["int8", "nvfp4"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp8"}, "precision='fp8': layout says how layers multiply; leave it out"),
        ({"activations": "static"}, "activations='static': layout says how layers multiply"),
        ({"layout": ["unet=x.safetensors"]}, "ltx-demo has no part 'unet'"),
        ({"layout": ["x.safetensors"]}, "write PART=FILE"),
    ],
)
def test_words_that_are_wrong(options: dict[str, Any], says: str, int8: Path) -> None:
    with pytest.raises(UserError, match=says):
        requests_for(DEMO, ["4090"], BuildOptions(**{"layout": [f"transformer={int8}"], **options}))


@pytest.mark.quick
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_weights_of_16_bit_in_a_rotated_layer(form: Any) -> None:
    """Packed for the graph that rotates its inputs, the product is the plain one."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(5, 64, generator=generator)
    rotated = LayerFormat(form, "dynamic", rotation=16)
    out = multiplied(x, packed_layer("a", weight, rotated, None, "bfloat16"), rotated)
    error = (out - x @ weight.T).norm() / (x @ weight.T).norm()
    assert float(error) < (0.02 if form == "int8" else 0.06)


@pytest.fixture
def card(simulated: Simulated, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parked, "on_a_card", simulated.card.holds)
    monkeypatch.setattr(parked, "to_host", simulated.card.sent_away)
    monkeypatch.setattr(parked, "to_device", lambda tensor, device: simulated.card.brought(tensor))
    return simulated


@pytest.mark.heavy
def test_an_engine_reads_the_bytes_where_the_module_has_them(
    card: Simulated, int8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of them is copied or parked; layers that the engine multiplies in 16 bit are, and a line says so."""
    built = bundle_of(DEMO, PROFILE, Store(tmp_path), "denoiser", wide=False, layers=LayerFormat("int8", "dynamic"))
    card.plans.register(built)
    pipe = load("ltx-demo", weights=[f"transformer={int8}"], backend="eager", device="cpu", dtype=torch.bfloat16)
    call = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    with caplog.at_level("INFO", "overcrank"):
        accelerate(pipe, backend="tensorrt", store=tmp_path)
        latents = pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    entry = read_manifest(built).components[0]
    stored = {name for name, own in pipe.transformer.named_modules() if isinstance(own, StoredLinear)}
    own = stored & {name for name, form in entry.formats.items() if form.kind == "linear"}
    assert 20 < len(own) < len(stored) == 60
    session: Any = pipe.overcrank.modules[0].slots[0].session
    assert set(session.replaced) == stored - own
    assert f"{len(own)} in int8 as they are; {len(stored - own)} in int8 widened to 16 bit" in caplog.text
    gc.collect()
    for name in stored:
        weight = pipe.transformer.get_submodule(name).weight
        assert card.card.holds(weight) == (name in own)
    with pipe.overcrank.ledger.eagerly():
        eager = pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    assert 0 < float((latents.float() - eager.float()).norm() / eager.float().norm()) < 0.1


@pytest.mark.heavy
def test_an_engine_that_is_missing_is_named_with_the_file(card: Simulated, int8: Path, tmp_path: Path) -> None:
    built = bundle_of(DEMO, PROFILE, Store(tmp_path), "denoiser", wide=False)
    card.plans.register(built)
    pipe = load("ltx-demo", weights=[f"transformer={int8}"], backend="eager", device="cpu", dtype=torch.bfloat16)
    accelerate(pipe, store=tmp_path)
    (reason,) = {f"{why.reason}; {why.fix}" for why in pipe.overcrank.ledger.standing}
    assert "are bf16 with weights as inputs, and the pipeline's weights are int8" in reason
    assert reason.endswith(f"build-engine --model ltx-demo --gpu sm_89 --layout transformer={int8}")


@pytest.mark.heavy
def test_factors_of_an_earlier_engine_are_bound_as_it_takes_them(tmp_path: Path) -> None:
    """Those behind products were in 16 bit."""
    built = bundle_of(DEMO, PROFILE, Store(tmp_path), "denoiser", wide=False, layers=LayerFormat("int8", "dynamic"))
    entry = read_manifest(built).components[0]
    earlier = [p.model_copy(update={"dtype": "bfloat16"}) if p.role == "behind" else p for p in entry.packed]
    entry = entry.model_copy(update={"packed": earlier})
    weights = load_file(FOLDER / "transformer/diffusion_pytorch_model.safetensors")
    packs = {
        f"{name}.{role}": tensor
        for name, form in entry.formats.items()
        for role, tensor in packed_layer(name, weights[f"{name}.weight"], form, None, "bfloat16").items()
    }
    require_packed(entry, declared(entry, packs))
    with pytest.raises(CheckpointError, match="the weight pack has"):
        require_packed(entry, packs)
