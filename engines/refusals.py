"""Every reason for which an engine does not serve: its kind, its figures, and the sentence made of them.

Whoever finds the reason raises CannotServe with one of these; only here is it put into words: `what` is wrong, and
the `fix`. The names in them are the kind's fields, {build} is the command that builds for this pipeline and card, and
{option:vram=low} names an option as whoever reads it gives it.
What was done to a module and its parameters is in module_refusals.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from overcrank.engines.targets import PRECISIONS
from overcrank.options import option
from overcrank.units import human_bytes

BUILD = "build-engine"
SLOW_ENGINES = "--slow-engines"  # as overcrank doctor names it
DOCTOR = "run overcrank doctor, which tests this machine"
SMALLER = "render fewer frames or a smaller size, with {option:vram=low}, or free the card"


class _Option:
    """{option:NAME}, {option:NAME=VALUE} or, of several values, {option:NAME=[VALUE]} of a sentence."""

    def __format__(self, spec: str) -> str:
        name, _, value = spec.partition("=")
        if value.startswith("["):
            return option(name, [value[1:-1]])
        return option(name, True if value == "True" else value or None)


OPTION = _Option()


class Refusal:
    """One reason."""

    what: ClassVar[str] = ""
    fix: ClassVar[str] = ""
    lasting: ClassVar[bool] = True
    """No later call can be served either, while the module stays as it is."""
    distance: ClassVar[int] = 0
    """How far from serving the call: of several components' reasons, the nearest is told."""

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def reason(self) -> str:
        return self.words()[0]

    def words(self, build: str = BUILD) -> tuple[str, str]:
        """What is wrong, and what to do."""
        figures = {name: _shown(value) for name, value in vars(self).items()}
        return self.what.format(**figures, option=OPTION), self.fix.format(**figures, option=OPTION, build=build)

    def sentence(self, build: str = BUILD) -> str:
        return "; ".join(self.words(build))


class CannotServe(Exception):
    """A session is not used; no error, for eager PyTorch takes its place."""

    def __init__(self, why: Refusal) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self.why.sentence()


def _shown(value: object) -> str:
    """Names with commas between them, a shape in brackets."""
    if isinstance(value, float):
        return f"{value:.1f}"
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(value) if value and all(isinstance(n, str) for n in value) else str(list(value))


class OfThisCall(Refusal):
    """A later call may be served."""

    lasting = False


# ── no engine that fits ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class NoEngine(Refusal):
    missing: str  # the model
    near: tuple[str, ...] = ()  # in what the nearest engine differs, and what is wrong with one that was left out
    what = "there is no engine of {missing}"
    fix = "{build}"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        what, fix = super().words(build)
        return "; ".join((what, *self.near)), fix


class NoComponent(NoEngine):
    """`missing` is a component of a model that has engines."""

    what = "no bundle has an engine of {missing}"
    fix = "{build} --components {missing}"


@dataclass(frozen=True)
class OtherCard(Refusal):
    model: str
    targets: tuple[str, ...]
    card: str
    what = "the engines of {model} are for {targets}, this card is {card}"
    fix = "{build}"


@dataclass(frozen=True)
class OtherOnProcessor(Refusal):
    graphs: str
    weights: str
    what = "on a processor, ONNX Runtime computes in {graphs}, and the pipeline's weights are {weights}"
    fix = "render with {option:dtype=[{graphs}]}"


@dataclass(frozen=True)
class OtherPrecision(Refusal):
    model: str
    card: str
    engines: tuple[str, ...]  # precision and where the weights are, such as "fp8 with weights as inputs"
    precision: str  # of the pipeline's weights
    what = "the engines of {model} for {card} are {engines}, and the pipeline's weights are {precision}"
    fix = "{build} --precision {precision}"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        what, fix = super().words(build)
        if "--layout" in build:  # which says the precision
            return what, build
        return what, fix if self.precision in PRECISIONS else "load the pipeline in bf16 or fp16"


@dataclass(frozen=True)
class OtherType(Refusal):
    component: str
    part: str
    engine: str
    pipeline: str
    what = "the engine of {component} computes in {engine}, and the pipeline's {part} is {pipeline}"
    fix = "{build} --dtype {part}={pipeline}, or render with {option:dtype=[{part}={engine}]}"


@dataclass(frozen=True)
class Damaged(Refusal):
    bundle: str
    problem: str
    what = "bundle {bundle} is damaged: {problem}"
    fix = "overcrank engines rm {bundle}, then {build}"


@dataclass(frozen=True)
class Untrusted(Refusal):
    problem: str  # a sentence with what to do
    what = "{problem}"
    fix = "or build it here: {build}"


@dataclass(frozen=True)
class Slower(Refusal):
    component: str
    engine_ms: float
    eager_ms: float
    shape: str
    date: str
    what = (
        "the engine of {component} took {engine_ms} ms a call on this card and eager PyTorch {eager_ms} ms "
        "({shape}, {date})"
    )
    fix = "measure again with ./build.sh bench-gpu, or add {option:slow_engines=True}"


# ── card, driver, libraries ──────────────────────────────────────────────────────────


@dataclass(frozen=True)
class OldDriver(Refusal):
    driver: str  # as nvidia-smi names it, such as "580.95.05"
    title: str
    version: str
    needed: str
    what = "driver {driver} is installed, and {title} {version} needs {needed} or newer"
    fix = "install a newer driver from nvidia.com/drivers (under WSL: that of Windows)"


@dataclass(frozen=True)
class OtherTensorRT(Refusal):
    title: str
    built_with: str
    installed: str  # version; empty for none
    install: str  # command; empty for a flavour that is not known here

    def words(self, build: str = BUILD) -> tuple[str, str]:
        installed = f"{self.installed} is installed" if self.installed else "it is not installed"
        fix = f"{self.install}, or build again: {build}" if self.install else build
        return f"the engine was built with {self.title} {self.built_with} and {installed}", fix


@dataclass(frozen=True)
class BrokenTensorRT(Refusal):
    package: str
    version: str
    error: str
    what = "{error}"
    fix = "repair the installation: pip install --force-reinstall {package}=={version}"


@dataclass(frozen=True)
class TorchWithoutCuda(Refusal):
    torch: str
    wheel: str  # the build for the CUDA that engines need, such as torch==2.13.0+cu130
    cards: tuple[str, ...]
    what = "PyTorch {torch} is a build without CUDA, and this machine has {cards}"
    fix = "install the wheel {wheel} in its place (pytorch.org/get-started has the command)"


@dataclass(frozen=True)
class CardsUnseen(Refusal):
    torch: str
    cuda: str
    cards: tuple[str, ...]
    what = "PyTorch {torch} for CUDA {cuda} sees no card, and this machine has {cards}"
    fix = "install a driver for CUDA {cuda} or newer, and look at CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class NoCard(OfThisCall):
    torch: str
    what = "PyTorch {torch} sees no card"
    fix = "run overcrank doctor, which says why"


@dataclass(frozen=True)
class OffCard(Refusal):
    device: str
    card_here: bool
    what = "the pipeline is on {device}, not on an NVIDIA GPU"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        fix = "move it to the one here: pipe.to('cuda')" if self.card_here else "render on a machine that has one"
        return super().words(build)[0], fix


# ── what TensorRT does ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TensorRTRefusal(Refusal):
    """TensorRT's own words stand behind the sentence."""

    subject: str  # the component, or the engine's file
    message: str

    def words(self, build: str = BUILD) -> tuple[str, str]:
        what, fix = super().words(build)
        return f"{what} ({self.message})" if self.message else what, fix


class LoadFailed(TensorRTRefusal):
    what = "{subject} could not be loaded on this card"
    fix = "{build}"


class LoadOutOfMemory(LoadFailed):
    """There may be more of it later."""

    lasting = False
    fix = SMALLER


class RunFailed(TensorRTRefusal):
    what = "the engine of {subject} failed while running"
    fix = DOCTOR


@dataclass(frozen=True)
class TensorRefused(TensorRTRefusal):
    lasting = False
    tensor: str
    what = "the engine of {subject} refuses the address of {tensor}"
    fix = DOCTOR


class OutputUnknown(TensorRefused):
    what = "the engine of {subject} cannot tell the shape of {tensor}"
    fix = "{build}"


@dataclass(frozen=True)
class ShapeRefused(TensorRefused):
    shape: tuple[int, ...]
    what = "the engine of {subject} refuses {tensor} {shape}"
    fix = "{build}"


@dataclass(frozen=True)
class OutOfMemory(OfThisCall):
    component: str
    needed: int  # bytes; 0 where nobody can tell
    free: int
    total: int
    fix = SMALLER

    def words(self, build: str = BUILD) -> tuple[str, str]:
        needs = f"it needs {human_bytes(self.needed)} for activations and " if self.needed else ""
        free = free_memory(self.free, self.total)
        return f"the engine of {self.component} ran out of GPU memory: {needs}{free}", super().words(build)[1]


def free_memory(free: int, total: int) -> str:
    """In bytes."""
    return f"{human_bytes(free)} of {human_bytes(total)} are free"


# ── the call ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class OutsideProfile(OfThisCall):
    component: str
    tensor: str
    shape: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    what = "{component}: {tensor} {shape} lies outside the engine's profile {low} … {high}"
    fix = "{build} with --max-height, --max-width or --max-frames large enough"


@dataclass(frozen=True)
class OtherLengths(OfThisCall):
    """Of a tensor that the graph holds fixed, such as a batch of 1."""

    component: str
    tensor: str
    shape: tuple[int, ...]
    dims: tuple[int | str, ...]
    what = "{component}: {tensor} {shape} is not {dims}"
    fix = "render one video at a time and with the model's own sizes"


@dataclass(frozen=True)
class WrongCall(OfThisCall):
    error: str  # Python's; the stock forward does not take the call either
    what = "{error}"
    fix = "call it as its class is called"


@dataclass(frozen=True)
class UnknownArguments(OfThisCall):
    names: tuple[str, ...]
    distance = 1
    what = "this call gives {names}"
    fix = "PyTorch runs it; without that the engine does"


@dataclass(frozen=True)
class UnfitCall(OfThisCall):
    message: str  # by the component
    distance = 1
    what = "{message}"
    fix = "PyTorch runs it"


class AnotherComponentsCall(UnfitCall):
    """Calls of this kind are served by another component of the same module."""

    distance = 2


@dataclass(frozen=True)
class CallFailed(OfThisCall):
    component: str
    error: str
    what = "{component} failed ({error})"
    fix = DOCTOR


class SessionFailed(CallFailed):
    """Before any call."""

    lasting = True


@dataclass(frozen=True)
class NonFiniteResult(OfThisCall):
    error: str
    what = "the engines gave {error}"
    fix = "it is rendered again without them; please report it with the sidecar"
