"""What a LoRA file that is not merged here is, told by its names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TRAINER = "merge it into the checkpoint with its trainer, and give that folder as the model"
_KINDS = (
    (r"\.oft_|\.boft_", "OFT (rotations)", TRAINER),
    (r"\.ia3_|\.on_input$", "IA3 (scales of activations)", TRAINER),
    (r"\.vera_|\.randlora_|\.lora_mid\.|\.lora_embedding_", "another kind than plain LoRA pairs", TRAINER),
)


def layout_of(keys: Collection[str]) -> str:
    """A sentence's end, "is …; do …", on a file with these names, "" for none that is known."""
    for pattern, name, need in _KINDS:
        if any(re.search(pattern, key) for key in keys):
            return f"is {name}, which is not merged here; {need}"
    return ""


def odd_setting(adapter: Mapping[str, Any]) -> str:
    """A setting of the file's own record that makes it another thing than B A is, "" for none."""
    for key, value in adapter.items():
        name = key.rpartition(".")[2]
        if name in ("use_dora", "use_qalora", "fan_in_fan_out") and value:
            return f"{name}={value}"
        if name == "init_lora_weights" and str(value).partition("_niter")[0] in ("pissa", "olora", "corda", "loftq"):
            return f"{name}={value}, which changes the model's own weights"
    return ""


def halves_that_disagree(a: Tensor | None, b: Tensor | None) -> str:
    """What is wrong with a pair, "" for nothing."""
    if a is None or b is None:
        return f"has lora_{'A' if b is None else 'B'} alone"
    if a.ndim < 2 or b.ndim < 2 or not a.shape[0]:
        return f"has halves of shape {list(a.shape)} and {list(b.shape)}"
    if a.shape[0] != b.shape[1]:
        return f"has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B"
    return ""
