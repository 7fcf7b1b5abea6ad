"""Put engines under a diffusers pipeline: `overcrank.accelerate(pipe)`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.calibration.pack import read_pack
from overcrank.calibration.recipe import IN_16_BIT, LayerFormat, Range, Recipe, read_recipe, recipe_of
from overcrank.engines.build import RECIPE
from overcrank.engines.cards import Card
from overcrank.engines.store import Store
from overcrank.errors import StoreError, UserError
from overcrank.models import components, family, main_part, variant_from_configs
from overcrank.models.base import Component, Variant
from overcrank.runtime.bundles import Bundle, bundle_of, fitting_bundles, rebuild_command
from overcrank.runtime.card import card_of
from overcrank.runtime.measured import require_not_slower
from overcrank.runtime.module import EngineModule, Slot
from overcrank.runtime.pack import kept_pack
from overcrank.runtime.parameters import bound_parameters, compute_of, own_parameters, packed_parameters, parameters_of
from overcrank.runtime.session import EAGER, CannotServe, Ledger, Session
from overcrank.runtime.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("overcrank")
BACKENDS = ("auto", "tensorrt", "onnxruntime", EAGER)


@dataclass(frozen=True)
class Quantization:
    """Engines of quantized layers: as a recipe says, or all that bear it alike."""

    layers: LayerFormat
    recipe: Recipe | None = None
    pack: Path | None = None  # of the checkpoint; without one, packed when a session is made
    source: str = ""  # digest of the weights the pipeline has, by which what is packed is kept

    @property
    def precision(self) -> str:
        return self.layers.format


@dataclass
class Acceleration:
    """What `accelerate` did to a pipeline; kept as `pipe.overcrank`."""

    variant: Variant
    backend: str
    ledger: Ledger
    modules: list[EngineModule]
    bundles: dict[str, str] = field(default_factory=dict)  # component → name of the bundle whose engine runs it
    source: str = ""  # folder or hub id of the checkpoint
    quantization: Quantization | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)  # merged into the weights
    moved: tuple[str, ...] = ()  # parts of the pipeline that are on the card only while they run
    workspace: Workspace = field(default_factory=Workspace)

    def settings(self) -> dict[str, Any]:
        """What decides the frames beside model and request, of what is not the usual."""
        found: dict[str, Any] = {"loras": self.loras} if self.loras else {}
        if self.quantization is not None:
            recipe = self.quantization.recipe
            found |= {"layers": list(self.quantization.layers), "recipe": recipe.digest() if recipe else ""}
        return found

    def settle(self) -> None:
        """Keep on disk what sessions have compiled; a disk that is full costs later renders time, not this one."""
        for slot in (s for module in self.modules for s in module.slots if s.session is not None):
            try:
                slot.session.settle()  # type: ignore[union-attr]
            except StoreError as error:
                log.warning("the kernels compiled for %s are not kept: %s", slot.component.name, error)

    def preload(self, pictures: bool) -> None:
        """Load the engines a render calls, while its text is encoded; `pictures`: those that encode them too.

        Why one cannot be loaded is said when it is called.
        """
        for module in self.modules:
            slot = module.slots[0]
            if pictures or not slot.component.name.endswith("_encoder"):
                with suppress(CannotServe):
                    slot.opened()

    def remove(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:
            module.remove()
        self.modules.clear()


def accelerate(
    pipe: Any,
    bundle: str | Path | None = None,
    *,
    backend: str = "auto",
    store: Path | None = None,
    model: str = "",
    quantization: Quantization | None = None,
    slow_engines: bool = False,
) -> Any:
    """Let engines serve the calls of a diffusers pipeline's denoiser and VAE; returns the pipeline.

    `bundle` is a bundle's path or name [default: the newest in the store for this network
    and card]. `backend`: "auto" uses TensorRT and falls back to eager PyTorch with one
    warning for each reason, "tensorrt" raises BackendError in place of falling back,
    "onnxruntime" runs the graphs in ONNX Runtime in fp32, "eager" uses no engine. `model` is the
    name that rebuild commands show. `quantization`: the engines asked for, and the ranges of
    their layers [default: engines in the pipeline's own 16-bit type]. `slow_engines`: also those
    that were measured to be slower than eager PyTorch on this card.

    Raises UserError for an unknown backend or bundle, ModelError for a pipeline of no known family.
    """
    if backend not in BACKENDS:
        raise UserError(f"Unknown backend '{backend}': use {', '.join(BACKENDS)}.")
    earlier = getattr(pipe, "overcrank", None)
    if earlier is not None:
        earlier.remove()
    variant = _variant_of(pipe, model)
    ledger = Ledger(strict=backend == "tensorrt")
    found = Acceleration(variant, backend, ledger, [], quantization=quantization)
    where = Store(store)
    if backend == "onnxruntime":
        found.modules = _install(pipe, variant, ledger, lambda c, p, m: ort_session(c, p, m, where, quantization))
    elif backend != EAGER:
        _with_engines(pipe, found, where, bundle, slow_engines)
    found.source = str(pipe.config.get("_name_or_path", ""))
    pipe.overcrank = found
    return pipe


def _variant_of(pipe: Any, model: str) -> Variant:
    kind = type(pipe).__name__
    denoiser = main_module(pipe)
    if denoiser is None:
        raise UserError(f"{kind} has no transformer or unet; overcrank accelerates video diffusion pipelines.")
    every: dict[str, Any] = {name: getattr(module, "config", None) for name, module in pipe.components.items()}
    read = {n: c.to_dict() if hasattr(c, "to_dict") else c for n, c in every.items()}
    configs = {name: dict(config) for name, config in read.items() if isinstance(config, Mapping)}
    return variant_from_configs(model or kind, type(denoiser).__name__, configs, kind)


def main_module(pipe: Any) -> Any:
    """The pipeline's denoiser, or what stands in its place; None if it has none."""
    part = main_part({name: type(module).__name__ for name, module in pipe.components.items() if module is not None})
    return getattr(pipe, part) if part else None


def denoisers(pipe: Any, variant: Variant) -> list[tuple[nn.Module, str]]:
    """Modules that steps call, with the component's name: the pipeline's main part and its twins."""
    main = main_module(pipe)
    serving = [c for c in components(variant) if not c.attribute and getattr(pipe, c.subfolder, None) is main]
    parts = dict.fromkeys(part for c in serving for part in (c.subfolder, *c.twins))
    return [(m, serving[0].name) for part in parts if (m := getattr(pipe, part, None)) is not None]


@dataclass
class _Engines:
    """Makes sessions of engines, with what is the same for all of them."""

    found: Acceleration
    store: Store
    fitting: Sequence[Bundle]
    card: Card
    rebuild: str
    slow: bool  # engines that were measured to be slower than eager are used too

    def session(self, component: Component, part: str, module: nn.Module) -> Session:
        from overcrank.runtime.trt import TrtSession

        path, manifest = bundle_of(component.name, self.fitting, self.rebuild)
        entry = manifest.component(component.name)
        if not self.slow:
            require_not_slower(self.store, self.card.name, self.card.driver, entry.key.digest())
        self.found.bundles[component.name] = path.name
        quantization = self.found.quantization
        recipe = quantization.recipe if quantization else None
        if recipe is None and manifest.recipe is not None:
            recipe = read_recipe(path / RECIPE)
        ranges = recipe_of(recipe, component, IN_16_BIT).ranges.get(part, {})
        formats, layout = entry.formats, entry.key.recipe
        packs = _packs(quantization, component, part, module, formats, ranges, layout, compute_of(entry), self.store)
        parameters: dict[str, Any] = {**own_parameters(module, component, parameters_of(entry)), **packs}
        workspace = self.found.workspace
        return TrtSession(manifest, path, entry, parameters, workspace, self.rebuild, self.store, self.card)


def _with_engines(pipe: Any, found: Acceleration, store: Store, bundle: str | Path | None, slow: bool) -> None:
    variant, ledger, quantization = found.variant, found.ledger, found.quantization
    try:
        card = _card(pipe)
        candidates = [store.resolve(str(bundle))] if bundle else [p for p, _ in store.list()]
        precision = quantization.precision if quantization else _precision(pipe)
        fitting = fitting_bundles(candidates, variant, card.target, precision)
    except CannotServe as error:
        names = [c.name for c in components(variant)]
        ledger.fall_back(names, error.reason, error.fix, standing=True)
        return
    engines = _Engines(found, store, fitting, card, rebuild_command(variant, card.target), slow)
    found.modules = _install(pipe, variant, ledger, engines.session)


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline computes, also when its parts come and go."""
    device: torch.device = pipe._execution_device
    return device


def _card(pipe: Any) -> Card:
    """The card the pipeline computes on; raises CannotServe for none."""
    import torch

    device = device_of(pipe)
    if device.type != "cuda":
        there = " (one is here: pipe.to('cuda'))" if torch.cuda.is_available() else ""
        raise CannotServe(f"the pipeline is on {device.type}, not on an NVIDIA GPU{there}", "render on one")
    return card_of(device)


def _precision(pipe: Any) -> str:
    """Precision name of the denoiser's dtype."""
    dtype = str(main_module(pipe).dtype)
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(dtype, dtype.removeprefix("torch."))


def _install(
    pipe: Any, variant: Variant, ledger: Ledger, session: Callable[[Component, str, nn.Module], Session]
) -> list[EngineModule]:
    """One EngineModule for each module that some component describes."""
    grouped: dict[tuple[str, str], list[Component]] = defaultdict(list)
    for component in family(variant.family).components(variant):
        for part in (component.subfolder, *component.twins):
            grouped[part, component.attribute].append(component)
    installed = []
    for (part, attribute), serving in grouped.items():
        owner = getattr(pipe, part, None)
        if owner is None:  # such as the second expert of a model that has one
            continue
        module = getattr(owner, attribute) if attribute else owner

        def maker(component: Component, part: str = part, module: nn.Module = module) -> Callable[[], Session]:
            return lambda: session(component, part, module)

        installed.append(EngineModule(module, [Slot(c, maker(c)) for c in serving], ledger))
    return installed


def _packs(
    quantization: Quantization | None,
    component: Component,
    part: str,
    module: nn.Module,
    formats: Mapping[str, LayerFormat],
    ranges: Mapping[str, Range],
    layout: str,
    compute: str,
    store: Store,
) -> Mapping[str, Tensor]:
    """Tensors of the quantized layers: from the pack that was given, else made of the module's weights.

    Those of weights that are known are kept in the store.
    """
    if not formats:
        return {}
    device = next(module.parameters()).device
    if quantization is None or quantization.pack is None:
        make = partial(packed_parameters, module, formats, ranges, compute)
        if quantization is None or not quantization.source:
            return make()
        described = {name: seen.model_dump() for name, seen in ranges.items()}
        dtype = str(next(module.parameters()).dtype)  # a checkpoint read in 16 bit has other values
        identity = [quantization.source, dtype, part, layout, sorted(formats.items()), described, compute]
        return kept_pack(identity, store, make, device)
    read = read_pack(quantization.pack, part, component.name, layout, compute)
    return {name: tensor.to(device) for name, tensor in read.items() if name.rpartition(".")[0] in formats}


def ort_session(
    component: Component, part: str, module: nn.Module, store: Store, quantization: Quantization | None
) -> Session:
    """The component's graph from the store's cache, exported into it the first time, quantized as asked."""
    import onnx_ir as ir
    from overcrank.calibration.quantize import layout_in, quantized
    from overcrank.runtime.ort import OrtSession

    graph = store.graph(component, "bf16")
    model, parameters = ir.load(graph.onnx), graph.parameters
    packs: Mapping[str, Tensor] = {}
    if quantization is not None:
        recipe = recipe_of(quantization.recipe, component, quantization.layers)
        layout = layout_in(model, recipe)
        parameters, _ = quantized(model, parameters, layout)
        ranges = recipe.ranges.get(part, {})
        packs = _packs(quantization, component, part, module, layout, ranges, recipe.digest(), "bfloat16", store)
    views = bound_parameters(module, component, parameters)
    device = next(module.parameters()).device.type
    return OrtSession(model, {**views, **packs}, device)
