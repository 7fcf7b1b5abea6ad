"""diffusers class + config → module, with or without values in its parameters."""

from __future__ import annotations

import inspect
import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from overcrank.errors import ModelError
from overcrank.models.base import Component, Config

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def torch_dtype(precision: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype


def abstract_module(component: Component, config: Config, precision: str) -> nn.Module:
    """The component's module with fake parameters: shapes and dtypes, no storage.

    Buffers hold real values (rotary tables, latent statistics). Parameter dtypes are what
    diffusers' from_pretrained(torch_dtype=…) would give.
    """
    import torch
    from accelerate import init_empty_weights
    from torch._subclasses.fake_tensor import FakeTensorMode

    with init_empty_weights(include_buffers=False):
        whole = construct(component.cls, config, f"{component.subfolder}/config.json")
    cast_like_diffusers(whole, torch_dtype(precision))
    module = part(whole, component)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for owner in module.modules():
            for name, old in owner.named_parameters(recurse=False):
                empty = torch.empty(old.shape, dtype=old.dtype)
                owner.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    return module.eval()


def random_module(component: Component, config: Config, precision: str, seed: int = 0) -> nn.Module:
    """The component's module with seeded random weights, none of them degenerate.

    Parameters that diffusers initializes to constants (norm scales, zeroed gates) are
    refilled, so that a graph that drops or swaps one cannot pass a comparison.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        whole = construct(component.cls, config, f"{component.subfolder}/config.json")
        for value in whole.parameters():
            if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    cast_like_diffusers(whole, torch_dtype(precision))
    return part(whole, component).eval().requires_grad_(False)


def cast_like_diffusers(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating parameters and stored buffers to `dtype`, except the ones diffusers keeps in fp32."""
    words = getattr(module, "_keep_in_fp32_modules", None) or []
    for owner_name, owner in module.named_modules():
        parts = owner_name.split(".")
        for name, value in owner.named_parameters(recurse=False):
            keep = any(word in parts or word == name for word in words)
            if value.is_floating_point() and not keep:
                value.data = value.data.to(dtype)
        stored = [n for n in owner._buffers if n not in owner._non_persistent_buffers_set]
        for name in stored:  # loaded with the checkpoint, so cast with it; others are computed in fp32
            buffer = owner._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = buffer.to(dtype)


def _as_json_has_it(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _construct_transformers(cls: str, config: Config) -> nn.Module:
    """A transformers model, such as an image encoder; its configuration keeps what it does not know."""
    import transformers

    model: Any = getattr(transformers, cls)
    settings = model.config_class(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")})
    settings._attn_implementation = "sdpa"
    module: nn.Module = model(settings)
    return module


def part(whole: nn.Module, component: Component) -> nn.Module:
    return whole.get_submodule(component.attribute) if component.attribute else whole


def construct(cls: str, config: Config, file: str) -> nn.Module:
    """The module of a class of diffusers (dotted where it is not at the top), else of transformers.

    Raises ModelError, naming `file`, for a configuration that it is not built from.
    """
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    where, _, name = cls.rpartition(".")
    library_class: Any = getattr(import_module(f"diffusers.{where}") if where else diffusers, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if library_class is None:
                return _construct_transformers(cls, config)
            # others are left out, as from_pretrained does
            parameters = inspect.signature(library_class.__init__).parameters
            module: nn.Module = library_class(**{k: _as_json_has_it(v) for k, v in config.items() if k in parameters})
        except Exception as error:
            raise ModelError(f"{cls} cannot be built from {file}: {error}") from error
    return module
