"""A LoRA file layer by layer, by its own names: layouts and kinds that diffusers' loaders do not read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError
from overcrank.runtime.pipeline.lora import Contents, Factor, Parts, lora_option
from overcrank.runtime.pipeline.lora_kinds import KINDS, kind_of, picked, rank_of
from overcrank.runtime.pipeline.lora_layouts import TRAINER, odd_setting
from overcrank.runtime.pipeline.lora_names import LayerNames, Runs, known, shape_in

if TYPE_CHECKING:
    from torch import Tensor

PEFT = "base_model.model."
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?P<what>lora_(?:A|B|down|up)|lora\.(?:down|up)|lora_magnitude_vector|dora_scale|alpha|diff|diff_b"
    r"|(?:hada|lokr)_[wt]\d?(?:_[ab])?)(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<kind>weight|bias))?"
)
_WHAT = {
    **{"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"},
    **{"lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"},
}


@dataclass
class _Layer:
    """What a file has of one layer: half → tensor."""

    raw: str
    halves: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Of its weight."""
        own = self.halves
        if "B" in own:
            return own["B"].shape[0]
        if "hada_w1_a" in own:
            return own["hada_w1_a"].shape[0]
        if kind_of(own) == "LoKr":
            first, second = (own.get(f"lokr_w{i}", own.get(f"lokr_w{i}_a")) for i in (1, 2))
            return 0 if first is None or second is None else first.shape[0] * second.shape[0]
        return next((own[name].shape[0] for name in ("diff", "diff_b") if name in own and own[name].dim()), 0)


def by_names(file: Path, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any], parts: Parts) -> Contents:
    """Of the denoiser; names that are none of its layers' are `strange`.

    Raises CheckpointError for a layer that is not whole, or of a kind that is not merged.
    """
    own = next((p for p in ("transformer", "unet") if p in parts), "")
    if not own:
        return Contents()
    if not adapter and any(key.startswith(PEFT) for key in tensors):
        adapter = {f"{own}.{name}": value for name, value in _beside(file).items()}
    reader = _Reader(file, adapter, own, parts)
    layers, reader.contents.strange = _layers(tensors)
    for layer in layers.values():
        reader.put(layer)
    return reader.contents


def _beside(file: Path) -> dict[str, Any]:
    """What PEFT writes beside its weights, alpha among it."""
    try:
        config = json.loads(file.with_name("adapter_config.json").read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{lora_option(file)} is in PEFT's own layout ({PEFT}…), whose alpha is in adapter_config.json; put that "
            f"beside it."
        ) from error
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file.with_name('adapter_config.json')} is no JSON object; save the LoRA again.")
    if odd := odd_setting({key: value for key, value in config.items() if key != "use_dora"}):
        raise CheckpointError(
            f"{lora_option(file)}: its adapter_config.json has {odd}; it is not merged here: {TRAINER}."
        )
    return config


class _Reader:
    """Puts a file's layers where they belong in a module."""

    def __init__(self, file: Path, adapter: Mapping[str, Any], part: str, parts: Parts) -> None:
        self.contents, self._file, self._adapter = Contents(), file, adapter
        self._part, self._parts, self._names = part, parts, LayerNames(parts[part])

    def put(self, layer: _Layer) -> None:
        try:
            kind = kind_of(layer.halves)
        except CheckpointError as error:
            raise CheckpointError(f"{lora_option(self._file)}: {layer.raw} {error}; {TRAINER}.") from error
        if not layer.rows or "A_bias" in layer.halves:
            self.contents.odd += layer.keys
            return
        found = self._names.find(layer.raw, layer.rows)
        for name, rows in found.items():
            self._weight(layer, kind, name, rows)
            self._differences(layer, name, rows)
        if not found and not self._parameter(layer):
            self.contents.strange.append(layer.raw)

    def _weight(self, layer: _Layer, kind: str, name: str, rows: Runs) -> None:
        halves, place = layer.halves, (self._part, name)
        if kind:
            rank = rank_of(kind, halves)
            self.contents.full[place] = KINDS[kind](halves, self._factor(layer, name, rank) if rank else 1.0, rows)
        elif "A" in halves and "B" in halves:
            factor = self._factor(layer, name, halves["A"].shape[0])
            self.contents.pairs[place] = halves["A"], picked(halves["B"], rows), factor
            if "B_bias" in halves:
                self.contents.differences[self._part, f"{name}.bias"] = picked(halves["B_bias"], rows) * factor

    def _differences(self, layer: _Layer, name: str, rows: Runs) -> None:
        for what, parameter in (("diff", "weight"), ("diff_b", "bias")):
            if what in layer.halves:
                self.contents.differences[self._part, f"{name}.{parameter}"] = picked(layer.halves[what], rows)

    def _parameter(self, layer: _Layer) -> bool:
        """Whether it is a difference of a parameter that belongs to no layer."""
        name = known(f"{self._names.bare(layer.raw)}.weight", self._part, self._parts)
        whole = layer.halves.get("diff")
        if whole is None or shape_in(self._parts, self._part, name) is None:
            return False
        self.contents.differences[self._part, name] = whole
        return True

    def _factor(self, layer: _Layer, name: str, rank: int) -> float:
        alpha = layer.halves.get("alpha")
        state = {} if alpha is None else {f"{self._part}.{name}.alpha": alpha}
        return Factor(self._file, state, {}, self._adapter).of(self._part, name, rank)


def _layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Layer], list[str]]:
    """And keys that are of none."""
    layers: dict[str, _Layer] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        layer = layers.setdefault(match["layer"], _Layer(match["layer"]))
        what = _WHAT.get(match["what"], match["what"])
        layer.halves[f"{what}_bias" if match["kind"] == "bias" else what] = tensor
        layer.keys.append(key)
    return layers, strange
