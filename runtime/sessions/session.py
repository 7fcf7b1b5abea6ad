"""What runs a component, and the record of who served which call."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from overcrank.engines.refusals import BUILD, CannotServe, OtherLengths, Refusal
from overcrank.errors import BackendError
from overcrank.models.base import Component

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("overcrank")
EAGER = "eager"


class Session(Protocol):
    """Runs one component's graph on named tensors; eager PyTorch needs none, it is the module itself."""

    backend: str  # "onnxruntime", "tensorrt_rtx" or "tensorrt"
    engine: str  # digest of the EngineKey it runs; "" for a graph
    replaced: tuple[str, ...]  # layers of the module whose weights it does not read, as it has packed ones
    copies: bool  # whether it has copies of the module's weights

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Raises CannotServe for a call it has no engine for."""

    def rebind(self, written: bool) -> bool:
        """Take the module's parameters from where they are now; False when it has to be made anew.

        `written`: they have other values too.
        """

    def take_loras(self) -> bool:
        """Take those beside the module's weights as they are now; False when they do not fit, or never have."""

    def save_kernels(self) -> None:
        """Keep on disk what was compiled for this machine."""


class WithLoras:
    """What sessions share that take LoRAs as inputs."""

    loras: Callable[[], Mapping[str, Tensor]] | None = None
    """Input → LoRA beside a layer of the module, as they are now; raises CannotServe for those that do not fit."""

    def take_loras(self) -> bool:
        try:
            self._bind_loras(self.loras() if self.loras is not None else {})
        except CannotServe:
            return False
        return True

    def _bind_loras(self, tensors: Mapping[str, Tensor]) -> None:
        """In place of those that were bound."""
        raise NotImplementedError


def run_each(session: Session, component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Run a session; a batch goes item by item through a graph of batch 1.

    Of the inputs that start with a fixed 1, those longer than that are the batch.
    """
    import torch

    single = [t.name for t in component.inputs if t.dims[:1] == (1,)]
    batch = max((inputs[name].shape[0] for name in single), default=1)
    if batch == 1:
        return session(inputs)
    for name in single:
        shape = tuple(inputs[name].shape)
        if shape[0] not in (1, batch):
            raise CannotServe(OtherLengths(component.name, name, shape, (batch, *shape[1:])))
    batched = {name for name in single if inputs[name].shape[0] == batch}
    results = [session({k: v[i : i + 1] if k in batched else v for k, v in inputs.items()}) for i in range(batch)]
    return {name: torch.cat([out[name] for out in results]) for name in results[0]}


@dataclass(frozen=True)
class Fallback:
    component: str
    reason: str
    fix: str
    kind: str = ""  # of the refusal


@dataclass
class Record:
    """What happened during one render."""

    served: Counter[tuple[str, str]] = field(default_factory=Counter)  # (component, backend) → calls
    engines: dict[str, str] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)

    def backends(self) -> dict[str, dict[str, int]]:
        """component → backend → number of calls."""
        table: dict[str, dict[str, int]] = {}
        for (component, backend), count in sorted(self.served.items()):
            table.setdefault(component, {})[backend] = count
        return table


class Ledger:
    """Records calls and fallbacks of a pipeline's engines, by the thread that renders."""

    def __init__(self, strict: bool, precision: str = "") -> None:
        """`strict`: a fallback raises BackendError in place of a warning; `precision`: that of engines alone."""
        self.strict, self.precision = strict, precision
        self.build = BUILD  # the command that builds engines for the pipeline
        self.standing: list[Fallback] = []  # known before any call
        self.look: Callable[[], None] = lambda: None  # for what is asked of no engine, before every call
        self._warned: set[str] = set()
        self._local = threading.local()
        self._outside = Record()

    @property
    def record(self) -> Record:
        record: Record = getattr(self._local, "record", self._outside)
        return record

    @property
    def forced_eager(self) -> bool:
        return bool(getattr(self._local, "eager", False))

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Calls of this thread are recorded here."""
        self._local.record = record = Record(fallbacks=list(self.standing))
        try:
            yield record
            self.look()
        finally:
            del self._local.record

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """No engine serves this thread's calls meanwhile."""
        before = self.forced_eager
        self._local.eager = True
        try:
            yield
        finally:
            self._local.eager = before

    def fall_back(self, components: list[str], why: Refusal, standing: bool = False) -> None:
        """One warning for one reason; raises BackendError when falling back is not allowed."""
        reason, fix = why.words(self.build)
        if self.strict:
            raise BackendError(f"{', '.join(components)}: {reason}; {fix}.")
        entries = [Fallback(c, reason, fix, why.kind) for c in components]
        fallbacks = self.standing if standing else self.record.fallbacks
        fallbacks += [e for e in entries if e not in fallbacks]
        if reason not in self._warned:
            self._warned.add(reason)
            plain = f", not in {self.precision}" if self.precision else ""
            log.warning("%s: rendering with eager PyTorch%s: %s; %s.", ", ".join(components), plain, reason, fix)
