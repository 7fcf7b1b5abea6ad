"""What a weight file is, from its header alone: which network, how its layers are stored, what serves it."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from math import prod

from overcrank.export.files.identify import Identified, identify
from overcrank.export.files.parts import AS_STORED
from overcrank.export.files.remote import local_header
from overcrank.export.files.stored_layers import PLAIN, stored_layers, weight_shapes
from overcrank.export.files.weight_file import WeightFile, open_weights

LORA = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down", "lora_w1", "hada_w1", "lokr_w1")
ENCODERS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "model.layers.0.self_attn.q_proj.weight": "a language model (text encoder)",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "a CLIP text encoder",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": "a CLIP or SigLIP image encoder",
}
"""A tensor that gives away what is no part of a pipeline that has engines."""


@dataclass(frozen=True)
class Inspection:
    """Bytes and values are of the header's tensors; nothing of their content was read."""

    file: str
    kind: str
    """"checkpoint", "LoRA", or what else it is, in words."""
    networks: tuple[Identified, ...]
    layers: dict[str, int]
    """Format → how many linear layers are stored in it."""
    others: dict[str, int]
    """Type → how many other tensors."""
    rotated: tuple[int, ...]
    """Sizes of ConvRot's groups, if any."""
    parameters: int
    bytes: int
    metadata: dict[str, str]

    @property
    def precision(self) -> str:
        """Of the engine that multiplies most layers as they are stored; auto (16 bit) where none does."""
        own = {AS_STORED[form]: count for form, count in self.layers.items() if form in AS_STORED}
        return max(own, key=lambda form: own[form]) if own else "auto"

    def commands(self) -> list[str]:
        """Those that build for the file, and render with it; none where it is not known of which model it is."""
        lines: list[str] = []
        for network in self.networks[:1]:
            for model in network.variants[:3]:
                lines.append(f"overcrank build --model {model} --layout {shlex.quote(self.file)} --gpu auto")
                part = f"{network.part}={shlex.quote(self.file)}"
                lines.append(f'overcrank render "a prompt" --model {model} --weights {part}')
        return lines


def inspect_file(where: str) -> Inspection:
    """`where`: a path, or a URL that is read in ranges. Raises CheckpointError for what is no such file."""
    with local_header(where) as path:
        file = open_weights(path)
        remote = "://" in where
        layers = stored_layers(file, holes=remote)
        shapes = weight_shapes(file, layers)
        kind = _kind(file)
        networks = tuple(identify(shapes)) if kind == "checkpoint" else ()
        own = {f"{name}.weight" for name in layers} | {s for layer in layers.values() for s in layer.scales.values()}
        others = Counter(PLAIN.get(file.tensors[n].dtype, file.tensors[n].dtype) for n in shapes if n not in own)
        return Inspection(
            file=where,
            kind=kind,
            networks=networks,
            layers=dict(Counter(layer.format for layer in layers.values()).most_common()),
            others=dict(others.most_common()),
            rotated=tuple(sorted({layer.rotation for layer in layers.values()} - {0})),
            parameters=sum(prod(shape) for shape in shapes.values()),
            bytes=file.bytes,
            metadata=dict(file.metadata),
        )


def _kind(file: WeightFile) -> str:
    if any(part in name for name in file.tensors for part in LORA):
        return "LoRA"
    for name, kind in ENCODERS.items():
        if any(tensor.endswith(name) for tensor in file.tensors):
            return kind
    return "checkpoint"
