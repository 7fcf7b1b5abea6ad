"""What sort of weights a file holds, by the names of its tensors: a LoRA, an encoder, or a network's own."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHECKPOINT, LORA = "checkpoint", "LoRA"
_LORA = re.compile(
    r"\.(lora_[AB]|lora_(up|down)|lora\.(up|down)|lora_w[12]|hada_w\d|lokr_w\d|dora_scale|diff|diff_b|oft_\w+)(\.|$)"
)
_ENCODERS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5 text encoder",
    "enc.blk.0.attn_q.weight": "T5 text encoder",
    "layers.0.self_attn.q_proj.weight": "language model (text encoder)",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "CLIP text encoder",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": "CLIP or SigLIP image encoder",
}
"""A tensor that gives away what is no part of a pipeline that has engines."""


def encoder_part(kind: str) -> str:
    """The part of a pipeline that an encoder of this kind is."""
    return "image_encoder" if "image" in kind else "text_encoder"


def kind_of(names: Iterable[str]) -> str:
    """CHECKPOINT, LORA, or which encoder it is, in words."""
    names = list(names)
    if any(_LORA.search(name) for name in names):
        return LORA
    for suffix, kind in reversed(_ENCODERS.items()):
        if any(name == suffix or name.endswith(f".{suffix}") for name in names):
            return kind
    return CHECKPOINT
