"""What decides how engines serve a pipeline, how it is loaded, and how it renders; beside the videos asked for.

Each class holds the fields of the one before. `overcrank.accelerate`, `overcrank.load`, and `overcrank render` and
`batch` take them, the last with the options of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.errors import UserError
from overcrank.options import option

if TYPE_CHECKING:
    import torch
    from overcrank.engines.store import Store
    from overcrank.export.quantization.recipe import Recipe
    from overcrank.runtime.sessions.sources import Quantization


@dataclass(frozen=True)
class AccelerateOptions:
    """How engines serve a pipeline."""

    model: str = ""
    """Name that rebuild commands show [default: the pipeline's class]."""
    bundle: str | Path | None = None
    """A bundle's path or name [default: the newest in the store for this network and card]."""
    backend: str = "auto"
    """"auto" uses TensorRT, or where no card can be used ONNX Runtime for the graphs that are in this package or in the
    store's bundles, and falls back to eager PyTorch with one warning for each reason, "tensorrt" raises BackendError in
    place of falling back, "onnxruntime" runs the graphs in ONNX Runtime, those of `bundle` if one is named, "eager"
    uses no engine."""
    precision: str = "auto"
    """Of the engines: "auto" (the pipeline's own 16-bit type), "fp8", "int8" or "nvfp4"."""
    activations: str = "dynamic"
    """Of quantized layers without a recipe: "dynamic" (per token at run time), "static" (calibrated), "16bit"."""
    recipe: Recipe | Path | str | None = None
    """Formats and ranges, made by `calibrate`."""
    pack: Path | None = None
    """Quantized weights of the checkpoint, made by `overcrank pack` [default: packed when first needed]."""
    slow_engines: bool = False
    """Also use engines that were measured to be slower than eager PyTorch on this card."""
    pull: str = ""
    """URL from which the bundle for this network and card is fetched if the store has none."""
    store: Store | Path | str | None = None
    """Where bundles and graphs are kept [default: $OVERCRANK_HOME, else the user's cache]."""

    def quantization(self) -> Quantization | None:
        """What the quantization options say together; raises UserError where they contradict each other."""
        from overcrank.export.quantization.recipe import QUANTIZED, layers_of
        from overcrank.runtime.sessions.sources import Quantization

        if self.precision not in ("auto", *QUANTIZED):
            raise UserError(f"{option('precision', self.precision)}: use auto, {', '.join(QUANTIZED)}.")
        if self.precision == "auto":
            for name in ("recipe", "pack"):
                if getattr(self, name) is not None:
                    raise UserError(f"{option(name)} is for quantized layers; add {option('precision', 'fp8')}.")
            return None
        recipe, layers = layers_of(self.precision, self.activations, self.recipe)
        return Quantization(layers, recipe, self.pack)


@dataclass(frozen=True)
class LoadOptions(AccelerateOptions):
    """How a pipeline is loaded."""

    device: str | None = None
    """cpu, cuda or cuda:N [default: cuda when there is a card, else cpu]."""
    dtype: torch.dtype | Mapping[str, torch.dtype] | Sequence[str] | None = None
    """One for all parts, a mapping from parts to types, or words such as "vae=fp32" [default: on a card the
    publisher's, float16 for bfloat16 where the card has none; on cpu float32]."""
    weights: Sequence[str] | Mapping[str, str | Path] = ()
    """Parts of the pipeline out of single files (.safetensors, .gguf), quantized or not, by original names or
    diffusers', PART=FILE, or FILE where it tells its part; the rest is the model's own."""
    comfy: str | Path | None = None
    """A ComfyUI folder, in whose models the names of files are looked up [default: $OVERCRANK_COMFY]."""
    loras: Sequence[str] = ()
    """Files, FILE or FILE:SCALE, for one part of the pipeline PART=FILE:SCALE; the experts of Wan 2.2 are high and low.
    Merged into weights in 16 bit, beside those that a file has quantized."""
    fuse_loras: bool = True
    """Merge LoRAs into weights in 16 bit for good; if not, linear layers hold them beside, where they can be changed
    and engines built with `lora_rank` and `lora_layers="all"` take them."""
    preset: str = ""
    """A published way to render in few steps; its own LoRAs are merged before `loras`."""
    vram: str = "auto"
    """How much of the card to use: auto, low, balanced, high, or an amount such as 8GB."""


@dataclass(frozen=True)
class RenderOptions(LoadOptions):
    """How jobs are rendered."""

    cache: str = "off"
    """Step caching: off, safe, fast, or a threshold from 0 to 1."""
    preview: bool = False
    """Write a picture at each denoising step."""
    metadata: bool = True
    """Write into MP4s what they were made of."""
    lanes: int | None = None
    """Jobs at a time, 1 to 4 [default: 2 on a GPU of 24 GB or more, else 1]."""
