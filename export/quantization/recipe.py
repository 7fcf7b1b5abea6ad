"""The number format of every layer as data: rules by name, measured ranges, and why. Imports nothing heavy.

The rules, resolved to layers, decide the engine; ranges and smoothing decide only the weight
pack, so one engine serves every calibration of an architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple, cast

from overcrank.errors import UserError
from overcrank.models.base import Component
from overcrank.models.network import differences, network
from overcrank.options import option
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

KEPT_ENDS = 3  # blocks at either end of a transformer that stay in 16 bit, of 24 or more

Format = Literal["fp8", "int8", "nvfp4", "16bit"]
Activations = Literal["static", "dynamic", "16bit"]
Method = Literal["max", "percentile", "mse", "smoothquant"]
SIXTEEN: Literal["16bit"] = "16bit"
ATTENTION: Literal["attention"] = "attention"
REWRITING = 3
"""Counts up when the same rules make another graph."""
ROTATIONS = (4, 16, 64, 256, 1024)
"""Sizes of ConvRot's groups: powers of four."""
QUANTIZED: tuple[Format, ...] = ("fp8", "int8", "nvfp4")


class LayerFormat(NamedTuple):
    """How one linear layer or attention multiplies.

    `activations`: scaled by a range measured beforehand, by each token's own largest value,
    or left in 16 bit (the weights alone are quantized).
    """

    format: Format = SIXTEEN
    activations: Activations = SIXTEEN
    kind: Literal["linear", "attention"] = "linear"
    rotation: int = 0
    """Inputs in a group that a Hadamard matrix rotates before they are quantized (ConvRot, arXiv:2512.03673)."""


IN_16_BIT = LayerFormat()


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Model):
    """`layers` is a pattern (* and ?) on the name of a linear layer ("blocks.0.attn1.to_q") or of an attention
    ("blocks.0.attn1") within its component; the first that matches decides. An attention is in fp8 or 16 bit."""

    layers: str
    format: Format
    activations: Activations = SIXTEEN
    rotation: int = 0
    reason: str = ""

    @model_validator(mode="after")
    def _has_kernels(self) -> Rule:
        if self.format == "nvfp4" and self.activations == SIXTEEN:
            raise ValueError("nvfp4 multiplies activations in nvfp4 too; make activations dynamic or static")
        if self.rotation and self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation} is none of {', '.join(map(str, ROTATIONS))}")
        if self.rotation and self.activations == "static":
            raise ValueError("ranges are measured before the rotation; make activations dynamic")
        return self


class ActivationRange(_Model):
    """What a layer's input was seen to hold: the largest value to represent, after division by `smoothing`
    (SmoothQuant, arXiv:2211.10438: one factor for each input channel)."""

    amax: float = Field(gt=0, allow_inf_nan=False)
    smoothing: list[float] | None = None


OPERANDS = ("query", "key", "value")


def unmeasured(layer: str, form: LayerFormat, ranges: Mapping[str, ActivationRange]) -> str:
    """The first range that a static layer needs and `ranges` lacks; empty if it has all."""
    if form.activations != "static":
        return ""
    needed = [f"{layer}.{operand}" for operand in OPERANDS] if form.kind == ATTENTION else [layer]
    return next((name for name in needed if name not in ranges), "")


class ComponentRecipe(_Model):
    cls: str
    config: dict[str, object]
    rules: list[Rule]
    ranges: dict[str, dict[str, ActivationRange]] = Field(default_factory=dict)
    """Part of the pipeline ("transformer") → layer → range; experts share an engine, each with its own.
    An attention has three: of ".query", ".key" and ".value"."""

    def of(self, layer: str) -> LayerFormat:
        for rule in self.rules:
            if fnmatchcase(layer, rule.layers):
                return LayerFormat(rule.format, rule.activations, rotation=rule.rotation)
        return IN_16_BIT

    def layout(self, layers: Iterable[str], attentions: Iterable[str] = ()) -> dict[str, LayerFormat]:
        """Layer → format, of those that leave 16 bit."""
        formats = {layer: form for layer in layers if (form := self.of(layer)).format != SIXTEEN}
        for name in attentions:  # which have no kernel in other formats, and no weights
            if (form := self.of(name)).format == "fp8" and form.activations != SIXTEEN:
                formats[name] = form._replace(kind=ATTENTION)
        return formats

    def digest(self) -> str:
        """SHA-256 of what the engine depends on: the rules, without their reasons."""
        rules = [(r.layers, r.format, r.activations, *([r.rotation] if r.rotation else [])) for r in self.rules]
        return hashlib.sha256(json.dumps([REWRITING, rules] if rules else []).encode()).hexdigest()

    def digest_with_ranges(self) -> str:
        """SHA-256 of what an engine with embedded weights depends on."""
        ranges = {part: {n: r.model_dump() for n, r in layers.items()} for part, layers in self.ranges.items()}
        return hashlib.sha256(json.dumps([self.digest(), ranges if self.rules else {}]).encode()).hexdigest()


class Calibration(_Model):
    """How the ranges were measured, and in which checkpoint."""

    method: Method
    samples: int
    steps: int
    prompts: str
    """SHA-256 of the prompts, one a line."""
    checkpoint: str
    """SHA-256 of the component's weight files."""
    versions: dict[str, str]
    quality: str = ""
    """What a search for sensitive blocks reached, of what was asked."""


class Recipe(_Model):
    """Formats, and ranges if any were measured, of a model's components; written as JSON."""

    schema_version: Literal[1] = 1
    model: str
    precision: Format
    calibration: Calibration | None = None
    components: dict[str, ComponentRecipe]

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_recipe(file: Path) -> Recipe:
    """Raises UserError naming file and field when it is no recipe."""
    try:
        return Recipe.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {where}: {first['msg']}; make it anew with overcrank calibrate.") from error


def layers_of(
    precision: str, activations: str, recipe: Recipe | Path | str | None
) -> tuple[Recipe | None, LayerFormat]:
    """A recipe, read if it is a file, and the format of quantized layers where it says nothing.

    Raises UserError for a recipe of another precision, and for activations that the format cannot multiply.
    """
    own = recipe if recipe is None or isinstance(recipe, Recipe) else read_recipe(Path(recipe))
    if own is not None and own.precision != precision:
        raise UserError(
            f"The recipe is for {own.precision}, not for {option('precision', precision)}; make them agree."
        )
    if activations not in ("static", "dynamic", SIXTEEN):
        raise UserError(f"{option('activations', activations)}: use dynamic, static or 16bit.")
    if precision == "nvfp4" and activations == SIXTEEN:
        raise UserError(
            f"{option('activations', SIXTEEN)}: nvfp4 multiplies activations in nvfp4 too; use dynamic or static."
        )
    if precision not in QUANTIZED:
        return own, IN_16_BIT
    return own, LayerFormat(precision, cast(Activations, activations))


def recipe_of(recipe: Recipe | None, component: Component, form: LayerFormat) -> ComponentRecipe:
    """What `recipe` says of a component, else the default for `form`.

    Raises UserError when it was made for another network, naming the field that differs.
    """
    if recipe is None:
        return default_recipe(component, form)
    entry = recipe.components.get(component.name)
    if entry is None:
        return default_recipe(component, IN_16_BIT)
    _check_architecture(recipe, entry, component)
    return entry


def _check_architecture(recipe: Recipe, entry: ComponentRecipe, component: Component) -> None:
    differing = differences(network(component), network(replace(component, config=entry.config)), "in the recipe")
    if entry.cls != component.cls:
        raise UserError(
            f"the recipe's {component.name} is a {entry.cls} (of {recipe.model}), this one a {component.cls}; "
            f"calibrate this model."
        )
    if differing:
        raise UserError(
            f"the recipe is of another architecture: its {component.name} (of {recipe.model}) differs in "
            f"{differing[0]}; calibrate this model."
        )


def default_rules(component: Component, form: LayerFormat) -> list[Rule]:
    """What is known to bear `form`: linear layers of transformer blocks, without those at either end.

    Modulation, embedders, the time step and the output projection stay in 16 bit.
    """
    blocks = [f"{r.path}.{i}" for r in component.repeats for i in range(r.full + r.after)]
    count = min(KEPT_ENDS, max(len(blocks) // 8, 1)) if len(blocks) > 2 else 0
    ends = blocks[:count] + blocks[len(blocks) - count :]
    rules = [Rule(layers=f"{b}.*", format=SIXTEEN, reason=f"among the {count} at either end") for b in ends]
    rules.append(Rule(layers="*.norm*", format=SIXTEEN, reason="modulation"))
    chains = [f"{path}.*" for path in dict.fromkeys(r.path for r in component.repeats)]
    within = chains or ["*blocks.*.attn*", "*blocks.*.ff*"]
    rules += [Rule(layers=p, format=form.format, activations=form.activations) for p in within]
    rules.append(Rule(layers="*", format=SIXTEEN, reason="outside the transformer blocks"))
    return rules


def default_recipe(component: Component, form: LayerFormat) -> ComponentRecipe:
    """All in 16 bit if `form` is, else the default rules; nothing measured."""
    rules = default_rules(component, form) if form.format != SIXTEEN else []
    return ComponentRecipe(cls=component.cls, config=network(component), rules=rules)
