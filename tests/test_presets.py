"""Presets of few steps: their schedules against what the publishers list, and what `--preset` makes of a render."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from overcrank.errors import RequestError
from overcrank.models import components, resolve, wan
from overcrank.models.base import Preset, Rendering
from overcrank.models.presets import applied, every_preset, fetched, presets, with_preset
from overcrank.runtime.render.request import RenderRequest
from safetensors.torch import load_file

pytestmark = pytest.mark.quick

LTX_DISTILLED = [1000, 993, 987, 981, 975, 909, 725, 0.03]
# As the publishers list them: what the scheduler counts with, 0 at the end, and what the network is told.
SIGMAS = {
    "lightx2v-4step": [1, 0.9375, 0.8333, 0.625, 0],
    "fastwan-3step": [1, 0.757, 0.522, 0],
    "ltx-13b-0.9.7-dev": [*(t / 1000 for t in LTX_DISTILLED), 0],
    "ltx2-19b": [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0],
    "hunyuan-1.5-step-distilled": [
        1, 0.98718, 0.97222, 0.95455, 0.93333, 0.90741, 0.875, 0.83333, 0.77778, 0.7, 0.58333, 0.38889, 0,
    ],
}  # fmt: skip
PAIRS = [(p, v) for p in every_preset() for v in p.variants]


def named(pair: Any) -> str:
    return pair if isinstance(pair, str) else pair.name


def scheduler_of(variant: str, rendering: Rendering) -> Any:
    """diffusers' own, of the checkpoint's configuration with what the preset lays over it."""
    config = dict(resolve(variant).configs["scheduler"])
    overlay = dict(rendering.scheduler)
    name = overlay.pop("_class_name", config.pop("_class_name"))
    return getattr(diffusers, name).from_config(config, **overlay)


def published(preset: Preset, variant: str) -> list[float]:
    return SIGMAS.get(variant) or SIGMAS[preset.name]


@pytest.mark.parametrize(("preset", "variant"), PAIRS, ids=named)
def test_the_schedule_is_the_published_list(preset: Preset, variant: str) -> None:
    import numpy as np

    rendering = applied(resolve(variant), preset).rendering()
    scheduler = scheduler_of(variant, rendering)
    listed = rendering.sigmas or tuple(t / 1000 for t in rendering.timesteps)
    # HunyuanVideo 1.5 lists nothing: its pipeline hands this to the scheduler, which shifts it
    given = np.array(listed) if listed else np.linspace(1, 0, rendering.steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=given)
    wanted = published(preset, variant)
    assert np.allclose(scheduler.sigmas.numpy(), wanted, atol=5e-5)
    assert np.allclose(scheduler.timesteps.numpy(), np.array(wanted[:-1]) * 1000, atol=0.05)
    assert rendering.steps == len(wanted) - 1
    assert (rendering.guidance, rendering.guidance_2 or 1.0) == (1.0, 1.0)


def test_each_expert_takes_two_steps() -> None:
    for variant, boundary in (("wan-2.2-t2v-a14b", 875), ("wan-2.2-i2v-a14b", 900)):
        rendered, _ = with_preset(resolve(variant), "lightx2v-4step")
        scheduler = scheduler_of(variant, rendered.rendering())
        scheduler.set_timesteps(sigmas=list(rendered.rendering().sigmas))
        assert [bool(t >= boundary) for t in scheduler.timesteps] == [True, True, False, False]
        assert rendered.rendering().guidance_2 == 1.0


def test_diffusers_own_four_steps_are_not_these() -> None:
    """Why the list is explicit: at the same shift Euler spaces steps otherwise, and the checkpoint's solver nearly so.

    The solver also rounds the timesteps, and looks two steps back.
    """
    import numpy as np

    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    euler.set_timesteps(4)
    solver = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)
    solver.set_timesteps(4)
    shifted_twice = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    shifted_twice.set_timesteps(sigmas=SIGMAS["lightx2v-4step"][:-1])
    for scheduler in (euler, shifted_twice):
        assert not np.allclose(scheduler.sigmas.numpy(), SIGMAS["lightx2v-4step"], atol=1e-2)
    assert solver.timesteps.tolist() == [999, 937, 833, 625]
    assert solver.config.solver_order == 2


def test_ltx2_lists_what_diffusers_lists() -> None:
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    rendered, _ = with_preset(resolve("ltx2-19b"), "ltx-distilled")
    assert list(rendered.rendering().sigmas) == DISTILLED_SIGMA_VALUES
    assert rendered.rendering().arguments["audio_guidance_scale"] == 1.0


def test_every_preset_is_well_formed() -> None:
    known = {f.name for f in fields(Rendering)}
    assert every_preset()
    for preset in every_preset():
        assert preset.changes.keys() <= known
        assert preset.source.startswith("https://")
        assert bool(preset.loras) != bool(preset.checkpoint), "a preset is a LoRA or a checkpoint"
        for name in preset.variants:
            variant = resolve(name)
            assert set(preset.tasks) <= variant.renders.keys()
            there = {part for c in components(variant) for part in (c.subfolder, *c.also_serves)}
            assert {lora.part for lora in preset.loras} <= there
    names = [(p.name, v) for p, v in PAIRS]
    assert len(names) == len(set(names))


def test_a_preset_changes_the_rendering_and_nothing_else() -> None:
    variant = resolve("wan-2.2-i2v-a14b")
    rendered, preset = with_preset(variant, "lightx2v-4step")
    assert preset is not None
    assert tuple(rendered.renders) == ("image-to-video",)
    before, after = variant.renders["image-to-video"], rendered.renders["image-to-video"]
    assert (after.pipeline, after.negative_prompt) == (before.pipeline, before.negative_prompt)
    assert (rendered.configs, rendered.hub_id, rendered.preset) == (variant.configs, variant.hub_id, "lightx2v-4step")
    other, _ = with_preset(resolve("wan-2.2-ti2v-5b"), "fastwan-3step")
    assert other.hub_id == "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    own = replace(variant, name="my tune", like="wan-2.2-i2v-a14b")
    assert presets(own) == presets(variant)
    assert with_preset(variant, "") == (variant, None)


def test_presets_that_are_not_there() -> None:
    with pytest.raises(RequestError, match=r"no such preset; did you mean lightx2v-4step\? wan-2.2-t2v-a14b has ligh"):
        with_preset(resolve("wan-2.2-t2v-a14b"), "lightx2v-4steps")
    with pytest.raises(RequestError, match=r"preset='fastwan-3step' is for wan-2\.2-ti2v-5b; wan-2\.1-t2v-14b has"):
        with_preset(resolve("wan-2.1-t2v-14b"), "fastwan-3step")
    with pytest.raises(RequestError, match=r"there is no such preset; svd-xt-1\.1 has no preset"):
        with_preset(resolve("svd"), "xyz")
    rendered, _ = with_preset(resolve("wan-2.2-i2v-a14b"), "lightx2v-4step")
    with pytest.raises(RequestError, match="with preset='lightx2v-4step' cannot do text-to-video"):
        RenderRequest(prompt="a").completed(rendered)


def test_the_command_line_refuses_and_lists_them(run: Any, tmp_path: Path) -> None:
    result = run("overcrank", "render", "--prompt", "a", "--preset", "lightx2v", "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert "error: --preset lightx2v: there is no such preset; did you mean lightx2v-4step? ltx-demo has no preset" in (
        result.output
    )
    shown = run("overcrank", "models", "show", "wan-2.2-t2v-a14b").output
    assert "--preset lightx2v-4step  4 steps without guidance: text-to-video" in shown
    assert "sigmas 1 0.9375 0.833333 0.625, guidance 1 and 1" in shown
    assert "transformer_2 + 1 × lightx2v/Wan2.2-Distill-Loras: wan2.2_t2v_A14b_low_noise" in shown
    everything = json.loads(run("overcrank", "models", "--json").output)["models"]
    assert {m["name"]: m["presets"] for m in everything}["ltx2-19b"] == ["ltx-distilled"]


@pytest.mark.heavy
def test_a_lora_that_cannot_be_fetched_is_named() -> None:
    from overcrank.errors import ModelError

    _, preset = with_preset(resolve("wan-2.1-t2v-14b"), "lightx2v-4step")
    assert preset is not None
    with pytest.raises(ModelError, match=r"needs wan2\.1_t2v_14b_lora.* of 'lightx2v/Wan2\.1-Distill-Loras'"):
        fetched(preset)


@pytest.mark.heavy
def test_a_render_merges_the_presets_loras_and_says_so(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files' names in a hub cache, small ones in them; the two experts of a small Wan."""
    from huggingface_hub import constants

    from tests.pipelines import saved
    from tests.test_lora import plain_file

    folder = saved("wan-two-experts", tmp_path)
    (preset,) = presets(resolve("wan-2.2-t2v-a14b"))
    here = replace(preset, variants=(resolve(str(folder)).like,))
    monkeypatch.setattr(wan, "FAMILY", replace(wan.FAMILY, presets=(here,)))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / f"models--{preset.loras[0].repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for seed, lora in enumerate(preset.loras):
        plain_file(cache / "snapshots" / "abc" / lora.file, seed)
    common = ["--prompt", "a red circle", "--height", 64, "--width", 64, "--frames", 9, "--formats", "latents"]
    common += ["--model", folder, "--backend", "eager", "--quiet"]
    for name, more in {"plain": ("--steps", 4, "--guidance", 1), "preset": ("--preset", preset.name)}.items():
        result = run("overcrank", "render", *common, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "preset.json").read_text())
    assert said["preset"] == "lightx2v-4step"
    assert [(x["file"], x["parts"], x["scale"]) for x in said["loras"]] == [
        (lora.file, [lora.part], 1.0) for lora in preset.loras
    ]
    assert {x["repository"] for x in said["loras"]} == {"lightx2v/Wan2.2-Distill-Loras"}
    assert (said["request"]["steps"], said["request"]["guidance"]) == (4, 1.0)
    plain, ours = (load_file(tmp_path / f"{n}.latents.safetensors")["latents"][-1] for n in ("plain", "preset"))
    files = [cache / "snapshots" / "abc" / lora.file for lora in preset.loras]
    wanted = _by_hand(folder, *files)
    assert float((plain - wanted).abs().max()) > 0.01
    assert torch.allclose(ours, wanted, atol=1e-3)


def _by_hand(folder: Path, high: Path, low: Path) -> torch.Tensor:
    """lightx2v's four steps in plain diffusers, whose LoRA loader needs peft."""
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(high), adapter_name="high")
    pipe.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    own = pipe.scheduler.set_timesteps
    shifted = [5 * t / (1 + 4 * t) for t in (1, 0.75, 0.5, 0.25)]  # denoising_step_list, sample_shift
    pipe.scheduler.set_timesteps = lambda steps, device=None: own(sigmas=shifted, device=device)
    made = pipe(
        "a red circle", height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(0), output_type="latent",
    )  # fmt: skip
    latents: torch.Tensor = made.frames
    return latents
