"""LTX-2: what is traced of its networks, and how a diffusers call becomes named inputs.

The other half of ltx2.py. The transformer runs its own forward, with rotary tables given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from overcrank.errors import OtherKind, ShapeError
from overcrank.models._common import PerOwnerCache, first_of_equal, forwards, given, patched
from overcrank.models.base import Call, Sizes

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

ROPES = {"rope": "video", "audio_rope": "audio", "cross_attn_rope": "cross", "cross_attn_audio_rope": "cross_audio"}
"""Submodule → name of its tables' inputs."""


def denoiser(module: nn.Module, *inputs: T, names: tuple[str, ...]) -> tuple[T, T]:
    """LTX2VideoTransformer3DModel.forward; the two timesteps of cross attention come as its sigmas."""
    m: Any = module
    of = dict(zip(names, inputs, strict=True))
    tables = {part: (of.pop(f"{name}_cos"), of.pop(f"{name}_sin")) for part, name in ROPES.items()}
    nowhere = of["hidden_states"].new_zeros(1, 1, 1, 1)
    with _given_tables(m, tables):
        video, audio = m(
            **{k: of[k] for k in of if not k.startswith("cross_timestep")},
            audio_sigma=of["cross_timestep"],
            sigma=of["cross_timestep_audio"],
            use_cross_timestep=True,
            video_coords=nowhere,
            audio_coords=nowhere,
            return_dict=False,
        )
    return video, audio


@contextmanager
def _given_tables(m: Any, tables: Mapping[str, tuple[T, T]]) -> Iterator[None]:
    from diffusers.models.transformers import transformer_ltx2 as stock

    with ExitStack() as stack:
        for part, pair in tables.items():
            stack.enter_context(forwards([getattr(m, part)], lambda module, coords, device=None, p=pair: p))
        stack.enter_context(patch.object(stock, "apply_split_rotary_emb", _turned))
        block = stock.LTX2VideoTransformerBlock
        stack.enter_context(patch.object(block, "get_mod_params", staticmethod(_modulations)))
        yield


def _turned(x: T, tables: tuple[T, T]) -> T:
    """Rotary embedding whose pairs are the halves of a head: x [B, S, h · d], tables [1, S, h, d / 2].

    The stock form adds in place.
    """
    import torch

    cos, sin = tables
    a, b = x.unflatten(2, (cos.shape[2], -1)).float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(2).to(x.dtype)


GATES = (2, 5, 8)
"""Of a block's six or nine modulation values, those that scale what is added to the tokens."""


def _modulations(table: T, temb: T, batch: int) -> tuple[Any, ...]:
    """One sum for each value, [B, T, C]: of all at once, the compiler would keep those of every block."""
    count = table.shape[0]
    per_token = temb.shape[1] != 1
    pairs = zip(table.unbind(0), temb.chunk(count, dim=-1), strict=True)
    return tuple(_Gate(*p) if per_token and i in GATES else p[0] + p[1] for i, p in enumerate(pairs))


class _Gate:
    """A gate per token: summed first, it is one more tensor that is made ahead for every block."""

    def __init__(self, row: T, value: T) -> None:
        self.row, self.value = row, value

    def __rmul__(self, y: T) -> T:
        return y * self.row + y * self.value


def vae(module: nn.Module, hidden_states: T) -> T:
    out: T = module(hidden_states)
    return out


def audio_decoder(module: nn.Module, sample: T) -> T:
    out: T = module(sample)
    return out


def vocoder(module: nn.Module, hidden_states: T) -> T:
    with patched(module, {"ConvTranspose1d": _upsampled}):
        out: T = module(hidden_states)
    return out


def _upsampled(conv: Any, x: T) -> T:
    """A transposed convolution as a convolution of x with zeros between: the compiler has none in bf16."""
    from torch.nn.functional import conv1d, pad

    (kernel,), (stride,), (padding,) = conv.kernel_size, conv.stride, conv.padding
    spread = pad(x.unsqueeze(-1), (0, stride - 1)).flatten(2)
    edge = kernel - 1 - padding
    out: T = conv1d(pad(spread, (edge, edge - stride + 1)), conv.weight.transpose(0, 1).flip(-1), conv.bias)
    return out


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables = PerOwnerCache()


def adapt_denoiser(module: nn.Module, call: Call, *, names: tuple[str, ...], per_token: bool) -> dict[str, Any]:
    """The engine's inputs for a call of LTX2VideoTransformer3DModel (same arguments).

    Raises ShapeError for what only PyTorch runs: guidance that isolates sound from picture or
    perturbs blocks, masks within the video, and cross attention with a timestep for each token.
    """
    video, audio = call["hidden_states"], call["audio_hidden_states"]
    batch = video.shape[0]
    for name in ("isolate_modalities", "spatio_temporal_guidance_blocks"):
        if call.get(name):
            raise ShapeError(f"this call uses {name}, which no engine does")
    call.ignored("perturbation_mask")  # of those blocks
    if not module.config.get("use_keyframes_abs_pos_embedding"):  # type: ignore[union-attr, operator]
        call.ignored("video_keyframes_mask")
    times = call["timestep"].reshape(batch, -1).float()
    if (times.shape[1] > 1) != per_token:
        raise OtherKind(f"this call gives {times.shape[1]} timesteps, for which there is another engine")
    audio_times = call.get("audio_timestep")
    audio_times = times if audio_times is None else audio_times.reshape(batch, -1).float()
    audio_times = first_of_equal(audio_times.T, "timesteps of sound").T
    crossing = call.get("use_cross_timestep")
    if per_token and not crossing:
        raise ShapeError("this call gives cross attention a timestep for each token (use_cross_timestep=False)")
    sigma = call["sigma"].reshape(batch, -1).float() if call.get("sigma") is not None else times
    audio_sigma = call.get("audio_sigma")
    audio_sigma = sigma if audio_sigma is None else audio_sigma.reshape(batch, -1).float()
    inputs = {
        "timestep": times,
        "audio_timestep": audio_times[:, 0],
        "cross_timestep": (audio_sigma if crossing else times)[:, 0],
        "cross_timestep_audio": (sigma if crossing else audio_times)[:, 0],
    }
    key: tuple[Any, ...] = tuple(
        (x.shape[1], id(c), None if c is None else c._version)
        for x, c in ((video, call.get("video_coords")), (audio, call.get("audio_coords")))
    )
    key += tuple(call.get(n) for n in ("num_frames", "height", "width", "fps", "audio_num_frames"))
    tables, _ = _tables.get(
        module, key, lambda: (_rotary(module, call), (call.get("video_coords"), call.get("audio_coords")))
    )
    for name in ("encoder_attention_mask", "audio_encoder_attention_mask"):
        inputs[name] = given(call, name)[name].to(video.dtype)
    inputs |= tables
    return inputs | given(call, *(n for n in names if n not in inputs))


def _rotary(module: Any, call: Mapping[str, Any]) -> dict[str, T]:
    """Tables [1, S, h, d / 2] of video, sound, and the cross attention between them."""
    m, device = module, call["hidden_states"].device
    video, audio = call.get("video_coords"), call.get("audio_coords")
    if video is None:
        sizes = (call.get(n) for n in ("num_frames", "height", "width"))
        video = m.rope.prepare_video_coords(1, *sizes, device, fps=call.get("fps", 24.0))
    if audio is None:
        audio = m.audio_rope.prepare_audio_coords(1, call.get("audio_num_frames"), device)
    coordinates = {
        "rope": (video := first_of_equal(video, "coordinates")),
        "audio_rope": (audio := first_of_equal(audio, "coordinates of sound")),
        "cross_attn_rope": video[:, 0:1],
        "cross_attn_audio_rope": audio[:, 0:1],
    }
    tables = {}
    for part, name in ROPES.items():
        for kind, table in zip(("cos", "sin"), getattr(m, part)(coordinates[part], device=device), strict=True):
            tables[f"{name}_{kind}"] = table.transpose(1, 2).float().contiguous()
    return tables


def denoiser_output(outputs: Mapping[str, T], call: Mapping[str, Any]) -> Any:
    pair = outputs["sample"], outputs["audio_sample"]
    if not call.get("return_dict", True):
        return pair
    from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

    return AudioVisualModelOutput(sample=pair[0], audio_sample=pair[1])


def sample_denoiser(module: nn.Module, sizes: Sizes, generator: Any, *, per_token: bool) -> dict[str, Any]:
    """A call as the pipelines make it."""
    import torch

    config: Any = module.config
    batch, tokens, audio, text = (sizes[n] for n in ("batch", "tokens", "audio", "text"))

    def normal(*shape: int) -> T:
        return torch.randn(shape, generator=generator)

    keep = (torch.arange(text).expand(batch, text) < max(1, text * 2 // 3)).float()
    start = torch.rand(1, 3, tokens, 1, generator=generator) * torch.tensor([5.0, 512.0, 768.0])[:, None, None]
    heard = torch.arange(audio)[None, None, :, None] / 25.0
    fixed = torch.rand(batch, tokens, generator=generator) < 0.25
    return {
        "hidden_states": normal(batch, tokens, config.in_channels),
        "audio_hidden_states": normal(batch, audio, config.audio_in_channels),
        "encoder_hidden_states": normal(batch, text, config.caption_channels),
        "audio_encoder_hidden_states": normal(batch, text, config.caption_channels),
        "timestep": torch.where(fixed, 0.0, 750.0) if per_token else torch.tensor(750.0).expand(batch),
        "audio_timestep": torch.tensor(750.0).expand(batch),
        "sigma": torch.tensor(750.0).expand(batch),
        "encoder_attention_mask": keep,
        "audio_encoder_attention_mask": keep,
        "video_coords": torch.cat([start, start + 0.04], dim=-1).expand(batch, -1, -1, -1),
        "audio_coords": torch.cat([heard, heard + 0.04], dim=-1).expand(batch, -1, -1, -1),
        "use_cross_timestep": True,
        "return_dict": False,
    }
