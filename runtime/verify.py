"""Does a bundle's graph compute what the eager module computes? Run here, in ONNX Runtime."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.manifest import ComponentEntry, Manifest, check_files, read_manifest
from overcrank.errors import IntegrityError
from overcrank.export.weights import Parameter
from overcrank.models import components, family, variant_from_manifest
from overcrank.models.base import Component, Variant, VideoShape
from overcrank.runtime.ort import OrtSession
from overcrank.runtime.parameters import bound_parameters, parameters_of
from overcrank.runtime.session import run_each

if TYPE_CHECKING:
    from torch import nn

VOLUME = 320 * 320 * 17  # pixels × frames above which a shape is scaled down on CPU
FP32_BYTES_PER_PARAMETER = 4 * 1.7  # the module, and what ONNX Runtime needs beside it


@dataclass(frozen=True)
class Check:
    component: str
    shape: VideoShape
    note: str
    max_error: float
    relative_error: float  # of the largest reference value
    seconds: float


def verify_bundle(bundle: Path, weights: Path | None) -> Iterator[Check]:
    """Yield one Check per component and shape: profile minimum, optimum, and another one.

    16-bit graphs are widened to fp32. A network too large for this machine's RAM is
    replaced by the same export at the traced depth; `Check.note` says so. Raises
    IntegrityError if a file of the bundle does not match its manifest.
    """
    manifest = read_manifest(bundle)
    wrong = check_files(bundle, manifest)
    if wrong:
        raise IntegrityError(f"{bundle}: {'; '.join(wrong)}; rebuild it.")
    variant = variant_from_manifest(manifest)
    known = {c.name: c for c in components(variant, tuple(e.name for e in manifest.components))}
    for entry in manifest.components:
        yield from _checks(bundle, manifest, entry, variant, known[entry.name], weights)


def _checks(
    bundle: Path,
    manifest: Manifest,
    entry: ComponentEntry,
    variant: Variant,
    component: Component,
    weights: Path | None,
) -> Iterator[Check]:
    session, module, note = _session(bundle, manifest, entry, component, weights)
    for label, shape in verification_shapes(variant, manifest):
        yield compare(component, session, module, shape, f"{label}{note}")


def compare(component: Component, session: OrtSession, module: nn.Module, shape: VideoShape, note: str) -> Check:
    """One call of the stock module against one run of the graph, on seeded inputs."""
    import torch

    start = time.monotonic()
    sizes = {**component.free_axes, **component.sizes(shape)}
    if note.startswith("minimum"):
        sizes |= component.free_axes
    with torch.no_grad():
        call = component.sample(module, sizes, torch.Generator().manual_seed(0))
        own = copy.deepcopy(call)  # caches among the arguments are written to
        torch.manual_seed(1)
        expected = dict(_tensors((module(**call), _written(call))))
        torch.manual_seed(1)
        found = dict(
            _tensors(
                (component.returns(run_each(session, component, component.adapt(module, **own)), own), _written(own))
            )
        )
    worst = relative = 0.0
    for name, tensor in found.items():
        reference = expected.get(name)
        error = float("inf")
        if reference is not None and reference.shape == tensor.shape:
            error = float((tensor - reference).abs().max())
        error = error if math.isfinite(error) else float("inf")
        largest = 1.0 if reference is None else float(reference.abs().max())
        worst, relative = max(worst, error), max(relative, error / max(largest, 1e-12))
    if len(found) < len(component.outputs):
        worst = relative = float("inf")
    return Check(component.name, shape, note, worst, relative, time.monotonic() - start)


def _written(call: Mapping[str, Any]) -> list[Any]:
    """Arguments that a module may write to: the caches of streaming decoders."""
    return [v for v in call.values() if isinstance(v, list | dict)]


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every floating tensor in nested results and arguments, by its place."""
    import torch

    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point():
            yield path, tree
        return
    if hasattr(tree, "__dataclass_fields__") and not isinstance(tree, Mapping):
        tree = vars(tree)
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield from _tensors(value, f"{path}/{key}")


def verification_shapes(variant: Variant, manifest: Manifest) -> Iterator[tuple[str, VideoShape]]:
    """The profile's minimum, its optimum (scaled down if huge), and a third, odd one."""
    low, best, high = (VideoShape(**s.model_dump()) for s in (manifest.min, manifest.opt, manifest.max))
    yield "minimum", low
    steps = family(variant.family).grid(variant)
    scaled = _scaled(best, low, steps)
    yield ("optimum" if scaled == best else f"optimum {best} scaled down"), scaled
    other = {a: min(getattr(high, a), getattr(low, a) + n * steps[a][0]) for a, n in (("width", 1), ("frames", 2))}
    another = VideoShape(low.height, other["width"], other["frames"], low.batch)
    if another not in (low, scaled):
        yield "another", another


def _scaled(shape: VideoShape, low: VideoShape, steps: dict[str, tuple[int, int]]) -> VideoShape:
    axes = {a: getattr(shape, a) for a in steps}
    floor = {a: min(axes[a], max(getattr(low, a), step + offset)) for a, (step, offset) in steps.items()}
    while axes["height"] * axes["width"] * axes["frames"] > VOLUME:
        axis = max(axes, key=lambda a: axes[a] / floor[a])
        step, offset = steps[axis]
        smaller = max(floor[axis], (axes[axis] // 2 - offset) // step * step + offset)
        if smaller == axes[axis]:
            break
        axes[axis] = smaller
    return VideoShape(**axes, batch=shape.batch)


def _session(
    bundle: Path, manifest: Manifest, entry: ComponentEntry, component: Component, weights: Path | None
) -> tuple[OrtSession, nn.Module, str]:
    """The graph and the module to compare: the bundle's own, or both at the traced depth."""
    import onnx_ir as ir
    import psutil
    from overcrank.export.graph import onnx_from_component
    from overcrank.export.module import random_module

    parameters = parameters_of(entry)
    count = sum(_product(p.module_shape) for p in parameters)
    config, note = component.config, ""
    if component.repeats and count * FP32_BYTES_PER_PARAMETER > psutil.virtual_memory().available:
        depth = ", ".join(f"{r.traced} of {r.full} {r.path}" for r in component.repeats)
        component, config = component.at_depth(component.traced_config), component.traced_config
        exported = onnx_from_component(component, manifest.precision)
        model, parameters = exported.model, exported.parameters
        note = f"; {count / 1e9:.1f} B parameters do not fit in RAM here: same export with {depth}"
    else:
        model = ir.load(bundle / entry.graph.name)
    module = random_module(component, config, manifest.precision).float()  # its stored buffers are the graph's
    if weights is not None:
        _load(module, weights / component.subfolder, parameters)
    views = bound_parameters(module, component, parameters)
    return OrtSession(model, views), module, note


def _load(module: nn.Module, folder: Path, parameters: tuple[Parameter, ...]) -> None:
    import torch
    from overcrank.export.weights import checkpoint_values, weight_files

    values = checkpoint_values(weight_files(folder), parameters)
    named: dict[str, Any] = dict(module.named_parameters())
    with torch.no_grad():
        for p in parameters:
            named[p.input].copy_(values(p.name))


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def print_checks(checks: Iterator[Check], tolerance: float) -> bool:
    """Print each check as it ends; returns whether all are within `tolerance`."""
    import onnxruntime as ort
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"graph in ONNX Runtime {ort.__version__} (CPU, 16-bit types widened to fp32) against the eager module in fp32"
    )
    good = True
    for check in checks:
        passed = check.relative_error <= tolerance
        good &= passed
        console.print(
            f"{'ok  ' if passed else 'FAIL'} {check.component:<12} {check.shape!s:<12} "
            f"max error {check.max_error:.2e}, relative {check.relative_error:.2e}  "
            f"({check.note}; {check.seconds:.1f} s)"
        )
    console.print(f"{'all within' if good else 'not within'} the tolerance of {tolerance:g} relative")
    return good
