"""One variation of one class: eagerly, then with engines' graphs in ONNX Runtime, and how the two compare."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overcrank import accelerate
from overcrank.errors import OvercrankError
from overcrank.runtime.sessions.session import EAGER, Record

from tests.diffusers_suite.classes import CLASSES, Arguments, Subject

LIMIT = 1e-3
_MISTAKE = r"\b(Attribute|Type|Key|Index|Name|Assertion|UnboundLocal)Error\b"  # an engine path's own, in a reason
MAIN = ("denoiser", "latent_upsampler")
GOOD = ("equal", "fallback", "eager", "refused", "n/a")
Frames = dict[str, np.ndarray]


class NotHere(Exception):
    """The class has nothing that could be varied so."""


@dataclass(frozen=True)
class Changed:
    """What a change made of the pipeline, and how to take it back."""

    pipe: Any = None
    undo: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variation:
    """What a user does: to the call, to the pipeline before it is accelerated, or after its first accelerated call.

    `changes`: it must change eager's frames, or there is nothing to see. `classes`: it is of these alone. `again`: the
    pipeline it makes is accelerated anew. `eager`: no engine serves afterwards. `rounded`: in 16 bit eager itself is
    off by some rounding, and the engines may be off by twice that.
    """

    call: Callable[[Any, Subject, Arguments], Arguments] | None = None
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Changed] | None = None
    changes: bool = False
    again: bool = False
    eager: bool = False
    rounded: bool = False
    classes: tuple[str, ...] = ()

    def of(self, name: str) -> bool:
        """Whether a class, by its name in CLASSES, can be varied so."""
        return not self.classes or name.partition(" ")[0] in self.classes


VARIED_BY_NOTHING = Variation()


@dataclass(frozen=True)
class Outcome:
    """`kind` is one of GOOD, or UNEQUAL, UNNAMED, NOT BACK or CRASHED; `note` is the reason, or what happened."""

    kind: str
    note: str = ""

    @property
    def good(self) -> bool:
        return self.kind in GOOD


@contextmanager
def shared_sessions() -> Iterator[None]:
    """ONNX Runtime loads a graph once for all pipelines that run it: weights are inputs."""
    import onnxruntime as ort

    real, made = ort.InferenceSession, {}

    def session(content: bytes, *more: Any, **named: Any) -> Any:
        key = hashlib.sha256(content).digest() if isinstance(content, bytes) else content
        if key not in made:
            made[key] = real(content, *more, **named)
        return made[key]

    ort.InferenceSession = session
    try:
        yield
    finally:
        ort.InferenceSession = real


def made(subject: Subject) -> Any:
    torch.manual_seed(0)
    pipe = subject.make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rendered(pipe: Any, arguments: Arguments) -> Frames:
    torch.manual_seed(0)  # a decoder may inject noise of the global generator
    with torch.no_grad():
        result = pipe(**arguments)
    if isinstance(result, Mapping):
        found = {n: result[n] for n in ("frames", "images", "audio", "keyframes_latents") if n in result}
    else:  # a tuple, of frames first
        found = {"frames": result[0] if isinstance(result, tuple) else result}
    return {name: _array(value) for name, value in found.items() if value is not None}


def _array(value: Any) -> np.ndarray:
    if torch.is_tensor(value):
        return value.detach().float().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value.astype(np.float32)
    return np.stack([_array(v) if isinstance(v, list) or torch.is_tensor(v) else np.asarray(v) for v in value])


def apart(a: Frames, b: Frames) -> float:
    """Largest difference, relative where values are larger than 1.

    Where the pipeline itself rounds to 8 bits, a few values may be rounded the other way.
    """
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return float("inf")
    return max(_apart(a[k], b[k]) for k in a)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    scale = max(1.0, float(np.abs(a).max()))
    off = np.abs(a - b) / scale
    levels = a / scale * 255
    if np.allclose(levels, levels.round(), atol=1e-3) and (off > LIMIT).mean() < 0.01:
        off = np.maximum(off - 1 / 255, 0)
    return float(off.max())


def same_bits(a: Frames, b: Frames) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@dataclass
class Suite:
    """Runs cells; graphs are exported into `store` once, eager's plain frames are kept by class."""

    store: Path
    _plain: dict[Any, Frames] = field(default_factory=dict)

    def plain(self, name: str, variation: Variation = VARIED_BY_NOTHING) -> Frames:
        """Eager's frames without what the variation does: its call alone, if it does more than call."""
        call = variation.call if variation.before or variation.after else None
        if (name, call) not in self._plain:
            subject, pipe = CLASSES[name], made(CLASSES[name])
            self._plain[name, call] = rendered(pipe, _arguments(pipe, subject, Variation(call)))
        return self._plain[name, call]

    def run(self, name: str, variation: Variation) -> Outcome:
        subject = CLASSES[name]
        try:
            eager = self._eagerly(subject, variation)
        except NotHere as reason:
            return Outcome("n/a", str(reason))
        except Exception as error:
            return Outcome("n/a", f"eager: {_sentence(error)}")
        if not all(np.isfinite(v).all() for v in eager.values()):
            return Outcome("n/a", "eager: not finite")
        if variation.changes and apart(eager, self.plain(name, variation)) <= LIMIT:
            return Outcome("n/a", "changes nothing here")
        allowed = LIMIT
        if variation.rounded:
            allowed += 2 * apart(eager, self._widened(subject, variation))
        try:
            return self._with_engines(name, subject, variation, eager, allowed)
        except _Refused as refusal:
            return Outcome("refused", str(refusal))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome("CRASHED", f"{_sentence(error)} ({Path(where.filename).name}:{where.lineno})")

    def _eagerly(self, subject: Subject, variation: Variation) -> Frames:
        pipe = self._varied(subject, variation)
        return rendered(pipe, _arguments(pipe, subject, variation))

    def _varied(self, subject: Subject, variation: Variation) -> Any:
        """A pipeline without engines, changed as the variation says."""
        pipe = made(subject)
        if variation.before:
            pipe = variation.before(pipe) or pipe
        if variation.after:
            rendered(pipe, subject.arguments())
            pipe = variation.after(pipe).pipe or pipe
        return pipe

    def _widened(self, subject: Subject, variation: Variation) -> Frames:
        """Eager, in fp32, on the weights that were rounded."""
        pipe = self._varied(subject, variation)
        pipe.to(torch.float32)
        return rendered(pipe, _arguments(pipe, subject, variation))

    def _with_engines(
        self, name: str, subject: Subject, variation: Variation, eager: Frames, allowed: float
    ) -> Outcome:
        pipe = made(subject)
        if variation.before:
            pipe = variation.before(pipe) or pipe
        pipe = self._accelerated(pipe)
        changed = Changed()
        if variation.after:
            rendered(pipe, subject.arguments())
            changed = variation.after(pipe)
            pipe = changed.pipe or pipe
            if variation.again:
                pipe = self._accelerated(pipe)
        frames, record = _recorded(pipe, _arguments(pipe, subject, variation))
        found = judged(eager, frames, record, allowed, variation)
        if not found.good or changed.undo is None:
            return found
        changed.undo()
        frames, record = _recorded(pipe, subject.arguments())
        back = judged(self.plain(name), frames, record, LIMIT, VARIED_BY_NOTHING)
        usual = back.kind if back.kind == "equal" else self.run(name, VARIED_BY_NOTHING).kind
        return found if back.kind == usual else Outcome("NOT BACK", f"{back.kind}: {back.note}")

    def _accelerated(self, pipe: Any) -> Any:
        try:
            return accelerate(pipe, backend="onnxruntime", store=self.store)
        except OvercrankError as error:
            raise _Refused(_sentence(error)) from error


class _Refused(Exception):
    """By accelerate, with a sentence."""


def _arguments(pipe: Any, subject: Subject, variation: Variation) -> Arguments:
    arguments = subject.arguments()
    return variation.call(pipe, subject, arguments) if variation.call else arguments


def _recorded(pipe: Any, arguments: Arguments) -> tuple[Frames, Record]:
    about = getattr(pipe, "overcrank", None)
    if about is None:
        return rendered(pipe, arguments), Record()
    with about.ledger.recording() as record:
        return rendered(pipe, arguments), record


def judged(eager: Frames, frames: Frames, record: Record, allowed: float, variation: Variation) -> Outcome:
    served = [component for (component, backend), n in record.served.items() if backend != EAGER and n]
    not_served = sorted({component for (component, backend), n in record.served.items() if backend == EAGER and n})
    reasons = "; ".join(dict.fromkeys(f.reason for f in record.fallbacks))
    off = apart(eager, frames)
    if re.search(_MISTAKE, reasons):
        return Outcome("CRASHED", reasons)
    if variation.eager and not served:
        return Outcome("eager") if same_bits(eager, frames) else Outcome("UNEQUAL", f"eager off by {off:.2g}")
    if off > allowed or (not served and not same_bits(eager, frames)):
        said = f", though it fell back: {reasons}" if reasons else ""
        return Outcome("UNEQUAL", f"off by {off:.2g}{said}")
    if any(f.component.startswith(MAIN) for f in record.fallbacks) and not any(c.startswith(MAIN) for c in served):
        return Outcome("fallback", reasons)
    if not any(component.startswith(MAIN) for component, _ in record.served):
        return Outcome("UNNAMED", "no call of the denoiser is recorded")
    if not_served and not reasons:
        return Outcome("UNNAMED", f"{', '.join(not_served)} ran eagerly")
    if any(component.startswith(MAIN) for component in not_served) or not served:
        return Outcome("fallback", reasons)
    return Outcome("equal", f"{', '.join(not_served)}: {reasons}" if not_served else "")


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if not isinstance(error, OvercrankError) else text[:300]


def counts(outcomes: Mapping[tuple[str, str], Outcome]) -> dict[str, int]:
    """Kind → how many."""
    kinds = [o.kind for o in outcomes.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys((*GOOD, *sorted(set(kinds)))) if kind in kinds}
