"""In which type each component of a bundle is built: that of its part of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from overcrank.engines.targets import SIXTEEN_BIT, Target, sixteen_bit
from overcrank.errors import TargetError, UserError
from overcrank.models import components
from overcrank.models.base import Component, Variant
from overcrank.options import option

FP32 = "fp32"
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Our names of types, by PyTorch's, which are understood too."""


def typed(words: Sequence[str]) -> dict[str, str]:
    """Part → type of words such as "vae=fp32"; "" stands for the parts that are not named ("bf16").

    Raises UserError for an unknown type and for a part that is named twice.
    """
    types: dict[str, str] = {}
    for word in words:
        part, equals, name = word.rpartition("=")
        own = next((k for k, v in NAMES.items() if name in (k, v)), None)
        if own is None or (equals and not part):
            raise UserError(
                f"{option('dtype', word)}: use {', '.join(NAMES)} for every part, or PART=TYPE such as vae=fp32."
            )
        if types.setdefault(part, own) != own:
            raise UserError(f"{option('dtype')} gives {part or 'all parts'} both {types[part]} and {own}; give one.")
    return types


def own_precision(variant: Variant) -> str:
    """The 16-bit type that the variant's denoiser is published for."""
    return variant.dtype_of(components(variant)[0].subfolder)


def compute_of(
    component: Component, variant: Variant, target: Target, precision: str, dtypes: dict[str, str] | None = None
) -> str:
    """bf16, fp16 or fp32: the type of the component's graph.

    It is that of the component's part of the pipeline, `dtypes` before the variant's own. A `precision` of 16 bit
    that is not the denoiser's own moves the parts in 16 bit along. Raises TargetError for a part that was asked for
    in a type that the target cannot multiply.
    """
    override = (dtypes or {}).get(component.subfolder, "")
    dtype = override or variant.dtype_of(component.subfolder)
    if dtype == FP32:
        if target.fp32_products:
            return FP32
        if override:
            part, instead = component.subfolder, f"{component.subfolder}={sixteen_bit(target)}"
            raise TargetError(
                f"{option('dtype', f'{part}=fp32')}: TensorRT for RTX compiles no fp32 products for {target.name} "
                f"({target.generation}); use {option('dtype', instead)}."
            )
        dtype = sixteen_bit(target)
    elif override and dtype not in target.precisions:
        raise TargetError(
            f"{option('dtype', f'{component.subfolder}={dtype}')}: {target.name} ({target.generation}) has no {dtype}; "
            f"use {sixteen_bit(target)}."
        )
    if override:
        return dtype
    usual = sixteen_bit(target, own_precision(variant) if own_precision(variant) in target.precisions else "auto")
    sixteen = precision if precision in SIXTEEN_BIT else usual
    moved = sixteen != usual or dtype not in target.precisions
    return sixteen if moved or component.subfolder == components(variant)[0].subfolder else dtype


def notes(variant: Variant, target: Target, precision: str, dtypes: dict[str, str] | None = None) -> list[str]:
    """What to know before parts are built in fp32, or are not because the target cannot; one sentence each."""
    sentences = {}
    for component in components(variant):
        part = component.subfolder
        compute = compute_of(component, variant, target, precision, dtypes)
        if compute == FP32:
            sentences[part] = (
                f"{variant.name}: {part} is built in fp32, as it is published; it takes twice the memory of 16 bit, "
                f"which {option('dtype', f'{part}={sixteen_bit(target)}')} saves (here and when rendering)."
            )
        elif variant.dtype_of(part) == FP32 and part not in (dtypes or {}):
            sentences[part] = (
                f"{variant.name}: {part} is published in fp32 and built in {compute} for {target.name}, for which "
                f"TensorRT for RTX compiles no fp32 products; render with {option('dtype', f'{part}={compute}')}."
            )
    return list(sentences.values())
