"""`--vram`: which parts of a pipeline stay on the card, and which are there only while they run.

Text and image encoders run once and are the first to be moved, then VAEs, then denoisers. Of the
moved parts one is on the card at a time, and none while a part that stays is running. The peak
that is compared with the budget: parts that stay, and the largest of what comes beside them: an
encoder, or another moved part with what the engines of this network take when they work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.engines.manifest import ComponentEntry, ShapeEntry, TensorEntry
from overcrank.errors import UserError
from overcrank.options import option
from overcrank.units import human_bytes, parse_size

if TYPE_CHECKING:
    import torch
    from torch import nn

AUTO, LOW, BALANCED, HIGH = "auto", "low", "balanced", "high"
MODES = (AUTO, LOW, BALANCED, HIGH)
RESERVE = 1_000_000_000
"""Of what is free, left to CUDA itself, the decoded frames and what parts hold besides weights (auto only)."""
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "int64": 8, "bool": 1}
"""Bytes of a value."""
COLOURS = 3  # channels of what a decoder makes
OUT = "out_"  # how sides are named that a VAE makes of other sides
ENCODERS, OTHERS, DENOISERS = range(3)
log = logging.getLogger("overcrank")


@dataclass(frozen=True)
class Part:
    """A pipeline's module: bytes of its weights, and when it is moved: ENCODERS first."""

    name: str
    weights: int
    rank: int


@dataclass(frozen=True)
class Plan:
    moved: tuple[str, ...]
    peak: int

    def line(self) -> str:
        where = f"{', '.join(self.moved)} on the card only while in use" if self.moved else "every part on the card"
        return f"{where}; weights and engines take {human_bytes(self.peak)} at most"


def vram_of(word: str) -> str | int:
    """A mode, or bytes of "8GB"; raises UserError."""
    if word in MODES:
        return word
    try:
        size = 0 if word.strip().isdigit() else parse_size(word, option("vram"))
    except UserError:
        size = 0
    if not size:
        raise UserError(f"{option('vram', word)}: use {', '.join(MODES)}, or an amount such as 8GB.")
    return size


def planned(parts: Sequence[Part], working: int, vram: str | int, free: int) -> Plan:
    """`working`: bytes of the largest activations; `free`: of the card, for auto.

    Raises UserError when an amount was given that not even the weights fit in.
    """
    fixed = {HIGH: (), LOW: tuple(p.name for p in parts)}
    fixed[BALANCED] = tuple(p.name for p in parts if p.rank == ENCODERS)
    if isinstance(vram, str) and vram in fixed:
        return Plan(fixed[vram], _peak(parts, fixed[vram], working))
    budget = vram if isinstance(vram, int) else free - RESERVE
    order = [p.name for p in sorted(parts, key=lambda p: (p.rank, -p.weights))]
    plans = [Plan(moved, _peak(parts, moved, working)) for i in range(len(order) + 1) if (moved := tuple(order[:i]), 1)]
    fitting = next((plan for plan in plans if plan.peak <= budget), None)
    if fitting is not None:
        return fitting
    least = min(plans, key=lambda plan: plan.peak)
    weights = _peak(parts, least.moved, 0)
    if isinstance(vram, int) and vram < weights:
        raise UserError(
            f"{option('vram', human_bytes(vram))}: one part alone has {human_bytes(weights)} of weights; give more."
        )
    log.warning(
        "with one part at a time weights and engines take %s at the engines' largest shapes, and there is %s: a large "
        "video may not fit; quantize with %s, or build for smaller ones.",
        human_bytes(least.peak),
        human_bytes(budget),
        option("precision"),
    )
    return least


def _peak(parts: Sequence[Part], moved: Sequence[str], working: int) -> int:
    staying = sum(p.weights for p in parts if p.name not in moved)
    beside = [p.weights + (0 if p.rank == ENCODERS else working) for p in parts if p.name in moved]
    return staying + max(working, *beside, 0)


def working_bytes(bundled: Sequence[tuple[ComponentEntry, ShapeEntry]]) -> int:
    """What engines take on the card besides weights, each at the largest video of its bundle.

    Activations lie in one arena, however many lanes there are; the engines themselves stay loaded; and at most one
    that steps call and one part of a VAE are under way at once, with their inputs, caches and outputs.
    """
    entries = [entry for entry, _ in bundled]
    activations = max((entry.activation_bytes or 0 for entry in entries), default=0)
    calls: dict[bool, int] = {}
    for entry, largest in bundled:
        part = bool(entry.attribute)
        calls[part] = max(calls.get(part, 0), _call_bytes(entry, largest))
    return activations + sum(entry.engine.bytes for entry in entries) + sum(calls.values())


def _call_bytes(entry: ComponentEntry, largest: ShapeEntry) -> int:
    """Of inputs and outputs.

    Of an engine that steps call, outputs thrice: its own, those handed over, and those of the step before, which the
    pipeline still has.
    """
    lengths = {
        dim: n
        for spec in entry.inputs
        for dim, n in zip(spec.dims, spec.max or (), strict=False)
        if isinstance(dim, str)
    }
    inputs = [_bytes(spec, spec.max or spec.dims, lengths) for spec in entry.inputs]
    video = largest.frames * largest.height * largest.width
    outputs = sum(_bytes(spec, spec.dims, lengths) or _unnamed(spec, video, max(inputs)) for spec in entry.outputs)
    return sum(inputs) + outputs * (1 if entry.attribute else 3)


def _bytes(spec: TensorEntry, dims: Sequence[int | str], lengths: Mapping[str, int]) -> int:
    """0 where a side of an output is none of the inputs' sides; a cache's are named after it."""

    def length(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        own = dim if dim.startswith(OUT) else dim.removeprefix(f"{spec.name}_")
        return lengths.get(dim, lengths.get(own, 0))

    return prod(map(length, dims)) * SIZES.get(spec.dtype, 4)


def _unnamed(spec: TensorEntry, video: int, input_bytes: int) -> int:
    """A decoder's are the pixels of at most the whole video; what an encoder makes is smaller than what it is given."""
    channels = next((d for d in spec.dims[1:] if isinstance(d, int)), COLOURS)
    return channels * video * SIZES.get(spec.dtype, 4) if channels <= COLOURS else input_bytes


def parts_of(pipe: Any, denoisers: Sequence[nn.Module]) -> list[Part]:
    import torch

    parts = []
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            tensors = (*module.parameters(), *module.buffers())
            encodes = name.startswith(("text_encoder", "image_encoder"))
            rank = DENOISERS if any(module is d for d in denoisers) else ENCODERS if encodes else OTHERS
            parts.append(Part(name, sum(t.numel() * t.element_size() for t in tensors), rank))
    return parts


def place(pipe: Any, moved: Sequence[str], device: torch.device) -> None:
    """Put every part where the plan says; `moved` ones come to `device` when they are called.

    When one leaves, so does what its engines had on the card besides weights.
    """
    import torch

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    turns = [modules[name] for name in moved]

    def left() -> None:
        acceleration = getattr(pipe, "overcrank", None)  # which is made after the parts are placed
        if acceleration is not None:
            acceleration.workspace.release()

    for name, module in modules.items():
        if name not in moved:
            come(module, device)
        if moved:
            _takes_turns(module, turns, device, left)


def come(module: nn.Module, device: torch.device) -> None:
    module.to(device)


def leave(module: nn.Module) -> None:
    module.to("cpu")


def is_on(module: nn.Module, device: torch.device) -> bool:
    return next(module.parameters()).device == device


def _takes_turns(module: nn.Module, turns: Sequence[nn.Module], device: torch.device, left: Callable[[], None]) -> None:
    """When the module is called, those of `turns` that are not it leave the device, and it comes."""
    from accelerate.hooks import ModelHook, add_hook_to_module, send_to_device

    class Turn(ModelHook):  # type: ignore[misc]
        """Diffusers asks it before a VAE encodes or decodes too."""

        execution_device = device

        def init_hook(self, module: nn.Module) -> nn.Module:
            if any(module is other for other in turns):
                leave(module)
            return module

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            leaving = [other for other in turns if other is not module and is_on(other, device)]
            for other in leaving:
                leave(other)
            if leaving:
                left()
            come(module, device)
            return send_to_device(args, device), send_to_device(kwargs, device)

    add_hook_to_module(module, Turn(), append=True)
