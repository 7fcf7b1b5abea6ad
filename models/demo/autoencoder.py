"""Stage 1: the VAE, on single frames first and then on whole clips."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from overcrank.models.demo import clips, networks
from overcrank.models.demo.loop import fit
from torch import nn

FRAME_STEPS, CLIP_STEPS, RATE = 2000, 4500, 6e-4
FRAMES_A_STEP, CLIPS_A_STEP = 32, 4
KL_WEIGHT = 1e-6  # latents are scaled by their measured deviation afterwards
LOG_VARIANCE = -6.0  # of the posterior at the start: its noise would drown the means


def trained_vae(work: Path, device: str) -> Any:
    """The trained AutoencoderKLLTXVideo, its latents_mean and latents_std measured.

    Squared error, since the median of a pixel is background and absolute error would keep
    it there; absolute error joins slowly to sharpen edges.
    """
    torch.manual_seed(0)
    vae = networks.vae()
    nn.init.constant_(vae.encoder.conv_out.conv.bias[-1:], LOG_VARIANCE)
    vae.to(device)
    trained, _ = clips.split()

    def loss(step: int) -> Any:
        random = Random(step)
        single = step < FRAME_STEPS or step % 4 == 0
        drawn = random.choices(trained, k=FRAMES_A_STEP if single else CLIPS_A_STEP)
        frames = random.sample(range(clips.FRAMES), 1) if single else None
        video = clips.render([clips.random_clip(random, t) for t in drawn], device, step, frames)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            posterior = vae.encode(video).latent_dist
            out = vae.decode(posterior.sample()).sample.float()
        sharpness = 0.5 * max(0.0, (step - FRAME_STEPS) / CLIP_STEPS)
        error = 4 * (out - video).square().mean() + sharpness * (out - video).abs().mean()
        return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", vae, loss, FRAME_STEPS + CLIP_STEPS, RATE, work)
    _measure_latents(vae, trained, device)
    return vae


@torch.no_grad()
def _measure_latents(vae: Any, trained: list[clips.Triple], device: str) -> None:
    random = Random(-1)
    drawn = [clips.random_clip(random, t) for t in random.choices(trained, k=192)]
    means = [vae.encode(clips.render(drawn[i : i + 16], device, i)).latent_dist.mean for i in range(0, len(drawn), 16)]
    latents = torch.cat(means).transpose(0, 1).flatten(1)
    vae.latents_mean.copy_(latents.mean(1))
    vae.latents_std.copy_(latents.std(1))
