"""Each class of pipelines with each variation: equal to eager, or eager's own bits with a reason that names why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overcrank import accelerate
from overcrank.errors import OvercrankError
from overcrank.runtime.sessions.session import Fallback, Record

from tests import without_torchvision
from tests.diffusers_suite import cells, unserved
from tests.diffusers_suite.classes import CLASSES
from tests.diffusers_suite.variations import CELLS, VARIATIONS

USUAL = {  # of two classes, as each has graphs to export: a transformer and a UNet
    "LTXPipeline": (
        "plain", "two prompts", "prompt embeds", "step callback", "shorter text", "bf16", "LoRA at half strength",
        "LoRA, after", "LoRA fused and unloaded, after", "attention processors, after", "hook inside, after",
        "first block cache, after", "new data, after", "layers offloaded, after", "layerwise casting, after",
        "compiled in place, before", "copied", "pickled", "removed", "saved and loaded",
    ),
    "TextToVideoSDPipeline": (
        "guided", "latent output", "longer", "FreeU, before", "FreeU, after", "attention processors, before",
        "forward inside, after", "state dict put in, after", "new parameters, after", "slices, before",
    ),
}  # fmt: skip


def spread() -> list[Any]:
    usual = {(name, variation) for name, several in USUAL.items() for variation in several}
    assert usual <= set(CELLS)
    return [pytest.param(*cell, marks=() if cell in usual else (pytest.mark.sweep,)) for cell in CELLS]


@pytest.fixture(scope="session")
def suite(shared_store: Path) -> Iterator[cells.Suite]:
    with cells.shared_sessions():
        yield cells.Suite(shared_store)


@pytest.fixture(autouse=True)
def _what_cannot_be_installed_here() -> None:
    without_torchvision.install()
    without_torchvision.pass_guardrail()


@pytest.mark.parametrize(("name", "variation"), spread())
def test_engines_render_what_eager_renders_or_say_why_not(name: str, variation: str, suite: cells.Suite) -> None:
    outcome = suite.run(name, VARIATIONS[variation])
    if outcome.kind == "n/a":
        pytest.skip(outcome.note)
    assert outcome.good, f"{outcome.kind}: {outcome.note}"
    if variation == "plain":
        assert outcome.kind in ("equal", "fallback"), outcome.note


def test_every_video_class_of_the_installed_diffusers_is_listed() -> None:
    found = {cls.__name__ for cls in unserved.video_classes()}
    listed = {name.partition(" ")[0] for name in CLASSES} | set(unserved.UNSERVED) | set(unserved.PICTURES)
    assert found == listed


@pytest.mark.parametrize("name", unserved.UNSERVED)
def test_a_class_that_no_family_runs_is_told_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(OvercrankError) as caught:
        accelerate(unserved.bare(name), backend="onnxruntime", store=tmp_path)
    assert str(caught.value) == unserved.answer(name)


def test_what_is_wrong_is_told_from_what_is_right() -> None:
    """The comparison itself: each kind of outcome from frames and records made by hand."""
    eager = {"frames": np.full((1, 2, 2, 3), 0.123, np.float32)}
    near = {"frames": eager["frames"] + 5e-4}
    far = {"frames": eager["frames"] + 0.01}
    engine, slow = ("denoiser", "onnxruntime"), ("denoiser", "eager")
    why, mistake = Fallback("denoiser", "a hook is in it", ""), Fallback("denoiser", "KeyError: 'x'", "")

    def kind(frames: Any, served: Any, fallbacks: Any = (), varied: cells.Variation = cells.VARIED_BY_NOTHING) -> str:
        record = Record(fallbacks=list(fallbacks))
        record.served.update(served)
        return cells.judged(eager, frames, record, cells.LIMIT, varied).kind

    assert kind(near, [engine]) == "equal"
    assert kind(far, [engine]) == kind(far, [engine], [why]) == kind(near, [slow], [why]) == "UNEQUAL"
    assert kind(eager, [slow], [why]) == "fallback"
    assert kind(eager, [slow]) == kind(eager, []) == kind(near, [("vae_decoder", "onnxruntime")]) == "UNNAMED"
    assert kind(eager, [slow], [mistake]) == "CRASHED"
    assert kind(eager, [], varied=cells.Variation(eager=True)) == "eager"
    assert kind(near, [], varied=cells.Variation(eager=True)) == "UNEQUAL"
    assert cells.apart(eager, {"frames": eager["frames"][0]}) == float("inf")
    random = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3)) / 255
    other = random.copy()
    other[0, 0, 0, 0] += 1 / 255
    assert cells.apart({"frames": random}, {"frames": other}) <= cells.LIMIT
    other[0, 0, 0, 1] += 3 / 255
    assert cells.apart({"frames": random}, {"frames": other}) > cells.LIMIT
