"""Weight files of every format, written by comfy-kitchen: what overcrank multiplies is what comfy-kitchen does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_model
from overcrank.engines.store import Store
from overcrank.export.files.parts import recipe_of_layers
from overcrank.export.module import random_module
from overcrank.export.quantization.recipe import LayerFormat, Recipe
from overcrank.models import components
from overcrank.models.base import Call, Component, VideoShape
from overcrank.runtime.pipeline.weights import module_of
from overcrank.runtime.sessions.session import Session, run_each
from overcrank.runtime.sessions.sources import Quantization, graph_session
from overcrank.runtime.sessions.stored_linear import StoredLinear
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tests import original_names, tiny
from tests.comfy_files import GGUF, K_BLOCKS, WHOLE, Written, write
from tests.original_names import Original, Renames

WIDTH = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2}
"""256 channels, which the largest blocks and ConvRot's groups need."""
DITS: dict[str, tuple[str, Renames, dict[str, Any]]] = {
    "ltx": ("tiny-ltx-0.9.5", original_names.LTX, WIDTH | {"cross_attention_dim": 256, "caption_channels": 64}),
    "wan": ("tiny-wan-2.1", original_names.WAN, WIDTH | {"ffn_dim": 512, "text_dim": 64}),
    "hunyuan_video": (
        "tiny-hunyuan",
        original_names.HUNYUAN,
        WIDTH | {"num_single_layers": 0, "mlp_ratio": 2.0, "text_embed_dim": 64, "rope_axes_dim": (16, 24, 24)},
    ),
    "ltx2": (
        "tiny-ltx2",
        original_names.LTX2,
        WIDTH
        | {"audio_num_attention_heads": 4, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 256}
        | {"cross_attention_dim": 256, "caption_channels": 64},
    ),
    # as wide as it is published, which diffusers' converter takes for granted when it splits linear1
    "hunyuan_video-wide": (
        "tiny-hunyuan",
        original_names.HUNYUAN,
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 0, "num_single_layers": 1}
        | {"mlp_ratio": 0.25, "text_embed_dim": 64, "rope_axes_dim": (16, 56, 56)},
    ),
}
CASES = [(name, kind) for name in DITS for kind in WHOLE if name != "hunyuan_video-wide" or kind not in GGUF]
USUAL = (
    ("ltx", "fp8"),
    ("ltx", "nvfp4"),
    ("ltx", "convrot-256"),
    ("ltx", "mixed"),
    ("wan", "fp8-old"),
    ("wan", "Q4_K"),
    ("hunyuan_video", "fp8-rows"),
    ("hunyuan_video", "int8"),
    ("ltx2", "convrot-64"),
)
SHAPE = VideoShape(64, 64, 9)
SIGMAS = (1.0, 0.75, 0.4, 0.0)
STATES = ("hidden_states", "audio_hidden_states")
STRENGTH = 1.25
"""Of the blocks' weights: as they are initialized, blocks add so little to what they are given that no error shows."""
NEAR = {
    "fp8": 0.99, "int8": 0.995, "convrot": 0.995, "nvfp4": 0.93, "mxfp8": 0.99, "mixed": 0.96,
    "Q4": 0.97, "Q5": 0.98, "Q8": 0.999,
}  # fmt: skip
"""Start of a format's name → the least cosine of a step with the unquantized module."""
Velocity = Callable[[Mapping[str, Any]], Any]


@cache
def component_of(name: str) -> Component:
    like, _, changes = DITS[name]
    variant = tiny.variant(like)
    configs = {**variant.configs, "transformer": {**variant.configs["transformer"], **changes}}
    (component,) = components(replace(variant, configs=configs), ("denoiser",))
    return component


def module_for(component: Component) -> nn.Module:
    module = random_module(component, component.config, "fp32")
    for name, parameter in module.named_parameters():
        if "blocks." in name and parameter.dim() > 1:
            parameter.mul_(STRENGTH)
    return module


def original_of(name: str, module: nn.Module) -> Original:
    return Original(DITS[name][1], {n: tuple(p.shape) for n, p in module.named_parameters()})


def written(name: str, kind: str, folder: Path, **how: Any) -> tuple[Component, Written, nn.Module]:
    """A file of this kind, and the module that its weights were made of."""
    component = component_of(name)
    module = module_for(component)
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
    module = module_for(component_of(name))
    parameters = {n: p.detach() for n, p in module.named_parameters()}
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
    session, reference = session_of(component, own, shared_store), file.reference(module_for(component))
    ways = (by_module(reference), by_session(component, own, session), by_module(own), by_module(module))
    cosines = []
    for expected, found, eager, plain in steps(component, own, *ways):
        cosines.append([cosine(expected, found), cosine(found, eager), cosine(found, plain)])
        same, with_weights_alone, near = cosines[-1]
        assert same >= 0.9999, cosines
        if not file.in_16_bit:  # another arithmetic is told from it
            assert 1 - same < 0.5 * (1 - with_weights_alone), cosines
        if kind not in K_BLOCKS:  # whose bits are random
            assert near >= next(least for start, least in NEAR.items() if kind.startswith(start)), cosines
    record_property("cosines", cosines)


@pytest.mark.parametrize(("name", "kind"), tiny.specimens(CASES, *USUAL))
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
