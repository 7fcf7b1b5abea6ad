"""Renders and batches through the simulated runtime: bytes, moves, cancelling, and memory that runs out."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from overcrank.engines.profiles import Profile
from overcrank.engines.store import Store
from overcrank.models import resolve
from overcrank.models.base import VideoShape
from overcrank.runtime.pipeline import placement as memory
from overcrank.runtime.render.renderer import CANCELLED, DONE, FAILED, Outcome, Renderer, RenderJob
from overcrank.runtime.render.request import request_of
from overcrank.runtime.sessions.select import engines_of

from tests.conftest import Once
from tests.simulated_tensorrt import Card, Simulated, bundle_of

PROFILE = Profile(VideoShape(32, 32, 1), VideoShape(64, 64, 17, 2), VideoShape(96, 96, 33, 2))
LARGEST = (96, 96, 33)
SMALLEST = (64, 32, 1)
SIZES = ((64, 64, 9), (32, 96, 17), LARGEST, SMALLEST)
STEPS = 2


@pytest.fixture(scope="session")
def demo_bundles(once: Once, seeded: Callable[[Path], Path]) -> Path:
    """A store with a bundle of the demo's for a pipeline in fp32."""

    def build(store: Path) -> None:
        bundle_of(resolve("ltx-demo"), PROFILE, Store(seeded(store)), "denoiser", "vae_decoder")

    return once("simulated_demo", build)


@pytest.fixture
def loaded(demo_bundles: Path, simulated: Simulated) -> Callable[[str], Any]:
    """The demo's pipeline on the simulated card, by backend."""
    from overcrank.runtime.pipeline.load import load

    for path, _ in Store(demo_bundles).list():
        simulated.plans.register(path)
    return lambda backend: load("ltx-demo", backend=backend, device="cpu", store=demo_bundles)


class Watcher:
    """Notes the card's bytes when a job has ended; `at` is called at each step and stage."""

    def __init__(self, card: Card, at: Callable[[str], None] = lambda where: None) -> None:
        self.card, self.at = card, at
        self.peaks: list[int] = []

    def started(self, job: RenderJob) -> None: ...

    def stage(self, job: RenderJob, name: str) -> None:
        self.at(name)

    def stepped(self, job: RenderJob, step: int, steps: int) -> None:
        self.at(f"step {step}")

    def ended(self, outcome: Outcome) -> None:
        self.peaks.append(self.card.peak)


def job(folder: Path, number: int, size: tuple[int, int, int] = SIZES[0]) -> RenderJob:
    height, width, frames = size
    values = {"prompt": "a red circle", "height": height, "width": width, "frames": frames, "steps": STEPS}
    request = request_of({**values, "formats": ("png",), "output": f"{number}", "seed": number})
    return RenderJob(request.completed(resolve("ltx-demo")), folder / f"{number}")


def pixels(outcome: Outcome) -> np.ndarray:
    from tests.test_render_families import frames_of

    return frames_of(outcome.job.stem.parent / f"{outcome.job.stem.name}-frames")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 1.01 / 255


def test_a_render_is_eagers(loaded: Any, simulated: Simulated, tmp_path: Path) -> None:
    made = {}
    for backend in ("eager", "tensorrt"):
        (tmp_path / backend).mkdir()
        driver = Renderer(loaded(backend), "ltx-demo", Watcher(simulated.card), lanes=1)
        jobs = [job(tmp_path / backend, i, size) for i, size in enumerate(SIZES)]
        made[backend] = driver.run(jobs)
    for eager, engine in zip(*made.values(), strict=True):
        assert (eager.status, engine.status) == (DONE, DONE), engine.error
        assert {b for by in engine.record.backends().values() for b in by} == {"tensorrt_rtx"}
        assert close(pixels(eager), pixels(engine))
    del driver
    gc.collect()
    assert (simulated.card.allocated, simulated.card.engines) == (0, 0)


@pytest.mark.parametrize(("lanes", "count"), [(1, 12), (2, 24)])
def test_a_batch_whose_memory_is_flat_after_the_second_job(
    lanes: int, count: int, loaded: Any, simulated: Simulated, tmp_path: Path, record_property: Any
) -> None:
    """In two lanes it is a matter of chance what comes together; no more than a tenth is."""
    card = simulated.card
    pipe = loaded("tensorrt")
    weights = card.allocated
    watcher = Watcher(card)
    rng = random.Random(0)
    sizes = [LARGEST, LARGEST, *(rng.choice(SIZES) for _ in range(count - 2))]
    outcomes = Renderer(pipe, "ltx-demo", watcher, lanes=lanes).run([job(tmp_path, i, s) for i, s in enumerate(sizes)])
    assert [o.status for o in outcomes] == [DONE] * count
    for key, value in {"weights": weights, "peaks": watcher.peaks, "left": card.allocated}.items():
        record_property(key, value)  # docs/reliability.md
    grown = watcher.peaks[-1] / watcher.peaks[1]
    assert grown <= (1.0 if lanes == 1 else 1.1)
    assert card.allocated == weights
    loads = {"denoiser", "vae_decoder"}
    assert card.loads == len(loads)


def test_memory_that_runs_out_at_every_allocation(
    loaded: Any, simulated: Simulated, tmp_path: Path, record_property: Any
) -> None:
    """Once, and from then on for the rest of the job: it ends right, by the engine or eagerly with a named reason."""
    card = simulated.card
    driver = Renderer(loaded("auto"), "ltx-demo", Watcher(card), lanes=1)
    small = job(tmp_path, 0, SMALLEST)
    (first,) = driver.run([small])
    right, weights = pixels(first), card.allocated
    before = card.allocations
    driver.run([small])
    usual = card.allocations - before
    assert usual >= 12
    fallen = 0
    for lasting in (False, True):
        for n in range(1, usual + 1):
            card.fail_at, card.fails_on = n, lasting
            (outcome,) = driver.run([small])
            card.fail_at, card.fails_on = None, False
            assert outcome.status == DONE, (n, outcome.error)
            assert close(pixels(outcome), right)
            reasons = {f.kind for f in outcome.record.fallbacks}
            assert reasons <= {"OutOfMemory"}
            assert bool(reasons) == lasting, n
            fallen += bool(reasons)
            gc.collect()  # diffusers leaves cycles behind when a call ends in an exception
            assert card.allocated == weights
            (again,) = driver.run([small])
            assert not again.record.fallbacks
    assert fallen == usual
    record_property("allocations", usual)


@pytest.mark.parametrize("what", ["cancel", "fail"])
def test_a_job_that_ends_at_any_point(
    what: str, loaded: Any, simulated: Simulated, tmp_path: Path, record_property: Any
) -> None:
    card = simulated.card
    points: list[str] = []
    pipe = loaded("tensorrt")
    (first,) = Renderer(pipe, "ltx-demo", Watcher(card, points.append), lanes=1).run([job(tmp_path, 0, SMALLEST)])
    right, weights = pixels(first), card.allocated
    assert len(points) >= STEPS + 3
    record_property("points", points)
    for point in list(points):

        def ends(where: str, point: str = point) -> None:
            if where == point and what == "cancel":
                driver.cancel()  # noqa: B023 (it is called before the loop goes on)
            elif where == point:
                raise ValueError(f"failed at {where}")

        driver = Renderer(pipe, "ltx-demo", Watcher(card, ends), lanes=1)
        (outcome,) = driver.run([job(tmp_path, 0, SMALLEST)])
        assert outcome.status in ({CANCELLED, DONE} if what == "cancel" else {FAILED}), point
        driver = Renderer(pipe, "ltx-demo", Watcher(card), lanes=1)
        gc.collect()
        assert card.allocated == weights, point
        (again,) = driver.run([job(tmp_path, 0, SMALLEST)])
        assert close(pixels(again), right)


def test_parts_that_come_and_go(
    loaded: Any, simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --vram low: at most one part's weights are on the card, and what an engine reads is where it is."""
    card, pipe = simulated.card, loaded("tensorrt")
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    sizes = {n: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for n, m in parts.items()}
    monkeypatch.setattr(memory, "leave", card.send_away)
    monkeypatch.setattr(memory, "come", lambda module, device: card.bring(module))
    monkeypatch.setattr(memory, "is_on", lambda module, device: card.holds(next(module.parameters())))
    memory.place(pipe, list(parts), torch.device("cpu"))
    assert card.allocated == 0
    driver = Renderer(pipe, "ltx-demo", Watcher(card), lanes=1)
    card.peak = 0
    first, second = driver.run([job(tmp_path, 0), job(tmp_path, 0)])
    assert {o.status for o in (first, second)} == {DONE}, first.error
    assert {b for by in first.record.backends().values() for b in by} == {"tensorrt_rtx"}
    assert card.peak < sum(sizes.values()) + 2**20
    here = [n for n, m in parts.items() if card.holds(next(m.parameters()))]
    assert len(here) == 1
    eager = Renderer(loaded("eager"), "ltx-demo", Watcher(card), lanes=1).run([job(tmp_path, 1)])
    assert eager[0].status == DONE
    assert close(pixels(first), pixels(second))


def test_weights_that_change_between_jobs(loaded: Any, simulated: Simulated, tmp_path: Path) -> None:
    """Moved away and back, and fused into as a LoRA is: each next job is as eager's."""
    pipe = loaded("tensorrt")
    driver = Renderer(pipe, "ltx-demo", Watcher(simulated.card), lanes=1)

    def both() -> bool:
        (engine,) = driver.run([job(tmp_path, 0)])
        made = pixels(engine)
        with pipe.overcrank.ledger.eagerly():
            video, _ = driver.made(Outcome(job(tmp_path, 0)))
        return engine.status == DONE and close(made, np.asarray(video.frames) / 255.0)

    assert both()
    simulated.card.send_away(pipe.transformer)
    simulated.card.bring(pipe.transformer)
    assert both()
    weight = pipe.transformer.transformer_blocks[0].attn1.to_q.weight
    weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert both()


def test_the_memory_planner_knows_what_a_batch_takes(
    loaded: Any, demo_bundles: Path, simulated: Simulated, tmp_path: Path, record_property: Any
) -> None:
    """Bytes beside weights: what it predicts for the largest videos, and what two lanes of them allocate."""
    card, pipe = simulated.card, loaded("tensorrt")
    weights = card.allocated
    predicted = memory.working_bytes(engines_of(Store(demo_bundles), pipe.overcrank.variant))
    card.peak = 0
    jobs = [job(tmp_path, i, LARGEST) for i in range(4)]
    assert {o.status for o in Renderer(pipe, "ltx-demo", Watcher(card), lanes=2).run(jobs)} == {DONE}
    taken = card.peak - weights
    record_property("predicted and taken", (predicted, taken))
    assert 0.5 * predicted <= taken <= predicted
