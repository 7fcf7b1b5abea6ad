"""The HunyuanVideo transformers (13B, 1.5, FramePack): what is traced, and a call as named inputs.

Video tokens come as flat patches, padding is cut from the text before the engine sees it (a masked key
counts for nothing), and rotary tables come from outside. Batch is 1, as the pipelines call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.errors import OtherKind, ShapeError
from overcrank.models._common import (
    Patch,
    PerOwnerCache,
    attend,
    embedded,
    forwards,
    given,
    patches,
    rotated,
    sample_output,
    shallow,
    unpatched_first,
)
from overcrank.models.base import Call, Component, Config, Sizes, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

CLEAN = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}
"""FramePack's history and its patches, each a convolution of `clean_x_embedder`."""
PROJECTIONS = dict(zip(CLEAN, ("proj", "proj_2x", "proj_4x"), strict=True))
IMAGE_TOKENS = 729  # of the SigLIP image encoder


def patch_of(config: Config) -> Patch:
    return (config["patch_size_t"], config["patch_size"], config["patch_size"])


def is_newer(config: Config) -> bool:
    """Whether it is HunyuanVideo 1.5."""
    return "text_embed_2_dim" in config


def component(
    cls: str, config: Config, sizes: Callable[[VideoShape], Sizes], traced: Sizes, *, framepack: bool = False
) -> Component:
    """The transformer as a component; `traced` are lengths of the axes that not every kind has, while tracing."""
    newer, patch = is_newer(config), patch_of(config)
    inputs = _inputs(config, framepack, newer)
    names = tuple(t.name for t in inputs)
    chains = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
    return Component(
        name="denoiser",
        cls=cls,
        subfolder="transformer",
        config=config,
        **shallow(config, chains),
        inputs=inputs,
        outputs=(TensorSpec("sample", (1, "tokens", config["out_channels"] * prod(patch))),),
        forward=partial(newer_denoiser if newer else denoiser, names=names),
        adapt=partial(adapt, names=names, config=config),
        returns=partial(output, patch=patch),
        sample=partial(sample, names=names),
        sizes=sizes,
        trace_sizes={"tokens": 24, "text": 12, **traced},
        free_axes={"text": 1} | ({"text_2": 1} if newer else {}),
    )


def _inputs(config: Config, framepack: bool, newer: bool) -> tuple[TensorSpec, ...]:
    half = sum(config["rope_axes_dim"]) // 2
    inputs = [
        TensorSpec("hidden_states", (1, "tokens", config["in_channels"] * prod(patch_of(config)))),
        TensorSpec("timestep", (1,), "float32"),
        TensorSpec("encoder_hidden_states", (1, "text", config["text_embed_dim"])),
        TensorSpec("rope_cos", (1, "tokens", half), "float32"),
        TensorSpec("rope_sin", (1, "tokens", half), "float32"),
    ]
    if newer:
        inputs.append(TensorSpec("encoder_hidden_states_2", (1, "text_2", config["text_embed_2_dim"])))
        inputs.append(TensorSpec("bias_2", (1, "text_2")))
        if config.get("use_meanflow"):
            inputs.append(TensorSpec("timestep_r", (1,), "float32"))
    else:
        inputs.append(TensorSpec("pooled_projections", (1, config["pooled_projection_dim"])))
        if config["guidance_embeds"]:
            inputs.append(TensorSpec("guidance", (1,), "float32"))
    if newer and config["task_type"] == "i2v":
        inputs.append(TensorSpec("image_embeds", (1, IMAGE_TOKENS, config["image_embed_dim"])))
    if config.get("image_condition_type") == "token_replace":
        inputs.append(TensorSpec("first_frame", (1, "tokens", 1)))
    if framepack:
        inputs.append(TensorSpec("image_embeds", (1, IMAGE_TOKENS, config["image_proj_dim"])))
        for name, patch in CLEAN.items():
            inputs.append(TensorSpec(name, (1, name, config["in_channels"] * prod(patch))))
            inputs += [TensorSpec(f"{name}_{part}", (1, name, half), "float32") for part in ("cos", "sin")]
    return tuple(inputs)


# ── what is traced ───────────────────────────────────────────────────────────────────


def denoiser(module: nn.Module, *inputs: T, names: tuple[str, ...]) -> T:
    """HunyuanVideo(Framepack)Transformer3DModel.forward on patches and unpadded text."""
    m: Any = module
    of = dict(zip(names, inputs, strict=True))
    x = embedded(m.x_embedder.proj, of["hidden_states"])
    tokens = x.shape[1]
    temb, replaced = m.time_text_embed(of["timestep"], of["pooled_projections"], of.get("guidance"))
    text = m.context_embedder(of["encoder_hidden_states"], of["timestep"], None)
    cos, sin = of["rope_cos"], of["rope_sin"]
    if "latents_clean" in of:
        x, cos, sin = _with_history(m, of, x, cos, sin)
        text = _joined(m.image_projection(of["image_embeds"]), text)
    rope = (cos[:, :, None, :, None], sin[:, :, None, :, None])
    condition = (temb, replaced, of.get("first_frame"))
    with forwards(list(m.transformer_blocks), _double):
        for block in m.transformer_blocks:
            x, text = block(x, text, condition, rope, None)
    first = of.get("first_frame")
    padded = (_padded(rope[0], text, 1.0), _padded(rope[1], text, 0.0))
    condition = (temb, replaced, None if first is None else _padded(first, text, 0.0))
    joint = _joined(x, text)
    with forwards(list(m.single_transformer_blocks), _single):
        for block in m.single_transformer_blocks:
            joint = block(joint, condition, padded)
    out: T = m.proj_out(m.norm_out(joint[:, :tokens], temb))
    return out


def newer_denoiser(module: nn.Module, *inputs: T, names: tuple[str, ...]) -> tuple[T, T]:
    """HunyuanVideo15Transformer3DModel.forward; the order of text tokens, which carry no position, is free."""
    m: Any = module
    of = dict(zip(names, inputs, strict=True))
    x = embedded(m.x_embedder.proj, of["hidden_states"])
    temb = _time(m.time_embed.time_proj, m.time_embed.timestep_embedder, of["timestep"], x)
    if "timestep_r" in of:
        temb = temb + _time(m.time_embed.time_proj_r, m.time_embed.timestep_embedder_r, of["timestep_r"], x)
    kinds = m.cond_type_embed.weight
    parts = [
        m.context_embedder(of["encoder_hidden_states"], of["timestep"], None) + kinds[0],
        m.context_embedder_2(of["encoder_hidden_states_2"]) + kinds[1],
    ]
    if "image_embeds" in of:
        parts.append(m.image_embedder(of["image_embeds"]) + kinds[2])
    text = _joined(parts[1], _joined(parts[0], *parts[2:])) if len(parts) > 2 else _joined(parts[1], parts[0])
    first = of["bias_2"]
    bias = _joined(first.new_zeros(1, x.shape[1]), first)
    bias = _joined(bias, first.new_zeros(1, text.shape[1] - first.shape[1]))[:, None, None, :]
    rope = tuple(of[n][:, :, None, :, None] for n in ("rope_cos", "rope_sin"))
    with forwards(list(m.transformer_blocks), _double):
        for block in m.transformer_blocks:
            x, text = block(x, text, (temb, None, None), rope, bias)
    return m.proj_out(m.norm_out(x, temb)), text


def _joined(*parts: T) -> T:
    import torch

    return torch.cat(parts, dim=1)


def _padded(x: T, text: T, value: float) -> T:
    """x along its tokens, with `value` for those of the text."""
    return _joined(x, x.new_full((1, text.shape[1], *x.shape[2:]), value))


def _time(sinusoid: Any, embedder: Any, timestep: T, like: T) -> Any:
    return embedder(sinusoid(timestep).to(like.dtype))


def _with_history(m: Any, of: Mapping[str, T], x: T, cos: T, sin: T) -> tuple[T, T, T]:
    """Clean frames after the noisy ones: with rotary tables given, order is free."""
    for name, projection in PROJECTIONS.items():
        x = _joined(x, embedded(getattr(m.clean_x_embedder, projection), of[name]))
        cos, sin = _joined(cos, of[f"{name}_cos"]), _joined(sin, of[f"{name}_sin"])
    return x, cos, sin


Value = tuple[Any, Any]
"""An adaLN value [1, 1, C], and what the first frame's tokens have beyond it, if they have a timestep of their own."""


def _values(norm: Any, count: int, condition: Any) -> tuple[Value, ...]:
    temb, replaced, first = condition
    rows = [v[:, None] for v in norm.linear(norm.silu(temb)).chunk(count, dim=1)]
    if first is None:
        return tuple((row, None) for row in rows)
    others = norm.linear(norm.silu(replaced)).chunk(count, dim=1)
    return tuple((row, other[:, None] - row) for row, other in zip(rows, others, strict=True))


def _scaled(y: T, value: Value, condition: Any) -> T:
    """y times a value. A value for each token, made first, would be kept for every block (docs/adr/0004)."""
    row, beyond = value
    out: T = y * row if beyond is None else y * row + (y * condition[2]) * beyond
    return out


def _modulated(y: T, shift: Value, scale: Value, condition: Any) -> T:
    moved: T = y + _scaled(y, scale, condition) + shift[0]
    out: T = moved if shift[1] is None else moved + condition[2] * shift[1]
    return out


def _double(block: Any, x: T, text: T, condition: Any, rope: Any, bias: T | None) -> tuple[T, T]:
    shift, scale, gate, shift2, scale2, gate2 = _values(block.norm1, 6, condition)
    plain = (condition[0], None, None)
    c_shift, c_scale, c_gate, c_shift2, c_scale2, c_gate2 = _values(block.norm1_context, 6, plain)
    attn = block.attn
    y = _modulated(block.norm1.norm(x), shift, scale, condition)
    c = _modulated(block.norm1_context.norm(text), c_shift, c_scale, plain)
    q, k = (
        _joined(rotated(_normed(attn, to, norm, y), *rope), _normed(attn, added, added_norm, c))
        for to, norm, added, added_norm in (
            (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
            (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
        )
    )
    v = _joined(attn.to_v(y), attn.add_v_proj(c))
    out = attend(q.flatten(2), k.flatten(2), v, attn.heads, bias)
    x = x + _scaled(attn.to_out[0](out[:, : x.shape[1]]), gate, condition)
    text = text + _scaled(attn.to_add_out(out[:, x.shape[1] :]), c_gate, plain)
    x = x + _scaled(block.ff(_modulated(block.norm2(x), shift2, scale2, condition)), gate2, condition)
    c = _modulated(block.norm2_context(text), c_shift2, c_scale2, plain)
    return x, text + _scaled(block.ff_context(c), c_gate2, plain)


def _single(block: Any, x: T, condition: Any, rope: Any) -> T:
    import torch

    shift, scale, gate = _values(block.norm, 3, condition)
    y = _modulated(block.norm.norm(x), shift, scale, condition)
    attn = block.attn
    q = rotated(_normed(attn, attn.to_q, attn.norm_q, y), *rope).flatten(2)
    k = rotated(_normed(attn, attn.to_k, attn.norm_k, y), *rope).flatten(2)
    out = attend(q, k, attn.to_v(y), attn.heads)
    update = block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(y))], dim=2))
    return x + _scaled(update, gate, condition)


def _normed(attn: Any, to: Any, norm: Any, x: T) -> T:
    """[1, S, C] → [1, S, heads, d], projected and normalized."""
    heads = to(x).unflatten(2, (attn.heads, -1))
    return heads if norm is None else norm(heads)  # type: ignore[no-any-return]


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables = PerOwnerCache()
_lengths, _blanks = PerOwnerCache(), PerOwnerCache()


def adapt(module: nn.Module, call: Call, *, names: tuple[str, ...], config: Config) -> dict[str, Any]:
    """The engine's inputs for a call of the transformer (same arguments).

    Raises ShapeError for several videos in one call, which have texts of different lengths.
    """
    m: Any = module
    latents: T = call["hidden_states"]
    if latents.shape[0] != 1:
        raise ShapeError(f"this call renders {latents.shape[0]} videos at once; render one at a time")
    patch = patch_of(config)
    inputs: dict[str, Any] = {
        "hidden_states": patches(latents, patch),
        "timestep": call["timestep"].reshape(-1).float(),
    }
    inputs["encoder_hidden_states"] = _unpadded(call, "encoder_hidden_states", "encoder_attention_mask")
    if "latents_clean" in names:
        inputs |= _history(m, call)
    else:
        key = (latents.shape[2:], latents.device)
        inputs["rope_cos"], inputs["rope_sin"] = _tables.get(module, key, lambda: _halves(m.rope(latents)))
    if "first_frame" in names:
        tokens = inputs["hidden_states"].shape[1]
        inputs["first_frame"] = latents.new_zeros(1, tokens, 1)
        inputs["first_frame"][:, : tokens // (latents.shape[2] // patch[0])].fill_(1)
    if "encoder_hidden_states_2" in names:
        mask = given(call, "encoder_attention_mask_2")["encoder_attention_mask_2"]
        inputs["bias_2"] = (1 - mask.to(latents.dtype)) * -10000.0
    for name in ("guidance", "timestep_r"):
        if name in names:
            inputs[name] = given(call, name)[name].reshape(-1).float()
    if not config.get("guidance_embeds"):
        call.ignored("guidance")
    if "encoder_hidden_states_2" in names and _blank(given(call, "image_embeds")["image_embeds"]) == (
        "image_embeds" in names
    ):
        raise OtherKind(f"this call gives {'no' if 'image_embeds' in names else 'a'} picture")
    return inputs | given(call, *(n for n in names if n not in inputs))


def _unpadded(call: Mapping[str, Any], name: str, mask: str) -> T:
    """The text's own tokens; a pipeline passes the same mask at every step, so its sum is read once."""
    padding: T = given(call, mask)[mask]
    length = _lengths.get(padding, padding._version, lambda: _length(padding))
    out: T = call[name][:, :length]
    return out


def _length(padding: T) -> int:
    """Raises ShapeError for a mask that keeps none, or other tokens than the first."""
    length = int(padding.sum())
    if not length:
        raise ShapeError("this call's text is nothing but padding")
    if not bool(padding[:, :length].all()):
        raise ShapeError("this call's text has padding among its tokens")
    return length


def _blank(embeds: T) -> bool:
    """Whether there is no picture: the stock module takes zeros for none, and a render gives the same at every step."""
    blank: bool = _blanks.get(embeds, embeds._version, lambda: not bool(embeds.any()))
    return blank


def _halves(tables: tuple[T, T]) -> tuple[T, ...]:
    """Stock tables [S, d] hold each value twice → [1, S, d / 2]."""
    return tuple(t[None, :, 0::2].float().contiguous() for t in tables)


def _history(m: Any, call: Mapping[str, Any]) -> dict[str, T]:
    """FramePack: rotary tables of the frames' own indices, and the clean frames as patches with theirs."""
    from diffusers.models.transformers import transformer_hunyuan_video_framepack as stock

    latents: T = call["hidden_states"]
    height, width = latents.shape[-2:]

    def tables(indices: T) -> Any:
        return m.rope(frame_indices=indices, height=height, width=width, device=latents.device)

    cos, sin = _halves(tables(given(call, "indices_latents")["indices_latents"]))
    inputs: dict[str, T] = {"rope_cos": cos, "rope_sin": sin}
    for name, patch in CLEAN.items():
        clean = given(call, name, f"indices_{name}")
        rope = tables(clean[f"indices_{name}"])
        if patch[0] > 1:
            p = m.config.patch_size
            rope = m._pad_rotary_emb(rope, height // p, width // p, (patch[0],) * 3)
        padded = stock._pad_for_3d_conv(clean[name], patch) if patch[0] > 1 else clean[name]
        inputs[name] = patches(padded, patch)
        inputs[f"{name}_cos"], inputs[f"{name}_sin"] = _halves(rope)
    return inputs


def output(outputs: Mapping[str, T], call: Mapping[str, Any], *, patch: Patch) -> Any:
    return sample_output(unpatched_first(outputs["sample"], call["hidden_states"], patch), call)


def sample(module: nn.Module, sizes: Mapping[str, int], generator: Any, *, names: tuple[str, ...]) -> dict[str, Any]:
    """A call as the pipelines make it: padded text, and FramePack's 1 + 16 history frames."""
    import torch

    config: Any = module.config
    normal = partial(torch.randn, generator=generator)
    video, text = (sizes["frames"], sizes["height"], sizes["width"]), sizes["text"] + 3
    call: dict[str, Any] = {
        "hidden_states": normal(1, config.in_channels, *video),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": normal(1, text, config.text_embed_dim),
        "encoder_attention_mask": (torch.arange(text) < sizes["text"])[None].long(),
        "return_dict": False,
    }
    if "guidance" in names:
        call["guidance"] = torch.tensor([6000.0])
    if "pooled_projections" in names:
        call["pooled_projections"] = normal(1, config.pooled_projection_dim)
    if "encoder_hidden_states_2" in names:
        call["encoder_hidden_states_2"] = normal(1, sizes["text_2"], config.text_embed_2_dim)
        call["encoder_attention_mask_2"] = (torch.arange(sizes["text_2"]) < sizes["text_2"] - 1)[None].long()
        embeds = normal(1, IMAGE_TOKENS, config.image_embed_dim)
        call["image_embeds"] = embeds if "image_embeds" in names else embeds * 0
    if "timestep_r" in names:
        call["timestep_r"] = torch.tensor([500.0])
    if "latents_clean" in names:
        call["image_embeds"] = normal(1, IMAGE_TOKENS, config.image_proj_dim)
        start = 0
        for name, frames in (("latents_history_4x", 16), ("latents_history_2x", 2), ("latents_clean", 2)):
            call[name] = normal(1, config.in_channels, frames, *video[1:])
            call[f"indices_{name}"] = torch.arange(start, start + frames)
            start += frames
        call["indices_latents"] = torch.arange(start, start + video[0])
    return call
