"""Put graphs under a diffusers pipeline of your own and compare its frames with eager PyTorch.

On a card leave `backend` out: engines from the store are used. ONNX Runtime computes the same graphs on a processor.
"""

from pathlib import Path

import diffusers
import numpy as np
import overcrank
import torch

FOLDER = Path(overcrank.__file__).parent / "models" / "demo" / "ltx-demo"


def frames_of(pipe: diffusers.LTXPipeline) -> np.ndarray:
    """[frame, height, width, 3], 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_frames": 17}
    return pipe(
        "a blue square moving up", **size, num_inference_steps=24, generator=generator, output_type="np"
    ).frames[0]


pipe = diffusers.LTXPipeline.from_pretrained(FOLDER)
eager = frames_of(pipe)

overcrank.accelerate(pipe, backend="onnxruntime")
served = frames_of(pipe)
print(pipe.overcrank.summary())
print(f"largest difference of a pixel: {np.abs(eager - served).max():.6f}")

pipe.overcrank.remove()  # the pipeline is as it was
print("after remove() the same bits as before:", np.array_equal(frames_of(pipe), eager))
