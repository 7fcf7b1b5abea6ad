"""Put engines under a diffusers pipeline: `overcrank.accelerate(pipe)`."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.cards import Card
from overcrank.engines.manifest import read_manifest
from overcrank.engines.module_refusals import ModuleChange, ModuleChanged
from overcrank.engines.refusals import CannotServe, OffCard
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME
from overcrank.engines.trust import Keyring
from overcrank.errors import StoreError, UserError
from overcrank.export.packaged import packaged_graph
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.models import components, family, main_part, variant_from_configs
from overcrank.models.base import Component, Variant
from overcrank.options import merged, option
from overcrank.runtime.options import AccelerateOptions
from overcrank.runtime.pipeline.adapters import adapters_of
from overcrank.runtime.pipeline.lora_parts import lora_of
from overcrank.runtime.pipeline.lora_sets import LoraSets
from overcrank.runtime.sessions.card import card_of, no_card, require_driver
from overcrank.runtime.sessions.engine_module import EngineModule, Slot
from overcrank.runtime.sessions.select import build_command, bundles_with_graphs, fitting_bundles, pull_missing
from overcrank.runtime.sessions.session import EAGER, Ledger, Session
from overcrank.runtime.sessions.sources import (
    BundledGraphs,
    Engines,
    GraphsHere,
    Quantization,
    graph_session,
    require_renderable,
)
from overcrank.runtime.sessions.stored_report import warn_anew
from overcrank.runtime.sessions.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("overcrank")
SessionMaker = Callable[[Component, str, "nn.Module"], Session]
BACKENDS = ("auto", "tensorrt", "onnxruntime", EAGER)


@dataclass(repr=False)
class Acceleration:
    """What `accelerate` did to a pipeline; kept as `pipe.overcrank`."""

    pipe: Callable[[], Any]  # None when it is gone
    variant: Variant
    backend: str
    ledger: Ledger
    modules: list[EngineModule]
    bundles: dict[str, str] = field(default_factory=dict)  # component → name of the bundle whose engine runs it
    source: str = ""  # folder or hub id of the checkpoint
    quantization: Quantization | None = None
    weights: dict[str, dict[str, str]] = field(default_factory=dict)  # part → the file it is from, in place of its own
    loras: list[dict[str, Any]] = field(default_factory=list)  # merged into the weights, or beside them
    lora_sets: LoraSets | None = None  # those that jobs bring; None where they cannot
    moved: tuple[str, ...] = ()  # parts of the pipeline that are on the card only while they run
    dtypes: dict[str, str] = field(default_factory=dict)  # of the parts, where they were asked for
    workspace: Workspace = field(default_factory=Workspace)

    def settings(self) -> dict[str, Any]:
        """What decides the frames beside model and request, of what is not the usual."""
        settings: dict[str, Any] = {"weights": self.weights} if self.weights else {}
        settings |= {"loras": self.loras} if self.loras else {}
        if self.variant.preset:
            settings["preset"] = self.variant.preset
        settings |= {"dtypes": self.dtypes} if self.dtypes else {}
        if self.quantization is not None:
            recipe = self.quantization.recipe
            settings |= {"layers": list(self.quantization.layers), "recipe": recipe.digest() if recipe else ""}
        return settings

    def set_loras(self, loras: Sequence[str]) -> None:
        """Render with these LoRAs from now on, in place of those before; with [] as without any.

        FILE, FILE:SCALE or PART=FILE:SCALE. Quantized layers of a file hold them beside their weights, into others they
        are merged, and what was there is kept in host memory. No engine is built or loaded for it, unless another one
        takes them. Raises UserError and CheckpointError as `overcrank.load`; then the LoRAs are those before.
        """
        pipe = self.pipe()
        if pipe is None:
            raise UserError("The pipeline of these engines is gone; load it anew.")
        adapters = adapters_of(pipe, self.variant)
        adapters.set([lora_of(argument) for argument in loras])
        self.loras = adapters.about()
        if self.lora_sets is not None:
            self.lora_sets.usual = adapters.files

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

    def __repr__(self) -> str:
        state = f"{len(self.modules)} modules" if self.modules else "no engine"
        return f"<overcrank {self.variant.name}: {self.backend}, {state}>"

    def summary(self) -> str:
        """Who served which calls of this pipeline since it was accelerated, and why engines did not; a line each."""
        record = self.ledger.record
        lines = [f"{self.variant.name}, backend {self.backend}"]
        for component, counts in record.backends().items():
            calls = ", ".join(f"{backend} {count} call{'s' * (count > 1)}" for backend, count in counts.items())
            bundle = f" ({self.bundles[component]})" if component in self.bundles else ""
            lines.append(f"  {component}: {calls}{bundle}")
        if not record.served:
            lines.append("  nothing was called yet")
        reasons: dict[str, list[str]] = {}
        for fallback in (*self.ledger.standing, *record.fallbacks):
            components = reasons.setdefault(f"{fallback.reason}; {fallback.fix}.", [])
            components += [fallback.component] if fallback.component not in components else []
        lines += [f"  {', '.join(names)} in eager PyTorch: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def remove(self) -> None:
        """Give every module its own forward back, and take `pipe.overcrank` away."""
        for module in self.modules:
            module.remove()
        self.modules.clear()
        pipe = self.pipe()
        if pipe is not None and vars(pipe).get("overcrank") is self:
            del pipe.overcrank

    def __reduce__(self) -> Any:
        """Of a pipeline that is copied or pickled, the copy is not accelerated."""
        return type(None), ()


def accelerate(pipe: Any, options: AccelerateOptions | None = None, **changes: Any) -> Any:
    """Let engines serve the calls of a diffusers pipeline's denoiser and VAE; returns the pipeline.

    `changes`: fields of AccelerateOptions, over those of `options`, such as backend="onnxruntime". What torch.compile
    made of a part is taken out again. `pipe.overcrank` is the Acceleration; its `remove()` undoes it.

    Raises UserError for an unknown option, backend or bundle, ModelError for a pipeline of no known family.
    """
    options = merged(AccelerateOptions, options, changes)
    return with_engines(pipe, options, options.quantization())


def with_engines(pipe: Any, options: AccelerateOptions, quantization: Quantization | None) -> Any:
    """As `accelerate`; `quantization` is that of the options, or one that knows the weights."""
    if options.backend not in BACKENDS:
        raise UserError(f"Unknown backend '{options.backend}': use {', '.join(BACKENDS)}.")
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise UserError(f"accelerate() takes a diffusers pipeline, not {type(pipe).__name__}.")
    compiled = _unwrap_compiled(pipe)
    try:
        acceleration, session = _prepared(pipe, options, quantization)
    except BaseException:  # the pipeline is as it was
        for name, module in compiled.items():
            setattr(pipe, name, module)
        raise
    earlier = getattr(pipe, "overcrank", None)
    if earlier is not None:
        earlier.remove()
    for name in compiled:
        log.info("%s was compiled by torch.compile; engines run it, and it runs uncompiled without", name)
    if session is not None:
        acceleration.modules = _install(pipe, acceleration.variant, acceleration.ledger, session)
    pipe.overcrank = acceleration
    return pipe


def _prepared(
    pipe: Any, options: AccelerateOptions, quantization: Quantization | None
) -> tuple[Acceleration, SessionMaker | None]:
    """What will be done to the pipeline, to which nothing is done yet; no sessions where no engine can serve it."""
    variant = _variant_of(pipe, options.model)
    precision = quantization.precision if quantization else ""
    if precision and options.backend == EAGER:
        raise UserError(
            f"{option('precision', precision)} is computed by engines, and {option('backend', EAGER)} uses none; leave "
            f"one of them out."
        )
    ledger = Ledger(options.backend == "tensorrt", precision)  # eager PyTorch computes with a file's own weights
    acceleration = Acceleration(weakref.ref(pipe), variant, options.backend, ledger, [], quantization=quantization)
    acceleration.loras = adapters_of(pipe, variant).about()
    acceleration.source = str(pipe.config.get("_name_or_path", ""))
    store = Store(options.store)
    bundle = store.resolve(str(options.bundle)) if options.bundle else None
    if quantization is None and options.backend != EAGER:
        acceleration.quantization = quantization = _as_stored(pipe, variant, _target(pipe, options.backend, bundle))
    if options.pull:
        pull_missing(options.pull, variant, quantization.precision if quantization else "auto", store, Keyring())
    session: SessionMaker | None = None
    if options.backend == "onnxruntime":
        session = _in_onnx_runtime(acceleration, store, bundle)
    elif options.backend != EAGER:
        session = _on_card(pipe, acceleration, store, bundle, options.slow_engines)
    return acceleration, session


def _as_stored(pipe: Any, variant: Variant, target: str) -> Quantization | None:
    """As the files of the pipeline's parts have their layers, if they quantize any; "" for no card."""
    from overcrank.runtime.pipeline.weights import stored_layout

    precisions = BY_NAME[target].precisions if target in BY_NAME else None
    stored = stored_layout(pipe, variant, precisions)
    if stored is None:
        return None
    warn_anew(stored.recipe, target)
    form = LayerFormat(stored.recipe.precision, "dynamic")
    return Quantization(form, stored.recipe, layout=stored.words)


def _unwrap_compiled(pipe: Any) -> dict[str, Any]:
    """Put parts in the places of what torch.compile made of them, which is returned: an engine takes a part's place."""
    compiled = {n: m for n, m in pipe.components.items() if getattr(m, "_orig_mod", None) is not None}
    for name, module in compiled.items():
        setattr(pipe, name, module._orig_mod)
    return compiled


def _variant_of(pipe: Any, model: str) -> Variant:
    kind = type(pipe).__name__
    denoiser = main_module(pipe)
    if denoiser is None:
        raise UserError(f"{kind} has no transformer or unet; overcrank accelerates video diffusion pipelines.")
    every: dict[str, Any] = {name: getattr(module, "config", None) for name, module in pipe.components.items()}
    plain = {n: c.to_dict() if hasattr(c, "to_dict") else c for n, c in every.items()}
    configs = {name: dict(config) for name, config in plain.items() if isinstance(config, Mapping)}
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


def _in_onnx_runtime(acceleration: Acceleration, store: Store, bundle: Path | None) -> SessionMaker:
    """Sessions of the graphs in the bundle that is named, else of those in the store's cache."""
    if bundle is None:
        return lambda c, part, module: graph_session(c, part, module, store, acceleration.quantization)
    fitting = [require_renderable(bundle, acceleration.variant, acceleration.quantization)]
    layout = acceleration.quantization.layout if acceleration.quantization else ()
    acceleration.ledger.build = build_command(acceleration.variant, fitting[0][1].target, layout)
    return BundledGraphs(acceleration.quantization, store, fitting, acceleration.bundles).session


def _on_card(
    pipe: Any, acceleration: Acceleration, store: Store, bundle: Path | None, slow: bool
) -> SessionMaker | None:
    variant, ledger, quantization = acceleration.variant, acceleration.ledger, acceleration.quantization
    try:
        card = _card(pipe)
    except CannotServe as error:
        session = _without_card(pipe, acceleration, store, bundle, error) if acceleration.backend == "auto" else None
        if session is None:
            _all_eager(acceleration, error)
        return session
    ledger.build = build_command(variant, card.target, quantization.layout if quantization else ())
    try:
        candidates = [bundle] if bundle else [p for p, _ in store.list()]
        precision = quantization.precision if quantization else _precision(pipe)
        fitting = fitting_bundles(candidates, variant, card.target, precision)
    except CannotServe as error:
        _all_eager(acceleration, error)
        return None
    return Engines(
        quantization, store, fitting, acceleration.bundles, slow, card=card, workspace=acceleration.workspace
    ).session


def _all_eager(acceleration: Acceleration, error: CannotServe) -> None:
    names = [c.name for c in components(acceleration.variant)]
    acceleration.ledger.fall_back(names, error.why, standing=True)


def _without_card(
    pipe: Any, acceleration: Acceleration, store: Store, bundle: Path | None, error: CannotServe
) -> SessionMaker | None:
    """Sessions of the graphs that are here, in ONNX Runtime; None if there are none, or a card could be used.

    `error`: why no card is; of one that is in this machine it is told.
    """
    import torch

    variant = acceleration.variant
    if acceleration.quantization is not None or device_of(pipe).type != "cpu" or torch.cuda.is_available():
        return None
    candidates = [bundle] if bundle else [path for path, _ in store.list()]
    bundles = bundles_with_graphs(candidates, variant)
    if not bundles and (bundle or not any(packaged_graph(c) for c in components(variant))):
        return None
    if bundles:
        acceleration.ledger.build = build_command(variant, bundles[0][1].target)
    if no_card():
        log.warning("rendering on the processor, in ONNX Runtime: %s.", error)
    return GraphsHere(None, store, bundles, acceleration.bundles, packaged=not bundle).session


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
        why = None if usable else no_card()
        raise CannotServe(why or OffCard(device.type, card_here=usable))
    card = card_of(device)
    require_driver(card)
    return card


def _target(pipe: Any, backend: str, bundle: Path | None) -> str:
    """The card that layers are multiplied on, or that the bundle in ONNX Runtime is for; "" for none."""
    if backend == "onnxruntime":
        return read_manifest(bundle).target if bundle else ""
    try:
        return _card(pipe).target
    except CannotServe:
        return ""


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
        current = getattr(owner, attribute, None) if attribute else owner
        if getattr(current, "_orig_mod", current) is not module.module:
            place = f"pipe.{part}.{attribute}".rstrip(".")
            ledger.fall_back([module.name], ModuleChanged(ModuleChange.REPLACED, place))
