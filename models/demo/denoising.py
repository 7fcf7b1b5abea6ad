"""Stage 2: the denoiser and the text encoder together, by flow matching on the VAE's latents.

A fifth of the steps gives the first frame, as LTXImageToVideoPipeline does; another fifth
gives the first and the last frame as LTXConditionPipeline does, so that both work.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from overcrank.models.demo import clips, networks
from overcrank.models.demo.loop import fit
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CLIPS, BATCH, STEPS, RATE = 8192, 32, 10000, 1.0e-3
TEXT_KEPT = 24  # captions are shorter; tokens behind them are masked anyway


def latents(vae: Any, work: Path, device: str) -> tuple[dict[str, torch.Tensor], list[clips.Clip]]:
    """Posterior of every training clip and of its last frame alone, normalized as the pipelines do.

    Returns tensors mean [N, C, F, H, W], deviation [N, 1, F, H, W], last_mean, last_deviation
    (one frame), and the clips.
    """
    random = Random(2)
    trained, _ = clips.split()
    drawn = [clips.random_clip(random, t) for t in random.choices(trained, k=CLIPS)]
    file = work / "latents.safetensors"
    if not file.exists():
        parts: list[dict[str, torch.Tensor]] = []
        for i in range(0, CLIPS, 16):
            video = clips.render(drawn[i : i + 16], device, seed=10**6 + i)
            parts.append(_posterior(vae, video, "") | _posterior(vae, video[:, :, -1:], "last_"))
            if i % 1024 == 0:
                print(f"encoded {i}/{CLIPS} clips", flush=True)
        save_file({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, file)
    return {k: v.to(device) for k, v in load_file(file).items()}, drawn


@torch.no_grad()
def _posterior(vae: Any, video: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    posterior = vae.encode(video).latent_dist
    scale = vae.latents_std.view(1, -1, 1, 1, 1)
    mean = (posterior.mean - vae.latents_mean.view(1, -1, 1, 1, 1)) / scale
    return {f"{prefix}mean": mean.cpu(), f"{prefix}deviation": (posterior.std / scale).cpu()}


def trained_denoiser(vae: Any, work: Path, device: str) -> tuple[Any, Any, Any]:
    """(denoiser, text encoder, tokenizer)."""
    data, drawn = latents(vae, work, device)
    tokenizer = networks.tokenizer()
    torch.manual_seed(1)
    both = nn.ModuleDict({"denoiser": networks.denoiser(), "text": networks.text_encoder(len(tokenizer))}).to(device)

    run = _in_bf16(both["denoiser"])

    def loss(step: int) -> Any:
        random = Random(step)
        chosen = random.sample(range(CLIPS), BATCH)
        captions = ["" if random.random() < 0.1 else clips.caption(drawn[i], random) for i in chosen]
        length = random.choices((32, 128, 256), (7, 2, 1))[0]  # the encoder attends to padding too
        ids = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").to(device)
        call, target, counted = _example(data, torch.tensor(chosen, device=device), random)
        text = both["text"](ids.input_ids)[0][:, :TEXT_KEPT].contiguous()
        mask = ids.attention_mask[:, :TEXT_KEPT].contiguous()
        out = run(dict(both["denoiser"].named_parameters()), text, mask, call)
        error = (out.float()[:, -target.shape[1] :] - target).square().mean(-1)
        return (error * counted).sum() / counted.sum()

    fit("denoiser", both, loss, STEPS, RATE, work)
    return both["denoiser"], both["text"], tokenizer


def _in_bf16(denoiser: nn.Module) -> Any:
    """The denoiser computed in bf16 by torch.compile while its weights stay fp32: twice the pace on a CPU.

    Scaled dot products in plain operations: their fused backward is the slowest of all on a CPU.
    """

    @torch.compile(dynamic=False)
    def forward(weights: dict[str, Any], text: torch.Tensor, mask: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        low = {name: value.bfloat16() for name, value in weights.items()}
        tokens = call.pop("hidden_states").bfloat16()
        call |= {"encoder_hidden_states": text.bfloat16(), "encoder_attention_mask": mask.bfloat16()}
        out: torch.Tensor
        (out,) = torch.func.functional_call(denoiser, low, (tokens,), {**call, "return_dict": False})
        return out

    def run(weights: dict[str, Any], text: torch.Tensor, mask: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        solid = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        with sdpa_kernel(SDPBackend.MATH):
            out: torch.Tensor = forward(weights, text, mask, solid)
            return out

    return run


def _example(data: dict[str, torch.Tensor], rows: torch.Tensor, random: Random) -> tuple[dict[str, Any], Any, Any]:
    """A call of the denoiser, the velocity it should return, and which tokens count."""

    def drawn(prefix: str) -> torch.Tensor:
        mean, deviation = data[f"{prefix}mean"][rows], data[f"{prefix}deviation"][rows]
        return mean + deviation * torch.randn_like(mean)

    video = drawn("")
    batch, device = len(rows), video.device
    clean = _tokens(video)
    even, bell = torch.rand(batch, device=device), (0.2 + torch.randn(batch, device=device)).sigmoid()
    sigma = torch.where(torch.rand(batch, device=device) < 0.3, even, bell)[:, None].expand(batch, clean.shape[1])
    mode = random.choices(("text", "image", "conditions"), (6, 2, 2))[0]
    mask = torch.zeros_like(sigma, dtype=torch.bool)
    first = mode == "image" or (mode == "conditions" and random.random() < 0.7)
    if first:
        mask[:, : video.shape[3] * video.shape[4]] = True
    sigma = sigma.masked_fill(mask, 0.0)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma[..., None])
    frames, height, width = video.shape[2:]
    call: dict[str, Any] = {"hidden_states": noisy, "timestep": 1000 * (sigma[:, -1] if mode == "text" else sigma)}
    if mode == "conditions":
        last = _tokens(drawn("last_")) if not first or random.random() < 0.7 else None
        if last is not None:
            call["hidden_states"] = torch.cat([last, noisy], 1)
            call["timestep"] = torch.cat([torch.zeros_like(last[..., 0]), 1000 * sigma], 1)
        call["video_coords"] = _coordinates(batch, (frames, height, width), last is not None, device)
    else:
        size = {"num_frames": frames, "height": height, "width": width}
        call |= size | {"rope_interpolation_scale": (4 / clips.FPS, 16, 16)}
    return call, noise - clean, ~mask


def _tokens(latent: torch.Tensor) -> torch.Tensor:
    """[B, C, F, H, W] → [B, F·H·W, C]."""
    return latent.flatten(2).transpose(1, 2)


def _coordinates(batch: int, grid: tuple[int, int, int], last: bool, device: torch.device) -> torch.Tensor:
    """Positions as LTXConditionPipeline gives them: an appended last frame comes first in the sequence."""
    from diffusers import LTXConditionPipeline as Pipeline

    def ids(frames: int, frame_index: int) -> Any:
        plain = Pipeline._prepare_video_ids(batch, frames, *grid[1:], device=device)
        return Pipeline._scale_video_ids(plain, 16, 4, frame_index, device).float()

    parts = [ids(1, clips.FRAMES - 1)] if last else []
    coordinates: torch.Tensor = torch.cat([*parts, ids(grid[0], 0)], -1)
    coordinates[:, 0] /= clips.FPS
    return coordinates
