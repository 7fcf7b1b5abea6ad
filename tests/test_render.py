"""Rendering the demo checkpoint through the public commands, against plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from overcrank.models.demo import FOLDER
from overcrank.runtime.pipeline.accelerate import accelerate
from PIL import Image

from bench.render_parity import PROMPT, TASKS, draw_picture, options_of, parity_of

STEPS = 6


@pytest.fixture(scope="session")
def store(shared_store: Path) -> Path:
    """One cache of exported graphs."""
    return shared_store


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_picture(tmp_path_factory.mktemp("pictures") / "square.png")


def pipeline(cls: str = "LTXPipeline") -> Any:
    import diffusers

    pipe = getattr(diffusers, cls).from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())]) / 255


@pytest.mark.parametrize("task", list(TASKS))
def test_onnx_runtime_renders_what_plain_diffusers_renders(
    task: str, run: Any, tmp_path: Path, store: Path, picture: Path
) -> None:
    result = run("overcrank", "render", *options_of(task, STEPS, picture, tmp_path / "clip.png"), "--store", store)
    assert result.exit_code == 0, result.output
    parity = parity_of(task, STEPS, picture, tmp_path / "clip")
    assert parity.worst_cosine >= 0.9999
    assert parity.psnr_db >= 50
    about = json.loads((tmp_path / "clip.json").read_text())
    denoiser = "denoiser" if task == "text-to-video" else "denoiser_conditioned"
    assert about["calls"][denoiser] == {"onnxruntime": STEPS}
    assert about["calls"]["vae_decoder"] == {"onnxruntime": 1}
    assert not about["fallbacks"]


def test_a_render_is_whole_and_reproducible(run: Any, tmp_path: Path) -> None:
    arguments = ["--prompt", PROMPT, "--steps", 3, "--backend", "eager", "--formats", "mp4,gif,png,sheet", "--quiet"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run("overcrank", "render", *arguments, "--seed", seed, "--fps", 12, "-o", tmp_path / f"{name}.mp4")
        assert result.exit_code == 0, result.output
    first, again, other = (frames_of(tmp_path / f"{n}-frames") for n in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with av.open(str(tmp_path / "a.mp4")) as container:
        video = container.streams.video[0]
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video)]
        assert (video.codec_context.name, float(video.average_rate), len(decoded)) == ("h264", 12.0, 17)
        assert container.metadata["prompt"] == PROMPT
        assert container.metadata["seed"] == "1"
        assert json.loads(container.metadata["comment"])["model"] == "ltx-demo"
    assert np.abs(np.stack(decoded) / 255 - first).mean() < 0.03
    with Image.open(tmp_path / "a.gif") as animation, Image.open(tmp_path / "a.sheet.png") as sheet:
        assert animation.n_frames == 17
        assert sheet.width > 4 * 64
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_sidecar_request_is_a_job_that_gives_the_same_frames(run: Any, tmp_path: Path) -> None:
    options = ["--prompt", PROMPT, "--steps", 3, "--formats", "png", "--quiet", "--seed", 5]
    assert run("overcrank", "render", *options, "-o", tmp_path / "one.png").exit_code == 0
    request = json.loads((tmp_path / "one.json").read_text())["request"]
    (tmp_path / "jobs.jsonl").write_text(json.dumps(request) + "\n")
    result = run("overcrank", "batch", tmp_path / "jobs.jsonl", "-o", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    assert np.array_equal(frames_of(tmp_path / "one-frames"), frames_of(tmp_path / "again" / "one-frames"))


def test_sound_is_muxed_and_cut_to_the_video(run: Any, tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "tone.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(22050)
        sound.writeframes((np.sin(np.arange(22050 * 5) / 8) * 9000).astype("<i2").tobytes())
    options = ["--prompt", PROMPT, "--steps", 1, "--quiet", "--audio", tmp_path / "tone.wav"]
    result = run("overcrank", "render", *options, "-o", tmp_path / "loud.mp4")
    assert result.exit_code == 0, result.output
    with av.open(str(tmp_path / "loud.mp4")) as container:
        samples = sum(f.samples for f in container.decode(audio=0))
    assert abs(samples / 48000 - 17 / 8) < 0.1


def test_without_a_gpu_tensorrt_refuses(run: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    options = ["--prompt", PROMPT, "--steps", 1, "--quiet"]
    result = run("overcrank", "render", *options, "-o", tmp_path / "strict.mp4", "--backend", "tensorrt")
    assert result.exit_code == 1
    assert "error: denoiser, vae_decoder, vae_encoder: the pipeline is on cpu" in result.output
    assert not list(tmp_path.glob("*strict*"))


def test_previews_show_the_video_while_it_is_made(
    run: Any, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overcrank.runtime.render import steps

    seen = []
    write = steps.write_preview

    def spy(image: np.ndarray, stem: Path) -> None:
        write(image, stem)
        seen.append(np.asarray(Image.open(tmp_path / "p.preview.png")) / 255)

    monkeypatch.setattr(steps, "write_preview", spy)
    options = ["--prompt", PROMPT, "--quiet", "--preview", "--formats", "png"]
    assert run("overcrank", "render", *options, "-o", tmp_path / "p.png").exit_code == 0
    last = frames_of(tmp_path / "p-frames")
    assert 3 <= len(seen) <= 6
    nearest = [min(np.abs(s - f).mean() for f in last) for s in seen]
    assert nearest[-1] < 0.05  # the guess closes in on the result
    assert not list(tmp_path.glob("*preview*"))


# ── accelerate on one's own pipeline ────────────────────────────────────────────────


def test_accelerate_keeps_the_pipelines_modules_and_can_be_removed(store: Path) -> None:
    import inspect

    pipe = pipeline()
    before = inspect.signature(pipe.transformer.forward)
    kinds = {name: type(module) for name, module in pipe.components.items()}
    assert accelerate(pipe, backend="onnxruntime", store=store) is pipe
    assert {name: type(module) for name, module in pipe.components.items()} == kinds
    assert inspect.signature(pipe.transformer.forward) == before
    assert "forward" in vars(pipe.transformer)
    pipe.overcrank.remove()
    assert "forward" not in vars(pipe.transformer)
    assert "forward" not in vars(pipe.vae.decoder)


def test_a_forward_that_a_hook_had_put_there_comes_back() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = pipeline()
    add_hook_to_module(pipe.transformer, ModelHook())
    hooked = pipe.transformer.forward
    accelerate(pipe, backend="onnxruntime")
    assert pipe.transformer.forward is not hooked
    pipe.overcrank.remove()
    assert pipe.transformer.forward is hooked


def test_both_output_types_and_a_lora_fused_into_the_module_take_effect(store: Path) -> None:
    from overcrank.models import components, resolve

    pipe = accelerate(pipeline(), backend="onnxruntime", store=store)
    component = components(resolve("ltx-demo"), ("denoiser",))[0]
    sizes = {"batch": 1, "tokens": 20, "text": 8}
    call = component.sample(pipe.transformer, sizes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        (as_tuple,) = pipe.transformer(**call)
        as_output = pipe.transformer(**{**call, "return_dict": True}).sample
        assert torch.equal(as_tuple, as_output)
        pipe.transformer.transformer_blocks[0].ff.net[2].weight.mul_(0.5)  # what fusing does: values change in place
        (changed,) = pipe.transformer(**call)
        pipe.overcrank.remove()
        (eager,) = pipe.transformer(**call)
    assert not torch.allclose(changed, as_tuple, atol=1e-4)
    assert torch.allclose(changed, eager, atol=1e-4)


def test_calls_that_need_gradients_run_eagerly(store: Path) -> None:
    from overcrank.models import components, resolve

    pipe = accelerate(pipeline(), backend="onnxruntime", store=store)
    component = components(resolve("ltx-demo"), ("denoiser",))[0]
    call = component.sample(pipe.transformer, {"batch": 1, "tokens": 20, "text": 8}, torch.Generator().manual_seed(0))
    (out,) = pipe.transformer(**call)
    out.sum().backward()
    assert pipe.transformer.proj_in.weight.grad is not None


def test_a_non_finite_engine_result_is_rendered_again_eagerly(
    run: Any, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overcrank.runtime.sessions.ort import OrtSession

    honest = OrtSession.__call__

    def overflowing(self: OrtSession, inputs: Any) -> Any:
        return {k: v * float("inf") for k, v in honest(self, inputs).items()}

    monkeypatch.setattr(OrtSession, "__call__", overflowing)
    options = ["--prompt", PROMPT, "--steps", 2, "--quiet", "--formats", "png", "--store", store]
    result = run("overcrank", "render", *options, "-o", tmp_path / "x.png", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "non-finite latents" in result.output
    about = json.loads((tmp_path / "x.json").read_text())
    assert [f["component"] for f in about["fallbacks"]] == ["denoiser"]
    assert about["calls"]["denoiser"] == {"eager": 2, "onnxruntime": 2}
    assert run("overcrank", "render", *options, "-o", tmp_path / "y.png", "--backend", "eager").exit_code == 0
    assert np.array_equal(frames_of(tmp_path / "x-frames"), frames_of(tmp_path / "y-frames"))


def test_a_named_bundle_s_graph_is_rendered(run: Any, demo_bundle: Path, tmp_path: Path) -> None:
    """It is the bundle's: the store stays empty, and a changed byte is noticed."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    options = ["--prompt", PROMPT, "--steps", 2, "--formats", "png", "--backend", "onnxruntime", "--bundle", bundle]
    rendered = run("overcrank", "render", *options, "-o", tmp_path / "x.png")
    assert rendered.exit_code == 0, rendered.output
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["bundles"] == {"denoiser": "bundle"}
    assert about["calls"]["denoiser"] == {"onnxruntime": 2}
    assert {f["reason"] for f in about["fallbacks"]} == {"no bundle has an engine of vae_decoder"}
    assert not list((tmp_path / "home").glob("graphs/*"))
    eager = run("overcrank", "render", *options[:-4], "--backend", "eager", "-o", tmp_path / "y.png")
    assert eager.exit_code == 0
    error = np.square(frames_of(tmp_path / "x-frames") - frames_of(tmp_path / "y-frames")).mean()
    assert error < 1e-6
    with (bundle / "denoiser.onnx").open("r+b") as file:
        file.seek(2000)
        file.write(b"?!")
    damaged = run("overcrank", "render", *options, "-o", tmp_path / "z.png")
    assert "bundle bundle is damaged: denoiser.onnx does not match the manifest" in damaged.output
    assert json.loads((tmp_path / "z.json").read_text())["calls"]["denoiser"] == {"eager": 2}


def test_a_named_bundle_that_does_not_fit(run: Any, demo_bundle: Path, tmp_path: Path) -> None:
    options = ["--prompt", PROMPT, "--backend", "onnxruntime", "--bundle", demo_bundle, "-o", tmp_path / "x.png"]
    fp8 = run("overcrank", "render", *options, "--precision", "fp8", "--activations", "dynamic")
    assert fp8.exit_code == 2
    assert "is in bf16; leave --precision out, or name another bundle" in fp8.output
    other = shutil.copytree(demo_bundle, tmp_path / "other")
    text = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"num_layers": ', '"num_layers": 1'))
    refused = run("overcrank", "render", *options[:4], "--bundle", other, "-o", tmp_path / "x.png")
    assert refused.exit_code == 2
    assert "--bundle other is of ltx-demo, another network than ltx-demo" in refused.output
