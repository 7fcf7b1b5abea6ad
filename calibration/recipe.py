"""The number format of every layer as data: rules by name, measured ranges, and why. Imports nothing heavy.

The rules, resolved to layers, decide the engine; ranges and smoothing decide only the weight
pack, so one engine serves every calibration of an architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from overcrank.models.base import Component
from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA = 1
KEPT_ENDS = 3  # blocks at either end of a transformer that stay in 16 bit, of 24 or more

Format = Literal["fp8", "int8", "nvfp4", "16bit"]
Activations = Literal["static", "dynamic", "16bit"]
SIXTEEN: Literal["16bit"] = "16bit"
QUANTIZED: tuple[Format, ...] = ("fp8", "int8", "nvfp4")


class LayerFormat(NamedTuple):
    """How one linear layer multiplies.

    `activations`: scaled by a range measured beforehand, by each token's own largest value,
    or left in 16 bit (the weights alone are quantized).
    """

    format: Format = SIXTEEN
    activations: Activations = SIXTEEN


IN_16_BIT = LayerFormat()


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Model):
    """`layers` is a pattern (* and ?) on a layer's name within its component; the first that matches decides."""

    layers: str
    format: Format
    activations: Activations = SIXTEEN
    reason: str = ""

    @model_validator(mode="after")
    def _has_kernels(self) -> Rule:
        if self.format == "nvfp4" and self.activations == SIXTEEN:
            raise ValueError("nvfp4 multiplies activations in nvfp4 too; make activations dynamic or static")
        return self


class Range(_Model):
    """What a layer's input was seen to hold: the largest value to represent, after division by `smoothing`
    (SmoothQuant, arXiv:2211.10438: one factor for each input channel)."""

    amax: float = Field(gt=0, allow_inf_nan=False)
    smoothing: list[float] | None = None


class ComponentRecipe(_Model):
    architecture: str
    """Digest of the network's class and configuration."""
    rules: list[Rule]
    ranges: dict[str, Range] = Field(default_factory=dict)

    def of(self, layer: str) -> LayerFormat:
        for rule in self.rules:
            if fnmatchcase(layer, rule.layers):
                return LayerFormat(rule.format, rule.activations)
        return IN_16_BIT

    def layout(self, layers: Iterable[str]) -> dict[str, LayerFormat]:
        """Layer → format, of those that leave 16 bit."""
        found = {layer: self.of(layer) for layer in layers}
        return {layer: form for layer, form in found.items() if form.format != SIXTEEN}

    def digest(self) -> str:
        """SHA-256 of what the engine depends on: the rules, without their reasons."""
        rules = [(r.layers, r.format, r.activations) for r in self.rules]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def architecture_digest(component: Component) -> str:
    """SHA-256 of the network's class and configuration, wherever it was loaded from."""
    config = {k: v for k, v in component.config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps([component.cls, config], sort_keys=True, default=list).encode()).hexdigest()


def default_rules(component: Component, form: LayerFormat) -> list[Rule]:
    """What is known to bear `form`: linear layers of transformer blocks, without those at either end.

    Modulation, embedders, the time step and the output projection stay in 16 bit.
    """
    blocks = [f"{r.path}.{i}" for r in component.repeats for i in range(r.full + r.after)]
    kept = min(KEPT_ENDS, len(blocks) // 8)
    ends = blocks[:kept] + blocks[len(blocks) - kept :]
    rules = [Rule(layers=f"{b}.*", format=SIXTEEN, reason=f"one of {kept} blocks at either end") for b in ends]
    rules.append(Rule(layers="*.norm*", format=SIXTEEN, reason="modulation"))
    paths = list(dict.fromkeys(r.path for r in component.repeats)) or ["*transformer_blocks"]
    rules += [Rule(layers=f"{p}.*", format=form.format, activations=form.activations) for p in paths]
    rules.append(Rule(layers="*", format=SIXTEEN, reason="outside the transformer blocks"))
    return rules


def default_recipe(component: Component, form: LayerFormat) -> ComponentRecipe:
    """All in 16 bit if `form` is, else the default rules; nothing measured."""
    rules = default_rules(component, form) if form.format != SIXTEEN else []
    return ComponentRecipe(architecture=architecture_digest(component), rules=rules)
