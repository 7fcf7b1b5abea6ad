"""The names of parameters in the files their authors publish, of parameters by diffusers' names.

The inverse of diffusers' single-file converters, which cannot be called backwards; tests/test_file_formats.py converts
with them what is named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Renames = Sequence[tuple[str, str]]
"""Regular expressions on a name, in order, and what takes their places."""

LTX: Renames = (
    (r"^proj_in\.", "patchify_proj."),
    (r"^time_embed\.", "adaln_single."),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
)
LTX2: Renames = (
    *LTX,
    (r"^audio_proj_in\.", "audio_patchify_proj."),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
    (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
    (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
    (r"(video|audio)_a2v_cross_attn_scale_shift_table", r"scale_shift_table_a2v_ca_\1"),
)
WAN: Renames = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    ("scale_shift_table", "modulation"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    ("norm2", "norm_other"),
    ("norm3", "norm2"),
    ("norm_other", "norm3"),
)
HUNYUAN: Renames = (
    (r"^x_embedder", "img_in"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"^context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    (r"(^txt_in\..*)norm_out\.linear", r"\1adaLN_modulation.1"),
    (r"(^txt_in\..*)attn\.to_out\.0", r"\1self_attn_proj"),
    (r"(^txt_in\..*)ff\.net\.0\.proj", r"\1mlp.fc1"),
    (r"(^txt_in\..*)ff\.net\.2", r"\1mlp.fc2"),
    (r"(^txt_in\..*)attn\.to_([qkv])", r"\1self_attn_qkv/\2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_blocks.\1.linear1/\2"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1/z"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])", r"single_blocks.\1.\2_norm"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.linear"),
    (r"^transformer_blocks", "double_blocks"),
    (r"attn\.to_([qkv])", r"img_attn_qkv/\1"),
    (r"attn\.add_([qkv])_proj", r"txt_attn_qkv/\1"),
    (r"attn\.to_out\.0", "img_attn_proj"),
    (r"attn\.to_add_out", "txt_attn_proj"),
    (r"attn\.norm_added_([qk])", r"txt_attn_\1_norm"),
    (r"attn\.norm_([qk])", r"img_attn_\1_norm"),
    (r"norm1\.linear", "img_mod.linear"),
    (r"norm1_context\.linear", "txt_mod.linear"),
    (r"ff\.net\.0\.proj", "img_mlp.fc1"),
    (r"ff\.net\.2", "img_mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.fc1"),
    (r"ff_context\.net\.2", "txt_mlp.fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
)
"""Behind a slash: which part of a fused tensor it is, in the order of FUSED."""
FUSED = ("", "q", "k", "v", "z")


@dataclass(frozen=True)
class Part:
    """Rows of a parameter of diffusers' that are the rows `within` of a tensor of the file."""

    name: str
    rows: slice
    within: slice


@dataclass(frozen=True)
class Original:
    """How a network's authors name its parameters."""

    renames: Renames
    shapes: Mapping[str, tuple[int, ...]]
    """Of diffusers' parameters."""
    blocks: str = "blocks."
    """What a quantized layer has in its name."""
    halves: str = "final_layer.adaLN_modulation.1"
    """A layer whose halves are the other way round."""

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        fused: dict[str, dict[str, str]] = {}
        for name in self.shapes:
            renamed = name
            for pattern, new in self.renames:
                renamed = re.sub(pattern, new, renamed)
            whole, _, last = renamed.partition("/")
            letter, _, kind = last.partition(".")
            fused.setdefault(f"{whole}.{kind}" if last else whole, {})[letter] = name
        return {tensor: self._placed(tensor, names) for tensor, names in fused.items()}

    def _placed(self, tensor: str, names: Mapping[str, str]) -> list[Part]:
        parts, at = [], 0
        for _, name in sorted(names.items(), key=lambda named: FUSED.index(named[0])):
            rows = self.shapes[name][0] if self.shapes[name] else 1
            cuts = [(rows // 2, rows), (0, rows // 2)] if tensor.startswith(self.halves) else [(0, rows)]
            for start, stop in cuts:
                parts.append(Part(name, slice(start, stop), slice(at, at + stop - start)))
                at += stop - start
        return parts

    def parts(self, tensor: str) -> list[Part]:
        """What parameters a tensor of the file holds, in order."""
        return self._parts[tensor]

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are in the file."""
        return {
            name: torch.cat([parameters[part.name].detach()[part.rows] for part in parts])
            for name, parts in self._parts.items()
        }

    def each(self) -> Iterator[tuple[str, list[Part]]]:
        """Tensors of the file, with the parameters in them."""
        yield from self._parts.items()

    def quantized(self, layer: str, shape: Sequence[int]) -> bool:
        """Whether files have it quantized: matrices of the blocks, with what they are modulated by left as it is."""
        wide = len(shape) == 2 and shape[1] >= 64 and f"{layer}.weight" in self._parts
        return wide and self.blocks in layer and "norm" not in layer and "mod" not in layer
