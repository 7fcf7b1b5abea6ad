"""What `overcrank inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from overcrank.engines.targets import BY_NAME
from overcrank.errors import safe_text
from overcrank.export.files.kinds import CHECKPOINT, LORA, encoder_part
from overcrank.export.files.parts import AS_STORED, layer_format
from overcrank.runtime.inspect import Inspection
from overcrank.runtime.inspect_lora import LoraFacts
from overcrank.units import human_bytes

WIDENED = "no engine multiplies it as it is: quantized anew to fp8 or int8, or widened to 16 bit"
CARDS = {
    "RTX 20": "sm_75",
    "RTX 30, A100": "sm_86",
    "RTX 40, H100": "sm_89",
    "RTX 50, B200, DGX Spark": "sm_120",
}
STORED = {
    "fp8 e4m3, scaled or not": ("fp8_e4m3", 0),
    "fp8 e5m2": ("fp8_e5m2", 0),
    "int8, by tensor or by row": ("int8", 0),
    "int8 ConvRot": ("int8", 256),
    "nvfp4": ("nvfp4", 0),
    "mxfp8": ("mxfp8", 0),
    "GGUF, Q4_0 to Q8_0 and K": ("Q4_K", 0),
}
LONGEST = 100
"""Characters of a value of the metadata that are shown."""


def formats_table() -> str:
    """What multiplies each format on each card, as docs/files.md has it."""
    lines = [f"| stored as | {' | '.join(CARDS)} |", f"|{'---|' * (len(CARDS) + 1)}"]
    for words, (stored, rotation) in STORED.items():
        forms = [layer_format(stored, rotation, BY_NAME[target].precisions) for target in CARDS.values()]
        cells = ["in 16 bit" if form is None else _as(stored, form.format) for form in forms]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| bf16, fp16, fp32 | {' | '.join(['in 16 bit'] * len(CARDS))} |"])


def _as(stored: str, form: str) -> str:
    return "as it is" if AS_STORED.get(stored) == form else f"anew as {form}"


def as_data(inspection: Inspection) -> dict[str, Any]:
    """As plain data, for programs."""
    networks = [{k: v for k, v in asdict(network).items() if k != "origins"} for network in inspection.networks]
    return {
        **asdict(inspection),
        "networks": networks,
        "precision": inspection.precision,
        "commands": inspection.commands(),
    }


def lines(inspection: Inspection) -> list[str]:
    """A short report for people."""
    return [f"{title:<9}{safe_text(text)}" for title, text in _rows(inspection)]


def _rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", inspection.file
    yield "kind", f"{inspection.kind}, {human_bytes(inspection.bytes)}, {_count(inspection.parameters)} parameters"
    for network, other in zip(inspection.networks, inspection.unlike, strict=True):
        yield "network", other or f"{network.part} of {', '.join(network.variants)} ({network.cls})"
    if inspection.kind == "checkpoint" and not inspection.networks:
        yield "network", "unknown: its tensors' names are of no model that overcrank has"
    for sentence in inspection.experts():
        yield "", sentence
    if inspection.lora is not None:
        yield from _lora(inspection.lora)
    if inspection.keys:
        yield "keys", inspection.keys
    for form, count in inspection.layers.items():
        yield "layers", f"{count} in {form}, scale {inspection.scales[form]}"
        yield "", f"multiplied as it is by {AS_STORED[form]} engines" if form in AS_STORED else WIDENED
    if inspection.rotated:
        yield "rotation", f"ConvRot in groups of {', '.join(map(str, inspection.rotated))}"
    yield "others", ", ".join(f"{count} in {form}" for form, count in inspection.others.items()) or "none"
    for name, value in inspection.metadata.items():
        yield "metadata", f"{name}: {value if len(value) <= LONGEST else value[:LONGEST] + '…'}"
    for command in inspection.commands():
        yield "next", command
    if inspection.kind not in (CHECKPOINT, LORA) and not inspection.networks:
        yield "next", f"give it beside --model as --weights {encoder_part(inspection.kind)}={inspection.file}"


def _lora(lora: LoraFacts) -> Iterator[tuple[str, str]]:
    ranks = list(lora.ranks)
    rank = f", rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}" if ranks else ""
    yield "layers", f"{lora.layers}{rank}, {lora.kind}, {lora.layout}"
    if not lora.fits:
        yield "fits", "no model that overcrank has"
        return
    some = "" if lora.matched == 1 else f", by {lora.matched:.0%} of its layers"
    yield "fits", f"{lora.part} of {', '.join(lora.fits)}{some}"


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
