"""Ranges of a network's activations while it denoises, collected by NVIDIA Model Optimizer.

Model Optimizer's quantizers stand at the inputs of the layers that a recipe quantizes; its
calibrators keep a maximum (per tensor, or per channel for SmoothQuant) or a histogram.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from overcrank.errors import CalibrationError, UserError
from overcrank.export.quantization.attention import intercepted
from overcrank.export.quantization.recipe import ATTENTION, OPERANDS, ActivationRange, LayerFormat, Method
from overcrank.options import option

if TYPE_CHECKING:
    from torch import Tensor, nn

METHODS: tuple[Method, ...] = get_args(Method)
PERCENTILE = 99.99
MSE_STRIDE = 8  # of 2,048 bins and more: finer moves a range by less than half a percent, and takes minutes
ALPHA = 0.5
"""SmoothQuant's migration strength (arXiv:2211.10438, section 4)."""
BITS: dict[str, Any] = {"fp8": (4, 3), "int8": 8, "nvfp4": (2, 1)}


def collected(
    modules: Mapping[str, nn.Module],
    layout: Mapping[str, LayerFormat],
    method: Method,
    samples: int,
    run: Callable[[int], None],
    state: Path,
) -> dict[str, dict[str, ActivationRange]]:
    """Part → layer → range over `run(0)` … `run(samples - 1)`; each runs the modules, with fixed seeds.

    `modules`: parts of a pipeline, all with the layers of `layout`. Samples done are kept in
    the file `state`, from which a later call goes on. The modules are left with Model
    Optimizer's layers in them, and must not be used afterwards. Raises CalibrationError for an
    activation that is not finite, naming layer and call, and for a layer that no sample
    reached; UserError for a method the format does not have.
    """
    import torch

    mtq, enable_stats_collection, MaxCalibrator = _model_optimizer()
    root = torch.nn.ModuleDict(dict(modules))
    layers = {f"{part}.{layer}": form for part in modules for layer, form in layout.items()}
    formats = {form.format for form in layers.values()}
    if method in ("smoothquant", "mse") and formats != {"int8"}:  # Model Optimizer 0.47 fails at mse in fp8
        raise UserError(f"{option('method', method)} is for int8, and this recipe has {', '.join(sorted(formats))}.")
    linear = {layer: form for layer, form in layers.items() if form.kind != ATTENTION}
    attended = layers.keys() - linear.keys()
    operands = {f"{a}.{operand}": MaxCalibrator(8, None, False) for a in attended for operand in OPERANDS}
    with _quietly(), _finite_inputs(root, linear) as check, _attended(root, attended, operands, check):
        mtq.quantize(root, {"quant_cfg": _settings(linear, method), "algorithm": None})
        quantizers: dict[str, Any] = {layer: root.get_submodule(layer).input_quantizer for layer in linear}

        def every(_: Any = None) -> None:
            calibrators = {layer: q._calibrator for layer, q in quantizers.items()} | operands
            for index in range(_restored(calibrators, state), samples):
                run(index)
                _keep(calibrators, index + 1, state)

        if method == "smoothquant":
            mtq.calibrate(root, {"method": "smoothquant", "alpha": ALPHA}, every)
        else:
            enable_stats_collection(root)
            every()
            for layer, quantizer in quantizers.items():
                _load(layer, quantizer, method)
    ranges = {layer: _range(layer, q.amax, q.pre_quant_scale) for layer, q in quantizers.items()}
    ranges |= {name: _range(name, calibrator.compute_amax(), None) for name, calibrator in sorted(operands.items())}
    return {part: _within(part, ranges) for part in modules}


def _model_optimizer() -> tuple[Any, Any, Any]:
    try:
        with _quietly():
            import modelopt.torch.quantization as mtq
            from modelopt.torch.quantization.calib import MaxCalibrator
            from modelopt.torch.quantization.model_calib import enable_stats_collection
    except ImportError as error:
        raise UserError("calibrating needs Model Optimizer; pip install 'overcrank[calibrate]' adds it.") from error
    return mtq, enable_stats_collection, MaxCalibrator


def _settings(layout: Mapping[str, LayerFormat], method: Method) -> list[dict[str, Any]]:
    """Model Optimizer's quant_cfg: nothing but the inputs of these layers (and weights, which SmoothQuant reads)."""
    kind = "histogram" if method in ("percentile", "mse") else "max"
    settings: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer, form in layout.items():
        bits = BITS[form.format] if method != "max" else 8  # of no account to a maximum
        inputs = {"num_bits": bits, "axis": None, "calibrator": kind}
        settings.append({"quantizer_name": f"{layer}.input_quantizer", "cfg": inputs, "enable": True})
        if method == "smoothquant":
            weights = {"num_bits": 8, "axis": 0}
            settings.append({"quantizer_name": f"{layer}.weight_quantizer", "cfg": weights, "enable": True})
    return settings


def _load(layer: str, quantizer: Any, method: Method) -> None:
    if method == "percentile":
        quantizer.load_calib_amax("percentile", percentile=PERCENTILE)
    elif method == "mse":
        quantizer.load_calib_amax("mse", stride=MSE_STRIDE)
    elif quantizer._calibrator.compute_amax() is not None:
        quantizer.load_calib_amax()


def _within(part: str, ranges: Mapping[str, ActivationRange]) -> dict[str, ActivationRange]:
    return {name.removeprefix(f"{part}."): value for name, value in ranges.items() if name.startswith(f"{part}.")}


def _range(layer: str, amax: Tensor | None, scale: Tensor | None) -> ActivationRange:
    if amax is None or not float(amax) > 0:
        raise CalibrationError(
            f"{layer} saw nothing but zeros, or no sample reached it; keep it in 16 bit in the recipe."
        )
    smoothing = None if scale is None else [float(f"{1 / float(s):.6g}") for s in scale.flatten()]
    return ActivationRange(amax=float(f"{float(amax):.6g}"), smoothing=smoothing)


@contextmanager
def _finite_inputs(root: nn.Module, layers: Mapping[str, LayerFormat]) -> Iterator[Callable[[str, Tensor], None]]:
    """Every call's inputs of these layers are checked while this lasts, with the function it yields."""
    import torch

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def check(what: str, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"the {what} is not finite at call {calls} of the network; the checkpoint or its precision is at "
                f"fault, so nothing is calibrated."
            )

    def checking(layer: str) -> Any:
        return lambda _, inputs: check(f"input of {layer}", inputs[0])

    handles = [part.register_forward_pre_hook(count) for part in root.children()]
    handles += [root.get_submodule(layer).register_forward_pre_hook(checking(layer)) for layer in layers]
    try:
        yield check
    finally:
        for handle in handles:
            handle.remove()


def _attended(
    root: nn.Module, names: Collection[str], operands: Mapping[str, Any], check: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """Query, key and value of these attentions are collected meanwhile."""

    def collect(name: str, *tensors: Any) -> None:
        for operand, x in zip(OPERANDS, tensors, strict=False):
            check(f"{operand} of {name}", x)
            operands[f"{name}.{operand}"].collect(x)

    return intercepted(root, names, collect)


def _keep(calibrators: Mapping[str, Any], done: int, state: Path) -> None:
    import torch

    part = state.with_name(f".{state.name}.part")
    torch.save({"done": done, "calibrators": {layer: vars(c) for layer, c in calibrators.items()}}, part)
    part.replace(state)


def _restored(calibrators: Mapping[str, Any], state: Path) -> int:
    """Samples that an earlier run did; its ranges are taken over."""
    import torch

    if not state.is_file():
        return 0
    record = torch.load(state, weights_only=True)
    for layer, calibrator in calibrators.items():
        vars(calibrator).update(record["calibrators"][layer])
    return int(record["done"])


@contextmanager
def _quietly() -> Iterator[None]:
    """Model Optimizer prints what it inserts, and which versions it was not tested with."""
    import warnings

    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
