"""Put engines under a diffusers pipeline: `overcrank.accelerate(pipe)`."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.cards import Card
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
from overcrank.errors import CannotServe, StoreError, UserError
from overcrank.export.packaged import packaged_graph
from overcrank.models import components, family, main_part, variant_from_configs
from overcrank.models.base import Component, Variant
from overcrank.runtime.sessions.card import card_of, no_card, require_driver
from overcrank.runtime.sessions.engine_module import EngineModule, Slot
from overcrank.runtime.sessions.select import bundles_with_graphs, fitting_bundles, pull_missing, rebuild_command
from overcrank.runtime.sessions.session import EAGER, Ledger, Session
from overcrank.runtime.sessions.sources import (
    BundledGraphs,
    Engines,
    GraphsHere,
    Quantization,
    graph_session,
    require_renderable,
)
from overcrank.runtime.sessions.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("overcrank")
SessionMaker = Callable[[Component, str, "nn.Module"], Session]
BACKENDS = ("auto", "tensorrt", "onnxruntime", EAGER)


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
    dtypes: dict[str, str] = field(default_factory=dict)  # of the parts, where they were asked for
    workspace: Workspace = field(default_factory=Workspace)

    def settings(self) -> dict[str, Any]:
        """What decides the frames beside model and request, of what is not the usual."""
        found: dict[str, Any] = {"loras": self.loras} if self.loras else {}
        if self.variant.preset:
            found["preset"] = self.variant.preset
        found |= {"dtypes": self.dtypes} if self.dtypes else {}
        if self.quantization is not None:
            recipe = self.quantization.recipe
            found |= {"layers": list(self.quantization.layers), "recipe": recipe.digest() if recipe else ""}
        return found

    def save_kernels(self) -> None:
        """Keep on disk what sessions have compiled; a disk that is full costs later renders time, not this one."""
        for slot in (s for module in self.modules for s in module.slots if s.session is not None):
            try:
                slot.session.save_kernels()  # type: ignore[union-attr]
            except StoreError as error:
                log.warning("the kernels compiled for %s are not kept: %s", slot.component.name, error)

    def preload(self, pictures: bool) -> None:
        """Load the engines a render calls, while its text is encoded; `pictures`: those that encode them too.

        Why one cannot be loaded is said when it is called.
        """
        for module in self.modules:
            if pictures or not module.slots[0].component.name.endswith("_encoder"):
                module.preload()

    def remove(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:
            module.remove()
        self.modules.clear()

    def __reduce__(self) -> Any:
        """Of a pipeline that is copied or pickled, the copy is not accelerated."""
        return type(None), ()


def accelerate(
    pipe: Any,
    bundle: str | Path | None = None,
    *,
    backend: str = "auto",
    store: Path | None = None,
    model: str = "",
    quantization: Quantization | None = None,
    slow_engines: bool = False,
    pull: str = "",
) -> Any:
    """Let engines serve the calls of a diffusers pipeline's denoiser and VAE; returns the pipeline.

    `bundle` is a bundle's path or name [default: the newest in the store for this network
    and card]. `backend`: "auto" uses TensorRT, or where no card can be used ONNX Runtime for the
    graphs that are in this package or in the store's bundles, and falls back to eager PyTorch with
    one warning for each reason, "tensorrt" raises BackendError in place of falling back,
    "onnxruntime" runs the graphs in ONNX Runtime in fp32, those of `bundle` if one is named,
    "eager" uses no engine. `model` is the name that rebuild commands show. `quantization`: the
    engines asked for, and the ranges of their layers [default: engines in the pipeline's own 16-bit
    type]. `slow_engines`: also those that were measured to be slower than eager PyTorch on this card.
    `pull`: URL from which the bundle for this network and card is fetched if the store has none.

    What torch.compile made of a part is taken out again.

    Raises UserError for an unknown backend or bundle, ModelError for a pipeline of no known family.
    """
    if backend not in BACKENDS:
        raise UserError(f"Unknown backend '{backend}': use {', '.join(BACKENDS)}.")
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise UserError(f"accelerate() takes a diffusers pipeline, not {type(pipe).__name__}.")
    earlier = getattr(pipe, "overcrank", None)
    if earlier is not None:
        earlier.remove()
    _unwrap_compiled(pipe)
    variant = _variant_of(pipe, model)
    ledger = Ledger(strict=backend == "tensorrt")
    found = Acceleration(variant, backend, ledger, [], quantization=quantization)
    where = Store(store)
    if pull:
        pull_missing(pull, variant, quantization.precision if quantization else "auto", where, Keyring())
    if backend == "onnxruntime":
        found.modules = _install(pipe, variant, ledger, _in_onnx_runtime(found, where, bundle))
    elif backend != EAGER:
        _with_engines(pipe, found, where, bundle, slow_engines)
    found.source = str(pipe.config.get("_name_or_path", ""))
    pipe.overcrank = found
    return pipe


def _unwrap_compiled(pipe: Any) -> None:
    """What torch.compile made of a part calls the part: an engine takes the part's place, and PyTorch runs it plain."""
    for name, module in pipe.components.items():
        plain = getattr(module, "_orig_mod", None)
        if plain is not None:
            log.info("%s was compiled by torch.compile; engines run it, and it runs uncompiled without", name)
            setattr(pipe, name, plain)


def _variant_of(pipe: Any, model: str) -> Variant:
    kind = type(pipe).__name__
    denoiser = main_module(pipe)
    if denoiser is None:
        raise UserError(f"{kind} has no transformer or unet; overcrank accelerates video diffusion pipelines.")
    every: dict[str, Any] = {name: getattr(module, "config", None) for name, module in pipe.components.items()}
    read = {n: c.to_dict() if hasattr(c, "to_dict") else c for n, c in every.items()}
    configs = {name: dict(config) for name, config in read.items() if isinstance(config, Mapping)}
    if "scheduler" in configs:  # one that was made in memory does not say what it is
        configs["scheduler"]["_class_name"] = type(pipe.scheduler).__name__
    read_from = [pipe.config.get("_name_or_path"), *(c.get("_name_or_path") for c in configs.values())]
    sources = [str(source) for source in read_from if source]
    return variant_from_configs(model or kind, type(denoiser).__name__, configs, kind, sources)


def main_module(pipe: Any) -> Any:
    """The pipeline's denoiser, or what stands in its place; None if it has none."""
    part = main_part({name: type(module).__name__ for name, module in pipe.components.items() if module is not None})
    return getattr(pipe, part) if part else None


def denoisers(pipe: Any, variant: Variant) -> list[tuple[nn.Module, str]]:
    """Modules that steps call, with the component's name: the pipeline's main part and its twins."""
    main = main_module(pipe)
    serving = [c for c in components(variant) if not c.attribute and getattr(pipe, c.subfolder, None) is main]
    parts = dict.fromkeys(part for c in serving for part in (c.subfolder, *c.also_serves))
    return [(m, serving[0].name) for part in parts if (m := getattr(pipe, part, None)) is not None]


def _in_onnx_runtime(found: Acceleration, store: Store, bundle: str | Path | None) -> SessionMaker:
    """Sessions of the graphs in the bundle that is named, else of those in the store's cache."""
    if bundle is None:
        return lambda c, part, module: graph_session(c, part, module, store, found.quantization)
    fitting = [require_renderable(store.resolve(str(bundle)), found.variant, found.quantization)]
    rebuild = rebuild_command(found.variant, fitting[0][1].target)
    return BundledGraphs(found.quantization, store, fitting, rebuild, found.bundles).session


def _with_engines(pipe: Any, found: Acceleration, store: Store, bundle: str | Path | None, slow: bool) -> None:
    variant, ledger, quantization = found.variant, found.ledger, found.quantization
    try:
        card = _card(pipe)
    except CannotServe as error:
        session = _without_card(pipe, found, store, bundle, error) if found.backend == "auto" else None
        if session is None:
            _all_eager(found, error)
        else:
            found.modules = _install(pipe, variant, ledger, session)
        return
    try:
        candidates = [store.resolve(str(bundle))] if bundle else [p for p, _ in store.list()]
        precision = quantization.precision if quantization else _precision(pipe)
        fitting = fitting_bundles(candidates, variant, card.target, precision)
    except CannotServe as error:
        _all_eager(found, error)
        return
    rebuild = rebuild_command(variant, card.target)
    engines = Engines(quantization, store, fitting, rebuild, found.bundles, slow, card=card, workspace=found.workspace)
    found.modules = _install(pipe, variant, ledger, engines.session)


def _all_eager(found: Acceleration, error: CannotServe) -> None:
    names = [c.name for c in components(found.variant)]
    found.ledger.fall_back(names, error.reason, error.fix, standing=True)


def _without_card(
    pipe: Any, found: Acceleration, store: Store, bundle: str | Path | None, error: CannotServe
) -> SessionMaker | None:
    """Sessions of the graphs that are here, in ONNX Runtime; None if there are none, or a card could be used.

    `error`: why no card is; of one that is in this machine it is told.
    """
    import torch

    variant = found.variant
    if found.quantization is not None or device_of(pipe).type != "cpu" or torch.cuda.is_available():
        return None
    candidates = [store.resolve(str(bundle))] if bundle else [path for path, _ in store.list()]
    bundles = bundles_with_graphs(candidates, variant)
    if not bundles and (bundle or not any(packaged_graph(c) for c in components(variant))):
        return None
    if no_card():
        log.warning("rendering on the processor, in ONNX Runtime: %s; %s.", error.reason, error.fix)
    rebuild = rebuild_command(variant, next((manifest.target for _, manifest in bundles), "CARD"))
    return GraphsHere(None, store, bundles, rebuild, found.bundles, packaged=not bundle).session


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline computes, also when its parts come and go."""
    device: torch.device = pipe._execution_device
    return device


def _card(pipe: Any) -> Card:
    """The card the pipeline computes on; raises CannotServe for none."""
    import torch

    device = device_of(pipe)
    if device.type != "cuda":
        usable = torch.cuda.is_available()
        if not usable and (reason := no_card()):
            raise CannotServe(*reason)
        there = " (one is here: pipe.to('cuda'))" if usable else ""
        raise CannotServe(f"the pipeline is on {device.type}, not on an NVIDIA GPU{there}", "render on one")
    card = card_of(device)
    require_driver(card)
    return card


def _precision(pipe: Any) -> str:
    """Precision name of the denoiser's dtype."""
    dtype = str(main_module(pipe).dtype)
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(dtype, dtype.removeprefix("torch."))


def _install(pipe: Any, variant: Variant, ledger: Ledger, session: SessionMaker) -> list[EngineModule]:
    """One EngineModule for each module that some component describes."""
    grouped: dict[tuple[str, str], list[Component]] = defaultdict(list)
    for component in family(variant.family).components(variant):
        for part in (component.subfolder, *component.also_serves):
            grouped[part, component.attribute].append(component)
    installed: dict[tuple[str, str], EngineModule] = {}
    for (part, attribute), serving in grouped.items():
        owner = getattr(pipe, part, None)
        if owner is None:  # such as the second expert of a model that has one
            continue
        module = getattr(owner, attribute) if attribute else owner

        def maker(component: Component, part: str = part, module: nn.Module = module) -> Callable[[], Session]:
            return lambda: session(component, part, module)

        installed[part, attribute] = EngineModule(module, [Slot(c, maker(c)) for c in serving], ledger)
    ledger.look = partial(_look_for_others, weakref.ref(pipe), installed, ledger)
    return list(installed.values())


def _look_for_others(
    pipe: Callable[[], Any], installed: Mapping[tuple[str, str], EngineModule], ledger: Ledger
) -> None:
    """Tell of parts that were put in the places of those that engines run, which nothing else would."""
    for (part, attribute), module in installed.items():
        owner = getattr(pipe(), part, None)
        if owner is None or not module.slots:  # taken out to save memory, or engines were removed
            continue
        found = getattr(owner, attribute, None) if attribute else owner
        if getattr(found, "_orig_mod", found) is not module.module:
            place = f"pipe.{part}.{attribute}".rstrip(".")
            ledger.fall_back(
                [module.name], f"{place} is not the one that was accelerated", "call accelerate(pipe) again"
            )
