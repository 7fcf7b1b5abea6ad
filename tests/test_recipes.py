"""What a default render hands its scheduler and pipeline, against the publishers' numbers written down here."""

from __future__ import annotations

import importlib
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from overcrank.cli.recipes import markdown
from overcrank.errors import RequestError, UserError
from overcrank.models import _negative_prompts, families, family, resolve
from overcrank.models._schedulers import ONLY, RESCALING, SCHEDULERS
from overcrank.models.base import Rendering, Variant
from overcrank.runtime.pipeline.dtypes import check_parts, typed
from overcrank.runtime.render.request import RenderRequest
from overcrank.runtime.render.schedule import scheduled, scheduler_of

pytestmark = pytest.mark.quick

RENDERS = [(v, task) for name in families() for v in family(name).variants for task in v.renders]
IDS = [f"{v.name}:{task}" for v, task in RENDERS]
# (shift, steps, guidance, second guidance): Wan-Video/Wan2.1 and Wan2.2 generate.py, README.md and wan/configs;
# SkyworkAI/SkyReels-V2 README.md and generate_video_df.py.
UNIPC = {
    "wan-2.1-t2v-1.3b": (8, 50, 6, None),
    "wan-2.1-t2v-14b": (5, 50, 5, None),
    "wan-2.1-i2v-14b-480p": (3, 40, 5, None),
    "wan-2.1-i2v-14b-720p": (5, 40, 5, None),
    "wan-2.1-flf2v-14b-720p": (16, 50, 5, None),
    "wan-2.1-vace-1.3b": (16, 50, 5, None),
    "wan-2.1-vace-14b": (16, 50, 5, None),
    "wan-2.2-ti2v-5b": (5, 50, 5, None),
    "wan-2.2-t2v-a14b": (12, 40, 4, 3),
    "wan-2.2-i2v-a14b": (5, 40, 3.5, 3.5),
    "skyreels-v2-t2v-14b-540p": (8, 50, 6, None),
    "skyreels-v2-i2v-14b-540p": (5, 50, 5, None),
    "skyreels-v2-df-14b-540p": (8, 30, 6, None),
}
# Lightricks/LTX-Video: allowed_inference_steps of the distilled checkpoints.
DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)


def made(variant: Variant, task: str, **asked: Any) -> tuple[RenderRequest, Any]:
    """The request with its schedule, and the scheduler it gets over the one the checkpoint carries."""
    rendering = variant.rendering(task)
    asked = {"prompt": "x"} | asked
    request = RenderRequest(**asked)
    request = request.model_copy(update=scheduled(request, variant, rendering))
    return request, scheduler_of(carried(variant), rendering, request)


def carried(variant: Variant) -> Any:
    config = {k: v for k, v in variant.configs["scheduler"].items() if k != "_class_name"}
    return getattr(diffusers, variant.configs["scheduler"]["_class_name"])(**config)


def karras(largest: float, smallest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    ramp = np.linspace(0, 1, steps)
    return (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho


def test_the_page_is_what_the_data_says() -> None:
    assert (Path(__file__).parents[1] / "docs/recipes.md").read_text("utf-8") == markdown(), "run ./build.sh pages"


@pytest.mark.parametrize(("variant", "task"), RENDERS, ids=IDS)
def test_a_rendering_is_one_that_diffusers_can_do(variant: Variant, task: str) -> None:
    rendering = variant.rendering(task)
    call = inspect.signature(getattr(diffusers, rendering.pipeline).__call__).parameters
    assert set(rendering.arguments) <= set(call)
    assert rendering.source
    assert rendering.guidance_2 is None or "guidance_scale_2" in call
    assert not rendering.guidance_rescale or "guidance_rescale" in call
    if "scheduler" not in variant.configs:
        return
    request, scheduler = made(variant, task)
    fields = inspect.signature(type(scheduler).__init__).parameters
    assert set(rendering.scheduler) - {"_class_name"} <= set(fields)
    for name, value in rendering.scheduler.items():
        assert name == "_class_name" or scheduler.config[name] == value
    assert request.steps == rendering.steps


@pytest.mark.parametrize("name", UNIPC)
def test_shifted_steps_are_the_publishers(name: str) -> None:
    shift, steps, guidance, second = UNIPC[name]
    variant = resolve(name)
    task = next(iter(variant.renders))
    request, scheduler = made(variant, task)
    scheduler.set_timesteps(request.steps, device="cpu")
    grid = np.linspace(1, 1 / 1000, steps + 1)[:-1]
    wanted = shift * grid / (1 + (shift - 1) * grid)
    assert scheduler.sigmas.numpy() == pytest.approx([*wanted, 0], abs=2e-6)
    rendering = variant.rendering(task)
    assert (rendering.guidance, rendering.guidance_2) == (guidance, second)


def test_most_steps_of_two_experts_are_the_high_noise_ones() -> None:
    request, scheduler = made(resolve("wan-2.2-t2v-a14b"), "text-to-video")
    scheduler.set_timesteps(request.steps, device="cpu")
    assert int((scheduler.timesteps >= 875).sum()) == 26


@pytest.mark.parametrize("name", ["ltx-13b-0.9.7-distilled", "ltx-13b-0.9.8-distilled"])
def test_distilled_steps_are_listed_and_final(name: str) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule, retrieve_timesteps

    assert linear_quadratic_schedule(8).tolist() == pytest.approx(DISTILLED)
    request, scheduler = made(resolve(name), "text-to-video")
    # as LTXConditionPipeline asks for them, whatever it would have had
    times, steps = retrieve_timesteps(scheduler, 8, "cpu", [900.0, 500.0])
    assert steps == 8
    assert times.tolist() == pytest.approx([s * 1000 for s in DISTILLED], abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([*DISTILLED, 0])
    assert request.sigmas == DISTILLED


def test_steps_of_the_users_take_the_place_of_a_list() -> None:
    request, _ = made(resolve("ltx-13b-0.9.8-distilled"), "text-to-video", steps=4)
    assert (request.steps, request.sigmas) == (4, None)
    again, _ = made(resolve("ltx-13b-0.9.8-distilled"), "text-to-video", steps=8)
    assert again.sigmas == DISTILLED, "a sidecar's request makes the same"


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-1.5-5b"])
def test_cogvideox_steps_trail(name: str) -> None:
    request, scheduler = made(resolve(name), "text-to-video")
    scheduler.set_timesteps(request.steps)
    assert type(scheduler).__name__ == ("CogVideoXDDIMScheduler" if "2b" in name else "CogVideoXDPMScheduler")
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))
    assert scheduler.config.snr_shift_scale == (3.0 if "2b" in name else 1.0)


@pytest.mark.parametrize(("name", "steps"), [("svd-img2vid", 25), ("svd-xt", 30)])
def test_svd_steps_are_after_karras(name: str, steps: int) -> None:
    request, scheduler = made(resolve(name), "image-to-video", prompt="")
    scheduler.set_timesteps(request.steps, device="cpu")
    assert scheduler.sigmas.numpy() == pytest.approx([*karras(700, 0.002, steps), 0], rel=1e-4)
    assert scheduler.timesteps.numpy() == pytest.approx(0.25 * np.log(karras(700, 0.002, steps)), abs=1e-3)


def test_cosmos_steps_are_after_karras() -> None:
    request, scheduler = made(resolve("cosmos-predict1-7b-text2world"), "text-to-video")
    scheduler.set_timesteps(request.steps, device="cpu")
    assert scheduler.sigmas.numpy()[:-1] == pytest.approx(karras(80, 0.002, 36), rel=1e-4)
    request, scheduler = made(resolve("cosmos-predict2.5-2b"), "text-to-video")
    scheduler.set_timesteps(request.steps, device="cpu")
    sigmas = karras(200, 0.01, 36)
    assert scheduler.sigmas.numpy()[:-1] == pytest.approx(sigmas / (1 + sigmas), rel=1e-3)


def test_animatediff_steps_are_linspaced_on_linear_betas() -> None:
    request, scheduler = made(resolve("animatediff-sd15-v1.5.3"), "text-to-video")
    scheduler.set_timesteps(request.steps)
    assert scheduler.timesteps.tolist() == np.linspace(0, 999, 25).round()[::-1].tolist()
    assert scheduler.betas.numpy() == pytest.approx(np.linspace(0.00085, 0.012, 1000), rel=1e-4)


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"]
)
def test_a_list_is_final_on_every_scheduler_that_takes_one(name: str) -> None:
    """lightx2v's four steps: nothing shifts them again."""
    sigmas = (1.0, 0.9375, 0.8333, 0.625)
    variant = resolve("wan-2.1-t2v-14b")
    request, scheduler = made(variant, "text-to-video", scheduler=name, sigmas=(*sigmas, 0.0))
    assert type(scheduler).__name__ == name
    assert isinstance(scheduler, getattr(diffusers, name))
    scheduler.set_timesteps(50, device="cpu")
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], abs=2e-6)
    assert (request.steps, request.shift) == (4, None)


def test_timesteps_are_a_list_too() -> None:
    asked = {"scheduler": "FlowMatchEulerDiscreteScheduler", "timesteps": (1000, 750, 500, 250)}
    _, scheduler = made(resolve("wan-2.1-t2v-14b"), "text-to-video", **asked)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("name", "field"), [("FlowMatchEulerDiscreteScheduler", "shift"), ("DPMSolverMultistepScheduler", "flow_shift")]
)
def test_a_shift_goes_by_the_name_the_class_has_for_it(name: str, field: str) -> None:
    variant = resolve("wan-2.1-t2v-14b")
    _, scheduler = made(variant, "text-to-video", scheduler=name)
    assert scheduler.config[field] == 5.0, "the publisher's"
    _, scheduler = made(variant, "text-to-video", scheduler=name, shift=7)
    assert scheduler.config[field] == 7
    scheduler.set_timesteps(10, device="cpu")
    assert all(a > b for a, b in pairwise(scheduler.sigmas.tolist()))


WRONG = {
    "sigmas: 0.9 follows 0.5; they must fall": {"sigmas": (1.0, 0.5, 0.9)},
    "sigmas: 1.2 is out of range; each must be above 0 and at most 1": {"sigmas": (1.2, 0.5)},
    "sigmas: 0 is out of range": {"sigmas": (1.0, 0.0, 0.5)},
    "steps 3 and a list of 2 sigmas disagree": {"sigmas": (1.0, 0.5), "steps": 3},
    "sigmas and timesteps both list": {"sigmas": (1.0,), "timesteps": (1000,)},
    "timesteps: 1001 is out of range": {"timesteps": (1001, 500)},
    "sigmas: the list is empty": {"sigmas": ()},
    "shift: the sigmas or timesteps that are listed are final": {"sigmas": (1.0, 0.5), "shift": 3},
    "no such video scheduler of diffusers; did you mean .*UniPCMultistepScheduler": {"scheduler": "UniPCScheduler"},
    "scheduler DDIMScheduler: WanPipeline of wan-2.1-t2v-14b cannot run it": {"scheduler": "DDIMScheduler"},
    "guidance_2: wan-2.1-t2v-14b has one expert": {"guidance_2": 3},
    "guidance_rescale: WanPipeline of wan-2.1-t2v-14b takes none": {"guidance_rescale": 0.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_one_sentence(message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        RenderRequest(prompt="x", **WRONG[message]).completed(resolve("wan-2.1-t2v-14b"))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("cogvideox-5b", {"shift": 3}, "shift: CogVideoXDPMScheduler of this model has none"),
        ("cogvideox-5b", {"sigmas": (1.0, 0.5)}, "sigmas: CogVideoXDPMScheduler of this model takes no list"),
        ("ltx-2b-0.9.0", {"shift": 3}, "shifts by the number of tokens"),
        ("ltx-13b-0.9.7-dev", {"scheduler": "UniPCMultistepScheduler"}, "LTXConditionPipeline of .* cannot run it"),
        ("hunyuan-video-13b", {"negative_prompt": "blurry"}, "negative_prompt: .* looks at none"),
    ],
)
def test_what_another_model_takes_is_refused(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RenderRequest(prompt="x", **asked).completed(resolve(name))


def test_a_model_without_steps_takes_none() -> None:
    upsampler = resolve("ltx-upsampler-0.9.7")
    assert scheduled(RenderRequest(prompt=""), upsampler, upsampler.rendering()) == {"steps": 1}
    with pytest.raises(RequestError, match=r"steps 5: ltx-upsampler-0.9.7 takes none .*; leave it out"):
        scheduled(RenderRequest(prompt="", steps=5), upsampler, upsampler.rendering())


@pytest.mark.parametrize(
    ("option", "value"), [("shift", 0), ("shift", -1), ("sigmas", "1,half"), ("dtype", "vae=int4")]
)
def test_wrong_options_of_the_command(option: str, value: object, run: Any, tmp_path: Path) -> None:
    result = run("overcrank", "render", "--prompt", "x", f"--{option}", value, "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --{option}")
    assert len(result.output.splitlines()) == 1
    assert not list(tmp_path.glob("a.*"))


def test_negative_prompts_are_those_of_diffusers_and_of_nobody_else() -> None:
    for place, text in (("cosmos.pipeline_cosmos2_5_predict", "COSMOS"), ("ltx2.utils", "LTX_2")):
        module = importlib.import_module(f"diffusers.pipelines.{place}")
        assert getattr(_negative_prompts, text) == module.DEFAULT_NEGATIVE_PROMPT
    own = RenderRequest(prompt="x").completed(resolve("wan-2.2-t2v-a14b"))
    none = RenderRequest(prompt="x", negative_prompt="").completed(resolve("wan-2.2-t2v-a14b"))
    assert (own.negative_prompt, none.negative_prompt) == (_negative_prompts.WAN, "")
    assert RenderRequest(prompt="x").completed(resolve("ltx-demo")).negative_prompt == ""
    assert own == RenderRequest.model_validate(own.model_dump(mode="json", exclude_none=True)).completed(
        resolve("wan-2.2-t2v-a14b")
    ), "a completed request is a valid job, and completes to itself"


def test_tables_of_schedulers_agree_with_diffusers() -> None:
    for name, known in SCHEDULERS.items():
        cls = getattr(diffusers, name)
        fields = inspect.signature(cls.__init__).parameters
        assert known.shift == next((k for k in ("shift", "flow_shift") if k in fields), ""), name
        assert not known.listed or "sigmas" in inspect.signature(cls.set_timesteps).parameters, name
    used = {r.pipeline for v, task in RENDERS for r in [v.rendering(task)]}
    for name in used:
        cls = getattr(diffusers, name)
        rescales = "guidance_rescale" in inspect.signature(cls.__call__).parameters
        assert rescales == (name in RESCALING), name
        assert name not in ONLY or all(s in SCHEDULERS for s in ONLY[name])


def test_dtype_words() -> None:
    assert typed(["bf16", "vae=float32"]) == {"": "bf16", "vae": "fp32"}
    for words, message in ((["vae=fp8"], "use fp32, fp16, bf16"), (["vae=fp32", "vae=bf16"], "both fp32 and bf16")):
        with pytest.raises(UserError, match=message):
            typed(words)
    demo = Path(__file__).parents[1] / "models/demo/ltx-demo"
    with pytest.raises(UserError, match="did you mean transformer"):
        check_parts({"transformers": None}, demo)


def test_sizes_of_pictures_are_those_of_hunyuan_video() -> None:
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    stock = HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    for name, target in (("hunyuan-video-1.5-480p-i2v", 640), ("hunyuan-video-1.5-720p-i2v", 960)):
        for height, width in ((480, 848), (848, 480), (512, 512), (333, 777), (1000, 999), (300, 1100)):
            size = family("hunyuan_video").size_of(resolve(name), height, width)
            assert size == stock.calculate_default_height_width(height, width, target)


@pytest.mark.parametrize("name", ["hunyuan-video-1.5-480p-i2v", "hunyuan-video-1.5-720p-i2v"])
def test_the_usual_engine_takes_every_picture(name: str) -> None:
    """Its one axis is the number of patches, which is largest for a square picture."""
    variant = resolve(name)
    longest = variant.maximum.height * variant.maximum.width
    for shape in ((1, 1), (9, 16), (16, 9), (4, 3), (1, 4), (4, 1), (853, 480)):
        height, width = family("hunyuan_video").size_of(variant, *shape)
        assert height * width <= longest


def test_cosmos_goes_on_from_the_last_frames() -> None:
    names = ("cosmos-predict1-7b-video2world", "cosmos-predict2-2b-video2world", "cosmos-predict2.5-2b")
    assert [family("cosmos").clip_of(resolve(n), resolve(n).native) for n in names] == [(9, True), (5, True), (5, True)]


def test_unset_renderings_are_plain() -> None:
    assert Rendering("LTXPipeline").listed == ()
