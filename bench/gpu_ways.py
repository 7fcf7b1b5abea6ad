"""What `bench-gpu` measures: networks at a shape, and the ways to run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overcrank.models.base import VideoShape

Kind = Literal["eager", "compile", "onnxruntime", "engine"]


@dataclass(frozen=True)
class Case:
    model: str  # a variant: random weights; a diffusers folder, or the packaged demo: its own
    shape: VideoShape

    @property
    def name(self) -> str:
        return f"{self.model.rstrip('/').rpartition('/')[2]}-{self.shape}"


@dataclass(frozen=True)
class Way:
    name: str
    kind: Kind
    precision: str = "bf16"
    mode: str = "default"  # of torch.compile
    attention: bool = False  # whether it is quantized too
    embedded: bool = False


CASES = (
    Case("ltx-demo", VideoShape(64, 64, 17)),
    Case("ltx-2b-0.9.5", VideoShape(512, 768, 121)),
    Case("ltx-2b-0.9.5", VideoShape(704, 1216, 121)),
    Case("wan-2.1-t2v-1.3b", VideoShape(480, 832, 81)),
    Case("svd-xt-1.1", VideoShape(576, 1024, 25)),
)
ON_CARD = (
    Way("eager", "eager"),
    Way("compile", "compile"),
    Way("compile-max-autotune", "compile", mode="max-autotune"),
    Way("engine-bf16", "engine"),
    Way("engine-bf16-embedded", "engine", embedded=True),
    Way("engine-fp8", "engine", "fp8"),
    Way("engine-fp8-attention", "engine", "fp8", attention=True),
    Way("engine-int8", "engine", "int8"),
)
ON_CPU = (
    Way("eager", "eager"),
    Way("compile", "compile"),
    Way("onnxruntime", "onnxruntime"),
    Way("onnxruntime-fp8", "onnxruntime", "fp8"),
    Way("onnxruntime-fp8-attention", "onnxruntime", "fp8", attention=True),
    Way("onnxruntime-int8", "onnxruntime", "int8"),
)
"""A dry run: fp32, and the quantized graphs that engines are made of. Its times say nothing of a card."""
COMPONENTS = ("denoiser", "vae_decoder")


def ways_on(device: str) -> tuple[Way, ...]:
    return ON_CARD if device == "cuda" else ON_CPU
