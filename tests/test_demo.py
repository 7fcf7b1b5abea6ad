"""The demo checkpoint and its judge."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
import torch
from overcrank.models.demo import FOLDER, clips
from overcrank.models.demo.evaluate import REQUIRED, prompts, scores, table, trials
from overcrank.models.demo.judge import Verdict, judge
from PIL import Image

from bench.render_parity import draw_picture


def drawn(clip: clips.Clip, seed: int) -> np.ndarray:
    return np.asarray((clips.render([clip], seed=seed)[0] / 2 + 0.5).permute(1, 2, 3, 0))


FIFTHS = [0, *(pytest.param(i, marks=pytest.mark.sweep) for i in range(1, 5))]
"""Of what is one of many alike: each run takes the first."""


@pytest.mark.parametrize("fifth", FIFTHS)
def test_the_judge_reads_drawn_clips_without_a_mistake(fifth: int) -> None:
    random = Random(11)
    for seed, triple in list(enumerate(clips.triples()))[fifth::5]:
        verdict = judge(drawn(clips.random_clip(random, triple), seed))
        assert (verdict.colour, verdict.shape, verdict.motion) == triple


def test_the_judge_sees_nothing_in_noise_and_in_empty_frames() -> None:
    noise = np.random.default_rng(0).random((17, 64, 64, 3))
    assert judge(np.full((17, 64, 64, 3), 0.4)).colour == "none"
    assert judge(noise).motion in ("none", "rotating")
    still = np.repeat(drawn(clips.Clip("red", "square", "moving up", "white"), 0)[:1], 17, axis=0)
    assert judge(still).motion == "none"


@pytest.mark.quick
def test_held_out_combinations_are_never_trained_and_every_word_is() -> None:
    trained, held_out = clips.split()
    assert not set(trained) & set(held_out)
    assert len(held_out) == clips.HELD_OUT
    for place in range(3):
        assert {t[place] for t in held_out} <= {t[place] for t in trained}


@pytest.mark.parametrize("count", [16, pytest.param(None, marks=pytest.mark.sweep)])
def test_the_checkpoint_is_small_and_renders_held_out_prompts_as_asked(count: int | None) -> None:
    from diffusers import LTXPipeline

    assert sum(f.stat().st_size for f in FOLDER.rglob("*.safetensors")) <= 12_000_000
    pipe = LTXPipeline.from_pretrained(FOLDER)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    asked = prompts()
    assert len(asked) >= 60
    done = trials(pipe, asked[:count])
    found = scores(done)
    assert all(found[aspect] >= REQUIRED[aspect] for aspect in REQUIRED), table(done)
    assert found["direction"] >= REQUIRED["motion"]


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) / 255


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red circle moving right", Verdict("red", "circle", "moving right")),
        ("a blue square moving up", Verdict("blue", "square", "moving up")),
    ],
)
def test_the_mp4_shows_what_was_asked(prompt: str, wanted: Verdict, run: Any, tmp_path: Path) -> None:
    result = run("overcrank", "render", "--prompt", prompt, "-o", tmp_path / "out.mp4", "--quiet")
    assert result.exit_code == 0, result.output
    assert judge(decoded(tmp_path / "out.mp4")) == wanted


@pytest.mark.parametrize("last", [False, True])
def test_a_given_image_is_where_the_video_starts(last: bool, run: Any, tmp_path: Path) -> None:
    picture = draw_picture(tmp_path / "square.png")
    options = ["--image", picture] if not last else ["--last-image", picture]
    prompt = f"a blue square moving {'left' if last else 'right'} on a white background"
    result = run("overcrank", "render", "--prompt", prompt, *options, "-o", tmp_path / "out.mp4", "--quiet")
    assert result.exit_code == 0, result.output
    frames = decoded(tmp_path / "out.mp4")
    given = np.asarray(Image.open(picture)) / 255
    differences = np.abs(frames - given).mean((1, 2, 3))
    assert differences[-1 if last else 0] < 0.03
    assert differences.argmin() > 12 if last else differences.argmin() < 4
    assert judge(frames).colour == "blue"
    assert judge(frames).motion == ("moving left" if last else "moving right")
