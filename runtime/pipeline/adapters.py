"""The LoRAs of a pipeline, and how they are changed: merged into weights, or beside those that a file has quantized.

A quantized layer's bytes stay as they are: it holds A and B of all LoRAs, stacked along their ranks, which eager
PyTorch adds and an engine takes as inputs. Into other layers LoRAs are merged, and what was there is kept in host
memory where they may be changed, so that taking them out leaves the very bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from overcrank.errors import CheckpointError, UserError, present
from overcrank.export.module import torch_dtype
from overcrank.export.quantization.linear import has_kernels
from overcrank.models import family
from overcrank.models.base import Variant
from overcrank.options import option
from overcrank.runtime.pipeline.lora import Lora, LoraFile, Place, lora_option
from overcrank.runtime.pipeline.lora_parts import read_loras
from overcrank.runtime.sessions.lora_layer import LoraLayer, UnmergedLinear, held_ranks, lora_layers
from overcrank.runtime.sessions.select import compute_type
from overcrank.runtime.sessions.stored_linear import StoredLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

SET_LORAS = "pipe.overcrank.set_loras(['FILE:SCALE'])"
Halves = tuple[LoraLayer, "Tensor", "Tensor"]


class Adapters:
    """Of the modules of one pipeline."""

    def __init__(self, pipe: Any, words: Mapping[str, str]) -> None:
        """`words`: what people call the parts (lora_parts.py)."""
        self.parts: dict[str, nn.Module] = {
            name: module for name, module in pipe.components.items() if hasattr(module, "named_parameters")
        }
        self._pipeline, self._words = type(pipe), words
        self.always: Sequence[LoraFile] = ()  # of a preset, which stay
        self.loras: list[Lora] = []
        self.files: tuple[LoraFile, ...] = ()  # that were set last
        self._kept: dict[Place, Tensor] = {}  # as it was before anything was merged
        self._for_good: set[Place] = set()  # merged, with nothing kept
        self._read: dict[object, Lora] = {}  # files of the last call
        for part, module in self.parts.items():
            if any(isinstance(layer, StoredLinear) for layer in module.modules()):
                _refuse_peft(module, part)

    @staticmethod
    def leave_unmerged(modules: Iterable[nn.Module]) -> None:
        """From now on linear layers of these hold LoRAs beside their weights."""
        from torch import nn

        for layer in [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]:
            if has_kernels(layer.out_features, layer.in_features):
                UnmergedLinear.of(layer)

    def set(self, files: Sequence[LoraFile], keep: bool = True) -> None:
        """Have these LoRAs in place of those before.

        `keep`: what they are merged into, to be had back; of parts with quantized layers it always is. Raises UserError
        for what cannot be had beside a quantized layer, or in place of what was merged for good, CheckpointError for a
        file that is for another model or not finite; then the LoRAs are those before.
        """
        if self._for_good:
            part, name = min(self._for_good)
            raise UserError(
                f"LoRAs were merged into {part} ({name} among others) as it was loaded, with nothing kept; load with "
                f"{option('fuse_loras', False)} to change them."
            )
        loras = self._loras([*self.always, *files])
        effective = [lora for lora in loras if lora.scale]
        for lora in effective:
            self._require_mergeable(lora)
        try:
            self._put(effective, keep)
        except BaseException:
            self._put([lora for lora in self.loras if lora.scale], keep)
            raise
        self.loras, self.files = loras, tuple(files)

    @property
    def changeable(self) -> bool:
        """Whether others can be set: nothing was merged for good."""
        return not self._for_good

    def described(self, files: Sequence[LoraFile]) -> list[dict[str, Any]]:
        """What a sidecar would say with these set; raises UserError and CheckpointError as `set`."""
        return [lora.about() for lora in self._loras([*self.always, *files])]

    def about(self, merged_alone: bool = False) -> list[dict[str, Any]]:
        """What a sidecar says of them; `merged_alone`: of those that are in some weight."""
        return [lora.about() for lora in self.loras if not merged_alone or list(self._merged_part(lora).parameters())]

    def _loras(self, files: Sequence[LoraFile]) -> list[Lora]:
        """Read, but for those of which only the strength is another."""
        keys = [(one.file.resolve(), one.file.stat().st_mtime_ns, one.file.stat().st_size, one.part) for one in files]
        fresh = [one for one, key in zip(files, keys, strict=True) if key not in self._read]
        if fresh:
            loras = read_loras(files, self._pipeline, self.parts, self._words)
            self._read = dict(zip(keys, loras, strict=True))
        self._read = {key: self._read[key] for key in keys}
        return [replace(self._read[key], scale=one.scale) for one, key in zip(files, keys, strict=True)]

    def _put(self, loras: Sequence[Lora], keep: bool) -> None:
        import torch

        stacked = [halves for part, module in self.parts.items() for halves in _stacked(part, module, loras)]
        with torch.no_grad():
            for (part, name), before in self._kept.items():
                self.parts[part].get_parameter(name).copy_(before)
            self._kept.clear()
            for lora in map(self._merged_part, loras):
                for part, name in lora.parameters():
                    self._merge(lora, part, name, keep)
        for layer in (layer for module in self.parts.values() for layer in lora_layers(module).values()):
            layer.let_go()
        for layer, a, b in stacked:
            layer.hold(a, b)

    def _merge(self, lora: Lora, part: str, name: str, keep: bool) -> None:
        parameter = self.parts[part].get_parameter(name)
        if keep or lora_layers(self.parts[part]):
            self._kept.setdefault((part, name), parameter.detach().clone().cpu())
        else:
            self._for_good.add((part, name))
        added = present(lora.delta(part, name, parameter), f"what the LoRA adds to {name}")
        parameter.add_(added.reshape(parameter.shape).to(parameter))

    def _merged_part(self, lora: Lora) -> Lora:
        """What of a LoRA is not beside weights."""
        return replace(lora, pairs={k: v for k, v in lora.pairs.items() if not isinstance(self._layer(*k), LoraLayer)})

    def _layer(self, part: str, name: str) -> nn.Module:
        return self.parts[part].get_submodule(name)

    def _require_mergeable(self, lora: Lora) -> None:
        whole = dict.fromkeys(lora.differences, "a whole difference (diff)")
        layers = {
            (part, name.removesuffix(".weight")): what for (part, name), what in whole.items() if "weight" in name
        }
        for (part, name), what in (layers | {k: f"a {v.kind}" for k, v in lora.full.items()}).items():
            layer = self._layer(part, name)
            if isinstance(layer, StoredLinear):
                raise UserError(
                    f"{lora_option(lora.file)} has {what} of {part}.{name}, which is in {layer.format} and takes plain "
                    f"LoRA pairs alone; take such a LoRA, or weights in 16 bit."
                )


_of_pipelines: WeakKeyDictionary[Any, Adapters] = WeakKeyDictionary()


def adapters_of(pipe: Any, variant: Variant) -> Adapters:
    """The pipeline's own, also when it is accelerated anew."""
    if pipe not in _of_pipelines:
        _of_pipelines[pipe] = Adapters(pipe, family(variant.family).part_words)
    return _of_pipelines[pipe]


def merge(loras: Sequence[Lora], parts: Mapping[str, nn.Module]) -> None:
    """Add every LoRA to the weights of these modules, in place and for good."""
    import torch

    with torch.no_grad():
        for lora in loras:
            for part, name in lora.parameters():
                parameter = parts[part].get_parameter(name)
                added = present(lora.delta(part, name, parameter), f"what the LoRA adds to {name}")
                parameter.add_(added.reshape(parameter.shape).to(parameter))


def _stacked(part: str, module: nn.Module, loras: Sequence[Lora]) -> Iterable[Halves]:
    """Of each layer that holds LoRAs: A [rank, in] and B [out, rank] of all together, as its network computes."""
    import torch

    compute = torch_dtype(compute_type(module))
    for name, layer in lora_layers(module).items():
        own = [(lora, *lora.pairs[part, name]) for lora in loras if (part, name) in lora.pairs]
        for lora, a, b, _ in own:
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise CheckpointError(
                    f"{lora_option(lora.file)} holds NaN or infinities in {part}.{name}; save it again."
                )
        if own:
            a = torch.cat([a.float().flatten(1) for _, a, _, _ in own])
            b = torch.cat([b.float().flatten(1) * (factor * lora.scale) for lora, _, b, factor in own], 1)
            dtype = compute if isinstance(layer, StoredLinear) else layer.weight.dtype
            yield layer, a.to(layer.weight.device, dtype), b.to(layer.weight.device, dtype)


# ── diffusers' own functions ─────────────────────────────────────────────────────────


def _refuse_peft(module: Any, part: str) -> None:
    """PEFT cannot wrap layers that a file has quantized, and says so in words about classes."""
    for name in ("load_lora_adapter", "add_adapter", "set_adapters"):
        setattr(module, name, partial(_refused, part))
    module.unload_lora = partial(_unloaded, module, part)


def _refused(part: str, *_: object, **__: object) -> None:
    raise UserError(f"{part} has layers that its file has quantized, which PEFT cannot wrap; use {SET_LORAS}.")


def _unloaded(module: nn.Module, part: str) -> None:
    if held_ranks(module):
        raise UserError(f"The LoRAs of {part} are beside its quantized layers; use pipe.overcrank.set_loras([]).")
