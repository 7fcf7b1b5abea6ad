"""Reasons in a module for which its engine does not serve: it, or a parameter, is otherwise than its class makes it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from overcrank.engines.refusals import BUILD, OPTION, OfThisCall, Refusal
from overcrank.export.quantization.lora import rank_for
from overcrank.export.quantization.recipe import QUANTIZED


class ModuleChange(enum.Enum):
    """What is wrong in a module at {place}, and what undoes it; {own} is there, and the class makes {stock}."""

    LORA = "{place} has LoRA layers", "fuse them: pipe.fuse_lora(), then pipe.unload_lora_weights()"
    UNKNOWN = "{place} ({own}) is none of the modules that its class makes", "load the checkpoint as published"
    OTHER_CLASS = "{place} is a {own} where its class makes a {stock}", "load the checkpoint unquantized"
    PROCESSOR = "{place} has the attention processor {own}", "set_attn_processor with {stock}"
    MISSING = "the module has no {place}", "load the checkpoint anew"
    DIFFUSERS_HOOKS = "{place} has diffusers hooks ({own})", "disable the cache or the casting that set them"
    HOOKS = "{place} has forward hooks, which an engine would not call", "remove them"
    GLOBAL_HOOKS = "every module has forward hooks (register_module_forward_hook)", "remove them"
    ACCELERATE_HOOKS = (
        "{place} has hooks of accelerate",
        "remove it; whole parts are moved with {option:vram=low} or enable_model_cpu_offload()",
    )
    FORWARD = (
        "{place} has a forward that is not its class's",
        "remove it; whole parts are moved with {option:vram=low} or enable_model_cpu_offload()",
    )
    CLASS_FORWARD = "{place}.forward was replaced by {own}", "give the class its own forward back"
    FREE_U = "FreeU is on in {place}", "call pipe.disable_freeu()"
    DROPOUT = "{place} drops values at random, as in training", "call eval() on the module"
    CONSTANTS = (
        "{place} has other values than its class gives it, which engines hold as constants",
        "load the checkpoint as published",
    )
    REPLACED = "{place} is not the one that was accelerated", "call accelerate(pipe) again"


@dataclass(frozen=True)
class ModuleChanged(OfThisCall):
    change: ModuleChange
    place: str = ""
    own: str = ""
    stock: str = ""

    @property
    def kind(self) -> str:
        return f"{super().kind}.{self.change.name}"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        fields = {"place": self.place, "own": self.own, "stock": self.stock, "option": OPTION}
        what, fix = (text.format(**fields) for text in self.change.value)
        return what, fix


class Unfit(enum.Enum):
    """What of a parameter {name} is {own} and should be {wanted}, and what to do."""

    PLACE = (
        "on {own}, where the engine is not",
        "keep the whole part on the card, or let it come and go with {option:vram=low}",
    )
    LAYOUT = "in another memory format", "keep it contiguous"
    TYPE = "as {own}, and the engine takes it as {wanted}", "load the pipeline with dtype={wanted}"
    SIZE = "with {own} values, and the engine takes {wanted}", "keep it as it was loaded"
    ADDRESS = (
        "at an address that is no multiple of {wanted} bytes",
        "give each parameter memory of its own (parameter.data = parameter.data.clone())",
    )


@dataclass(frozen=True)
class ParameterUnfit(OfThisCall):
    """It may be fit later, such as when its module is moved back."""

    problem: Unfit
    name: str
    own: str = ""
    wanted: str = ""

    @property
    def kind(self) -> str:
        return f"{super().kind}.{self.problem.name}"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        what, fix = (text.format(own=self.own, wanted=self.wanted, option=OPTION) for text in self.problem.value)
        return f"the pipeline holds {self.name} {what}", fix


@dataclass(frozen=True)
class NoParameter(Refusal):
    part: str
    parameter: str
    shape: tuple[int, ...]
    what = "the {part} has no parameter {parameter} of shape {shape}"
    fix = "fuse LoRAs (pipe.fuse_lora(), pipe.unload_lora_weights()) and load the checkpoint unquantized"


@dataclass(frozen=True)
class LoraUnfit(Refusal):
    """Of LoRAs that are beside the weights, which an engine takes as inputs."""

    component: str
    rank: int  # of the pipeline's LoRAs together
    needed: int  # the smallest an engine with them can be built with
    have: int  # what the engine takes; 0 for none
    missing: str  # a layer for which the engine takes none, though for others it does
    precision: str

    def words(self, build: str = BUILD) -> tuple[str, str]:
        takes = f"takes LoRAs of rank {self.have} together" if self.have else "takes no LoRA beside its weights"
        what = f"the engine of {self.component} {takes}, and the pipeline's have rank {self.rank}"
        if self.missing:
            what = f"the engine of {self.component} takes no LoRA beside {self.missing}, which the pipeline has one for"
        precision = f" --precision {self.precision}" if self.precision and " --layout " not in build else ""
        layers = " --lora-layers all" if self.missing or self.precision not in QUANTIZED else ""
        return what, f"{build}{precision} --lora-rank {max(self.needed, self.have)}{layers}"


def lora_unfit(component: str, needed: Mapping[str, int], taken: Mapping[str, int], precision: str) -> LoraUnfit | None:
    """Why an engine whose layers take LoRAs of the ranks in `taken` cannot have those in `needed`; None if it can."""
    if all(rank <= taken.get(name, 0) for name, rank in needed.items()):
        return None
    missing = next((name for name in needed if name not in taken), "") if taken else ""
    rank = max(needed.values())
    return LoraUnfit(component, rank, rank_for(rank), max(taken.values(), default=0), missing, precision)


@dataclass(frozen=True)
class NoRange(Refusal):
    layer: str
    what = "{layer} needs a range that no recipe gives"
    fix = "calibrate, and render with {option:recipe}, or build with {option:activations=dynamic}"
