"""A model's name, cards' names and options → what `build` is to build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.engines.build import Request
from overcrank.engines.profiles import PartialShape, profile_for
from overcrank.engines.targets import Target, gpu_names, precision_for, targets_for
from overcrank.engines.tensorrt import driver_notes
from overcrank.engines.types import notes, own_precision, typed
from overcrank.errors import UserError
from overcrank.export.files.parts import anew_line, layout
from overcrank.export.quantization.lora import LORA_LAYERS, RANK_STEP, LoraInputs
from overcrank.export.quantization.recipe import QUANTIZED
from overcrank.models import components, family
from overcrank.models.base import Variant
from overcrank.options import option

if TYPE_CHECKING:
    from overcrank.export.quantization.recipe import LayerFormat, Recipe


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built; as the options of `overcrank build`. Sizes are in pixels and frames."""

    precision: str = "auto"
    """fp16, bf16, fp8, int8, nvfp4, or auto (bf16 where there is bf16)."""
    activations: str = "dynamic"
    """Of quantized layers without a recipe: "dynamic" (per token at run time), "static" (calibrated), "16bit"."""
    recipe: Recipe | Path | str | None = None
    """Formats and ranges, made by `calibrate`."""
    layout: Sequence[str] = ()
    """PART=FILE of quantized single files, by path or URL: layers are multiplied as these have them, which their
    headers tell; formats that the card does not multiply as 8-bit ones that it does."""
    dtype: Mapping[str, str] | Sequence[str] = ()
    """Part → fp32, bf16 or fp16, or words such as "vae=bf16" [default: as published]."""
    lora_rank: int = 0
    """Ranks of LoRAs, together, that layers take beside their weights at run time; a multiple of 16, 0 for none."""
    lora_layers: str = "quantized"
    """Which linear layers take them: "quantized", as LoRAs are merged into the others, or "all"."""
    allow_fallback: bool = False
    """Keep an engine that runs quantized layers in 16 bit."""
    embed_weights: bool = False
    """Weights inside the engine, in place of inputs of it."""
    height: int | None = None
    """Best-served height [default: the model's native], and so for `width` and `frames`."""
    width: int | None = None
    frames: int | None = None
    batch: int | None = None
    """Best-served batch; 1 and 2 (classifier-free guidance) always work [default: 2]."""
    min_height: int | None = None
    """Smallest height of the profile [default: the model's], and so for `min_width` and `min_frames`."""
    min_width: int | None = None
    min_frames: int | None = None
    max_height: int | None = None
    """Largest height of the profile [default: the model's], and so for `max_width` and `max_frames`."""
    max_width: int | None = None
    max_frames: int | None = None
    static: bool = False
    """Serve the best-served shape only."""
    components: Sequence[str] = ()
    """Names of components [default: the family's usual ones]."""
    flavour: str = "tensorrt_rtx"
    """TensorRT for RTX ("tensorrt_rtx"), or TensorRT ("tensorrt")."""
    jobs: int | None = None
    """Worker processes [default: by cores and RAM]."""

    def best(self) -> PartialShape:
        return PartialShape(self.height, self.width, self.frames, self.batch)

    def smallest(self) -> PartialShape:
        return PartialShape(self.min_height, self.min_width, self.min_frames)

    def largest(self) -> PartialShape:
        return PartialShape(self.max_height, self.max_width, self.max_frames)


def requests_for(
    variant: Variant, gpus: Sequence[str], options: BuildOptions, checkpoint: Path | None = None
) -> list[Request]:
    """One for each card that `gpus` names ("sm_89", "RTX 4070", "rtx", "all", "auto").

    `checkpoint`: diffusers folder whose weights are embedded. Raises UserError for what cannot be built.
    """
    targets = targets_for([name for words in gpus for name in gpu_names(words)], options.flavour)
    dtypes = _part_types(options.dtype, variant)
    names = tuple(options.components)
    components(variant, names)
    lora = _lora_inputs(options)
    shapes = {"minimum": options.smallest(), "maximum": options.largest()}
    profile = profile_for(variant, options.best(), **shapes, static=options.static)
    formats = [_formats_for(target, variant, options) for target in targets]
    return [
        Request(
            variant=variant,
            target=target,
            precision=precision_for(target, precision, own_precision(variant)),
            profile=profile,
            flavour=options.flavour,
            components=names,
            checkpoint=checkpoint,
            layers=layers,
            recipe=recipe,
            allow_fallback=options.allow_fallback,
            dtypes=dtypes,
            lora=lora,
        )
        for target, (precision, recipe, layers) in zip(targets, formats, strict=True)
    ]


def _formats_for(target: Target, variant: Variant, options: BuildOptions) -> tuple[str, Recipe | None, LayerFormat]:
    """Precision, recipe, and format of layers that it does not name."""
    from overcrank.export.quantization.recipe import LayerFormat, layers_of

    if not options.layout:
        return options.precision, *layers_of(options.precision, options.activations, options.recipe)
    for name, default in (("precision", "auto"), ("recipe", None), ("activations", "dynamic")):
        if (value := getattr(options, name)) != default:
            raise UserError(f"{option(name, str(value))}: {option('layout')} says how layers multiply; leave it out.")
    recipe = layout(options.layout, variant, target.precisions)
    return recipe.precision, recipe, LayerFormat(recipe.precision, "dynamic")


def _lora_inputs(options: BuildOptions) -> LoraInputs:
    """Raises UserError for a rank or layers that no engine takes LoRAs of."""
    rank, layers = options.lora_rank, options.lora_layers
    if layers not in LORA_LAYERS:
        raise UserError(f"{option('lora_layers', layers)}: use {' or '.join(LORA_LAYERS)}.")
    if rank < 0 or rank % RANK_STEP:
        above = max(RANK_STEP, -(-rank // RANK_STEP) * RANK_STEP)
        near = f"{above - RANK_STEP} or {above}" if above > RANK_STEP else str(above)
        raise UserError(f"{option('lora_rank', rank)} is no multiple of {RANK_STEP}; use {near}.")
    if rank and options.embed_weights:
        raise UserError(
            f"{option('lora_rank', rank)} is for engines whose weights are inputs; leave "
            f"{option('embed_weights', True)} out."
        )
    if rank and layers == "quantized" and options.precision not in QUANTIZED and not options.layout:
        raise UserError(
            f"{option('lora_rank', rank)}: no layer is quantized with {option('precision', options.precision)}; add "
            f"{option('lora_layers', 'all')}, or leave it out, as LoRAs are merged into layers in 16 bit."
        )
    return LoraInputs(rank, layers)


def request_notes(requests: Sequence[Request]) -> list[str]:
    """What to know before these are built; one sentence each."""
    sentences = list(driver_notes(requests[0].flavour, tuple(r.target for r in requests)))
    for request in requests:
        sentences += notes(request.variant, request.target, request.precision, dict(request.dtypes))
        if request.recipe is not None and (line := anew_line(request.recipe, request.target.name)):
            sentences.append(line)
    return list(dict.fromkeys(sentences))


def _part_types(words: Mapping[str, str] | Sequence[str], variant: Variant) -> dict[str, str]:
    """Part → type; raises UserError for a part that has no engine."""
    parts = dict.fromkeys(c.subfolder for c in family(variant.family).components(variant))
    types = typed([f"{part}={name}" for part, name in words.items()] if isinstance(words, Mapping) else words)
    for part, name in types.items():
        if part not in parts:
            raise UserError(
                f"{option('dtype', part or name)}: name a part of {variant.name} that has engines, such as vae=bf16; "
                f"they are {', '.join(parts)}."
            )
    return types
