"""`overcrank calibrate --auto`: keep the most sensitive blocks in 16 bit until rendered videos meet a target.

Each block is quantized alone in calls captured while denoising; how far the network's output
moves, relative in norm, ranks it. Then the fewest of the worst are kept with which the videos
hold the target, found by bisection: each try renders them. Quantized layers are those of
export/quantization/reference.py, so a try costs about an eager render.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from overcrank.calibration.quality import difference, videos
from overcrank.errors import UserError
from overcrank.export.quantization.formats import NUMBERS
from overcrank.export.quantization.recipe import (
    ATTENTION,
    SIXTEEN,
    ActivationRange,
    ComponentRecipe,
    LayerFormat,
    Recipe,
    Rule,
)
from overcrank.export.quantization.reference import quantized_layers
from overcrank.options import option
from overcrank.runtime.render.request import RenderRequest

if TYPE_CHECKING:
    from overcrank.runtime.render.output import Video
    from torch import Tensor, nn

CALLS = 6
"""Captured calls of each network, evenly spaced over one request's steps."""
VIDEOS = 4
_BLOCK = re.compile(r"(.*blocks\.\d+)\.")
_TARGET = re.compile(r"(\d+(?:\.\d+)?)\s*dB", re.IGNORECASE)

Progress = Callable[[int, int], None]
Layouts = Mapping[str, tuple[Sequence[str], Mapping[str, LayerFormat]]]
"""Component → the parts of the pipeline it describes, and its layers' formats."""


@dataclass(frozen=True)
class QualityTarget:
    """What rendered videos must hold against the network in its own precision."""

    kind: Literal["dB", "cosine"]
    """PSNR of the frames, mean over videos; or cosine of latents, the lowest of any step and video."""
    value: float

    def __str__(self) -> str:
        return f"{self.value:.4g} dB" if self.kind == "dB" else f"cosine {self.value:.6g}"


def target_of(text: str) -> QualityTarget:
    """From "35dB", or a cosine such as "0.995"; raises UserError for anything else."""
    if match := _TARGET.fullmatch(text.strip()):
        return QualityTarget("dB", float(match[1]))
    try:
        cosine = float(text)
    except ValueError:
        cosine = 0.0
    if not 0 < cosine < 1:
        raise UserError(f"{option('quality', text)}: give decibels (35dB), or a cosine below 1 (0.995).")
    return QualityTarget("cosine", cosine)


@dataclass(frozen=True)
class SearchResult:
    recipe: Recipe
    effects: Mapping[str, float]
    """Block → relative error of the network's output with nothing else quantized, the worst first."""
    kept: Sequence[str]
    reached: float
    """In the target's unit."""
    bytes: tuple[int, int, int]
    """Of the weights concerned: as kept, all quantized, all in 16 bit."""


@dataclass(frozen=True)
class _Part:
    module: nn.Module
    formats: Mapping[str, LayerFormat]
    ranges: Mapping[str, ActivationRange]


def searched(
    pipe: Any,
    recipe: Recipe,
    layouts: Layouts,
    requests: Sequence[RenderRequest],
    target: QualityTarget,
    progress: Progress,
) -> SearchResult:
    """`recipe` with rules that keep blocks in 16 bit until `requests` hold the target on the eager pipeline.

    Raises UserError when nothing quantized holds it.
    """
    parts = _parts(pipe, recipe, layouts)
    blocks = list(dict.fromkeys(block_of(layer) for part in parts.values() for layer in part.formats))
    tries = len(blocks).bit_length() + 1
    sample = list(requests)[:VIDEOS]
    exact, calls = _rendered_with_calls(pipe, parts, sample)
    effects = {}
    for i, block in enumerate(blocks):
        progress(i, len(blocks) + tries)
        effects[block] = max(_effect(part, block, calls[name]) for name, part in parts.items())
    worst = dict(sorted(effects.items(), key=lambda item: -item[1]))
    done = len(blocks)

    def reached(count: int) -> float:
        nonlocal done
        done += 1
        progress(done, len(blocks) + tries)
        with _quantized(parts, set(list(worst)[:count])):
            figures = difference("quantized", videos(pipe, sample), "16 bit", exact)
        return figures.psnr if target.kind == "dB" else min(figures.cosines)

    count, figure = _fewest(reached, len(blocks), target)
    progress(len(blocks) + tries, len(blocks) + tries)
    kept = list(worst)[:count]
    recipe = _with_rules(recipe, layouts, {b: worst[b] for b in kept})
    about = (
        recipe.calibration.model_copy(update={"quality": f"{QualityTarget(target.kind, figure)}, asked {target}"})
        if recipe.calibration
        else None
    )
    return SearchResult(recipe.model_copy(update={"calibration": about}), worst, kept, figure, _bytes(parts, set(kept)))


def block_of(layer: str) -> str:
    """ "transformer_blocks.3" of "transformer_blocks.3.attn1.to_q"; a layer outside any block stands alone."""
    match = _BLOCK.match(layer)
    return match[1] if match else layer


def _fewest(reached: Callable[[int], float], most: int, target: QualityTarget) -> tuple[int, float]:
    """The fewest blocks to keep, and what is reached with them; all in 16 bit reach anything."""
    figure = reached(0)
    if figure >= target.value:
        return 0, figure
    fails, holds, figure = 0, most, float("nan")
    while holds - fails > 1:
        middle = (holds + fails) // 2
        if (quality := reached(middle)) >= target.value:
            holds, figure = middle, quality
        else:
            fails = middle
    if holds == most:
        raise UserError(
            f"{target} does not hold with any block quantized; ask for less, or for another {option('precision')}."
        )
    return holds, figure


def _parts(pipe: Any, recipe: Recipe, layouts: Layouts) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    for component, (names, formats) in layouts.items():
        for name in names:
            module = getattr(pipe, name, None)
            if module is not None and name not in parts:
                parts[name] = _Part(module, formats, recipe.components[component].ranges[name])
    return parts


@contextmanager
def _quantized(parts: Mapping[str, _Part], kept: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts.values():
            formats = {layer: form for layer, form in part.formats.items() if block_of(layer) not in kept}
            stack.enter_context(quantized_layers(part.module, formats, part.ranges, "bfloat16"))
        yield


def _rendered_with_calls(
    pipe: Any, parts: Mapping[str, _Part], requests: list[RenderRequest]
) -> tuple[list[Video], dict[str, list[dict[str, Any]]]]:
    """The videos as they should be, and some of the first one's calls of each part."""
    counts = dict.fromkeys(parts, 0)
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}

    def counting(name: str) -> Any:
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    def capturing(name: str) -> Any:
        indices = {counts[name] * i // CALLS for i in range(CALLS)}
        numbers = iter(range(counts[name]))

        def capture(_: Any, __: Any, arguments: dict[str, Any]) -> None:
            if next(numbers, -1) in indices:
                calls[name].append(copy.deepcopy(arguments))

        return capture

    handles = [p.module.register_forward_pre_hook(counting(n)) for n, p in parts.items()]
    first = videos(pipe, requests[:1])
    for handle in handles:
        handle.remove()
    handles = [p.module.register_forward_pre_hook(capturing(n), with_kwargs=True) for n, p in parts.items()]
    videos(pipe, requests[:1])
    for handle in handles:
        handle.remove()
    return first + videos(pipe, requests[1:]), calls


def _effect(part: _Part, block: str, calls: list[dict[str, Any]]) -> float:
    """Mean over calls of the output's relative error with this block alone quantized."""
    import torch

    formats = {layer: form for layer, form in part.formats.items() if block_of(layer) == block}
    errors = []
    with torch.no_grad():
        for call in calls:
            exact = _output(part.module, call)
            with quantized_layers(part.module, formats, part.ranges, "bfloat16"):
                moved = _output(part.module, call)
            errors.append(float((moved - exact).norm() / exact.norm().clamp_min(1e-12)))
    return sum(errors) / max(1, len(errors))


def _output(module: nn.Module, call: dict[str, Any]) -> Tensor:
    result = module(**copy.deepcopy(call))  # caches among the arguments are written to
    first: Tensor = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return first.float()


def _with_rules(recipe: Recipe, layouts: Layouts, effects: Mapping[str, float]) -> Recipe:
    """Rules for the blocks kept, before all others."""
    reasons = {b: f"sensitive: alone it moves the output by {effect:.2%}" for b, effect in effects.items()}
    components: dict[str, ComponentRecipe] = {}
    for name, component in recipe.components.items():
        formats = layouts[name][1]
        own = [b for b in effects if any(block_of(layer) == b for layer in formats)]
        rules = [Rule(layers=b if b in formats else f"{b}.*", format=SIXTEEN, reason=reasons[b]) for b in own]
        components[name] = component.model_copy(update={"rules": rules + component.rules})
    return recipe.model_copy(update={"components": components})


def _bytes(parts: Mapping[str, _Part], kept: set[str]) -> tuple[int, int, int]:
    as_kept = quantized = wide = 0.0
    for part in parts.values():
        for layer, form in part.formats.items():
            if form.kind == ATTENTION:
                continue
            values = part.module.get_parameter(f"{layer}.weight").numel()
            own = values * NUMBERS[form.format].bytes
            quantized += own
            wide += 2 * values
            as_kept += 2 * values if block_of(layer) in kept else own
    return int(as_kept), int(quantized), int(wide)
