"""Put engines under a diffusers pipeline: `overcrank.accelerate(pipe)`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.calibration.pack import read_pack
from overcrank.calibration.recipe import IN_16_BIT, LayerFormat, Range, Recipe, read_recipe, recipe_of
from overcrank.engines.build import RECIPE
from overcrank.engines.manifest import Manifest, check_files, read_manifest
from overcrank.engines.store import Store
from overcrank.engines.targets import SIXTEEN_BIT, serves
from overcrank.errors import IntegrityError, UserError
from overcrank.models import components, family, main_part, variant_from_configs, variant_from_manifest
from overcrank.models.base import Component, Variant
from overcrank.runtime.module import EngineModule, Slot
from overcrank.runtime.pack import kept_pack
from overcrank.runtime.parameters import bound_parameters, compute_of, own_parameters, packed_parameters, parameters_of
from overcrank.runtime.session import EAGER, CannotServe, Ledger, Session

if TYPE_CHECKING:
    from torch import Tensor, nn

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

    def settings(self) -> dict[str, Any]:
        """What decides the frames beside model and request, of what is not the usual."""
        found: dict[str, Any] = {"loras": self.loras} if self.loras else {}
        if self.quantization is not None:
            recipe = self.quantization.recipe
            found |= {"layers": list(self.quantization.layers), "recipe": recipe.digest() if recipe else ""}
        return found

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
) -> Any:
    """Let engines serve the calls of a diffusers pipeline's denoiser and VAE; returns the pipeline.

    `bundle` is a bundle's path or name [default: the newest in the store for this network
    and card]. `backend`: "auto" uses TensorRT and falls back to eager PyTorch with one
    warning for each reason, "tensorrt" raises BackendError in place of falling back,
    "onnxruntime" runs the graphs in ONNX Runtime in fp32, "eager" uses no engine. `model` is the
    name that rebuild commands show. `quantization`: the engines asked for, and the ranges of
    their layers [default: engines in the pipeline's own 16-bit type].

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
        found.modules = _install(pipe, variant, ledger, lambda c, p, m: _ort_session(c, p, m, where, quantization))
    elif backend != EAGER:
        _with_engines(pipe, found, where, bundle, quantization)
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


def _with_engines(
    pipe: Any, found: Acceleration, store: Store, bundle: str | Path | None, quantization: Quantization | None
) -> None:
    variant, ledger = found.variant, found.ledger
    try:
        card = _card(pipe)
        candidates = [store.resolve(str(bundle))] if bundle else [p for p, _ in store.list()]
        fitting = fitting_bundles(
            candidates, variant, card, quantization.precision if quantization else _precision(pipe)
        )
    except CannotServe as error:
        names = [c.name for c in components(variant)]
        ledger.fall_back(names, error.reason, error.fix, standing=True)
        return
    rebuild = rebuild_command(variant, card)

    def session(component: Component, part: str, module: nn.Module) -> Session:
        path, manifest = bundle_of(component.name, fitting, rebuild)
        found.bundles[component.name] = path.name
        recipe = quantization.recipe if quantization else None
        if recipe is None and (path / RECIPE).is_file():
            recipe = read_recipe(path / RECIPE)
        ranges = recipe_of(recipe, component, IN_16_BIT).ranges.get(part, {})
        entry = manifest.component(component.name)
        packs = _packs(
            quantization, component, part, module, entry.formats, ranges, entry.key.recipe, compute_of(entry), store
        )
        return _trt_session(path, manifest, component, module, packs, rebuild)

    found.modules = _install(pipe, variant, ledger, session)


def _card(pipe: Any) -> str:
    """Target name of the card the pipeline is on, such as "sm_89"."""
    import torch

    if pipe.device.type != "cuda":
        there = " (one is here: pipe.to('cuda'))" if torch.cuda.is_available() else ""
        raise CannotServe(f"the pipeline is on {pipe.device.type}, not on an NVIDIA GPU{there}", "render on one")
    major, minor = torch.cuda.get_device_capability(pipe.device)
    return f"sm_{major}{minor}"


def _precision(pipe: Any) -> str:
    """Precision name of the denoiser's dtype."""
    dtype = str(main_module(pipe).dtype)
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(dtype, dtype.removeprefix("torch."))


def rebuild_command(variant: Variant, card: str) -> str:
    return f"build-engine --model {variant.name} --gpu {card}"


Bundle = tuple[Path, Manifest]


def fitting_bundles(candidates: Sequence[Path], variant: Variant, card: str, precision: str) -> list[Bundle]:
    """Bundles of this network for this card whose weights the pipeline can bind, the newest first, portable ones last.

    Raises CannotServe with the nearest miss: no bundle, other network, other card, another
    precision than the pipeline's weights, weights embedded.
    """
    rebuild = rebuild_command(variant, card)
    known = []
    for path in candidates:
        try:
            known.append((path, read_manifest(path)))
        except IntegrityError:
            continue
    alike = [(p, m) for p, m in known if m.family == variant.family and same_network(variant, m)]
    if not alike:
        others = f"; {len(known)} of other networks" if known else ""
        raise CannotServe(f"there is no engine of {variant.name}{others}", rebuild)
    here = [(p, m) for p, m in alike if serves(m.target, m.precision, card)]
    if not here:
        have = ", ".join(sorted({m.target for _, m in alike}))
        raise CannotServe(f"the engines of {variant.name} are for {have}, this card is {card}", rebuild)
    bindable = [(p, m) for p, m in here if m.weights == "inputs" and m.precision == precision]
    if not bindable:
        have = ", ".join(sorted({f"{m.precision} with weights as {m.weights}" for _, m in here}))
        raise CannotServe(
            f"the engines of {variant.name} for {card} are {have}, and the pipeline's weights are {precision}",
            f"{rebuild} --precision {precision}" if precision in SIXTEEN_BIT else "load the pipeline in bf16 or fp16",
        )
    return sorted(bindable, key=lambda bundle: (bundle[1].target == card, bundle[1].created), reverse=True)


def bundle_of(component: str, bundles: Sequence[Bundle], rebuild: str) -> Bundle:
    """The first bundle that has the component and whose files are what its manifest says."""
    damage: list[str] = []
    for path, manifest in bundles:
        if any(entry.name == component for entry in manifest.components):
            wrong = check_files(path, manifest)
            if not wrong:
                return path, manifest
            damage.append(f"bundle {path.name} is damaged: {wrong[0]}")
    if damage:
        raise CannotServe(damage[0], f"overcrank engines rm it, then {rebuild}")
    raise CannotServe(f"no bundle has an engine of {component}", f"{rebuild} --components {component}")


def same_network(variant: Variant, manifest: Manifest) -> bool:
    """Whether a bundle's configurations describe the same networks as the variant's."""
    built = variant_from_manifest(manifest)
    return all(
        _plain(c.config) == _plain(b.config) for c, b in zip(components(variant), components(built), strict=True)
    )


def _plain(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


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


def _trt_session(
    bundle: Path,
    manifest: Manifest,
    component: Component,
    module: nn.Module,
    packs: Mapping[str, Tensor],
    rebuild: str,
) -> Session:
    from overcrank.runtime.trt import TrtSession

    entry = manifest.component(component.name)
    parameters: dict[str, Any] = dict(own_parameters(module, component, parameters_of(entry)))
    parameters |= packs
    return TrtSession(manifest.flavour, manifest.flavour_version, bundle, entry, parameters, rebuild)


def _ort_session(
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
