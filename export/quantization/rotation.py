"""ConvRot (arXiv:2512.03673): groups of a layer's inputs are rotated before they are quantized, and its weight too."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rotated(values: Tensor, size: int) -> Tensor:
    """Each group of `size` values of the last axis times the Hadamard matrix; twice is nothing."""
    groups = values.unflatten(-1, (-1, size))
    turned: Tensor = (groups @ hadamard(size).to(values)).flatten(-2)
    return turned


def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix [size, size] of ConvRot, orthogonal and symmetric, fp32; `size`: a power of four."""
    import torch

    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / isqrt(size)
