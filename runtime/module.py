"""EngineModule: a session in the place of a module's forward."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models.base import Component
from overcrank.runtime.session import EAGER, CannotServe, Ledger, Session, run_each
from overcrank.runtime.workspace import out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Slot:
    """One component that may serve a module's calls; its session is made at the first call."""

    component: Component
    make: Callable[[], Session]
    session: Session | None = None
    refused: CannotServe | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def opened(self) -> Session:
        with self._lock:  # it may be on its way in another thread
            if self.refused is not None:
                raise self.refused
            if self.session is None:
                try:
                    self.session = self.make()
                except CannotServe as error:
                    self.refused = error if error.lasting else None
                    raise
            return self.session


class Parked:
    """Weights of a module's quantized layers, in host memory while an engine multiplies packed ones in their place.

    A module with hooks that move it is left alone. Its first parameter stays, as it tells where the module is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._away: dict[str, torch.device] = {}

    def park(self, layers: Sequence[str]) -> None:
        first = next(self._module.parameters())
        if first.device.type == "cpu" or hasattr(self._module, "_hf_hook"):
            return
        for name in layers:
            weight = self._module.get_parameter(f"{name}.weight")
            if weight is not first and name not in self._away:
                self._away[name] = weight.device
                weight.data = weight.data.cpu()

    def fetch(self) -> None:
        """Back to where they were, for PyTorch to multiply; of those that have been moved since, none."""
        for name, device in self._away.items():
            weight = self._module.get_parameter(f"{name}.weight")
            weight.data = weight.data.to(device)
        self._away.clear()


class EngineModule:
    """Takes over `module.forward`: same arguments, same results, run by an engine.

    The module stays in the pipeline with its class, configuration, parameters, dtype and
    hooks, so LoRA loading, offloading and saving keep working, and eager fallback is its
    own forward. The first of `slots` that fits a call serves it. Calls that need gradients
    run eagerly.
    """

    def __init__(self, module: nn.Module, slots: list[Slot], ledger: Ledger) -> None:
        self.module, self.slots, self.ledger = module, slots, ledger
        self.__signature__ = inspect.signature(module.forward)
        self._eager = module.forward
        self._before = vars(module).get("forward")  # an offload hook's, if there is one
        self._name = slots[0].component.name
        self._parked = Parked(module)
        module.forward = self

    def remove(self) -> None:
        """Give the module its own forward back; a hook put over this one since keeps calling it, to no effect."""
        self.slots = []
        self._parked.fetch()
        if vars(self.module).get("forward") is not self:
            return
        if self._before is None:
            del self.module.forward  # the instance attribute; the class's method shows again
        else:
            self.module.forward = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if self.slots and not (torch.is_grad_enabled() or self.ledger.forced_eager):
            hook = getattr(self.module, "_hf_hook", None)
            if hook is not None and self._before is not None:  # under this forward, which brings the weights
                args, kwargs = hook.pre_forward(self.module, *args, **kwargs)
            call = self.__signature__.bind(*args, **kwargs).arguments
            refusal: tuple[str, str] | None = None  # not the exception, whose frames hold tensors while PyTorch runs
            other = ""
            for slot in self.slots:
                try:
                    return self._served(slot, call)
                except CannotServe as error:
                    if error.lasting:
                        slot.refused = error
                    refusal = refusal or (error.reason, error.fix)
                except ShapeError as error:  # a component for calls of another kind
                    other = str(error)
            self.ledger.fall_back([self._name], *(refusal or (other, "PyTorch runs it")))
        self.ledger.record.served[self._name, EAGER] += 1
        self._parked.fetch()
        return self._eager(*args, **kwargs)

    def _served(self, slot: Slot, call: dict[str, Any]) -> Any:
        import torch

        component = slot.component
        inputs = component.adapt(self.module, **call)
        session = slot.opened()
        self._parked.park(session.replaced)
        _check_fixed(component, inputs)
        try:
            outputs = run_each(session, component, inputs)
        except torch.cuda.OutOfMemoryError as error:
            raise out_of_memory(component.name, 0, next(iter(inputs.values())).device) from error
        record = self.ledger.record
        record.served[component.name, session.backend] += 1
        record.engines.setdefault(component.name, session.engine)
        like = inputs[component.inputs[0].name].dtype
        return component.returns({k: v.to(like) for k, v in outputs.items()}, call)


def _check_fixed(component: Component, inputs: Mapping[str, Any]) -> None:
    """Raise CannotServe for a length the graph holds fixed, such as a batch of 1."""
    for spec in component.inputs:
        shape = inputs[spec.name].shape
        batched = spec.dims[:1] == (1,)  # goes item by item, so any first length fits
        fits = len(shape) == len(spec.dims) and all(
            isinstance(d, str) or d == n or (batched and i == 0)
            for i, (d, n) in enumerate(zip(spec.dims, shape, strict=True))
        )
        if not fits:
            raise CannotServe(
                f"{component.name}: {spec.name} {list(shape)} is not {list(spec.dims)}",
                "render one video at a time and with the model's own sizes",
                lasting=False,
            )
