"""EngineModule: a session in the place of a module's forward."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from overcrank.engines.graph_refusals import SessionRefused
from overcrank.engines.refusals import (
    AnotherComponentsCall,
    CallFailed,
    CannotServe,
    OtherLengths,
    Refusal,
    SessionFailed,
    UnfitCall,
    UnknownArguments,
    WrongCall,
)
from overcrank.errors import BuildCancelled, OtherKind, OvercrankError, RenderCancelled, ShapeError, present
from overcrank.models.base import Call, Component
from overcrank.runtime.sessions.fingerprint import EVERY, Change, Fingerprint
from overcrank.runtime.sessions.parked import Parked
from overcrank.runtime.sessions.session import EAGER, Ledger, Session, log, run_each
from overcrank.runtime.sessions.stock import kinds_of
from overcrank.runtime.sessions.workspace import out_of_memory

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Slot:
    """One component that may serve a module's calls; its session is made at the first call."""

    component: Component
    make: Callable[[], Session]
    session: Session | None = None
    refused: Refusal | None = None  # for good
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def opened(self) -> Session:
        with self._lock:  # it may be on its way in another thread
            if self.refused is not None:
                raise CannotServe(self.refused)
            if self.session is None:
                try:
                    self.session = self.make()
                except (RenderCancelled, BuildCancelled):
                    raise
                except CannotServe as error:
                    self.refuse(error.why)
                    raise
                except Exception as error:
                    self.refused = _why(self.component.name, error)
                    raise CannotServe(self.refused) from error
            return self.session

    def refuse(self, why: Refusal) -> None:
        if why.lasting:
            self.refused = why

    def follow(self, change: Change) -> None:
        """The module was changed: what could not be made may be now, and what stays must hold its weights."""
        with self._lock:
            if change is Change.NOTHING:
                return
            self.refused = None
            kept = change < Change.REBUILT and self.session is not None
            if not (kept and _follows(present(self.session, "a session"), change)):
                self.session = None


class EngineModule:
    """Takes over `module.forward`: same arguments, same results, run by an engine.

    The module stays in the pipeline with its class, configuration, parameters, dtype and
    hooks, so LoRA loading, offloading and saving keep working, and eager fallback is its
    own forward. The first of `slots` that fits a call serves it, if every argument is one that
    it understands and the module is as it was bound, which is asked at each call. Calls that
    need gradients run eagerly. A copy of the module has its class's forward again.
    """

    def __init__(self, module: nn.Module, slots: list[Slot], ledger: Ledger) -> None:
        self.module, self.slots, self.ledger = module, slots, ledger
        self.__signature__ = inspect.signature(module.forward)
        self._defaults = {p.name: p.default for p in self.__signature__.parameters.values()}
        self._eager = module.forward
        self._before = vars(module).get("forward")  # an offload hook's, if there is one
        self._compiled = vars(module).pop("_compiled_call_impl", None)  # by module.compile()
        self.name = slots[0].component.name
        self._parked = Parked(module)
        self._bound: Fingerprint | None = None
        self._counted: list[Session] = []  # whose copies are known to it
        self._binding = threading.Lock()
        module.forward = self

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")

    def remove(self) -> None:
        """Give the module its own forward back; a hook put over this one since keeps calling it, to no effect."""
        self.slots = []
        self._parked.fetch()
        if self._compiled is not None:
            self.module._compiled_call_impl = self._compiled
        if vars(self.module).get("forward") is not self:
            return
        if self._before is None:
            del self.module.forward  # the instance attribute; the class's method shows again
        else:
            self.module.forward = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if self.slots and not (torch.is_grad_enabled() or self.ledger.forced_eager):
            self.ledger.look()
            hook = getattr(self.module, "_hf_hook", None)
            if hook is not None and self._before is not None:  # under this forward, which brings the weights
                args, kwargs = hook.pre_forward(self.module, *args, **kwargs)
            try:
                serve = self._uncompiled if "torch._dynamo" in sys.modules else self._by_an_engine
                return serve(_arguments(self.__signature__, args, kwargs))
            except CannotServe as refusal:
                self.ledger.fall_back([self.name], refusal.why)
        self.ledger.record.served[self.name, EAGER] += 1
        self._parked.fetch()
        return self._eager(*args, **kwargs)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile leaves it as it is

    @cached_property
    def _uncompiled(self) -> Callable[[dict[str, Any]], Any]:
        """What engines do is not for torch.compile, which would trace it frame by frame."""
        import torch

        disabled: Callable[[dict[str, Any]], Any] = torch.compiler.disable(self._by_an_engine)
        return disabled

    def _by_an_engine(self, arguments: dict[str, Any]) -> Any:
        """Raises CannotServe with the reason of the slot that came closest to serving, of several the first."""
        self._bind()
        reasons: list[Refusal] = []
        for slot in self.slots:
            try:
                return self._served(slot, Call(arguments))
            except CannotServe as error:
                slot.refuse(error.why)
                reasons.append(error.why)
            except OtherKind as error:
                reasons.append(AnotherComponentsCall(str(error)))
            except ShapeError as error:
                reasons.append(UnfitCall(str(error)))
            except (RenderCancelled, BuildCancelled):
                raise
            except Exception as error:
                reasons.append(CallFailed(slot.component.name, _first_line(error)))
        raise CannotServe(min(reasons, key=lambda why: why.distance))

    def _bind(self) -> None:
        """Have every session follow what was done to the module; raises CannotServe while it is none of its class's."""
        with self._binding:
            before = self._bound
            if before is not None and before.same():
                return
            kinds = kinds_of([slot.component for slot in self.slots])
            fresh = Fingerprint(self.module, kinds, self._copied())
            change = fresh.since(before)
            for slot in self.slots:
                slot.follow(change)
            self._bound = fresh

    def _served(self, slot: Slot, call: Call) -> Any:
        component = slot.component
        inputs = component.adapt(self.module, call)
        if unread := call.unread(self._defaults):
            raise CannotServe(UnknownArguments(tuple(unread)))
        session = self._opened(slot)
        if self._parked.park(session.replaced) and self._bound is not None:
            self._bound.noted()
        _check_fixed(component, inputs)
        outputs = self._run(session, component, inputs)
        record = self.ledger.record
        record.served[component.name, session.backend] += 1
        record.engines.setdefault(component.name, session.engine)
        like = inputs[component.inputs[0].name].dtype
        return component.returns({k: v.to(like) for k, v in outputs.items()}, call)

    def _opened(self, slot: Slot) -> Session:
        session = slot.opened()
        if self._bound is not None and session.copies and session not in self._counted:
            self._bound.count_writes(self._copied())
        return session

    def _copied(self) -> Collection[str]:
        """Layers whose weights sessions hold copies of."""
        sessions = [slot.session for slot in self.slots if slot.session is not None and slot.session.copies]
        self._counted = sessions
        if any(not session.replaced for session in sessions):
            return EVERY
        return {name for session in sessions for name in session.replaced}

    def preload(self) -> None:
        """Make the first slot's session ahead of its first call, which tells why it cannot be made."""
        with suppress(CannotServe):
            self._bind()
            self._opened(self.slots[0])

    def _run(self, session: Session, component: Component, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        import torch

        try:
            return run_each(session, component, inputs)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotServe(out_of_memory(component.name, next(iter(inputs.values())).device)) from error


def _follows(session: Session, change: Change) -> bool:
    """Whether a session has taken what has changed."""
    bound = change is Change.LORAS or session.rebind(change is Change.WRITTEN)
    return bound and session.take_loras()


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """A call's arguments by name; those that the signature does not name are among them."""
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:  # the stock forward says so in its own words
        raise CannotServe(WrongCall(str(error))) from error
    more = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return arguments | {k: v for name in more for k, v in arguments.pop(name, {}).items()}


def _why(component: str, error: Exception) -> Refusal:
    """A session could not be made; what our own errors advise stands behind their semicolon."""
    problem, _, advice = _first_line(error).rpartition("; ")
    if problem and isinstance(error, OvercrankError):
        return SessionRefused(component, problem, advice)
    return SessionFailed(component, _first_line(error))


def _first_line(error: Exception) -> str:
    """Of a failure that nobody foresaw; all of it is logged."""
    log.debug("an engine failed", exc_info=error)
    line = str(error).strip().partition("\n")[0].rstrip(".")[:300]
    return line if isinstance(error, OvercrankError) else f"{type(error).__name__}: {line}"


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
            raise CannotServe(OtherLengths(component.name, spec.name, tuple(shape), spec.dims))
