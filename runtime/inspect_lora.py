"""What a LoRA file is, from its header: its layout, its ranks, and the models whose layers it fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overcrank.export.files.identify import networks_by_class
from overcrank.export.files.parts import parts_of
from overcrank.export.files.weight_file import WeightFile
from overcrank.models.base import Component
from overcrank.models.registry import variant_named

if TYPE_CHECKING:
    from torch import nn

_KEY = re.compile(
    r"(?P<layer>.+?)\.(?P<what>lora_(?:A|B|down|up)|lora\.(?:down|up)|alpha|dora_scale|lora_magnitude_vector|diff|diff_b"
    r"|(?:hada|lokr|oft)_\w+)(?:\.|$).*"
)
_DOWN, _UP = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")
_KINDS = {"hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
_LAYOUTS = (
    ("lora_unet_", "kohya (lora_unet_…)"),
    ("base_model.model.", "PEFT (base_model.model.…)"),
    ("lycoris_", "LyCORIS (lycoris_…)"),
    ("transformer.", "diffusers (transformer.…)"),
    ("unet.", "diffusers (unet.…)"),
    ("diffusion_model.", "original names (diffusion_model.…)"),
    ("model.diffusion_model.", "original names (model.diffusion_model.…)"),
)
SAMPLED = 7
"""Of so many layers at least one has a name of the class, or the file is another's."""
SHALLOW = 3
"""Blocks of a chain whose layers are compared; the others are like them."""


@dataclass(frozen=True)
class LoraFacts:
    kind: str
    """LoRA, LoHa, LoKr, OFT, DoRA."""
    layout: str
    layers: int
    ranks: dict[int, int]
    """Rank → how many layers."""
    part: str
    """Of the pipeline that it fits."""
    fits: tuple[str, ...]
    """Published variants that have every layer of it, or of which it fits the most."""
    matched: float
    """The share of layers that those have."""


def lora_facts(file: WeightFile) -> LoraFacts:
    """Nothing but the header is read."""
    layers = _layers(file)
    kinds = Counter(kind for what in layers.values() for w in what for key, kind in _KINDS.items() if w.startswith(key))
    first = next(iter(layers), "")
    layout = next((words for prefix, words in _LAYOUTS if first.startswith(prefix)), "names without a prefix")
    ranks = Counter(s[0] for what in layers.values() for w, s in what.items() if w in _DOWN and s)
    share, part, fits = _fitting({n: own for n, what in layers.items() if (own := _shape(what)) is not None})
    kind = kinds.most_common(1)[0][0] if kinds else "LoRA"
    return LoraFacts(kind, layout, len(layers), dict(sorted(ranks.items())), part, fits, share)


def _layers(file: WeightFile) -> dict[str, dict[str, tuple[int, ...]]]:
    """Layer → what the file has of it, with its shape."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in file.tensors.items():
        if (match := _KEY.fullmatch(name)) is not None:
            layers.setdefault(match["layer"], {})[match["what"]] = stored.shape
    return layers


def _shape(what: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer, of what a LoRA has of it."""
    down, up = (next((what[w] for w in names if w in what), None) for names in (_DOWN, _UP))
    return (up[0], down[1]) if up and down and len(down) > 1 else None


def _fitting(layers: Mapping[str, tuple[int, int]]) -> tuple[float, str, tuple[str, ...]]:
    """(share of layers, part, variants) of the networks that have the most of them."""
    few = {n: s for n, s in layers.items() if all(int(d) < SHALLOW for d in re.findall(r"\d+", n))} or dict(layers)
    best: tuple[float, str, tuple[str, ...]] = (0.0, "", ())
    for cls, networks in networks_by_class().items() if few else ():
        for variants in networks:
            component = _denoiser(cls, variants[0])
            share = None if component is None else _share(few, component)
            if component is None or share is None:
                break  # the class's other networks have the same names
            if share > best[0]:
                best = share, component.subfolder, variants
            elif share and share == best[0]:
                best = share, best[1], (*best[2], *variants)
    return best


def _denoiser(cls: str, name: str) -> Component | None:
    """The component of this class of a published variant, if it denoises."""
    variant = variant_named(name)
    every = parts_of(variant).items() if variant is not None else ()
    own = (c for part, c in every if part in ("transformer", "unet") and c.cls.rpartition(".")[2] == cls)
    return next(own, None)


def _share(layers: Mapping[str, tuple[int, int]], component: Component) -> float | None:
    """How much of the layers a network has, by name and shape; None where it has no such names."""
    from overcrank.runtime.pipeline.lora_names import LayerNames

    module = _shallow(component)
    names, named, matched = LayerNames(module), 0, 0
    for i, (raw, (outputs, inputs)) in enumerate(layers.items()):
        own = names.find(raw, outputs)
        shapes = [tuple(module.get_parameter(f"{name}.weight").shape) for name in own]
        named += bool(own)
        matched += bool(shapes) and all(s[1] == inputs for s in shapes) and sum(s[0] for s in shapes) == outputs
        if i == SAMPLED and not named:
            return None
    return matched / len(layers) if named else None


def _shallow(component: Component) -> nn.Module:
    """The component's module of few blocks, without values."""
    from accelerate import init_empty_weights
    from overcrank.export.module import construct

    with init_empty_weights():
        return construct(component.cls, component.traced_config or component.config, component.subfolder)
