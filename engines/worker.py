"""One component of one bundle, built in a worker process: graph, engine, and what is known of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.engines.compile import engine_from_graph
from overcrank.engines.manifest import ComponentEntry, EngineKey, PackedEntry, ParameterEntry, TensorEntry, file_entry
from overcrank.engines.plan import PlanCounts, PlanReport, read_plan
from overcrank.engines.profiles import Profile, ShapeRange
from overcrank.engines.store import Store
from overcrank.engines.targets import Target
from overcrank.errors import CompileError
from overcrank.export.cache import cached_graph, load_cached
from overcrank.export.module import DTYPES
from overcrank.export.quantization.formats import Packed
from overcrank.export.quantization.linear import layout_in, quantize
from overcrank.export.quantization.lora import NO_LORA_INPUTS, LoraInputs
from overcrank.export.quantization.lora_inputs import add_lora_inputs, layers_with_lora
from overcrank.export.quantization.pack import Part, embed_pack
from overcrank.export.quantization.recipe import ATTENTION, SIXTEEN, ComponentRecipe, LayerFormat
from overcrank.export.weights import Parameter
from overcrank.files import atomic_write, write_errors
from overcrank.models import components, family
from overcrank.models.base import Component, TensorSpec, Variant
from overcrank.models.network import network
from overcrank.options import option

Report = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class BuildJob:
    """All that one component of one bundle is made from."""

    variant: Variant
    key: EngineKey
    compute: str  # type of the exported graph: "fp16", "bf16" or "fp32"
    precision: str  # of the bundle
    recipe: ComponentRecipe
    target: Target
    profile: Profile
    flavour: str
    weights: tuple[Path, ...]  # safetensors files to embed; empty: weights are inputs
    staging: Path
    store: Store
    allow_fallback: bool = False
    lora: LoraInputs = NO_LORA_INPUTS
    title: str = ""  # for people

    def make_component(self) -> Component:
        """Made in the worker: its functions cannot be pickled into one, as the variant and the name can."""
        return components(self.variant, (self.key.component,))[0]

    @property
    def graph_folder(self) -> Path:
        return self.store.graphs / self.key.graph[:16]

    @property
    def done(self) -> Path:
        return self.staging / f"{self.key.component}.json"


def finished(job: BuildJob) -> ComponentEntry | None:
    """The component left complete by an earlier run, if its files are still what it says."""
    if not job.done.is_file():
        return None
    entry = ComponentEntry.model_validate_json(job.done.read_text("utf-8"))
    files = (entry.engine, entry.graph)
    whole = all((job.staging / f.name).is_file() and file_entry(job.staging / f.name) == f for f in files)
    return entry if whole and entry.key == job.key else None


def has_graph(job: BuildJob) -> bool:
    return load_cached(job.graph_folder) is not None


def export_component(job: BuildJob, report: Report) -> None:
    """Put the component's graph into the store's cache; needs torch, and no TensorRT."""
    report("exporting")
    with job.store.lock(f"graph-{job.graph_folder.name}"), write_errors(job.store.graphs):
        cached_graph(job.make_component(), job.compute, job.graph_folder)
    report("exported")


@dataclass(frozen=True)
class _Graph:
    """The graph as it goes into the bundle, and who fills its inputs."""

    component: Component
    ranges: dict[str, ShapeRange]
    onnx: Path
    seconds: float  # of its export
    parameters: tuple[Parameter, ...]
    packed: tuple[Packed, ...]
    layout: dict[str, LayerFormat]
    replaced: dict[str, Parameter]  # quantized layer → its weight in the checkpoint
    loras: tuple[Packed, ...]


def compile_component(job: BuildJob, report: Report) -> None:
    """Compile the cached graph, read the plan, and leave it all in `job.staging`; needs no torch.

    Raises CompileError when the plan multiplies in 16 bit what the recipe quantizes.
    """
    graph = _staged_graph(job)
    component = graph.component
    start = time.monotonic()
    with _with_weights(job, graph) as source:
        compiled = engine_from_graph(
            source,
            job.target,
            graph.ranges,
            flavour=job.flavour,
            progress=lambda phase: report(f"compiling · {phase}"),
        )
    seconds = time.monotonic() - start
    plan = read_plan(bytes(memoryview(compiled.plan)), [] if job.weights else _parameter_names(graph))
    fallen = fallen_back(graph.layout, plan)
    if fallen and not job.allow_fallback:
        raise CompileError(
            f"{component.name} for {job.target.name}: {len(fallen)} of {len(graph.layout)} quantized layers would run "
            f"in 16 bit, {fallen[0]} among them; keep them in 16 bit in the recipe, or build with "
            f"{option('allow_fallback', True)}."
        )
    report("writing")
    engine = job.staging / f"{component.name}.engine"
    with atomic_write(engine) as part:
        part.write_bytes(memoryview(compiled.plan))
    entry = _entry(job, graph, engine, compiled.activation_bytes, seconds, plan.counts())
    with atomic_write(job.done) as part:
        part.write_text(entry.model_dump_json(), "utf-8")
    report("done")


def fallen_back(layout: Mapping[str, LayerFormat], plan: PlanReport) -> list[str]:
    """Layers that the plan does not multiply in their format; none is claimed of a plan that cannot be read."""
    if not plan.known:
        return []
    formats = {n: (f, n in plan.dequantized) for n, f in plan.formats.items()}
    return [
        n
        for n, form in layout.items()
        if (form.kind == ATTENTION and plan.attended.get(n) != form.format)
        or (form.kind != ATTENTION and formats.get(n) != (form.format, form.activations == SIXTEEN))
    ]


def _staged_graph(job: BuildJob) -> _Graph:
    """The exported graph, quantized as the recipe says, in the staging folder."""
    import onnx_ir as ir
    from overcrank.export.passes import products_in_fp16

    cached = load_cached(job.graph_folder)
    if cached is None:
        raise CompileError(f"{job.graph_folder} vanished during the build; run the same command again.")
    component = job.make_component()
    ranges = job.profile.ranges(component)
    onnx = job.staging / f"{job.key.component}.onnx"
    parameters, layout = cached.parameters, dict[str, LayerFormat]()
    packed: tuple[Packed, ...] = ()
    model = ir.load(cached.onnx)
    if not job.target.fp32_products:
        products_in_fp16(model)
    if job.recipe.rules:
        layout = layout_in(model, job.recipe, ranges)
    lora = lora_inputs_of(job.variant, component, job.lora)
    loras = add_lora_inputs(model, lora.rank, layers_with_lora(model, lora, layout))
    if job.recipe.rules:
        parameters, packed = quantize(model, cached.parameters, layout)
    with atomic_write(onnx) as part:
        ir.save(model, part)
    weights = {p.input.removesuffix(".weight"): p for p in cached.parameters}
    replaced = {layer: weights[layer] for layer in layout if layer in weights}
    return _Graph(component, ranges, onnx, cached.seconds, parameters, packed, layout, replaced, loras)


def lora_inputs_of(variant: Variant, component: Component, lora: LoraInputs) -> LoraInputs:
    """As asked for, of the denoiser; LoRAs are for no other component."""
    own = not component.attribute and component.cls in family(variant.family).denoiser_classes
    return lora if own else NO_LORA_INPUTS


def _part(job: BuildJob, graph: _Graph, read: Callable[[str], Any]) -> Part:
    """The quantized layers, for a pack of their tensors."""
    component = graph.component
    return Part(
        name=component.subfolder,
        component=component.name,
        layout=job.key.recipe,
        compute=DTYPES[job.compute],
        formats=graph.layout,
        packed=graph.packed,
        ranges=job.recipe.ranges.get(component.subfolder, {}),
        read=read,
    )


def _parameter_names(graph: _Graph) -> list[str]:
    return [p.input for p in graph.parameters] + [p.input for p in (*graph.packed, *graph.loras)]


@contextmanager
def _with_weights(job: BuildJob, graph: _Graph) -> Iterator[Path]:
    """The graph to compile: as it is, or a temporary copy that carries the checkpoint's values."""
    if not job.weights:
        yield graph.onnx
        return
    import onnx_ir as ir
    from overcrank.export.weights import checkpoint_values, embed

    model = ir.load(graph.onnx)
    values = checkpoint_values(job.weights, (*graph.parameters, *graph.replaced.values()))
    embed(model, graph.parameters, values)
    embed_pack(model, _part(job, graph, lambda layer: values(graph.replaced[layer].name)))
    onnx = job.staging / f".{job.key.component}.embedded.onnx"
    data = onnx.with_suffix(".weights")
    with write_errors(onnx):
        try:
            ir.save(model, onnx, external_data=data.name)
            yield onnx
        finally:
            onnx.unlink(missing_ok=True)
            data.unlink(missing_ok=True)


def _entry(
    job: BuildJob, graph: _Graph, engine: Path, activation: int | None, seconds: float, plan: PlanCounts | None
) -> ComponentEntry:
    component, ranges = graph.component, graph.ranges
    dtypes = {"compute": job.compute}

    def tensors(specs: tuple[TensorSpec, ...]) -> list[TensorEntry]:
        return [
            TensorEntry(
                name=t.name,
                dtype=dtypes.get(t.dtype, t.dtype),
                dims=list(t.dims),
                **dict(zip(("min", "opt", "max"), map(list, ranges.get(t.name, ())), strict=False)),
            )
            for t in specs
        ]

    return ComponentEntry(
        name=component.name,
        cls=component.cls,
        subfolder=component.subfolder,
        attribute=component.attribute,
        config=network(component),
        compute=job.compute,
        key=job.key,
        engine=file_entry(engine),
        graph=file_entry(graph.onnx),
        inputs=tensors(component.inputs),
        outputs=tensors(component.outputs),
        parameters=[
            ParameterEntry(
                input=p.input, parameter=p.name, dtype=p.dtype, shape=list(p.module_shape), view=list(p.shape)
            )
            for p in graph.parameters
        ],
        activation_bytes=activation,
        export_seconds=round(graph.seconds, 2),
        compile_seconds=round(seconds, 2),
        plan=plan,
        packed=list(map(_packed_entry, graph.packed)),
        formats=graph.layout,
        loras=list(map(_packed_entry, graph.loras)),
    )


def _packed_entry(packed: Packed) -> PackedEntry:
    return PackedEntry(
        input=packed.input, layer=packed.layer, role=packed.role, dtype=packed.dtype, shape=list(packed.shape)
    )
