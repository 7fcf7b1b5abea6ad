"""Does a bundle's graph compute what the eager module computes? Run here, in ONNX Runtime."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.build import RECIPE
from overcrank.engines.manifest import ComponentEntry, Manifest
from overcrank.engines.refusals import CannotServe
from overcrank.engines.targets import BY_NAME, sixteen_bit
from overcrank.engines.trust import Keyring
from overcrank.errors import BackendError, IntegrityError, OvercrankError
from overcrank.export.quantization.attention import attentions
from overcrank.export.quantization.linear import linear_layers, quantize
from overcrank.export.quantization.recipe import ActivationRange, LayerFormat, read_recipe, unmeasured
from overcrank.export.quantization.reference import quantized_layers, ranges_of_call
from overcrank.export.weights import Parameter
from overcrank.models import components, family, variant_from_manifest
from overcrank.models.base import Call, Component, Variant, VideoShape
from overcrank.runtime.pipeline.naming import weights_of
from overcrank.runtime.sessions.graphs import bundled_graph
from overcrank.runtime.sessions.ort import OrtSession
from overcrank.runtime.sessions.parameters import bound_parameters, compute_of, packed_parameters, parameters_of
from overcrank.runtime.sessions.session import run_each

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

_NUMBER = re.compile(r"\b\d+\b")
VOLUME = 320 * 320 * 17  # pixels × frames above which a shape is scaled down on CPU
ROUNDING = {"fp8": 0.02, "int8": 0.02, "nvfp4": 0.1}
"""Of the largest value: what differs in fp32's last digits may round to the next quantized value, and those of fp4
are far apart."""
FP32_BYTES_PER_PARAMETER = 4 * 1.7  # the module, and what ONNX Runtime needs beside it


@dataclass(frozen=True)
class Check:
    component: str
    shape: VideoShape
    note: str
    max_error: float
    relative_error: float  # of the largest reference value
    seconds: float
    quantized: int = 0  # layers, which PyTorch multiplies in the same format
    allowed: float = 0.0  # relative error, for their rounding

    def within(self, tolerance: float) -> bool:
        return self.relative_error <= max(tolerance, self.allowed)


@dataclass(frozen=True)
class Weights:
    """Whose weights are compared: of the files of parts, else of a diffusers folder, else random ones."""

    checkpoint: Path | None = None
    words: Sequence[str] | Mapping[str, str | Path] = ()
    """[PART=]FILE."""
    comfy: Path | None = None
    """A ComfyUI folder, in whose models names of files are looked up."""


def verify_bundle(bundle: Path, weights: Weights | None = None) -> Iterator[Check]:
    """Yield one Check per component and shape: profile minimum, optimum, and another one.

    16-bit graphs are widened to fp32. A network too large for this machine's RAM is
    replaced by the same export at the traced depth; `Check.note` says so. Raises
    IntegrityError if a file of the bundle does not match its manifest, or its signature is not as it must be.
    """
    manifest = Keyring().whole(bundle)
    variant, networks = _described(manifest, bundle)
    source = _Source(weights or Weights(), variant)
    for entry in manifest.components:
        yield from _checks(bundle, manifest, entry, variant, networks[entry.name], source)


class _Source:
    """Values of parameters by component."""

    def __init__(self, weights: Weights, variant: Variant) -> None:
        self._folder = weights.checkpoint
        self._files = weights_of(variant, weights.words, weights.comfy) if weights.words else {}

    def fill(self, module: nn.Module, component: Component, parameters: tuple[Parameter, ...]) -> None:
        """Random ones stay where there are no others."""
        import torch
        from overcrank.export.expected import component_files
        from overcrank.export.weights import checkpoint_values

        own = [self._files[p] for p in (component.subfolder, *component.also_serves) if p in self._files]
        if own:
            from overcrank.runtime.pipeline.weights import file_values

            values = file_values(own[0], component)
        elif self._folder is not None:
            values = checkpoint_values(component_files(component, self._folder / component.subfolder), parameters)
        else:
            return
        named: dict[str, Any] = dict(module.named_parameters())
        with torch.no_grad():
            for p in parameters:
                named[p.input].copy_(values(p.name))


def _described(manifest: Manifest, bundle: Path) -> tuple[Variant, dict[str, Component]]:
    """What the manifest's configurations make; whatever they hold, what is raised is ours."""
    try:
        variant = variant_from_manifest(manifest)
        return variant, {c.name: c for c in components(variant, tuple(e.name for e in manifest.components))}
    except OvercrankError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise IntegrityError(
            f"{bundle.name}: its configurations make no network of {manifest.family} ({reason}); rebuild it."
        ) from error


def _checks(
    bundle: Path,
    manifest: Manifest,
    entry: ComponentEntry,
    variant: Variant,
    component: Component,
    source: _Source,
) -> Iterator[Check]:
    session, module, reference, note = _session(bundle, manifest, entry, component, source)
    with reference:
        for label, shape in verification_shapes(variant, manifest):
            check = compare(component, session, module, shape, f"{label}{note}")
            allowed = max((ROUNDING[form.format] for form in entry.formats.values()), default=0.0)
            yield replace(check, quantized=len(entry.formats), allowed=allowed)


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
        try:
            outputs = run_each(session, component, component.adapt(module, Call(own)))
        except CannotServe as refused:
            raise BackendError(
                f"{component.name} at {shape} cannot be compared here: {refused.why.reason}."
            ) from refused
        results = dict(_tensors((component.returns(outputs, own), _written(own))))
    worst = relative = 0.0
    for name, tensor in results.items():
        reference = expected.get(name)
        error = float("inf")
        if reference is not None and reference.shape == tensor.shape:
            error = float((tensor - reference).abs().max())
        error = error if math.isfinite(error) else float("inf")
        largest = 1.0 if reference is None else float(reference.abs().max())
        worst, relative = max(worst, error), max(relative, error / max(largest, 1e-12))
    if len(results) < len(component.outputs):
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
    bundle: Path, manifest: Manifest, entry: ComponentEntry, component: Component, source: _Source
) -> tuple[OrtSession, nn.Module, AbstractContextManager[None], str]:
    """The graph and the module to compare: the bundle's own, or both at the traced depth.

    Within the context, the module's layers multiply as the quantized ones of the graph.
    """
    import psutil
    from overcrank.export.graph import onnx_from_component
    from overcrank.export.module import random_module

    parameters, formats, compute = parameters_of(entry), entry.formats, compute_of(entry)
    short = sixteen_bit(BY_NAME[manifest.target], manifest.precision)
    count = sum(_product(p.module_shape) for p in parameters)
    count += sum(_product(p.shape) for p in entry.packed if p.role == "weight")
    whole, config, note = component, component.config, ""
    if component.repeats and count * FP32_BYTES_PER_PARAMETER > psutil.virtual_memory().available:
        depth = ", ".join(f"{r.traced} of {r.full} {r.path}" for r in component.repeats)
        component, config = component.at_depth(component.traced_config), component.traced_config
        exported = onnx_from_component(component, short)
        model, formats = exported.model, _alike(formats, exported.model)
        parameters, _ = quantize(model, exported.parameters, formats)
        note = f"; {count / 1e9:.1f} B parameters do not fit in RAM here: same export with {depth}"
    else:
        model = bundled_graph(bundle, entry.graph)
    module = random_module(component, config, short).float()  # its stored buffers are the graph's
    source.fill(module, whole, parameters)
    views = bound_parameters(module, component, parameters)
    ranges = _ranges(bundle, component, module, formats)
    views |= packed_parameters(module, formats, ranges, compute)
    return OrtSession(model, views), module, quantized_layers(module, formats, ranges, compute), note


def _alike(formats: Mapping[str, LayerFormat], shallow: ir.Model) -> dict[str, LayerFormat]:
    """Formats for a network of fewer blocks: of layers whose names differ in the block's number only."""
    kinds = {_NUMBER.sub("#", name): form for name, form in formats.items()}
    names = [layer.name for layer in linear_layers(shallow)] + [own.name for own in attentions(shallow)]
    return {name: kinds[kind] for name in names if (kind := _NUMBER.sub("#", name)) in kinds}


def _ranges(
    bundle: Path, component: Component, module: nn.Module, formats: Mapping[str, LayerFormat]
) -> Mapping[str, ActivationRange]:
    """The bundle's recipe's, if it has one for these layers, else those of one call."""
    import torch

    fixed = {name: form for name, form in formats.items() if form.activations == "static"}
    if (bundle / RECIPE).is_file():
        recipe = read_recipe(bundle / RECIPE).components.get(component.name)
        ranges = recipe.ranges.get(component.subfolder, {}) if recipe else {}
        if not any(unmeasured(name, form, ranges) for name, form in fixed.items()):
            return ranges
    if not fixed:
        return {}
    sizes = {**component.free_axes, **component.trace_sizes}
    with torch.no_grad():
        return ranges_of_call(module, fixed, component.sample(module, sizes, torch.Generator().manual_seed(2)))


def _product(shape: Iterable[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
