"""What a LoRA file is, from its header: its layout, its ranks, and the models whose layers it fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
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
    for variants, component in _denoisers():
        share = _share(few, component) if few else 0.0
        if share > best[0]:
            best = share, component.subfolder, variants
        elif share and share == best[0]:
            best = share, best[1], (*best[2], *variants)
    return best


def _denoisers() -> Iterator[tuple[tuple[str, ...], Component]]:
    """Every published network that denoises, with its variants."""
    for cls, networks in networks_by_class().items():
        for variants in networks:
            variant = variant_named(variants[0])
            for component in parts_of(variant).values() if variant is not None else ():
                if component.cls.rpartition(".")[2] == cls and component.subfolder in ("transformer", "unet"):
                    yield variants, component
                    break


def _share(layers: Mapping[str, tuple[int, int]], component: Component) -> float:
    from overcrank.runtime.pipeline.lora_names import LayerNames

    module = _shallow(component)
    names, matched = LayerNames(module), 0
    for i, (raw, (outputs, inputs)) in enumerate(layers.items()):
        own = names.find(raw, outputs)
        shapes = [tuple(module.get_parameter(f"{name}.weight").shape) for name in own]
        matched += bool(shapes) and all(s[1] == inputs for s in shapes) and sum(s[0] for s in shapes) == outputs
        if i == 7 and not matched:  # of another class, or size
            return 0.0
    return matched / len(layers)


def _shallow(component: Component) -> nn.Module:
    """The component's module of few blocks, without values."""
    from accelerate import init_empty_weights
    from overcrank.export.module import construct

    with init_empty_weights():
        return construct(component.cls, component.traced_config or component.config, component.subfolder)
