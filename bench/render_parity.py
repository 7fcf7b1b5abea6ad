"""How far renders through ONNX Runtime are from plain diffusers, on the demo model in fp32.

    python bench/render_parity.py

One side is the public command `overcrank render --backend onnxruntime`; the other is diffusers'
own pipeline with nothing of overcrank. Latents are compared after every step, frames at the
end. Results go to bench/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from overcrank.models.demo import FOLDER
from PIL import Image
from safetensors.numpy import load_file

RESULTS = Path(__file__).parent / "results"
PROMPT = "a red circle moving right on a white background"
TASKS = {
    "text-to-video": "LTXPipeline",
    "image-to-video": "LTXImageToVideoPipeline",
    "conditioned": "LTXConditionPipeline",
}
COMMAND = [sys.executable, "-c", "from overcrank.cli import main; main()"]


@dataclass(frozen=True)
class Parity:
    task: str
    steps: int
    worst_cosine: float  # of the latents, over the steps
    largest_difference: float  # of any latent value after any step
    psnr_db: float  # of the frames as 8-bit PNG against float frames


def draw_picture(path: Path) -> Path:
    """A blue square left of the middle, in the video's size."""
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[22:42, 10:30] = (30, 70, 225)
    Image.fromarray(pixels).save(path)
    return path


def plain_diffusers(task: str, steps: int, picture: Path) -> tuple[np.ndarray, np.ndarray]:
    """(latents after each step, frames in [0, 1])."""
    import diffusers
    import torch

    pipe = getattr(diffusers, TASKS[task]).from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    opened = Image.open(picture).convert("RGB")
    more: dict[str, Any] = {"image": opened} if task == "image-to-video" else {}
    if task == "conditioned":
        more = {"image": [opened] * 2, "video": [None] * 2, "frame_index": [0, 16], "strength": [1.0, 1.0]}
        more |= {"image_cond_noise_scale": 0.0, "max_sequence_length": 128}
    kept = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    frames = pipe(
        prompt=PROMPT,
        height=64,
        width=64,
        num_frames=17,
        frame_rate=8,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        callback_on_step_end=keep,
        **more,
    ).frames[0]
    return torch.stack(kept).numpy(), frames


def options_of(task: str, steps: int, picture: Path, out: Path) -> list[str]:
    """Arguments of `overcrank render` for the same video."""
    options = ["--prompt", PROMPT, "--steps", str(steps), "--seed", "7", "--formats", "png,latents", "--quiet"]
    options += ["--image", str(picture)] if task != "text-to-video" else []
    options += ["--last-image", str(picture)] if task == "conditioned" else []
    return [*options, "--backend", "onnxruntime", "-o", str(out)]


def parity_of(task: str, steps: int, picture: Path, stem: Path) -> Parity:
    """Compare the results that `overcrank render` left at `stem` with plain diffusers."""
    latents, frames = plain_diffusers(task, steps, picture)
    found = load_file(stem.with_name(f"{stem.name}.latents.safetensors"))["latents"]
    assert found.shape == latents.shape
    pairs = list(zip(found, latents, strict=True))
    files = sorted(stem.with_name(f"{stem.name}-frames").iterdir())
    error = np.square(np.stack([np.asarray(Image.open(f)) for f in files]) / 255 - frames).mean()
    return Parity(
        task,
        steps,
        min(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs),
        max(float(np.abs(a - b).max()) for a, b in pairs),
        float(-10 * np.log10(error)),
    )


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        picture = draw_picture(Path(folder) / "square.png")
        for task in TASKS:
            stem = Path(folder) / task
            subprocess.run([*COMMAND, "render", *options_of(task, 24, picture, stem.with_suffix(".png"))], check=True)
            rows.append(parity_of(task, 24, picture, stem))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "CPU, no GPU",
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "onnxruntime-gpu")},
        "command": "python bench/render_parity.py",
        "required": {"worst_cosine": 0.9999, "psnr_db": 50},
        "rows": [asdict(r) for r in rows],
    }
    print(json.dumps(result, indent=1))
    RESULTS.joinpath(f"render-parity-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
