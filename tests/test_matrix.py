"""`overcrank engines build`: what is dropped, what fails alone, what is shared and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from overcrank.engines import matrix
from overcrank.engines.matrix import Cell, cells_of, expanded
from overcrank.engines.store import Store
from overcrank.engines.worker import BuildJob, compile_component
from overcrank.engines.workers import LocalWorkers
from overcrank.errors import CompileError, UserError
from overcrank.models import components, resolve
from overcrank.options import named_as_flags, option


@pytest.mark.quick
def test_impossible_combinations_are_dropped_with_their_reason() -> None:
    found = expanded(cells_of("ltx-demo,svd", "sm_75 sm_86,rtx5090", "auto,bf16,fp8"))
    assert {str(c) for c in found.requests if c.model == "svd"} == {
        "svd sm_75 fp16",
        "svd sm_86 fp16",  # auto is the type that the model is published in
        "svd sm_86 bf16",
        "svd sm_120 fp16",
        "svd sm_120 bf16",
        "svd sm_120 fp8",
    }
    assert len(found.requests) == 10
    assert found.dropped[Cell("ltx-demo", "sm_86", "fp8")] == "sm_86 (Ampere) has no fp8"
    assert len(found.dropped) == 6


@pytest.mark.quick
def test_all_is_every_architecture_once() -> None:
    found = expanded(cells_of("ltx-demo", "all", "auto"))
    assert [c.gpu for c in found.requests] == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", ""], "--models is empty"),
        (["--models", "ltx-demo", "--gpus", ","], "--gpus is empty"),
        (["--models", "ltx-demo", "--precisions", "fp7"], "Unknown precision 'fp7'"),
        (["--models", "ltx-dem"], "did you mean ltx-demo"),
        (["--models", "ltx-demo", "--gpus", "rtx4900"], "did you mean"),
        (["--retry-failed"], "--retry-failed: nothing failed"),
    ],
)
@pytest.mark.quick
def test_wrong_words(words: list[str], says: str, run: Any) -> None:
    result = run("overcrank", "engines", "build", *words, "--yes")
    assert result.exit_code == 2
    assert says in result.output


def test_a_matrix_is_built_resumed_and_indexed(run: Any, shared_store: Path, tmp_path: Path) -> None:
    """Of its three graphs one is exported for it, the others are there."""
    for component in components(resolve("ltx-demo"), ("vae_decoder", "vae_encoder")):
        graph = Store(shared_store).graph(component, "bf16").onnx.parent
        shutil.copytree(graph, tmp_path / "s" / "graphs" / graph.name)
    words = ["--models", "ltx-demo", "--gpus", "sm_86,sm_89", "--precisions", "bf16,fp8", "--store", tmp_path / "s"]
    refused = run("overcrank", "engines", "build", *words)  # nobody says yes
    assert "dropped  ltx-demo sm_86 fp8: sm_86 (Ampere) has no fp8" in refused.output
    assert "plan     3 bundles, 0 of them in the store already" in refused.output
    assert "9 engines of 3 graphs" in refused.output
    assert not (tmp_path / "s" / "bundles").exists()
    made = run("overcrank", "engines", "build", *words, "--yes", "--index", tmp_path / "index.md")
    assert made.exit_code == 0, made.output
    assert made.output.count("\nbuilt ") == 3
    assert len(list((tmp_path / "s" / "graphs").iterdir())) == 3
    index = (tmp_path / "index.md").read_text()
    assert index.count("| ltx-demo |") == 3
    assert "| ltx-demo | sm_89 | fp8 |" in index
    again = run("overcrank", "engines", "build", *words, "--json")
    built = json.loads(again.stdout)["built"]
    assert [b["cached"] for b in built] == [True] * 3
    assert {(b["gpu"], b["precision"]) for b in built} == {("sm_86", "bf16"), ("sm_89", "bf16"), ("sm_89", "fp8")}


def test_one_that_fails_does_not_stop_the_rest(
    run: Any, seeded: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, broken, store = LocalWorkers.submit, ["sm_89"], seeded(tmp_path / "s")

    def submit(self: LocalWorkers, work: Any, job: BuildJob) -> Future[None]:
        """The real one, with a compiler that gives up for some cards."""
        if work is compile_component and job.target.name in broken:
            given_up = Future[None]()
            given_up.set_exception(CompileError("the compiler gave up"))
            return given_up
        return own(self, work, job)

    monkeypatch.setattr(LocalWorkers, "submit", submit)
    words = ["--models", "ltx-demo", "--gpus", "sm_86,sm_89", "--precisions", "bf16", "--store", store, "--yes"]
    result = run("overcrank", "engines", "build", *words)
    assert result.exit_code == 3
    assert "built    ltx-demo sm_86 bf16" in result.output
    assert "FAILED   ltx-demo sm_89 bf16: the compiler gave up" in result.output
    broken.clear()
    again = run("overcrank", "engines", "build", "--retry-failed", "--store", store, "--yes")
    assert again.exit_code == 0, again.output
    assert "plan     1 bundles, 0 of them in the store already" in again.output
    assert "built    ltx-demo sm_89 bf16" in again.output
    with pytest.raises(UserError, match="nothing failed"):
        matrix.failed_before(matrix.Store(store))


def _refuse(job: BuildJob, report: Any) -> None:
    raise CompileError(option("allow_fallback", True))


@pytest.mark.parametrize(("flags", "says"), [(True, "--allow-fallback"), (False, "allow_fallback=True")])
def test_a_worker_names_options_as_its_caller_does(flags: bool, says: str) -> None:
    workers, job = LocalWorkers(1), cast(BuildJob, SimpleNamespace(title="x"))
    try:
        with named_as_flags() if flags else nullcontext(), pytest.raises(CompileError, match=f"^{says}$"):
            workers.submit(_refuse, job).result()
    finally:
        workers.stop()


def test_estimates_are_those_that_were_measured() -> None:
    """What is shipped is what bench/results says; a variant nobody measured takes the nearest that was."""
    from dataclasses import replace

    from overcrank.engines.estimates import FILE, cost_of, costs_of

    root = Path(matrix.__file__).parents[1]
    rows, quantized = (
        json.loads((root / f"bench/results/{name}.json").read_text("utf-8"))
        for name in ("families", "quantized-builds")
    )
    assert json.loads((root / "engines" / FILE).read_text("utf-8")) == costs_of(rows["rows"], quantized)
    measured = [r for r in rows["rows"] if (r["variant"], r["component"]) == ("ltx-2b-0.9.5", "denoiser")]
    own = cost_of(resolve("ltx-2b-0.9.5"), "denoiser", "bf16")
    assert own.export_seconds == measured[0]["export_s"]
    assert min(r["compile_s"] for r in measured) <= own.compile_seconds <= max(r["compile_s"] for r in measured)
    assert cost_of(resolve("ltx-2b-0.9.5"), "denoiser", "fp8").engine_bytes > 1.5 * own.engine_bytes
    assert cost_of(replace(resolve("ltx-2b-0.9.5"), name="my-own"), "denoiser", "bf16") == own
    assert cost_of(resolve("ltx-demo"), "nobody_knows", "bf16").engine_bytes > 0


def test_what_is_left_follows_this_machines_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    from overcrank.engines import estimates

    clock = [0.0]
    monkeypatch.setattr(estimates.time, "monotonic", lambda: clock[0])
    forecast = estimates.Forecast({"a": 10.0, "b": 20.0, "c": 30.0}, workers=2)
    assert forecast.left() == 30.0  # both workers are busy for that long, and one task is
    forecast.started("a")
    forecast.started("b")
    clock[0] = 5.0
    assert forecast.left() == 30.0
    clock[0] = 20.0
    forecast.finished("a")  # half as fast as measured
    assert forecast.left() == 60.0
    forecast.finished("nobody knows")
    clock[0] = 30.0
    forecast.finished("b")
    forecast.started("c")
    clock[0] = 31.0
    assert forecast.left() == pytest.approx(30 * 50 / 30 - 1)
    forecast.finished("c")
    assert forecast.left() == 0.0
