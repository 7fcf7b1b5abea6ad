"""`overcrank render` with its defaults against diffusers called by hand as the publishers do it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from overcrank.models import _negative_prompts, resolve
from overcrank.runtime.pipeline.dtypes import dtypes_of
from overcrank.runtime.render.media import fitted_image, fitted_video

from tests import pipelines, tiny
from tests.test_render_families import _what_cannot_be_installed_here, frames_of, media_of  # noqa: F401

STEPS = 4


def unipc(pipe: Any, shift: float) -> None:
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)


def wan(pipe: Any, **_: Any) -> dict[str, Any]:
    unipc(pipe, 8.0)
    return {"negative_prompt": _negative_prompts.WAN, "guidance_scale": 6.0}


def skyreels(pipe: Any, image: Any, **_: Any) -> dict[str, Any]:
    unipc(pipe, 5.0)
    return {"negative_prompt": _negative_prompts.SKYREELS, "guidance_scale": 5.0, "image": image}


def cogvideox(pipe: Any, **_: Any) -> dict[str, Any]:
    own = pipe.scheduler.config
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(own, timestep_spacing="trailing")
    return {"guidance_scale": 6.0, "use_dynamic_cfg": True, "negative_prompt": ""}


def animatediff(pipe: Any, **_: Any) -> dict[str, Any]:
    more = {"clip_sample": False, "timestep_spacing": "linspace", "beta_schedule": "linear", "steps_offset": 1}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **more)
    return {"guidance_scale": 7.5, "negative_prompt": "bad quality, worse quality"}


def cosmos_2(pipe: Any, video: Any, **_: Any) -> dict[str, Any]:
    return {"guidance_scale": 7.0, "video": video[-5:], "fps": 9}  # the pipeline has the negative prompt itself


def ltx(pipe: Any, image: Any, **_: Any) -> dict[str, Any]:
    made = {"negative_prompt": _negative_prompts.LTX, "guidance_scale": 3.0, "frame_rate": 24}
    made |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025, "image_cond_noise_scale": 0.15}
    return made | ({"image": image} if image is not None else {})


WAYS: dict[str, tuple[str, Any]] = {
    "wan": ("WanPipeline", wan),
    "skyreels-image": ("SkyReelsV2ImageToVideoPipeline", skyreels),
    "cogvideox": ("CogVideoXPipeline", cogvideox),
    "animatediff": ("AnimateDiffPipeline", animatediff),
    "cosmos-2-video": ("Cosmos2VideoToWorldPipeline", cosmos_2),
    "ltx": ("LTXConditionPipeline", ltx),
    "ltx-image": ("LTXConditionPipeline", ltx),
}


@pytest.mark.parametrize("name", tiny.thinned(WAYS, every=2))
def test_defaults_are_the_publishers_call(name: str, run: Any, tmp_path: Path) -> None:
    folder, case = pipelines.saved(name, tmp_path), pipelines.CASES[name]
    media = media_of(case, tmp_path)
    options = ["--model", folder, "--steps", STEPS, "--height", case.height, "--width", case.width, "--quiet"]
    options += ["--frames", case.frames, "--formats", "png", "--prompt", pipelines.PROMPT, "--backend", "eager"]
    result = run("overcrank", "render", *options, *media, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    kind, way = WAYS[name]
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    from overcrank.models.base import VideoShape

    shape = VideoShape(case.height, case.width, case.frames)
    image = fitted_image(tmp_path / "first.png", shape) if case.media == "image" else None
    video = fitted_video(tmp_path / "clip.mp4", shape, case.frames, False) if case.media == "video" else None
    call = {"prompt": pipelines.PROMPT, "height": case.height, "width": case.width, "num_frames": case.frames}
    call |= {"num_inference_steps": STEPS, "output_type": "np", "generator": torch.Generator("cpu").manual_seed(0)}
    with torch.no_grad():
        wanted = pipe(**call, **way(pipe, image=image, video=video)).frames[0]
    error = np.square(frames_of(tmp_path / "a-frames") - np.asarray(wanted)).mean()
    assert -10 * math.log10(max(float(error), 1e-20)) >= 50


def test_text_to_video_of_the_later_ltx_runs_the_denoiser_with_one_timestep(
    run: Any, shared_store: Path, tmp_path: Path
) -> None:
    folder, case = pipelines.saved("ltx", tmp_path), pipelines.CASES["ltx"]
    options = ["--model", folder, "--steps", 2, "--height", case.height, "--width", case.width, "--quiet"]
    options += ["--frames", case.frames, "--formats", "png", "--prompt", "x", "--backend", "onnxruntime"]
    options += ["--store", shared_store]
    result = run("overcrank", "render", *options, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["pipeline"] == "LTXConditionPipeline"
    assert about["calls"]["denoiser"] == {"onnxruntime": 2}
    assert not about["fallbacks"]


def test_parts_have_their_own_types(run: Any, tmp_path: Path) -> None:
    folder, case = pipelines.saved("wan", tmp_path), pipelines.CASES["wan"]
    options = ["--model", folder, "--steps", 2, "--height", case.height, "--width", case.width, "--quiet"]
    options += ["--frames", case.frames, "--formats", "png", "--prompt", "x", "--backend", "eager"]
    result = run(
        "overcrank", "render", *options, "--dtype", "transformer=bf16", "--overwrite", "-o", tmp_path / "a.png"
    )
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["dtypes"] == {"text_encoder": "fp32", "transformer": "bf16", "vae": "fp32"}
    wrong = run("overcrank", "render", *options, "--dtype", "transfomer=bf16", "-o", tmp_path / "b.png")
    assert wrong.exit_code == 2
    assert "did you mean transformer?" in wrong.output


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(run: Any, tmp_path: Path) -> None:
    folder, case = pipelines.saved("wan", tmp_path), pipelines.CASES["wan"]
    options = [
        "--model",
        folder,
        "--steps",
        1,
        "--height",
        case.height,
        "--width",
        case.width,
        "--quiet",
        "--frames",
        5,
    ]
    options += ["--formats", "png", "--prompt", "x", "--backend", "eager", "--negative-prompt", "blurry"]
    result = run("overcrank", "render", *options, "--guidance", 1, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "negative_prompt does nothing at guidance 1" in result.output


def test_types_are_the_publishers_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    wan_ = resolve("wan-2.2-t2v-a14b")
    assert dtypes_of(wan_, "cuda", None)["vae"] is torch.float32
    assert dtypes_of(wan_, "cuda", ["vae=bf16"])["vae"] is torch.bfloat16
    assert dtypes_of(wan_, "cuda", ["fp16"]) == {"": torch.float16}
    assert dtypes_of(wan_, "cpu", None) == {"": torch.float32}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert dtypes_of(wan_, "cuda", None)[""] is torch.float16


def test_a_scheduler_made_in_memory_says_what_it_is() -> None:
    import overcrank
    from overcrank.runtime.pipeline.load import pipeline_for

    pipe = pipelines.CASES["cogvideox"].make()
    pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    overcrank.accelerate(pipe, backend="eager")
    variant = pipe.overcrank.variant
    assert variant.configs["scheduler"]["_class_name"] == "CogVideoXDPMScheduler"
    made = pipeline_for(pipe, variant, "text-to-video")
    assert type(made.scheduler) is diffusers.CogVideoXDPMScheduler
