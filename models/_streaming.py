"""Caches of causal video decoders as inputs and outputs: what the streaming VAEs share."""

from __future__ import annotations

from overcrank.models.base import TensorSpec


def axis(name: str, scale: int) -> str:
    """Name of a side that is `scale` times the coarsest one."""
    return name if scale == 1 else f"{name}_x{scale}"


def scaled(height: int, width: int, scales: list[int]) -> dict[str, int]:
    """Lengths of the sides at each scale."""
    return {axis(name, s): n * s for s in scales for name, n in (("height", height), ("width", width))}


def affine(scales: list[int]) -> dict[str, tuple[str, int, int]]:
    """`Component.affine_axes` of the sides."""
    return {axis(a, s): (a, s, 0) for s in scales if s > 1 for a in ("height", "width")}


def inputs(prefix: str, caches: list[tuple[int, int, int]]) -> tuple[TensorSpec, ...]:
    """One tensor a cache of (channels, frames, scale)."""
    return tuple(
        TensorSpec(f"{prefix}_{i}", (1, channels, frames, axis("height", scale), axis("width", scale)))
        for i, (channels, frames, scale) in enumerate(caches)
    )


def outputs(prefix: str, caches: list[tuple[int, int, int]]) -> tuple[TensorSpec, ...]:
    """As `inputs`; the sides of an output need no names of their own."""
    return tuple(
        TensorSpec(t.name, tuple(d if isinstance(d, int) else f"{t.name}_{d}" for d in t.dims))
        for t in inputs(prefix, caches)
    )
