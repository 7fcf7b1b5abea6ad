"""Component → ONNX graph whose parameters are inputs; no weight is materialized."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overcrank.errors import ExportError, present
from overcrank.export import linear, operators
from overcrank.export.module import abstract_module, torch_dtype
from overcrank.export.passes import clean, deduplicate
from overcrank.export.repeat import NotAChain, repeat_chain
from overcrank.export.weights import Parameter
from overcrank.models.base import Component, Config, Repeat

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

OPSET = 23
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    model: ir.Model
    parameters: tuple[Parameter, ...]


def onnx_from_component(component: Component, precision: str, *, shortcut: bool = True) -> Exported:
    """Export at `precision` ("fp16", "bf16", "fp32"), inputs dynamic in their named axes.

    With `shortcut`, chains of identical blocks are traced three deep and repeated in the
    graph; the result has the nodes of the plain path, which `shortcut=False` takes.
    Raises ExportError naming the component and the stage.
    """
    if shortcut and component.repeats:
        try:
            model = _traced(component, component.traced_config, precision, component.repeats)
        except NotAChain as why:
            log.warning("%s: blocks are traced one by one, because %s", component.name, why)
            model = _traced(component, component.config, precision, ())
    else:
        model = _traced(component, component.config, precision, ())
    full = abstract_module(component, component.config, precision)
    return Exported(model, _parameter_table(component, model, full))


def _traced(component: Component, config: Config, precision: str, repeats: tuple[Repeat, ...]) -> ir.Model:
    module = abstract_module(component, config, precision)
    stage = "torch.export"
    try:
        program = _program(component, module, precision)
        stage = "ONNX conversion"
        model = _converted(program)
        _name_interface(model, component)
        stage = "graph cleaning"
        clean(model)
        stage = "block repetition"
        for repeat in repeats:
            repeat_chain(model, repeat)
        _drop_extra_outputs(model, component)
        deduplicate(model)
    except NotAChain:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise ExportError(f"{component.name}: {stage} failed: {' '.join(first)}") from error
    for owner in (model.graph, *model.graph):
        owner.metadata_props.clear()  # notes of torch.export, in no fixed order
    return model


def _program(component: Component, module: nn.Module, precision: str) -> Any:
    import torch

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: torch.Tensor) -> Any:
            return component.forward(self.module, *inputs)

    fixed = {"float32": torch.float32, "bool": torch.bool, "int64": torch.int64}
    mode = next(p for p in module.parameters()).fake_mode  # type: ignore[attr-defined]
    with mode:
        inputs = tuple(
            torch.empty(t.shape(component.trace_sizes), dtype=fixed.get(t.dtype, torch_dtype(precision)))
            for t in component.inputs
        )
    axes = _axes(component)
    dynamic = tuple({i: axes[d] for i, d in enumerate(t.dims) if isinstance(d, str)} for t in component.inputs)
    from torch.fx.experimental import _config

    with (
        _quiet(),
        torch.no_grad(),
        _config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=component.backed_size_oblivious
        ),
    ):
        return torch.export.export(Traced(), inputs, dynamic_shapes=(dynamic,), strict=False)


def _axes(component: Component) -> dict[str, Any]:
    from torch.export import Dim

    names = {d for t in component.inputs for d in t.dims if isinstance(d, str)}
    bounds = component.bounds
    roots = {n: Dim(n, **_range(bounds.get(n))) for n in names if n not in component.affine_axes}
    axes: dict[str, Any] = dict(roots)
    for name, (root, scale, offset) in component.affine_axes.items():
        base = roots.setdefault(root, Dim(root))
        axes[name] = base * scale + offset if offset else base * scale
    return axes


def _range(bounds: tuple[int, int | None] | None) -> dict[str, int]:
    low, high = bounds or (None, None)
    return {k: v for k, v in (("min", low), ("max", high)) if v is not None}


def _converted(program: Any) -> ir.Model:
    import torch

    with _quiet():
        out = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=operators.translations(),
        )
    model: ir.Model = present(out, "the exported program").model
    return model


def _name_interface(model: ir.Model, component: Component) -> None:
    """Inputs and outputs get their declared names; parameters become inputs."""
    import onnx_ir as ir

    graph = model.graph
    for value, spec in zip(list(graph.inputs), component.inputs, strict=True):
        value.name = spec.name
    for value, spec in zip(graph.outputs, component.outputs, strict=False):
        value.name = spec.name
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        if not value.uses() and not value.is_graph_output():
            continue
        tensor = value.const_value
        if name.startswith("module.") and _is_fake(tensor):
            value.const_value = None
            value.name = name.removeprefix("module.")
            view = value.metadata_props.pop(linear.SHAPE_KEY, None)
            if view:
                value.shape = ir.Shape([int(n) for n in view.split(",")])
            graph.inputs.append(value)
        else:
            graph.initializers[name] = value


def _drop_extra_outputs(model: ir.Model, component: Component) -> None:
    """Outputs beyond the declared ones only kept the last block whole until its chain was repeated."""
    import onnx_ir.passes.common as common

    graph = model.graph
    if len(graph.outputs) == len(component.outputs):
        return
    del graph.outputs[len(component.outputs) :]
    common.RemoveUnusedNodesPass()(model)
    declared = {t.name for t in component.inputs}
    for value in [v for v in graph.inputs if v.name not in declared and not v.uses()]:
        graph.inputs.remove(value)


def _is_fake(tensor: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(getattr(tensor, "raw", None), FakeTensor)


def _parameter_table(component: Component, model: ir.Model, full: nn.Module) -> tuple[Parameter, ...]:
    """Graph inputs that are parameters, checked one by one against the full-depth module."""
    parameters = dict(full.named_parameters())
    prefix = f"{component.attribute}." if component.attribute else ""
    declared = {t.name for t in component.inputs}
    table = []
    for value in model.graph.inputs:
        if value.name in declared:
            continue
        name = str(value.name)
        if name not in parameters:
            raise ExportError(f"{component.name}: graph input '{name}' is not a parameter of {component.cls}.")
        parameter = parameters.pop(name)
        shape = tuple(int(str(n)) for n in value.shape or ())
        if tuple(n for n in shape if n != 1) != tuple(n for n in parameter.shape if n != 1):
            raise ExportError(f"{component.name}: parameter '{name}' is {shape}, expected {tuple(parameter.shape)}.")
        dtype = str(parameter.dtype).removeprefix("torch.")
        table.append(Parameter(name, prefix + name, dtype, shape, tuple(parameter.shape)))
    if parameters:
        log.info("%s: %d parameters are not read by the graph", component.name, len(parameters))
    return tuple(table)


@contextlib.contextmanager
def _quiet() -> Any:
    """torch's exporter prints notes about torchvision and pytrees that mean nothing here."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
