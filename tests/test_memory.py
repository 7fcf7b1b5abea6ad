"""Who is on the card when: the plan for its memory, parts that come and go, weights that are parked."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from overcrank.errors import UserError
from overcrank.runtime.pipeline.placement import (
    DENOISERS,
    ENCODERS,
    OTHERS,
    RESERVE,
    Part,
    parts_of,
    place,
    planned,
    vram_of,
)
from overcrank.runtime.sessions.parked import Parked

pytestmark = pytest.mark.quick

GB = 10**9
PARTS = [
    Part("text_encoder", 9 * GB, ENCODERS),
    Part("text_encoder_2", 2 * GB, ENCODERS),
    Part("vae", 1 * GB, OTHERS),
    Part("transformer", 4 * GB, DENOISERS),
]


@pytest.mark.parametrize(
    ("word", "means"),
    [("auto", "auto"), ("low", "low"), ("8GB", 8 * GB), ("7.5 gb", 7.5 * GB), ("6144MiB", 6 * 2**30)],
)
def test_words(word: str, means: Any) -> None:
    assert vram_of(word) == means


@pytest.mark.parametrize("word", ["", "much", "8", "0GB", "-1GB", "8 apples"])
def test_wrong_words(word: str) -> None:
    with pytest.raises(UserError, match="use auto, low, balanced, high, or an amount such as 8GB"):
        vram_of(word)


@pytest.mark.parametrize(
    ("wanted", "moved", "peak"),
    [
        ("high", (), 16 + 2),
        ("balanced", ("text_encoder", "text_encoder_2"), 5 + 9),
        ("low", ("text_encoder", "text_encoder_2", "vae", "transformer"), 9),
        (18 * GB, (), 18),
        (17 * GB, ("text_encoder",), 7 + 9),
        (14 * GB, ("text_encoder", "text_encoder_2"), 5 + 9),
        (13 * GB, ("text_encoder", "text_encoder_2", "vae"), 4 + 9),
        (9 * GB, ("text_encoder", "text_encoder_2", "vae", "transformer"), 9),
    ],
)
def test_as_little_is_moved_as_the_budget_asks(wanted: Any, moved: tuple[str, ...], peak: int) -> None:
    """2 GB of activations come beside a denoiser or a VAE, and not beside an encoder."""
    plan = planned(PARTS, 2 * GB, wanted, free=0)
    assert (plan.moved, plan.peak) == (moved, peak * GB)


def test_auto_takes_what_is_free() -> None:
    assert planned(PARTS, 2 * GB, "auto", free=18 * GB + RESERVE).moved == ()
    assert planned(PARTS, 2 * GB, "auto", free=18 * GB).moved == ("text_encoder",)


def test_a_budget_that_nothing_fits_in(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"vram='8\.0 GB': one part alone has 9\.0 GB of weights; give more"):
        planned(PARTS, 2 * GB, 8 * GB, free=0)
    everything = ("text_encoder", "text_encoder_2", "vae", "transformer")
    for wanted, free in (("auto", 5 * GB), (10 * GB, 0)):  # the engines' largest shapes, which a render may not need
        with caplog.at_level(logging.WARNING):
            plan = planned(PARTS, 8 * GB, wanted, free)
        assert plan.moved == everything
        assert "take 12.0 GB at the engines' largest shapes" in caplog.text
        caplog.clear()


class Part_(torch.nn.Linear):
    """Notes where the others are when it runs; "meta" stands for the card, as it holds no values."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, pipe: Any) -> dict[str, str]:
        return {name: p.weight.device.type for name, p in pipe.components.items()}


def test_moved_parts_start_in_host_memory_and_come_when_they_are_called() -> None:
    """That they leave again needs a card whose contents can be copied back: test_gpu.py."""
    parts = {name: Part_() for name in ("text_encoder", "vae", "transformer")}
    pipe = SimpleNamespace(components={**parts, "scheduler": object()})
    pipe_parts = SimpleNamespace(components=parts)
    found = parts_of(pipe, [parts["transformer"]])
    assert [(p.name, p.weights, p.rank) for p in found] == [
        ("text_encoder", 24, ENCODERS),
        ("vae", 24, OTHERS),
        ("transformer", 24, DENOISERS),
    ]
    place(pipe, ["text_encoder", "vae"], torch.device("meta"))
    assert {n: p.weight.device.type for n, p in parts.items()} == {
        "text_encoder": "cpu",
        "vae": "cpu",
        "transformer": "meta",
    }
    assert parts["text_encoder"](pipe_parts) == {"text_encoder": "meta", "vae": "cpu", "transformer": "meta"}


@pytest.mark.heavy
def test_a_pipeline_whose_parts_are_moved_still_renders() -> None:
    from overcrank.models.demo import FOLDER
    from overcrank.runtime.pipeline.accelerate import device_of
    from overcrank.runtime.pipeline.load import load

    pipe = load(str(FOLDER), backend="eager", device="cpu")
    arguments = {"prompt": "a red circle moving right", "height": 64, "width": 64, "num_frames": 9}
    arguments |= {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    place(pipe, ["text_encoder", "vae"], torch.device("cpu"))
    assert device_of(pipe) == torch.device("cpu")
    moved = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    assert torch.equal(plain, moved)


@pytest.mark.heavy
def test_engines_let_hooks_bring_the_weights_whenever_they_were_put_on(shared_store: Path) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module
    from overcrank.runtime.pipeline.accelerate import accelerate
    from overcrank.runtime.pipeline.load import load

    class Counts(ModelHook):  # type: ignore[misc]
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    arguments = {"prompt": "a red circle moving right", "height": 64, "width": 64, "num_frames": 9}
    arguments |= {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    for first in (True, False):
        pipe = load("ltx-demo", backend="eager", device="cpu")
        hook = Counts()
        if first:
            add_hook_to_module(pipe.transformer, hook)
        accelerate(pipe, backend="onnxruntime", store=shared_store)
        if not first:
            add_hook_to_module(pipe.transformer, hook)
        with pipe.overcrank.ledger.recording() as record:
            pipe(**arguments)
        assert record.backends()["denoiser"] == {"onnxruntime": 2}
        assert hook.calls == 2


def test_nothing_is_parked_on_the_processor_nor_of_a_module_that_is_moved() -> None:
    """What is parked and fetched on a card, test_gpu.py looks at."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    parked = Parked(module)
    before = [p.data_ptr() for p in module.parameters()]
    assert not parked.park(["1", "2"])
    assert [p.data_ptr() for p in module.parameters()] == before
    hooked = torch.nn.Sequential(torch.nn.Linear(2, 2)).to("meta")
    hooked._hf_hook = object()
    assert not Parked(hooked).park(["0"])
    assert hooked[0].weight.device.type == "meta"


@pytest.mark.heavy
def test_vram_is_for_a_card(run: Any, tmp_path: Any) -> None:
    result = run("overcrank", "render", "--prompt", "x", "--device", "cpu", "--vram", "low", "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert "error: --vram is for a card" in result.output
    assert not list(tmp_path.glob("a*"))
