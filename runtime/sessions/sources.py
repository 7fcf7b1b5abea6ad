"""Where sessions come from: the engine of a bundle, the graph of a bundle, the graph in the store's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.engines.build import RECIPE
from overcrank.engines.cards import Card
from overcrank.engines.graph_refusals import GraphRefused
from overcrank.engines.manifest import BundledEngine, read_manifest
from overcrank.engines.measurements import require_not_slower
from overcrank.engines.refusals import CannotServe, OtherOnProcessor
from overcrank.engines.store import Store
from overcrank.errors import IntegrityError, UserError
from overcrank.export.module import DTYPES
from overcrank.export.packaged import PRECISION, packaged_graph
from overcrank.export.quantization.lora import rank_for
from overcrank.export.quantization.pack import read_pack
from overcrank.export.quantization.recipe import (
    IN_16_BIT,
    QUANTIZED,
    ActivationRange,
    LayerFormat,
    Recipe,
    read_recipe,
    recipe_of,
)
from overcrank.models.base import Component, Variant
from overcrank.options import option
from overcrank.runtime.sessions.fingerprint import sample_of
from overcrank.runtime.sessions.lora_layer import BoundLoras, held_ranks, lora_layers
from overcrank.runtime.sessions.packs import kept_pack
from overcrank.runtime.sessions.parameters import (
    bound_parameters,
    compute_of,
    declared,
    live_weights,
    own_parameters,
    packed_parameters,
    parameters_of,
    require_packed,
)
from overcrank.runtime.sessions.select import Bundle, cheapest_first, compute_type, engine_of, require_same_network
from overcrank.runtime.sessions.session import Session
from overcrank.runtime.sessions.stored_report import report_stored
from overcrank.runtime.sessions.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Quantization:
    """Engines of quantized layers: as a recipe says, or all that bear it alike."""

    layers: LayerFormat
    recipe: Recipe | None = None
    pack: Path | None = None  # of the checkpoint; without one, packed when a session is made
    source: str = ""  # digest of the weights the pipeline was loaded with, by which what is packed is kept
    samples: Mapping[str, object] = field(default_factory=dict)  # part → some values of those weights
    layout: tuple[str, ...] = ()  # PART=FILE of the files whose layers are multiplied as they have them

    @property
    def precision(self) -> str:
        return self.layers.format


@dataclass
class OfBundles:
    """What sessions of bundles have in common."""

    quantization: Quantization | None
    store: Store
    fitting: Sequence[Bundle]
    bundles: dict[str, str] = field(default_factory=dict)  # component → name of the bundle that runs it

    def ranked(self, component: Component) -> Sequence[Bundle]:
        """Those first whose engine multiplies the component's layers as the pipeline's files have them."""
        fitting = cheapest_first(component, self.fitting)
        if self.quantization is None or not self.quantization.layout:
            return fitting
        own = recipe_of(self.quantization.recipe, component, IN_16_BIT).digest()

        def differs(bundle: Bundle) -> bool:
            return all(e.key.recipe != own for e in bundle[1].components if e.name == component.name)

        return sorted(fitting, key=differs)

    def packs(self, bundled: BundledEngine, component: Component, part: str, module: nn.Module) -> Mapping[str, Tensor]:
        """Tensors of its quantized layers, of the module's weights, with the bundle's ranges if none were given."""
        entry = bundled.entry
        recipe = self.quantization.recipe if self.quantization else None
        if recipe is None and bundled.manifest.recipe is not None:
            recipe = read_recipe(bundled.folder / RECIPE)
        ranges = recipe_of(recipe, component, IN_16_BIT).ranges.get(part, {})
        layers = QuantizedLayers(component.name, part, entry.formats, ranges, entry.key.recipe, compute_of(entry))
        packs = declared(entry, _packs(self.quantization, layers, module, self.store))
        require_packed(entry, packs)
        return packs


@dataclass
class Engines(OfBundles):
    """TensorRT on this card."""

    card: Card = field(kw_only=True)
    workspace: Workspace = field(kw_only=True)
    slow: bool = False  # engines that were measured to be slower than eager are used too

    def session(self, component: Component, part: str, module: nn.Module) -> Session:
        from overcrank.runtime.sessions.trt import TrtSession

        bundled = engine_of(component, self.ranked(component), compute_type(module), held_ranks(module))
        entry = bundled.entry
        if not self.slow:
            require_not_slower(self.store, self.card.name, self.card.driver, entry.key.digest())
        packs = {**self.packs(bundled, component, part, module), **live_weights(module, entry.formats)}
        loras = _loras(bundled, module)
        parameters = {**own_parameters(module, component, parameters_of(entry)), **packs, **loras()}
        session = TrtSession(bundled, parameters, self.workspace, self.store, self.card)
        session.loras = loras
        self.bundles[component.name] = bundled.folder.name
        return session


class BundledGraphs(OfBundles):
    """The graphs that a bundle's engines were compiled from, in ONNX Runtime."""

    def session(self, component: Component, part: str, module: nn.Module) -> Session:
        from overcrank.runtime.sessions.graphs import bundled_graph
        from overcrank.runtime.sessions.ort import OrtSession

        bundled = engine_of(component, self.ranked(component), loras=held_ranks(module))
        views = bound_parameters(module, component, parameters_of(bundled.entry))
        packs, loras = self.packs(bundled, component, part, module), _loras(bundled, module)
        device = next(module.parameters()).device.type
        try:
            graph = bundled_graph(bundled.folder, bundled.entry.graph)
        except IntegrityError as error:
            problem = str(error).rstrip(".").partition("; ")[0]
            raise CannotServe(GraphRefused(bundled.folder.name, problem)) from error
        session = OrtSession(graph, {**views, **packs, **loras()}, device)
        session.loras = loras
        self.bundles[component.name] = bundled.folder.name
        return session


@dataclass
class GraphsHere(BundledGraphs):
    """The graphs in this package and in bundles, in ONNX Runtime: what there is without a card."""

    packaged: bool = True

    def session(self, component: Component, part: str, module: nn.Module) -> Session:
        own = compute_type(module)
        if own != PRECISION:
            raise CannotServe(OtherOnProcessor(PRECISION, own))
        if self.packaged and packaged_graph(component) is not None:
            return graph_session(component, part, module, self.store, None)
        return super().session(component, part, module)


def require_renderable(path: Path, variant: Variant, quantization: Quantization | None) -> Bundle:
    """A bundle that is named to be run in ONNX Runtime, whatever card it is for.

    Raises UserError when it is of another network or precision, or has its weights embedded.
    """
    manifest = read_manifest(path)
    require_same_network(variant, manifest, path.name)
    if manifest.weights != "inputs":
        raise UserError(
            f"{option('bundle', path.name)} has weights of its own; its graphs are not run in ONNX Runtime."
        )
    precision = quantization.precision if quantization else ""
    own = manifest.precision if manifest.precision in QUANTIZED else ""
    if precision != own:
        fix = f"add {option('precision', own)}" if own else f"leave {option('precision')} out"
        raise UserError(f"{option('bundle', path.name)} is in {manifest.precision}; {fix}, or name another bundle.")
    return path, manifest


def graph_session(
    component: Component, part: str, module: nn.Module, store: Store, quantization: Quantization | None
) -> Session:
    """The component's graph, quantized as asked, from this package, else from the store's cache.

    It is exported into the cache the first time.

    It is of the module's own type, as its constants are; quantized layers compute in bf16.
    """
    import onnx_ir as ir
    from overcrank.export.quantization.linear import layout_in, quantize
    from overcrank.export.quantization.lora_inputs import add_lora_inputs
    from overcrank.runtime.sessions.ort import OrtSession

    own = compute_type(module)
    precision = own if quantization is None and own in ("fp16", "fp32") else "bf16"
    graph = (packaged_graph(component) if precision == PRECISION else None) or store.graph(component, precision)
    model, parameters = ir.load(graph.onnx), graph.parameters
    packs: Mapping[str, Tensor] = {}
    if quantization is None:
        report_stored(part, module, {}, "")
    ranks = held_ranks(module)
    beside = lora_layers(module) if ranks else {}
    recipe = recipe_of(quantization.recipe, component, quantization.layers) if quantization else None
    layout = layout_in(model, recipe) if recipe else {}
    inputs = add_lora_inputs(model, rank_for(max(ranks.values(), default=0)), beside)
    if quantization is not None and recipe is not None:
        parameters, _ = quantize(model, parameters, layout)
        ranges = recipe.ranges.get(part, {})
        layers = QuantizedLayers(component.name, part, layout, ranges, recipe.digest(), "bfloat16")
        packs = _packs(quantization, layers, module, store)
    loras = BoundLoras(component.name, precision, inputs, module)
    parameters_here = {**bound_parameters(module, component, parameters), **packs, **loras()}
    session = OrtSession(model, parameters_here, next(module.parameters()).device.type)
    session.loras = loras
    return session


def _loras(bundled: BundledEngine, module: nn.Module) -> BoundLoras:
    """What is bound of the LoRAs beside the module's weights."""
    import torch

    entry = bundled.entry
    return BoundLoras(
        entry.name, bundled.manifest.precision, entry.loras, module, getattr(torch, DTYPES[entry.compute])
    )


@dataclass(frozen=True)
class QuantizedLayers:
    """Those of a component in a part of the pipeline, and what their packed tensors are made by."""

    component: str
    part: str
    formats: Mapping[str, LayerFormat]
    ranges: Mapping[str, ActivationRange]
    recipe: str  # digest
    compute: str  # torch's name of the factors' type


def _packs(
    quantization: Quantization | None, layers: QuantizedLayers, module: nn.Module, store: Store
) -> Mapping[str, Tensor]:
    """Tensors of the quantized layers: from the pack that was given, else made of the module's weights.

    Those of weights that are known are kept in the store.
    """
    formats, ranges, compute = layers.formats, layers.ranges, layers.compute
    report_stored(layers.part, module, formats, compute)
    if not formats:
        return {}
    device = next(module.parameters()).device
    if quantization is None or quantization.pack is None:
        make = partial(packed_parameters, module, formats, ranges, compute)
        if quantization is None or not quantization.source or not _as_loaded(quantization, layers.part, module):
            return make()
        described = {name: each.model_dump() for name, each in ranges.items()}
        dtype = str(next(module.parameters()).dtype)  # a checkpoint read in 16 bit has other values
        identity = [quantization.source, dtype, layers.part, layers.recipe, sorted(formats.items()), described, compute]
        return kept_pack(identity, store, make, device)
    tensors = read_pack(quantization.pack, layers.part, layers.component, layers.recipe, compute)
    return {name: tensor.to(device) for name, tensor in tensors.items() if name.rpartition(".")[0] in formats}


def _as_loaded(quantization: Quantization, part: str, module: nn.Module) -> bool:
    """Whether the weights are those of `source`: LoRAs may have been fused since."""
    before = quantization.samples.get(part)
    return before is None or before == sample_of(list(module.parameters()))
