"""Whether a module is still the one that sessions were bound to, asked before every call of it.

An engine computes what the module's class makes of the module's parameters. So it may answer while the module is as
its class makes it (`require_stock`), and while its parameters are those that were bound (`Fingerprint`).
"""

from __future__ import annotations

import enum
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from overcrank.export.quantization.lora import LORA_A, LORA_B
from overcrank.models._common import state_of
from overcrank.runtime.sessions.lora_layer import LoraLayer
from overcrank.runtime.sessions.stock import Kinds, require_stock

if TYPE_CHECKING:
    import torch
    from torch import nn

REPLACEABLE = ("forward", "processor", "s1", "s2", "b1", "b2", "_hf_hook", "_diffusers_hook")
"""Attributes of submodules that others put in the place of the class's own: hooks, attention, FreeU's factors."""
OF_THE_ROOT = ("training", "_internal_dict", "_cache_config", "_compiled_call_impl")


_FORWARD = attrgetter("forward")


EVERY: Collection[str] = ("every layer",)
"""In the place of layers' names."""


class Change(enum.IntEnum):
    NOTHING = 0
    LORAS = 1  # other LoRAs beside the same weights
    MOVED = 2  # the same values elsewhere
    WRITTEN = 3  # other values
    REBUILT = 4  # other parameters or submodules


class Fingerprint:
    """What of a module changes when anything that an engine relies on does; `same` asks in microseconds.

    Where parameters lie, attributes that are replaced, how many each submodule has, buffers and whether they were
    written, and what PyTorch tells of submodules, parameters and hooks that are registered. `copied`: layers whose
    weights a session holds copies of, so what is written into the module's own counts too; EVERY for all.
    """

    def __init__(self, module: nn.Module, kinds: Kinds, copied: Collection[str] = ()) -> None:
        """Raises CannotServe when the module is not as its class makes it."""
        require_stock(module, kinds)
        self._submodules = list(module.modules())
        self._children = _Tables([m._modules for m in self._submodules])
        self._tables = _Tables([m._parameters for m in self._submodules])
        self._parameters = [p for p in self._tables.values() if p is not None]
        places = [(m._buffers, name) for m in self._submodules for name in m._buffers]
        self._places = [table for table, _ in places], [name for _, name in places]
        self._buffers = self._buffers_now()
        self._loras = [b for b, (_, name) in zip(self._buffers, places, strict=True) if name in (LORA_A, LORA_B)]
        self._types = list({type(m) for m in self._submodules})
        self._forwards = list(map(_FORWARD, self._types))
        self._attributes = [vars(m) for m in self._submodules]
        self._counts = list(map(len, self._attributes))
        watched = [(a, key) for a in self._attributes for key in REPLACEABLE if key in a]
        watched += [(self._attributes[0], key) for key in OF_THE_ROOT if key in self._attributes[0]]
        self._watched = [a for a, _ in watched], [key for _, key in watched]
        self._values = [a[key] for a, key in watched]
        self._module = weakref.ref(module)
        self._copied = self._parameters_of(copied)
        _listen()
        self._hooks = _hooks_ever()
        self.touched = False  # a submodule or parameter was registered
        self.noted()
        _watch(self, self._submodules)

    def _buffers_now(self) -> list[Any]:
        return list(map(dict.get, *self._places))

    @property
    def copies(self) -> bool:
        return bool(self._copied)

    def count_writes(self, copied: Collection[str]) -> None:
        """A session has just copied the weights of these layers."""
        self._copied = self._parameters_of(copied)
        self.noted()

    def _parameters_of(self, copied: Collection[str]) -> list[torch.Tensor]:
        """Of layers, and of those that a file has quantized, as sessions may have widened them."""
        module = self._module()
        if copied is EVERY or module is None or not copied:
            return self._parameters if copied is EVERY else []
        layers = set(copied)
        owners = [own for name, own in module.named_modules() if name in layers or isinstance(own, LoraLayer)]
        return [own._parameters["weight"] for own in owners if own._parameters.get("weight") is not None]  # type: ignore[misc]

    def noted(self) -> None:
        """Take where the parameters are now for right."""
        self._addresses = _addresses(self._parameters)
        self._constants = state_of(b for b in self._buffers if b is not None)
        self._loras_state = [None if b is None else state_of([b]) for b in self._loras]
        self._versions = _versions(self._copied)
        self.__dict__.pop("_samples", None)
        self._content = self._sampled() if self.copies else None

    def same(self) -> bool:
        """Whether nothing was done to the module; False also for what turns out to matter to no engine."""
        return (
            not self.touched
            and self._hooks == _hooks_ever()
            and list(map(_FORWARD, self._types)) == self._forwards
            and list(map(len, self._attributes)) == self._counts
            and all(map(is_, map(dict.get, *self._watched), self._values))
            and self._children.same()
            and self._tables.same()
            and (not self._buffers or self._same_buffers())
            and _at(self._parameters, self._addresses)
            and (not self.copies or self._unwritten())
        )

    def since(self, earlier: Fingerprint | None) -> Change:
        """What has happened to the module between an earlier fingerprint and this one."""
        if earlier is None:
            return Change.NOTHING
        if earlier.touched or len(self._submodules) != len(earlier._submodules):
            return Change.REBUILT
        pairs = (self._submodules, earlier._submodules), (self._parameters, earlier._parameters)
        if any(len(a) != len(b) or not all(map(is_, a, b)) for a, b in pairs):
            return Change.REBUILT
        if self._versions != earlier._versions or self._content != earlier._content:
            return Change.WRITTEN
        if self._addresses != earlier._addresses:
            return Change.MOVED
        return Change.NOTHING if self._loras_state == earlier._loras_state else Change.LORAS

    def _same_buffers(self) -> bool:
        now = self._buffers_now()
        return all(map(is_, now, self._buffers)) and self._constants == state_of(b for b in now if b is not None)

    def _unwritten(self) -> bool:
        if _versions(self._copied) != self._versions:
            return False
        in_host_memory = self._copied[0].device.type == "cpu"  # elsewhere, reading them would wait for the card
        return not in_host_memory or self._sampled() == self._content

    def _sampled(self) -> dict[str, bytes]:
        """PyTorch does not count what is written through `.data`, as LoRAs are fused."""
        return _values(self._samples)

    @cached_property
    def _samples(self) -> Mapping[str, list[Any]]:
        return _samples(self._copied)


def sample_of(parameters: Sequence[torch.Tensor]) -> dict[str, bytes]:
    """The first, a middle and the last value of each parameter, by type."""
    return _values(_samples(parameters))


def _values(samples: Mapping[str, list[Any]]) -> dict[str, bytes]:
    import numpy as np
    import torch

    return {
        kind: (np.concatenate(views) if isinstance(views[0], np.ndarray) else torch.cat(views).cpu().numpy()).tobytes()
        for kind, views in samples.items()
    }


def _samples(parameters: Sequence[torch.Tensor]) -> Mapping[str, list[Any]]:
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows not every type
    in_host_memory = all(p.device.type == "cpu" for p in parameters)
    samples: dict[str, list[Any]] = defaultdict(list)
    for parameter in parameters:
        bits = parameter.detach().view(whole[parameter.element_size()])
        ends = bits.as_strided((min(3, bits.numel()),), (max(1, (bits.numel() - 1) // 2),))
        samples[str(parameter.dtype)].append(ends.numpy() if in_host_memory else ends.cpu())
    return samples


class _Tables:
    """What modules hold by name, compared as dictionaries, which find the same object in its place first."""

    def __init__(self, tables: Iterable[dict[str, Any]]) -> None:
        self._tables = [t for t in tables if t]
        self._copies = [dict(t) for t in self._tables]
        single = [(t, k) for t in self._tables for k, v in t.items() if getattr(v, "numel", int)() == 1]
        self._single = [t for t, _ in single], [k for _, k in single]
        self._ones = list(map(dict.get, *self._single))

    def values(self) -> Iterator[Any]:
        return chain.from_iterable(c.values() for c in self._copies)

    def same(self) -> bool:
        try:
            equal = self._tables == self._copies
        except RuntimeError:  # PyTorch will not say whether another tensor is the same
            return False
        return equal and all(map(is_, map(dict.get, *self._single), self._ones))  # a tensor of one value it compares


def _addresses(parameters: Sequence[torch.Tensor]) -> list[int]:
    import torch

    return list(map(torch.Tensor.data_ptr, parameters))


def _at(parameters: Sequence[torch.Tensor], addresses: list[int]) -> bool:
    """Whether the parameters are at these addresses; PyTorch with CUDA compares them in one call."""
    import torch

    compare: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    try:
        if compare is None or len(parameters) != len(addresses):
            return _addresses(parameters) == addresses
        return bool(compare(parameters, addresses, list(range(len(addresses)))))
    except TypeError:  # one was taken out
        return False


def _versions(parameters: Sequence[torch.Tensor]) -> list[int]:
    import torch

    return list(map(torch.Tensor._version.__get__, parameters))  # type: ignore[attr-defined]


# ── what PyTorch tells ───────────────────────────────────────────────────────────────

_watchers: dict[int, list[weakref.ref[Fingerprint]]] = {}
"""By the id of a submodule."""


def _watch(fingerprint: Fingerprint, submodules: Sequence[nn.Module]) -> None:
    """Have PyTorch tell when a submodule or parameter is put into one of these, such as a LoRA's layer."""
    me = weakref.ref(fingerprint)
    ids = [id(m) for m in submodules]
    for key in ids:
        _watchers[key] = [*(r for r in _watchers.get(key, ()) if r() is not None), me]
    weakref.finalize(fingerprint, _forget, ids)


def _forget(ids: Sequence[int]) -> None:
    for key in ids:
        _watchers[key] = [r for r in _watchers.get(key, ()) if r() is not None]
        if not _watchers[key]:
            del _watchers[key]


@cache
def _listen() -> None:
    from torch.nn.modules import module

    module.register_module_module_registration_hook(_registered)
    module.register_module_parameter_registration_hook(_registered)


def _registered(module: nn.Module, name: str, value: Any) -> None:
    for reference in _watchers.get(id(module), ()):
        fingerprint = reference()
        if fingerprint is not None:
            fingerprint.touched = True


def _hooks_ever() -> int:
    """How many hooks were registered in this process: a forward hook may be one of them."""
    from torch.utils.hooks import RemovableHandle

    return RemovableHandle.next_id
