"""ONNX graph → TensorRT engine, one path for both flavours; needs no GPU on TensorRT for RTX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overcrank.engines.profiles import ShapeRange
from overcrank.engines.targets import Target
from overcrank.engines.tensorrt import load_flavour
from overcrank.errors import CompileError, TargetError
from overcrank.options import option

Progress = Callable[[str], None]
"""Called with a phase when it starts."""

# Where nearly all the time goes, under a name that would mislead.
PHASES = {"Determining refit engines": "generating kernels"}

SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")


@dataclass
class Compiled:
    plan: Any  # buffer of the serialized engine
    activation_bytes: int | None  # at the profile's maximum; None if the flavour did not say
    warnings: list[str] = field(default_factory=list)


def engine_from_graph(
    graph: Path,
    target: Target | None,
    ranges: Mapping[str, ShapeRange],
    *,
    flavour: str = "tensorrt_rtx",
    progress: Progress = lambda phase: None,
) -> Compiled:
    """Compile `graph` (strongly typed) for `target`, or for the machine's own card if None.

    Raises CompileError with the compiler's own words.
    """
    trt = load_flavour(flavour)
    log = logger_of(trt)
    builder = trt.Builder(log)
    network = builder.create_network(
        sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, n)) for n in NETWORK_FLAGS)
    )
    progress("parsing")
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        what = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise CompileError(f"{graph.name}: the compiler cannot read the graph: {what[:500]}")
    config = builder.create_builder_config()
    for set_flag in SETTINGS.values():
        set_flag(trt, network, config)
    if flavour == "tensorrt_rtx" and target is not None:
        config.num_compute_capabilities = len(target.compute_capabilities)
        for i, name in enumerate(target.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    elif target is not None:
        _require_local_card(target)
    _add_profile(builder, network, config, ranges)
    config.progress_monitor = _monitor(trt, progress)
    try:
        plan = builder.build_serialized_network(network, config)
    except Exception as error:
        raise CompileError(f"{graph.name}: {_reason(log, error)}") from error
    if plan is None:
        raise CompileError(f"{graph.name}: {_reason(log, None)}")
    return Compiled(plan, log.activation_bytes, log.warnings)


def _reason(log: Any, error: Exception | None) -> str:
    words = log.errors[-1] if log.errors else str(error or "no reason given")
    return f"the compiler gave up: {words[:500]}"


def logger_of(trt: Any) -> Any:
    """A logger that prints nothing: `errors` and `warnings` are kept."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps errors and warnings, and the activation memory that only the log tells."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.activation_bytes: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif match := SCRATCH.search(message):
                self.activation_bytes = int(match.group(1))

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Reports each phase when it first starts; the compiler enters some of them thousands of times."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if phase not in self.seen:
                self.seen.add(phase)
                progress(PHASES.get(phase, phase))

        def step_complete(self, phase: str, step: int) -> bool:
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _decomposable_attention(trt: Any, network: Any, config: Any) -> None:
    """Head sizes without a dedicated kernel compile as matrix products instead of failing."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _no_auxiliary_streams(trt: Any, network: Any, config: Any) -> None:
    """What runs side by side cannot share memory; a large network fills the card anyway."""
    config.max_aux_streams = 0


def _user_allocation(trt: Any, network: Any, config: Any) -> None:
    """Nothing is allocated while a call is captured."""
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


NETWORK_FLAGS = ("STRONGLY_TYPED",)
SETTINGS = {
    "decomposable_attention": _decomposable_attention,
    "no_auxiliary_streams": _no_auxiliary_streams,
    "user_allocation": _user_allocation,
}
"""By the name that stands for each in an engine's key: another name for what is set otherwise."""
FLAGS = ",".join((*map(str.lower, NETWORK_FLAGS), *SETTINGS))


def _add_profile(builder: Any, network: Any, config: Any, ranges: Mapping[str, ShapeRange]) -> None:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name in ranges:
            profile.set_shape(tensor.name, *ranges[tensor.name])
        elif -1 in tuple(tensor.shape):
            raise CompileError(f"input '{tensor.name}' is dynamic but has no range in the profile")
    config.add_optimization_profile(profile)


def _require_local_card(target: Target) -> None:
    """Classic TensorRT builds only for the card it runs on."""
    from overcrank.engines.targets import targets_for

    local = targets_for(["auto"], "tensorrt")[0]
    if local != target:
        raise TargetError(
            f"TensorRT builds only for the card it runs on ({local.name}), not for {target.name}; "
            f"use {option('flavour', 'tensorrt_rtx')}, which builds for any card."
        )
