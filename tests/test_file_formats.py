"""Weight files of every format, written by comfy-kitchen: what overcrank multiplies is what comfy-kitchen does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import onnx_ir as ir
import overcrank
import pytest
import torch
from diffusers.loaders import single_file_model
from overcrank.engines.store import Store
from overcrank.engines.worker import fallen_back
from overcrank.errors import present
from overcrank.export.files.parts import recipe_of_layers
from overcrank.export.files.weight_file import open_weights
from overcrank.export.module import abstract_module, random_module
from overcrank.export.quantization.linear import layout_in, quantize
from overcrank.export.quantization.recipe import LayerFormat, Recipe
from overcrank.models import components
from overcrank.models.base import Call, Component, VideoShape
from overcrank.runtime.pipeline.weights import module_of
from overcrank.runtime.sessions.session import Session, run_each
from overcrank.runtime.sessions.sources import Quantization, graph_session
from overcrank.runtime.sessions.stored_linear import StoredLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tests import original_names, sparse_files, tiny
from tests.comfy_files import GGUF, K_BLOCKS, MIXTURE, WHOLE, Written, write
from tests.compiling import Graphs, compiled
from tests.original_names import Original, Renames


@dataclass(frozen=True)
class Dit:
    """A transformer as narrow as the formats allow."""

    like: str
    renames: Renames
    changes: Mapping[str, Any]
    strength: float
    """Of the blocks' weights: as they are initialized, blocks add so little to what they are given that no error shows,
    and if they add much, one value that is rounded the other way moves all."""


WIDTH = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2}
"""256 channels, which the largest blocks and ConvRot's groups need."""
_AUDIO = {"audio_num_attention_heads": 4, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 256}
_TEXT = {"cross_attention_dim": 256, "caption_channels": 64}
_DOUBLE = {"num_single_layers": 0, "mlp_ratio": 2.0, "text_embed_dim": 64, "rope_axes_dim": (16, 24, 24)}
_SINGLE = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 0, "num_single_layers": 1}
_SINGLE |= {"mlp_ratio": 0.25, "text_embed_dim": 64, "rope_axes_dim": (16, 56, 56)}
DITS = {
    "ltx": Dit("tiny-ltx-0.9.5", original_names.LTX, WIDTH | _TEXT, 1.5),
    "wan": Dit("tiny-wan-2.1", original_names.WAN, WIDTH | {"ffn_dim": 512, "text_dim": 64}, 2.0),
    "hunyuan_video": Dit("tiny-hunyuan", original_names.HUNYUAN, WIDTH | _DOUBLE, 1.25),
    "ltx2": Dit("tiny-ltx2", original_names.LTX2, WIDTH | _AUDIO | _TEXT, 1.0),
    # as wide as it is published, which diffusers' converter takes for granted where it splits linear1
    "hunyuan_video-wide": Dit("tiny-hunyuan", original_names.HUNYUAN, _SINGLE, 2.0),
}
CASES = [(name, kind) for name in DITS for kind in WHOLE if not name.endswith("-wide") or kind in MIXTURE]
USUAL = (
    ("ltx", "fp8"),
    ("ltx", "nvfp4"),
    ("ltx", "convrot-256"),
    ("ltx", "mixed"),
    ("wan", "fp8-old"),
    ("hunyuan_video", "fp8-rows"),
    ("ltx2", "convrot-64"),
)
SHAPE = VideoShape(64, 64, 9)
SIGMAS = (1.0, 0.75, 0.4, 0.0)
STATES = ("hidden_states", "audio_hidden_states")
NEAR = {
    "fp8": 0.99, "int8": 0.995, "convrot": 0.995, "nvfp4": 0.93, "mxfp8": 0.99, "mixed": 0.96,
    "Q4": 0.97, "Q5": 0.98, "Q8": 0.999,
}  # fmt: skip
"""Start of a format's name → the least cosine of a step with the unquantized module."""
Velocity = Callable[[Mapping[str, Any]], Any]


@cache
def component_of(name: str) -> Component:
    variant = tiny.variant(DITS[name].like)
    configs = {**variant.configs, "transformer": {**variant.configs["transformer"], **DITS[name].changes}}
    (component,) = components(replace(variant, configs=configs), ("denoiser",))
    return component


def module_for(name: str) -> nn.Module:
    module = random_module(component_of(name), component_of(name).config, "fp32")
    for parameter, value in module.named_parameters():
        if "blocks." in parameter and value.dim() > 1:
            value.mul_(DITS[name].strength)
    return module


def original_of(name: str, module: nn.Module) -> Original:
    return Original(DITS[name].renames, {n: tuple(p.shape) for n, p in module.named_parameters()})


def written(name: str, kind: str, folder: Path, **how: Any) -> tuple[Component, Written, nn.Module]:
    """A file of this kind, and the module that its weights were made of."""
    component, module = component_of(name), module_for(name)
    file = folder / f"{kind}.{'gguf' if kind in GGUF else 'safetensors'}"
    return component, write(file, module, original_of(name, module), kind, **how), module


def steps(component: Component, module: nn.Module, *velocities: Velocity) -> Iterator[list[list[Tensor]]]:
    """What several networks answer at each step of a denoising that the first one's answers move on."""
    sizes = {**component.free_axes, **component.sizes(SHAPE)}
    call = dict(component.sample(module, sizes, torch.Generator().manual_seed(0)))
    for now, after in pairwise(SIGMAS):
        for name in ("timestep", "audio_timestep"):
            if isinstance(call.get(name), Tensor):
                call[name] = torch.full_like(call[name], 1000 * now)
        with torch.no_grad():
            answers = [[a for a in velocity(dict(call)) if isinstance(a, Tensor)] for velocity in velocities]
        yield answers
        for name, answer in zip([n for n in STATES if n in call], answers[0], strict=True):
            call[name] = call[name] + (after - now) * answer


def by_session(component: Component, module: nn.Module, session: Session) -> Velocity:
    def velocity(call: Mapping[str, Any]) -> Any:
        return component.returns(run_each(session, component, component.adapt(module, Call(call))), call)

    return velocity


def by_module(module: nn.Module) -> Velocity:
    return lambda call: module(**call)


def session_of(component: Component, module: nn.Module, store: Path) -> Session:
    """The component's graph in ONNX Runtime, quantized as the module's file says."""
    layers = {name: (layer.format, layer.rotation) for name, layer in stored_in(module).items()}
    own = recipe_of_layers(layers, component, None)
    quantization = None
    if own is not None:
        form = LayerFormat(own.rules[0].format, "dynamic")
        quantization = Quantization(form, Recipe(model="", precision=form.format, components={component.name: own}))
    return graph_session(component, component.subfolder, module, Store(store), quantization)


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    x, y = (torch.cat([t.flatten() for t in tensors]).double() for tensors in (a, b))
    return float(cosine_similarity(x, y, dim=0))


def stored_in(module: nn.Module) -> dict[str, StoredLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, StoredLinear)}


@pytest.mark.quick
@pytest.mark.parametrize("name", DITS)
def test_original_names_are_what_diffusers_converts(name: str) -> None:
    module = abstract_module(component_of(name), component_of(name).config, "fp32")
    parameters = {n: torch.rand(len(p), *[1] * (p.dim() - 1)) for n, p in module.named_parameters()}
    cls = single_file_model._get_single_file_loadable_mapping_class(getattr(diffusers, component_of(name).cls))
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls]["checkpoint_mapping_fn"]
    converted = convert(checkpoint=original_of(name, module).tensors(parameters))
    assert converted.keys() == parameters.keys()
    assert all(torch.equal(converted[n], p) for n, p in parameters.items())


@pytest.mark.parametrize(("name", "kind"), tiny.specimens(CASES, *USUAL))
def test_a_file_is_multiplied_as_comfy_kitchen_does(
    name: str, kind: str, shared_store: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    component, file, module = written(name, kind, tmp_path)
    own = module_of(file.path, component, torch.float32)
    assert stored_in(own).keys() == file.values().keys()
    session, reference = session_of(component, own, shared_store), file.reference(module_for(name))
    ways = (by_module(reference), by_session(component, own, session), by_module(own), by_module(module))
    cosines = []
    for expected, found, eager, plain in steps(component, own, *ways):
        cosines.append([cosine(expected, found), cosine(found, eager), cosine(found, plain)])
        same, with_weights_alone, near = cosines[-1]
        assert same >= 0.9999, cosines
        if not file.in_16_bit:  # another arithmetic is told from it
            assert 1 - same < 0.5 * (1 - with_weights_alone) + 1e-6, cosines
        if kind not in K_BLOCKS:  # whose bits are random
            assert near >= next(least for start, least in NEAR.items() if kind.startswith(start)), cosines
    record_property("cosines", cosines)


@pytest.mark.parametrize(("name", "kind"), tiny.specimens(CASES, *USUAL[2:4], ("wan", "Q4_K"), USUAL[5]))
def test_eager_pytorch_computes_with_the_values_of_the_file(name: str, kind: str, tmp_path: Path) -> None:
    component, file, module = written(name, kind, tmp_path)
    own = module_of(file.path, component, torch.float32)
    values = file.values()
    for layer, stored in stored_in(own).items():
        torch.testing.assert_close(stored.values(), values[layer], rtol=0, atol=1e-6 if "convrot" in kind else 0)
        module.get_submodule(layer).weight.data = stored.values()  # type: ignore[union-attr]
    file.fill(module)
    for expected, found in steps(component, own, by_module(module), by_module(own)):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", tiny.specimens(("mixed", "convrot-256"), "mixed"))
def test_what_the_header_says_of_layers_is_what_tensors_beside_them_say(kind: str, tmp_path: Path) -> None:
    component, beside, _ = written("wan", kind, tmp_path)
    (tmp_path / "header").mkdir()
    _, header, _ = written("wan", kind, tmp_path / "header", metadata=True)
    assert not any(name.endswith(".comfy_quant") for name in open_weights(header.path).tensors)
    one, other = (stored_in(module_of(file.path, component, torch.bfloat16)) for file in (beside, header))
    assert [(n, s.format, s.rotation) for n, s in one.items()] == [(n, s.format, s.rotation) for n, s in other.items()]
    assert all(torch.equal(stored.values(), other[name].values()) for name, stored in one.items())


def test_a_file_cast_to_fp8_as_a_whole(tmp_path: Path) -> None:
    """Biases, norms and tables too, as a plain cast of a checkpoint leaves them."""
    component, module = component_of("wan"), module_for("wan")
    tensors = original_of("wan", module).tensors(dict(module.named_parameters()))
    path, narrow = tmp_path / "w.safetensors", torch.float8_e4m3fn
    save_file({f"model.diffusion_model.{name}": tensor.to(narrow) for name, tensor in tensors.items()}, path)
    own = module_of(path, component, torch.float32)
    values = {f"{name}.weight": layer.values() for name, layer in stored_in(own).items()}
    assert len(values) > 20
    for name, parameter in module.named_parameters():
        value = values[name] if name in values else own.get_parameter(name)
        assert torch.equal(value, parameter.to(narrow).float()), name


def test_convrot_costs_one_product_for_each_input(graphs: Graphs, tmp_path: Path) -> None:
    """In the plan for a card: the rest of the products are those of the unrotated engine, in int8."""
    component = component_of("ltx")
    plans = []
    for kind in ("int8-rows", "convrot-64"):
        _, file, _ = written("ltx", kind, tmp_path)
        stored = stored_in(module_of(file.path, component, torch.bfloat16))
        layers = {layer: (own.format, own.rotation) for layer, own in stored.items()}
        exported = graphs(component, "bf16")
        layout = layout_in(exported.model, present(recipe_of_layers(layers, component, ("int8",)), "a recipe"))
        parameters, packed = quantize(exported.model, exported.parameters, layout)
        ir.save(exported.model, tmp_path / "g.onnx")
        ranges, names = tiny.profile("tiny-ltx-0.9.5").ranges(component), [p.input for p in (*parameters, *packed)]
        ((_, plan),) = compiled(tmp_path / "g.onnx", ("sm_89",), ranges, names, "int8")
        assert layout.keys() == layers.keys()
        assert fallen_back(layout, plan) == []
        plans.append(plan)
    plain, rotated = plans
    blocks, inputs = 2, 6  # of a block: of each attention's queries and its result, and of both feed-forward layers
    assert len(rotated.rotations) == blocks * inputs + 1  # keys and values of text, which all blocks read
    assert not any("+" in name for name in rotated.rotations)
    assert (plain.rotations, rotated.gemms - plain.gemms) == ((), len(rotated.rotations))
    assert "13 of them rotations" in rotated.verdict()


DEMO_NEAR = {"fp8": 20, "int8": 25, "convrot": 25, "nvfp4": 15, "mxfp8": 20, "mixed": 20, "Q4": 18, "Q5": 20, "Q8": 28}
"""Start of a format's name → the least PSNR of frames in dB, of the engine's graph with the 16-bit checkpoint."""
DEMO = [kind for kind in WHOLE if kind not in K_BLOCKS and kind != "convrot-256"]
"""Its layers have 128 inputs, which are less than one of the larger blocks."""


@pytest.mark.parametrize("kind", tiny.specimens(DEMO, "convrot-64"))
def test_the_demo_is_rendered_from_its_file(
    kind: str, seeded: Callable[[Path], Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    store = seeded(tmp_path / "store")

    def frames(backend: str, **how: Any) -> Tensor:
        pipe = overcrank.load("ltx-demo", backend=backend, device="cpu", store=store, **how)
        call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 6, "output_type": "pt"}
        result: Tensor = pipe("a red circle moving right", generator=torch.Generator().manual_seed(0), **call).frames
        assert not pipe.overcrank.ledger.record.fallbacks
        return result

    pipe = overcrank.load("ltx-demo", backend="eager", device="cpu", store=store)
    parameters = {n: tuple(p.shape) for n, p in pipe.transformer.named_parameters()}
    path = tmp_path / f"demo.{'gguf' if kind in GGUF else 'safetensors'}"
    write(path, pipe.transformer, Original(original_names.LTX, parameters), kind)
    weights = {"transformer": path}
    plain = frames("eager")
    decibels = [psnr(frames(backend, weights=weights), plain) for backend in ("eager", "onnxruntime")]
    record_property("psnr", decibels)
    assert min(decibels) >= next(least for start, least in DEMO_NEAR.items() if kind.startswith(start)), decibels


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean().clamp_min(1e-10)))


@pytest.mark.parametrize("form", tiny.specimens(("fp8", "int8"), "int8"))
def test_a_file_is_opened_without_its_values_in_memory(form: str, tmp_path: Path) -> None:
    """bench/open_file.py measures one of 14 B parameters."""
    variant = tiny.variant("tiny-wan-2.1")
    wide = {"num_attention_heads": 16, "attention_head_dim": 128, "ffn_dim": 8192, "text_dim": 64, "num_layers": 6}
    configs = {**variant.configs, "transformer": {**variant.configs["transformer"], **wide}}
    (component,) = components(replace(variant, configs=configs), ("denoiser",))
    parameters = sparse_files.write(tmp_path / "w.safetensors", component, original_names.WAN, form)
    assert parameters > 300e6
    before = anonymous_bytes()
    module = module_of(tmp_path / "w.safetensors", component, torch.bfloat16)
    bound = [layer.bound(torch.bfloat16) for layer in stored_in(module).values()]
    assert len(bound) == 60
    assert anonymous_bytes() - before < 60e6


def anonymous_bytes() -> int:
    """Of this process, what no file stands behind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
