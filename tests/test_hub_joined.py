"""Checkpoints that come from several repositories: the whole is what diffusers makes of them by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests import by_hand, checkpoints, hub_server, pipelines

ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-3"
IMAGE_MODEL = "SG161222/Realistic_Vision_V5.1_noVAE"


def overcrank(hub: hub_server.Hub, own: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | hub.environment(own / "hf") | {"OVERCRANK_HOME": str(own / "home")}
    script = Path(sys.executable).with_name("overcrank")
    return subprocess.run(
        [script, *map(str, words)], env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def test_animatediff_is_joined_as_diffusers_joins_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    checkpoints.published(root, "animatediff-sd15-v1.5.3")
    shutil.copy(root / ADAPTER / "diffusion_pytorch_model.safetensors", root / ADAPTER / "motion.ckpt")
    options = ["--prompt", pipelines.PROMPT, "--steps", 2, "--height", 64, "--width", 64, "--frames", 4, "--seed", 3]
    options += ["--guidance", 5, "--backend", "eager", "--formats", "png", "--device", "cpu"]
    with hub_server.serve(root) as hub:
        done = overcrank(
            hub, tmp_path, "render", "--model", "animatediff-sd15-v1.5.3", *options, "-o", tmp_path / "o.png"
        )
        assert done.returncode == 0, done.stderr
        assert not [f for f in hub.fetched() if f.endswith(".ckpt")]
    (folder,) = (tmp_path / "home/checkpoints").iterdir()

    adapter = diffusers.MotionAdapter.from_pretrained(root / ADAPTER)
    by_hand = diffusers.AnimateDiffPipeline.from_pretrained(root / IMAGE_MODEL, motion_adapter=adapter)
    ours = diffusers.AnimateDiffPipeline.from_pretrained(folder)
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    configs = [{k: v for k, v in dict(p.unet.config).items() if k not in ignored} for p in (ours, by_hand)]
    assert json.loads(json.dumps(configs[0])) == json.loads(json.dumps(configs[1]))
    tensors, stock = ours.unet.state_dict(), by_hand.unet.state_dict()
    assert tensors.keys() == stock.keys()
    assert all(torch.equal(tensors[name], stock[name]) for name in stock)

    about: dict[str, Any] = json.loads((tmp_path / "o.json").read_text())
    assert about["pipeline"] == "AnimateDiffPipeline"
    frames = []
    for pipe in (ours, by_hand):
        pipe.set_progress_bar_config(disable=True)
        call = {"prompt": pipelines.PROMPT, "num_inference_steps": 2, "height": 64, "width": 64, "num_frames": 4}
        seed = torch.Generator().manual_seed(3)
        frames.append(pipe(**call, guidance_scale=5.0, generator=seed, output_type="np").frames[0])
    assert np.array_equal(*frames)
    shown = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "o-frames").iterdir())])
    assert shown.shape == (4, 64, 64, 3)


def test_framepack_is_joined_of_three_repositories(tmp_path: Path) -> None:
    root = tmp_path / "root"
    checkpoints.published(root, "framepack-i2v-13b")
    base = root / "hunyuanvideo-community/HunyuanVideo"
    shutil.copytree(root / "lllyasviel/FramePackI2V_HY", base / "transformer")  # HunyuanVideo's own, not wanted
    with hub_server.serve(root) as hub:
        picture = tmp_path / "first.png"
        Image.effect_noise((64, 64), 90).convert("RGB").save(picture)
        options = ["--prompt", pipelines.PROMPT, "--image", picture, "--steps", 2, "--height", 64, "--width", 64]
        options += ["--frames", 9, "--backend", "eager", "--formats", "png", "--device", "cpu"]
        done = overcrank(hub, tmp_path, "render", "--model", "framepack-i2v-13b", *options, "-o", tmp_path / "o.png")
        assert done.returncode == 0, done.stderr
        assert not [f for f in hub.fetched() if f.startswith("hunyuanvideo-community/HunyuanVideo/transformer")]
    (folder,) = (tmp_path / "home/checkpoints").iterdir()
    ours = diffusers.HunyuanVideoFramepackPipeline.from_pretrained(folder)
    stock = by_hand.framepack_parts(root, "framepack-i2v-13b", "HunyuanVideoFramepackPipeline")
    assert {k: type(v) for k, v in ours.components.items()} == {k: type(v) for k, v in stock.components.items()}
    for part in ("transformer", "vae", "image_encoder", "text_encoder"):
        mine, theirs = (getattr(p, part).state_dict() for p in (ours, stock))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), part
