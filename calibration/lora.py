"""LoRA files merged into weights, tensor by tensor: W + scale · alpha / rank · B A (arXiv:2106.09685).

diffusers turns the file's names into its own (`lora_state_dict` of the pipeline's class); the
product is taken here, since a weight pack is made without the module.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PAIR = re.compile(r"(?P<part>[^.]+)\.(?P<layer>.+?)\.(?:lora_|lora\.)(?P<half>A|B|down|up)(?:\.\w+)?\.weight")


@dataclass(frozen=True)
class Lora:
    """What a file adds: (part of the pipeline, layer) → A [r, in …], B [out, r …] and their factor."""

    file: Path
    scale: float
    pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor, float]]

    def delta(self, part: str, layer: str) -> Tensor | None:
        """What is added to the layer's weight, fp32 [out, in × kernel]; None if nothing is."""
        if (part, layer) not in self.pairs:
            return None
        a, b, factor = self.pairs[part, layer]
        out: Tensor = b.float().flatten(1) @ a.float().flatten(1) * (factor * self.scale)
        return out


def read_lora(argument: str, pipeline: type, parts: Mapping[str, nn.Module]) -> Lora:
    """`argument`: FILE or FILE:SCALE, for a pipeline of class `pipeline` with these modules.

    Raises UserError for a file that is missing or no LoRA, and CheckpointError for one of
    another model, listing the keys that match nothing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, scale = _parsed(argument)
    reader: Any = getattr(pipeline, "lora_state_dict", None)
    if reader is None:
        raise UserError(f"--lora {file}: {pipeline.__name__} takes no LoRA.")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--lora {file} cannot be read as safetensors: {error}.") from error
    if any("dora_scale" in k or "magnitude_vector" in k for k in tensors):
        raise UserError(f"--lora {file} is a DoRA, which cannot be merged here; merge it into the checkpoint first.")
    alphas = {} if "return_alphas" not in inspect.signature(reader).parameters else {"return_alphas": True}
    found = reader(dict(tensors), **alphas)
    state, scales = found if isinstance(found, tuple) else (found, None)
    return Lora(file, scale, _pairs(file, state, scales or {}, _adapter(file), parts))


def merge(loras: Sequence[Lora], parts: Mapping[str, nn.Module]) -> None:
    """Add every LoRA to the weights of these modules, in place."""
    import torch

    with torch.no_grad():
        for lora in loras:
            for part, layer in lora.pairs:
                weight = parts[part].get_parameter(f"{layer}.weight")
                added = lora.delta(part, layer)
                assert added is not None
                weight.add_(added.reshape(weight.shape).to(weight))


def _parsed(argument: str) -> tuple[Path, float]:
    path, colon, scale = argument.rpartition(":")
    try:
        file, factor = (Path(path), float(scale)) if colon else (Path(argument), 1.0)
    except ValueError:  # a colon of the path, as in C:\
        file, factor = Path(argument), 1.0
    if not file.expanduser().is_file():
        raise UserError(f"--lora {argument}: {file} does not exist; give FILE or FILE:SCALE.")
    return file.expanduser(), factor


def _adapter(file: Path) -> dict[str, Any]:
    """diffusers' own record of rank and alpha, in the file's header."""
    import json

    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
    known: dict[str, Any] = json.loads(header.get("lora_adapter_metadata", "{}"))
    return known


def _pairs(
    file: Path,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    adapter: Mapping[str, Any],
    parts: Mapping[str, nn.Module],
) -> dict[tuple[str, str], tuple[Tensor, Tensor, float]]:
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in state.items():
        match = _PAIR.fullmatch(key)
        place = (match["part"], match["layer"]) if match else None
        if match is None or place is None or not _fits(parts, place):
            if not key.endswith(".alpha"):
                unmatched.append(key)
            continue
        halves.setdefault(place, {})["A" if match["half"] in ("A", "down") else "B"] = tensor
    whole = {place: (h["A"], h["B"]) for place, h in halves.items() if len(h) == 2}
    unmatched += [f"{p}.{layer}" for (p, layer), (a, b) in whole.items() if not _shaped(parts, p, layer, a, b)]
    if unmatched or not whole:
        listed = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
        raise CheckpointError(f"--lora {file} is for another model: nothing here matches {listed or 'it'}.")
    return {
        (part, layer): (a, b, _alpha(state, alphas, adapter, part, layer, a.shape[0]) / a.shape[0])
        for (part, layer), (a, b) in whole.items()
    }


def _fits(parts: Mapping[str, nn.Module], place: tuple[str, str]) -> bool:
    part, layer = place
    try:
        return part in parts and parts[part].get_parameter(f"{layer}.weight") is not None
    except AttributeError:
        return False


def _shaped(parts: Mapping[str, nn.Module], part: str, layer: str, a: Tensor, b: Tensor) -> bool:
    shape = parts[part].get_parameter(f"{layer}.weight").shape
    return tuple(a.shape[1:]) == tuple(shape[1:]) and b.shape[0] == shape[0]


def _alpha(
    state: Mapping[str, Any], alphas: Mapping[str, float], adapter: Mapping[str, Any], part: str, layer: str, rank: int
) -> float:
    """alpha, wherever the file says it; else the rank, which makes the factor one."""
    for key in (f"{part}.{layer}.alpha", f"{layer}.alpha"):
        for place in (state, alphas):
            if key in place:
                return float(place[key])
    given = adapter.get(f"{part}.alpha_pattern", {}).get(layer, adapter.get(f"{part}.lora_alpha", rank))
    return float(given)
