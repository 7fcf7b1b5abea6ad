"""Render the demo model: circle.gif. On a card engines of the store do it, elsewhere ONNX Runtime."""

import overcrank
import torch

pipe = overcrank.load("ltx-demo")
frames = pipe(
    "a red circle moving right",
    height=64,
    width=64,
    num_frames=17,
    num_inference_steps=24,
    generator=torch.Generator().manual_seed(0),
).frames[0]
frames[0].save("circle.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)
print(pipe.overcrank.summary())
