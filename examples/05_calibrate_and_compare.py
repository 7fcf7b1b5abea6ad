"""Calibrate fp8 on a few prompts, render with it, and say what it costs against 32 bit."""

import numpy as np
import overcrank
import torch

PROMPTS = ("a red circle moving right", "a yellow square growing")


def frames_of(pipe) -> np.ndarray:
    """[video, frame, height, width, 3], 0 to 1."""
    videos = []
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        size = {"height": 64, "width": 64, "num_frames": 17}
        videos += [*pipe(prompt, **size, num_inference_steps=24, generator=generator, output_type="np").frames]
    return np.stack(videos)


recipe = overcrank.calibrate("ltx-demo", precision="fp8", samples=4, steps=8)
ranges = recipe.components["denoiser"].ranges["transformer"]
print(f"{len(ranges)} ranges; the first: {next(iter(ranges.items()))}")

eager = frames_of(overcrank.load("ltx-demo", backend="eager"))
quantized = overcrank.load("ltx-demo", backend="onnxruntime", precision="fp8", recipe=recipe)
error = float(np.mean((frames_of(quantized) - eager) ** 2))
print(quantized.overcrank.summary())
print(f"PSNR of fp8 against eager fp32: {10 * np.log10(1 / error):.1f} dB")
