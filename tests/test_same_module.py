"""An engine answers for the module that was bound, as its class makes it: whatever else is done to it, PyTorch runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import overcrank
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, LTXVideoTransformerBlock
from overcrank.errors import BackendError, UserError
from overcrank.models import components
from overcrank.runtime.sessions.ort import OrtSession
from overcrank.runtime.sessions.session import Record

from tests import pipelines, tiny
from tests.test_render_families import store  # noqa: F401

NAME = "tiny-ltx-0.9.5"
Do = Callable[[Any], Any]


@pytest.fixture
def pipe(store: Path) -> Iterator[Any]:  # noqa: F811
    made = overcrank.accelerate(pipelines.ltx(), backend="onnxruntime", store=store)
    yield made
    made.overcrank.remove()


def called(pipe: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor, Record]:
    """The denoiser's answer to one call through `accelerate`, PyTorch's own, and the record of the first."""
    call = arguments(pipe) | more
    ledger, plain = pipe.overcrank.ledger, getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    plain._reset_stateful_cache()  # of diffusers' caches, where they are on
    with torch.no_grad(), ledger.recording() as record, plain.cache_context("cond"):
        found = pipe.transformer(**call)[0]
    plain._reset_stateful_cache()
    with torch.no_grad(), ledger.recording(), ledger.eagerly(), plain.cache_context("cond"):
        expected = pipe.transformer(**call)[0]
    return found, expected, record


def arguments(pipe: Any) -> dict[str, Any]:
    component = components(tiny.variant(NAME), ("denoiser",))[0]
    sizes = {**component.free_axes, **component.sizes(tiny.TINY[NAME].minimum), "batch": 2}
    call = component.sample(pipe.transformer, sizes, torch.Generator().manual_seed(0))
    return {k: v.to(pipe.transformer.proj_out.weight.dtype) if _floats(v) else v for k, v in call.items()}


def _floats(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def require_served(pipe: Any) -> torch.Tensor:
    found, expected, record = called(pipe)
    assert record.served["denoiser", "onnxruntime"] == 1, record.fallbacks
    assert float((found - expected).abs().max()) < 1e-4
    return expected


def require_fallback(pipe: Any, kind: str, place: str, **more: Any) -> None:
    found, expected, record = called(pipe, **more)
    (fallback,) = record.fallbacks
    assert fallback.kind == kind
    assert place in fallback.reason
    assert fallback.fix
    assert torch.equal(found, expected)


def with_lora(module: Any, name: str = "one") -> None:
    module.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)


@dataclass
class Change:
    do: Do
    kind: str  # of ModuleChange
    place: str
    undo: Do | None = None


class Attention(LTXVideoAttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 0.5


def halved(module: Any, name: str) -> None:
    """A forward that gives half of what the class's own gives."""
    sub = module.get_submodule(name)
    own = sub.forward
    sub.forward = lambda *args, **kwargs: own(*args, **kwargs) * 0.5


def _quantized_like(module: Any) -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    own = module.transformer_blocks[0].attn1.to_q
    other = Linear4bit(own.in_features, own.out_features)
    module.transformer_blocks[0].attn1._modules["to_q"] = other  # as quantizers put theirs


FOREIGN = {
    "lora": Change(with_lora, "LORA", "to_q", lambda m: m.unload_lora()),
    "two loras": Change(lambda m: (with_lora(m), with_lora(m, "two")), "LORA", "to_q", lambda m: m.unload_lora()),
    "lora merged": Change(
        lambda m: (with_lora(m), m.fuse_lora()), "LORA", "to_q", lambda m: (m.unfuse_lora(), m.unload_lora())
    ),
    "processor": Change(
        lambda m: m.set_attn_processor(Attention()),
        "PROCESSOR",
        "Attention",
        lambda m: m.set_attn_processor(LTXVideoAttnProcessor()),
    ),
    "cache": Change(
        lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.5)),
        "DIFFUSERS_HOOKS",
        "fbc_",
        lambda m: m.disable_cache(),
    ),
    "layerwise casting": Change(
        lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "DIFFUSERS_HOOKS", "layerwise_casting"
    ),
    "hook of accelerate": Change(
        lambda m: add_hook_to_module(m.transformer_blocks[0], ModelHook()),
        "ACCELERATE_HOOKS",
        "transformer_blocks.0",
        lambda m: remove_hook_from_module(m.transformer_blocks[0]),
    ),
    "forward": Change(lambda m: halved(m, "transformer_blocks.0.ff"), "FORWARD", "transformer_blocks.0.ff"),
    "quantized": Change(_quantized_like, "OTHER_CLASS", "to_q is a Linear4bit"),
    "block more": Change(
        lambda m: m.transformer_blocks.append(copy.deepcopy(m.transformer_blocks[0])),
        "UNKNOWN",
        "transformer_blocks",
        lambda m: m.transformer_blocks.pop(-1),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_class_did_not_make_is_left_to_pytorch_until_it_is_gone(name: str, pipe: Any) -> None:
    change = FOREIGN[name]
    require_served(pipe)
    change.do(pipe.transformer)
    for _ in range(2):
        require_fallback(pipe, f"ModuleChanged.{change.kind}", change.place)
    if change.undo is not None:
        change.undo(pipe.transformer)
        require_served(pipe)


def test_forward_hooks_inside_are_called(pipe: Any) -> None:
    require_served(pipe)
    seen: list[str] = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *a: seen.append("block"))
    outer = pipe.transformer.register_forward_hook(lambda *a: seen.append("whole"))
    require_fallback(pipe, "ModuleChanged.HOOKS", "transformer_blocks.0")
    assert "block" in seen
    handle.remove()
    seen.clear()
    require_served(pipe)  # PyTorch calls those of the whole around an engine too
    assert seen == ["whole", "whole"]
    outer.remove()


def test_a_class_whose_forward_was_replaced_is_left_to_pytorch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As caching tools do it: for every module of the class at once."""
    require_served(pipe)
    own = LTXVideoTransformerBlock.forward
    monkeypatch.setattr(LTXVideoTransformerBlock, "forward", lambda self, *a, **k: own(self, *a, **k) * 0.5)
    require_fallback(pipe, "ModuleChanged.CLASS_FORWARD", "LTXVideoTransformerBlock")
    monkeypatch.undo()
    require_served(pipe)


def _fused(module: Any) -> None:
    with_lora(module)
    module.fuse_lora()
    module.unload_lora()


def _set_data(module: Any) -> None:
    module.proj_out.weight.data = module.proj_out.weight.data * 1.5


def _in_place(module: Any) -> None:
    with torch.no_grad():
        module.proj_out.weight.mul_(1.5)


def _anew(module: Any) -> None:
    module.proj_out.weight = torch.nn.Parameter(module.proj_out.weight.detach() * 1.5)


def _behind_its_back(module: Any) -> None:
    module.proj_out._parameters["weight"] = torch.nn.Parameter(module.proj_out.weight.detach() * 1.5)


WRITTEN: dict[str, Do] = {
    "a fused LoRA": _fused,
    "data": _set_data,
    "data in place": lambda m: m.proj_out.weight.data.mul_(1.5),
    "in place": _in_place,
    "another parameter": _anew,
    "another parameter, unannounced": _behind_its_back,
    "a state dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "a state dict, assigned": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["shared", "copied"])
@pytest.mark.parametrize("name", WRITTEN)
def test_other_weights_are_bound_at_the_next_call(name: str, dtype: torch.dtype, store: Path) -> None:  # noqa: F811
    """ONNX Runtime shares fp32 weights with PyTorch, and has copies of those in 16 bit."""
    made = pipelines.ltx()
    made.transformer.to(dtype)
    pipe = overcrank.accelerate(made, backend="onnxruntime", store=store)
    before, expected, record = called(pipe)
    WRITTEN[name](pipe.transformer)
    after, wanted, record = called(pipe)
    assert record.served["denoiser", "onnxruntime"] == 1, record.fallbacks
    apart = float((wanted.float() - expected.float()).norm() / wanted.float().norm())
    error = float((after.float() - wanted.float()).norm() / wanted.float().norm())
    assert apart > 0.05
    assert error < (1e-4 if dtype is torch.float32 else 0.02)
    assert before.dtype is after.dtype is dtype


def test_another_type_of_the_weights_is_bound_too(pipe: Any) -> None:
    require_served(pipe)
    pipe.transformer.to(torch.float64).to(torch.float32)
    require_served(pipe)


def test_parameters_swapped_for_one_call_count(pipe: Any) -> None:
    """torch.func.functional_call puts tensors in the parameters' places while it calls."""
    require_served(pipe)
    component = components(tiny.variant(NAME), ("denoiser",))[0]
    sizes = {**component.free_axes, **component.sizes(tiny.TINY[NAME].minimum), "batch": 2}
    call = component.sample(pipe.transformer, sizes, torch.Generator().manual_seed(0))
    others = {name: p.detach() * 0.5 for name, p in pipe.transformer.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(pipe.transformer, others, (), call)[0]
        with pipe.overcrank.ledger.eagerly():
            expected = torch.func.functional_call(pipe.transformer, others, (), call)[0]
    assert float((found - expected).abs().max()) < 1e-4
    require_served(pipe)


def test_an_argument_that_no_engine_takes_is_named(pipe: Any) -> None:
    require_fallback(pipe, "UnknownArguments", "attention_kwargs", attention_kwargs={"scale": 0.5})
    require_served(pipe)


def test_items_with_timesteps_of_their_own_go_to_the_engine_that_takes_them(pipe: Any) -> None:
    """The plain one takes one for all."""
    found, expected, record = called(pipe, timestep=torch.tensor([[750.0], [20.0]]))
    assert record.served == {("denoiser_conditioned", "onnxruntime"): 1}
    assert float((found - expected).abs().max()) < 1e-4


def test_an_empty_argument_is_none(pipe: Any) -> None:
    _, _, record = called(pipe, attention_kwargs={})
    assert record.served["denoiser", "onnxruntime"] == 1


def test_whatever_fails_in_an_engine_is_a_fallback_with_its_reason(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_served(pipe)

    def broken(*args: Any) -> None:
        raise MemoryError("there is no more")

    monkeypatch.setattr(OrtSession, "__call__", broken)
    require_fallback(pipe, "CallFailed", "MemoryError: there is no more")
    pipe.overcrank.ledger.strict = True
    with pytest.raises(BackendError, match="denoiser failed"):
        called(pipe)


def test_copies_are_as_if_nothing_was_accelerated(pipe: Any, store: Path) -> None:  # noqa: F811
    expected = require_served(pipe)
    twin = copy.deepcopy(pipe)
    module = pickle.loads(pickle.dumps(pipe.transformer))
    assert twin.overcrank is None
    for other in (twin.transformer, module, copy.copy(module)):
        pipe.transformer, own = other, pipe.transformer
        found, plain, record = called(pipe)
        pipe.transformer = own
        assert not record.served
        assert torch.equal(found, expected)
        assert torch.equal(plain, expected)
    again = overcrank.accelerate(twin, backend="onnxruntime", store=store)
    require_served(again)
    require_served(pipe)


@pytest.mark.parametrize("when", ["whole before", "method before", "method after"])
def test_torch_compile_and_engines_get_along(when: str, store: Path) -> None:  # noqa: F811
    made = pipelines.ltx()
    if when == "whole before":
        made.transformer = torch.compile(made.transformer, backend="eager")
    if when == "method before":
        made.transformer.compile(backend="eager")
    pipe = overcrank.accelerate(made, backend="onnxruntime", store=store)
    require_served(pipe)
    if when == "method after":
        compiled: list[torch.fx.GraphModule] = []
        pipe.transformer.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)  # type: ignore[func-returns-value]
        call = arguments(pipe)
        with torch.no_grad(), pipe.overcrank.ledger.recording() as record:
            pipe.transformer(**call)
        assert record.served["denoiser", "onnxruntime"] == 1
        assert not compiled  # engines' calls are traced by nobody
        require_served(pipe)
        assert compiled  # PyTorch's are


def test_only_pipelines_are_accelerated() -> None:
    for thing in (None, torch.nn.Linear(1, 1), "a folder"):
        with pytest.raises(UserError, match="takes a diffusers pipeline, not"):
            overcrank.accelerate(thing)
