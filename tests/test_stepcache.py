"""The step cache: which calls it computes, what stands in for the others, and what a render says of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from overcrank.errors import UserError
from overcrank.models import families, family, resolve
from overcrank.runtime.pipeline.accelerate import denoisers
from overcrank.runtime.render.stepcache import BACKEND, StepCache, threshold_of
from overcrank.runtime.sessions.session import Ledger
from PIL import Image

pytestmark = pytest.mark.quick

DEMO = resolve("ltx-demo")
STEPS = 10


class Net(torch.nn.Module):
    """Counts its calls; its output follows the input."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[float] = []

    def forward(self, hidden_states: torch.Tensor, kind: str = "tuple") -> Any:
        self.computed.append(float(hidden_states.flatten()[0]))
        out = hidden_states * 2 + 10
        return {"tuple": (out, "more"), "tensor": out, "output": Transformer2DModelOutput(sample=out)}[kind]


class LTXVideoTransformer3DModel(Net):
    """Under the name by which a pipeline's main part is known."""


def pipe_of(**parts: torch.nn.Module) -> Any:
    return SimpleNamespace(components=parts, **parts)


def looped(cache: StepCache, net: Any, kind: str = "tuple", branches: int = 1, steps: int = STEPS) -> list[Any]:
    """The first branch's results; the input of branch b at step s is s/10 + 100 b."""
    seen = []
    for step in range(steps):
        for branch in range(branches):
            result = net(torch.full((1, 3, 4), step / 10 + 100.0 * branch), kind=kind)
            if not branch:
                seen.append(result)
        cache.stepped(step, steps)
    return seen


@pytest.fixture
def net() -> Any:
    return LTXVideoTransformer3DModel()


def cached(threshold: float) -> StepCache:
    return StepCache(threshold, DEMO, Ledger(strict=False))


@pytest.mark.parametrize("kind", ["tuple", "tensor", "output"])
def test_a_skipped_call_continues_the_last_two(kind: str, net: Any) -> None:
    cache = cached(1.0)
    with cache.ledger.recording() as record, cache.over(pipe_of(transformer=net)):
        seen = looped(cache, net, kind)
    assert net.computed == pytest.approx([0.0, 0.1, 0.9])  # the first two and the last
    assert record.served["denoiser", BACKEND] == STEPS - 3
    for step, result in enumerate(seen):
        out = result[0] if kind == "tuple" else result.sample if kind == "output" else result
        computed = step in (0, 1, STEPS - 1)
        value = 10 + 0.2 * step if computed else 10.2 + 0.5 * 0.2 * (step - 1)
        assert torch.allclose(out, torch.full((1, 3, 4), value))
        assert kind != "tuple" or result[1] == "more"
    assert "forward" not in vars(net)
    assert net(torch.zeros(1, 3, 4))[0].sum() == 120


def test_the_threshold_is_how_far_outputs_move(net: Any) -> None:
    """Each step moves the output by 0.2 of about 10: two of them are within 5 %, a third is not."""
    cache = cached(0.05)
    with cache.over(pipe_of(transformer=net)):
        looped(cache, net)
    assert net.computed == pytest.approx([0.0, 0.1, 0.4, 0.7, 0.9])


def test_both_branches_are_skipped_together(net: Any) -> None:
    cache = cached(0.05)
    with cache.over(pipe_of(transformer=net)):
        looped(cache, net, branches=2)
    assert net.computed == pytest.approx([x + b for x in (0.0, 0.1, 0.4, 0.7, 0.9) for b in (0.0, 100.0)])


def test_a_branch_that_comes_late_is_computed_first(net: Any) -> None:
    cache = cached(1.0)
    with cache.over(pipe_of(transformer=net)):
        for step in range(6):
            for branch in range(2 if step > 2 else 1):
                net(torch.full((1, 2), step + 100.0 * branch))
            cache.stepped(step, 6)
    assert net.computed == [0, 1, 103, 104, 5, 105]


def test_each_run_through_the_steps_begins_anew(net: Any) -> None:
    cache = cached(1.0)
    with cache.over(pipe_of(transformer=net)):
        looped(cache, net)
        looped(cache, net)
    assert net.computed == pytest.approx([0.0, 0.1, 0.9] * 2)


def test_another_size_is_computed(net: Any) -> None:
    cache = cached(1.0)
    with cache.over(pipe_of(transformer=net)):
        for step, length in enumerate((4, 4, 6, 6, 6)):
            net(torch.full((1, length), float(step)))
            cache.stepped(step, 9)
    assert net.computed == [0, 1, 2, 3]


def test_inputs_changed_in_place_are_still_compared(net: Any) -> None:
    cache = cached(0.05)
    with cache.over(pipe_of(transformer=net)):
        x = torch.zeros(1, 3, 4)
        for step in range(STEPS):
            net(x)[0].add_(1000)  # nor does a pipeline's arithmetic reach what is kept
            cache.stepped(step, STEPS)
            x += 0.1
    assert net.computed == pytest.approx([0.0, 0.1, 0.4, 0.7, 0.9])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_compute_everything(steps: int, net: Any) -> None:
    cache = cached(1.0)
    with cache.over(pipe_of(transformer=net)):
        looped(cache, net, steps=steps)
    assert len(net.computed) == steps


def test_eager_renders_and_off_skip_nothing(net: Any) -> None:
    cache = cached(1.0)
    with cache.over(pipe_of(transformer=net)), cache.ledger.eagerly():
        looped(cache, net)
    with cached(0.0).over(pipe_of(transformer=net)):
        looped(cache, net)
    assert len(net.computed) == 2 * STEPS


def test_what_stood_before_comes_back(net: Any) -> None:
    own = net.forward
    net.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as an offload hook does
    hook = net.forward
    with contextlib.suppress(ZeroDivisionError), cached(1.0).over(pipe_of(transformer=net)):
        assert net.forward is not hook
        _ = 1 / 0
    assert net.forward is hook


def test_the_second_expert_is_cached_too() -> None:
    class WanTransformer3DModel(Net):
        pass

    pipe = pipe_of(transformer=WanTransformer3DModel(), transformer_2=WanTransformer3DModel())
    found = denoisers(pipe, resolve("wan-2.2-t2v-a14b"))
    assert found == [(pipe.transformer, "denoiser"), (pipe.transformer_2, "denoiser")]


@pytest.mark.parametrize("word", ["slow", "-0.1", "1.5", "nan", "", "5%"])
def test_wrong_words(word: str) -> None:
    with pytest.raises(UserError, match="use off, safe, fast, or a number from 0 to 1"):
        threshold_of(word, DEMO)


def test_levels_of_every_family() -> None:
    for name in families():
        for variant in family(name).variants:
            assert 0 == threshold_of("off", variant) < threshold_of("safe", variant) < threshold_of("fast", variant)
    assert threshold_of("0.08", DEMO) == 0.08


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.heavy
def test_a_render_skips_steps_and_says_so(backend: str, run: Any, shared_store: Path, tmp_path: Path) -> None:
    prompt = "a red circle moving right on a black background"
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": prompt, "output": "clip", "formats": ["png"]}))
    frames, about = {}, {}
    for cache in ("off", "safe", "fast"):
        out = ["-o", tmp_path / "out", "--backend", backend, "--cache", cache, "--quiet", "--store", shared_store]
        result = run("overcrank", "batch", tmp_path / "jobs.jsonl", *out)  # another setting is another render
        assert result.exit_code == 0, result.output
        files = sorted((tmp_path / "out" / "clip-frames").iterdir())
        frames[cache] = np.stack([np.asarray(Image.open(f)) for f in files]) / 255
        about[cache] = json.loads((tmp_path / "out" / "clip.json").read_text())
    skipped = {cache: a["calls"].get("denoiser", {}).get(BACKEND, 0) for cache, a in about.items()}
    assert 0 == skipped["off"] < skipped["safe"] < skipped["fast"] < DEMO.rendering().steps - 3
    if backend == "onnxruntime":
        assert about["fast"]["calls"]["denoiser"][backend] == DEMO.rendering().steps - skipped["fast"]
    assert about["fast"]["cache"] == threshold_of("fast", DEMO)
    assert "cache" not in about["off"]
    errors = {c: float(((frames[c] - frames["off"]) ** 2).mean()) for c in ("safe", "fast")}
    assert 0 < errors["safe"] < errors["fast"] < 1e-4  # 40 dB
