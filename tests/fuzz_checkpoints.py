"""Checkpoints and LoRA files of an attacker, or of a download that went wrong: what tests/fuzz.py does with them.

Headers of safetensors files are also held against the library's own reading: what it takes, we take, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from overcrank import models
from overcrank.errors import CheckpointError, OvercrankError
from overcrank.export import expected, headers
from overcrank.export.expected import require_part
from overcrank.export.headers import read_header
from overcrank.models import resolve
from overcrank.runtime.pipeline import checkpoint, lora, lora_parts
from overcrank.runtime.pipeline.checkpoint import file_variant, require_whole
from overcrank.runtime.pipeline.lora_parts import lora_of, read_loras
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests import pipelines

CONFIG: dict[str, Any] = {
    "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "cross_attention_dim": 8,
    "in_channels": 4, "out_channels": 4, "caption_channels": 8,
}  # fmt: skip
LAYER = "transformer_blocks.0.attn1.to_q"
RECORD = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.use_rslora": True,
          "transformer.alpha_pattern": {LAYER: 3}}  # fmt: skip


class CheckpointTargets:
    """As tests.fuzz.Targets: `valid` documents, and a function of bytes for each kind of them."""

    followed = (headers, expected, models, checkpoint, lora_parts, lora)

    def __init__(self, folder: Path) -> None:
        self.folder = pipelines.saved("ltx", folder)
        self.module = diffusers.LTXVideoTransformer3DModel(**CONFIG)
        self.module.save_pretrained(self.folder / "transformer")
        weights = self.folder / "transformer/diffusion_pytorch_model.safetensors"
        self.lora = folder / "lora.safetensors"
        halves = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2), "alpha": torch.ones(())}
        tensors = {f"transformer.{LAYER}.{name}": value for name, value in halves.items()}
        tensors |= {"transformer.proj_out.diff_b": torch.ones(4)}
        save_file(tensors, self.lora, {"lora_adapter_metadata": json.dumps(RECORD)})
        self.files = {"safetensors": weights, "lora": self.lora}
        self.data: dict[str, bytes] = {}
        self.valid: dict[str, bytes] = {}
        for name, file in self.files.items():
            self.valid[name], self.data[name] = _parts_of(file)
        self.whole = weights.read_bytes()
        self.configs = {
            "config": self.folder / "transformer/config.json",
            "model_index": self.folder / "model_index.json",
        }
        self.valid |= {name: file.read_bytes() for name, file in self.configs.items()}
        self.all: dict[str, Callable[[bytes], None]] = {
            "safetensors": self.safetensors,
            "lora": self.as_lora,
            "config": lambda content: self.configured("config", content),
            "model_index": lambda content: self.configured("model_index", content),
        }

    def safetensors(self, header: bytes) -> None:
        file = self._written("safetensors", header)
        try:
            with safe_open(file, "pt") as opened:
                wanted = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            wanted = None
        try:
            tensors = read_header(file)
        except CheckpointError:
            assert wanted is None
            return
        assert {name: entry.shape for name, entry in tensors.items()} == wanted
        with suppress(OvercrankError):
            config = json.loads(self.valid["config"])
            require_part(file.parent, "diffusers", "LTXVideoTransformer3DModel", config, tensors)

    def as_lora(self, header: bytes) -> None:
        file = self._written("lora", header)
        parts = {"transformer": self.module}
        with suppress(OvercrankError):
            for lora in read_loras([lora_of(str(file))], diffusers.LTXPipeline, parts, {}):
                for part, parameter in lora.parameters():
                    added = lora.delta(part, parameter, parts[part].get_parameter(parameter))
                    assert added is not None
                    assert added.numel() == parts[part].get_parameter(parameter).numel()

    def configured(self, name: str, content: bytes) -> None:
        self.files["safetensors"].write_bytes(self.whole)
        for other, file in self.configs.items():
            file.write_bytes(content if other == name else self.valid[other])
        with suppress(OvercrankError):
            variant = resolve(str(self.folder))
            pipeline = getattr(diffusers, next(iter(variant.tasks.values())))
            require_whole(self.folder, pipeline, file_variant(self.folder, variant))

    def _written(self, name: str, header: bytes) -> Path:
        file = self.files[name]
        file.write_bytes(len(header).to_bytes(8, "little") + header + self.data[name])
        return file


def _parts_of(file: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]
