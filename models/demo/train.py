"""Train ltx-demo: `python -m overcrank.models.demo.train --work DIR` (needs the `demo` extra).

About an hour on two CPU cores. A run that was stopped goes on where
it was. Ends by writing the checkpoint and its pictures; `evaluate.py` judges it.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from overcrank.models.demo import FOLDER, clips, networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for state that a stopped run goes on from")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the checkpoint [default: the package's]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    from overcrank.models.demo.autoencoder import trained_vae
    from overcrank.models.demo.denoising import trained_denoiser

    vae = trained_vae(arguments.work, arguments.device)
    denoiser, text_encoder, tokenizer = trained_denoiser(vae, arguments.work, arguments.device)
    _save(vae, denoiser, text_encoder, tokenizer, arguments.out)
    _loss_curves(arguments.work, arguments.out.parent / "loss.png")
    _reconstructions(vae, arguments.out.parent / "reconstructions.png", arguments.device)
    print(f"wrote {arguments.out}")


def _save(vae: Any, denoiser: Any, text_encoder: Any, tokenizer: Any, out: Path) -> None:
    """A diffusers folder; the two large networks as fp16, which halves what the package carries."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**networks.SCHEDULER),
        vae=vae.cpu().half(),
        text_encoder=text_encoder.cpu(),
        tokenizer=tokenizer,
        transformer=denoiser.cpu().half(),
    )
    new = out.with_name(f"{out.name}.new")
    pipeline.save_pretrained(new)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    vae.float()


def _loss_curves(work: Path, picture: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in zip(axes, ("vae", "denoiser"), strict=True):
        with (work / f"{name}.csv").open() as rows:
            points = {int(r["step"]): float(r["loss"]) for r in csv.DictReader(rows)}
        axis.plot(list(points), list(points.values()), linewidth=0.8)
        axis.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=90)


@torch.no_grad()
def _reconstructions(vae: Any, picture: Path, device: str) -> None:
    """Clips of held-out combinations above what the VAE makes of them."""
    from PIL import Image

    vae.to(device)
    random = Random(3)
    _, held_out = clips.split()
    video = clips.render([clips.random_clip(random, t) for t in held_out[:4]], device, seed=3)
    out = vae.decode(vae.encode(video).latent_dist.mean).sample.clamp(-1, 1)
    rows = [torch.cat([both[i, :, f] for i in range(4) for f in (0, 8, 16)], -1) for both in (video, out)]
    pixels = ((torch.cat(rows, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(picture)


if __name__ == "__main__":
    main()
