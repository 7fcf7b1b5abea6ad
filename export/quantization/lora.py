"""Which layers of an engine take LoRAs beside their weights. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

LORA_A, LORA_B = "lora_a", "lora_b"
LORA_LAYERS = ("quantized", "all")
RANK_STEP = 16
"""Inner length of what GEMM kernels multiply."""


@dataclass(frozen=True)
class LoraInputs:
    """Which linear layers take LoRAs, of which rank together."""

    rank: int = 0
    layers: str = "quantized"

    @property
    def label(self) -> str:
        """What of an engine's key it is."""
        return f"rank {self.rank}, {self.layers}" if self.rank else ""


NO_LORA_INPUTS = LoraInputs()


def rank_for(rank: int) -> int:
    """The smallest that an engine can be built with."""
    return -(-rank // RANK_STEP) * RANK_STEP
