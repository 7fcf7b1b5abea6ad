"""Whether a module is as its class makes it, of which alone its engine was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from overcrank.engines.module_refusals import ModuleChange, ModuleChanged
from overcrank.engines.refusals import CannotServe
from overcrank.models.base import Component
from overcrank.runtime.sessions.lora_layer import LoraLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

FREE_U = ("s1", "s2", "b1", "b2")
Types = Mapping[str, tuple[str, str]]
"""Path of a submodule → the names of its class and of its attention processor's."""


@dataclass(frozen=True)
class Kinds:
    """What a component's class makes: its submodules, the classes that may stand in their places, and constants.

    `buffers` are those that a checkpoint stores and the graph holds, by their path.
    """

    types: Types
    variations: frozenset[str] = frozenset()
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)


def kinds_of(components: Sequence[Component]) -> Kinds:
    """Of components that serve the same module."""
    first = components[0]
    config = json.dumps(dict(first.config), sort_keys=True, default=str)
    types, buffers = _types_and_buffers(_Made(first, config))
    constant = {path: value for path, value in buffers.items() if path not in first.fed}
    return Kinds(types, frozenset(n for c in components for n in c.variations), constant)


class _Made:
    """A component, equal to others that are made alike."""

    def __init__(self, component: Component, config: str) -> None:
        self.component, self._key = component, (component.cls, component.attribute, config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Made) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=32)
def _types_and_buffers(key: _Made) -> tuple[Types, Mapping[str, torch.Tensor]]:
    from accelerate import init_empty_weights
    from overcrank.export.module import construct, part

    with init_empty_weights(include_buffers=False):
        whole = construct(key.component.cls, key.component.config, f"{key.component.subfolder}/config.json")
    module = part(whole, key.component)
    return {path: _type(sub) for path, sub in module.named_modules()}, stored_buffers(module)


def stored_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those of floating point that are in the module's state dict, by their path."""
    names = {p for p, sub in module.named_modules() for p in (f"{p}.{b}".lstrip(".") for b in _stored(sub))}
    return {path: value for path, value in module.named_buffers() if path in names and value.is_floating_point()}


def _stored(sub: nn.Module) -> set[str]:
    return set(sub._buffers) - sub._non_persistent_buffers_set


def _type(module: nn.Module) -> tuple[str, str]:
    processor = vars(module).get("processor") or module._modules.get("processor")
    return type(module).__name__, "" if processor is None else type(processor).__name__


def require_stock(module: nn.Module, kinds: Kinds) -> None:
    """Raise CannotServe naming the first thing in a module that its class did not put there."""
    paths = dict(module.named_modules())
    for path, sub in paths.items():
        for why in _foreign(path, sub, kinds):
            raise CannotServe(why)
    if (missing := set(kinds.types) - set(paths)) and not kinds.variations:
        raise CannotServe(ModuleChanged(ModuleChange.MISSING, min(missing)))
    _require_own_constants(module, kinds)
    for cls in {type(m) for m in paths.values()}:
        _require_own_forward(cls)
    _require_no_global_hooks()


def _foreign(path: str, sub: nn.Module, kinds: Kinds) -> Iterator[ModuleChanged]:
    place = path or "the module"
    yield from _wrong_type(place, path, sub, kinds)
    own = vars(sub)
    hooks = getattr(own.get("_diffusers_hook"), "hooks", None)
    if hooks:
        yield ModuleChanged(ModuleChange.DIFFUSERS_HOOKS, place, ", ".join(hooks))
    if path and (sub._forward_hooks or sub._forward_pre_hooks):
        yield ModuleChanged(ModuleChange.HOOKS, place)
    if path and not _is_own(sub, own.get("forward")):
        yield ModuleChanged(ModuleChange.ACCELERATE_HOOKS if "_hf_hook" in own else ModuleChange.FORWARD, place)
    if any(own.get(name) is not None for name in FREE_U):
        yield ModuleChanged(ModuleChange.FREE_U, place)
    if sub.training and type(sub).__name__.startswith("Dropout") and getattr(sub, "p", 0) > 0:
        yield ModuleChanged(ModuleChange.DROPOUT, place)


def _wrong_type(place: str, path: str, sub: nn.Module, kinds: Kinds) -> Iterator[ModuleChanged]:
    (cls, processor), stock = _type(sub), kinds.types.get(path)
    if any(base.__module__.startswith("peft.") for base in type(sub).__mro__):
        yield ModuleChanged(ModuleChange.LORA, place)
    if cls in kinds.variations or _within(path, sub, kinds):
        return
    if isinstance(sub, LoraLayer) and stock is not None and stock[0] == "Linear":
        return
    if stock is None:
        yield ModuleChanged(ModuleChange.UNKNOWN, place, cls)
    elif cls != stock[0]:
        yield ModuleChanged(ModuleChange.OTHER_CLASS, place, cls, stock[0])
    elif processor != stock[1]:
        yield ModuleChanged(ModuleChange.PROCESSOR, place, processor or "None", stock[1])


def _within(path: str, sub: nn.Module, kinds: Kinds) -> bool:
    """Whether it is no module of the class's, where the class's are known to be exchanged for others."""
    return bool(kinds.variations) and path not in kinds.types


def _is_own(sub: nn.Module, forward: Any) -> bool:
    """Whether a forward set on the instance is none, or the class's own put back."""
    if forward is None:
        return True
    return getattr(forward, "__self__", None) is sub and getattr(forward, "__func__", None) is type(sub).forward


def _require_own_constants(module: nn.Module, kinds: Kinds) -> None:
    """Buffers of a checkpoint are its class's, but for their rounding to 16 bit."""
    import torch

    own = dict(module.named_buffers()) if kinds.buffers else {}
    for path, stock in kinds.buffers.items():
        value = own.get(path)
        if value is None and kinds.variations:
            continue
        if value is None or not torch.allclose(value.float().cpu(), stock, rtol=2**-7, atol=2**-8):
            raise CannotServe(ModuleChanged(ModuleChange.CONSTANTS, path))


def _require_own_forward(cls: type[nn.Module]) -> None:
    """Some speed up a pipeline by giving its class another forward."""
    where = next(c for c in cls.__mro__ if "forward" in vars(c))
    forward = vars(where)["forward"]
    if forward.__module__ != where.__module__ and where.__module__ != "torch.nn.modules.module":
        own = f"{forward.__name__} of {forward.__module__}"
        raise CannotServe(ModuleChanged(ModuleChange.CLASS_FORWARD, cls.__name__, own))


def _require_no_global_hooks() -> None:
    from torch.nn.modules import module as torch_module

    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise CannotServe(ModuleChanged(ModuleChange.GLOBAL_HOOKS))
