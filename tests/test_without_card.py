"""What a machine without a card does first: graphs that are here run in ONNX Runtime, and what is said meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from overcrank.export.graph import onnx_from_component
from overcrank.export.packaged import PRECISION, packaged_components, packaged_graph
from overcrank.models import prompt_note, resolve
from overcrank.models.base import Component
from overcrank.models.demo import FOLDER, clips
from overcrank.runtime.pipeline.accelerate import accelerate
from overcrank.runtime.sessions.ort import OrtSession

PACKAGED = list(packaged_components())
OVERCRANK = [sys.executable, "-c", "from overcrank.cli import main; main()"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import LTXPipeline

    pipe = LTXPipeline.from_pretrained(FOLDER, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe: Any) -> dict[str, dict[str, int]]:
    """Who served two steps and the decoding."""
    size = {"height": 64, "width": 64, "num_frames": 17, "frame_rate": 8}
    with pipe.overcrank.ledger.recording() as record, torch.no_grad():
        pipe("a red circle moving right", num_inference_steps=2, output_type="np", **size)
    return record.backends()


@pytest.mark.parametrize(("component", "folder"), PACKAGED, ids=[c.name for c, _ in PACKAGED])
def test_packaged_graphs_are_what_is_exported(component: Component, folder: Path, tmp_path: Path) -> None:
    """If not: `python -m overcrank.export.packaged`, and look at the difference."""
    from overcrank.export.cache import save_graph

    save_graph(onnx_from_component(component, PRECISION), tmp_path / "fresh")
    for name in ("graph.onnx", "graph.json"):
        assert (tmp_path / "fresh" / name).read_bytes() == (folder / name).read_bytes(), name


def test_packaged_graphs_are_small_and_of_the_demo_alone() -> None:
    graphs = FOLDER / "graphs"
    assert {f.name for f in graphs.iterdir()} == {c.name for c, _ in PACKAGED}
    assert sum(f.stat().st_size for f in graphs.rglob("*")) <= 1_000_000
    from overcrank.models import components

    assert all(packaged_graph(c) for c in components(resolve(str(FOLDER))))
    assert not any(packaged_graph(c) for c in components(resolve("ltx")))


def test_auto_runs_the_graphs_of_the_package_and_claims_no_fallback(run: Any, tmp_path: Path) -> None:
    words = ["render", "a red circle moving right", "--steps", 2, "-o", tmp_path / "clip.mp4"]
    result = run("overcrank", *words)
    assert result.exit_code == 0, result.output
    assert "eager" not in result.output
    assert "warning" not in result.output
    about = json.loads((tmp_path / "clip.json").read_text())
    assert about["calls"] == {"denoiser": {"onnxruntime": 2}, "vae_decoder": {"onnxruntime": 1}}
    assert about["fallbacks"] == []


@pytest.mark.parametrize("named", [False, True])
def test_auto_runs_the_graphs_of_bundles_and_tells_of_the_rest(
    named: bool, demo_store: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not named:  # as of a model that is not in this package
        monkeypatch.setattr("overcrank.runtime.pipeline.accelerate.packaged_graph", lambda component: None)
        monkeypatch.setattr("overcrank.runtime.sessions.sources.packaged_graph", lambda component: None)
    pipe = accelerate(pipeline(), bundle=demo_bundle if named else None, store=demo_store)
    assert calls(pipe) == {"denoiser": {"onnxruntime": 2}, "vae_decoder": {"eager": 1}}
    assert pipe.overcrank.bundles == {"denoiser": demo_bundle.name}
    (line,) = [r.getMessage() for r in caplog.records if "eager" in r.getMessage()]
    assert line.startswith("vae_decoder: rendering with eager PyTorch: no bundle has an engine of vae_decoder; build-")


def test_eager_is_what_remains_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = accelerate(pipeline(torch.bfloat16), store=tmp_path)
    assert calls(half) == {"denoiser": {"eager": 2}, "vae_decoder": {"eager": 1}}
    monkeypatch.setattr("overcrank.runtime.pipeline.accelerate.packaged_graph", lambda component: None)
    without = accelerate(pipeline(), store=tmp_path)
    assert calls(without) == {}  # no module's forward is taken over
    assert [r.getMessage().partition(": rendering with eager PyTorch: ")[2] for r in caplog.records] == [
        "on a processor, ONNX Runtime computes in fp32, and the pipeline's weights are bf16; "
        "render with dtype=['fp32'].",
        "the pipeline is on cpu, not on an NVIDIA GPU; render on a machine that has one.",
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_onnx_runtime_has_pytorchs_threads(threads: int) -> None:
    """One of them is the caller's."""
    graph = packaged_graph(PACKAGED[0][0])
    assert graph is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.ones(400, 400) @ torch.ones(400, 400)  # has its threads
        running = psutil.Process().num_threads()
        session = OrtSession(graph.onnx, {})
        assert psutil.Process().num_threads() - running == threads - 1
        del session
    finally:
        torch.set_num_threads(before)


def test_onnx_runtime_obeys_omp_num_threads() -> None:
    code = (
        "import psutil; from overcrank.export.packaged import packaged_components, packaged_graph\n"
        "from overcrank.runtime.sessions.ort import OrtSession\n"
        "import onnxruntime, onnx_ir; graph = packaged_graph(next(packaged_components())[0])\n"
        "before = psutil.Process().num_threads(); session = OrtSession(graph.onnx, {})\n"
        "import torch; print(psutil.Process().num_threads() - before, torch.get_num_threads())"
    )
    command = [sys.executable, "-c", code]
    for threads in (1, 2):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(threads - 1), str(threads)]


def test_what_is_loading_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    words = ["render", "a red circle moving right", "--steps", "1", "-o", str(tmp_path / "clip.mp4")]
    command = [sys.executable, "-X", "importtime", *OVERCRANK[1:], *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line.rpartition("|")[2].strip())
            if seen[-1] == "torch._C":
                break
        process.kill()
    assert "loading ltx-demo …" in seen
    assert not {"diffusers", "transformers", "onnxruntime"} & set(seen)


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_programs_are_told_nothing_on_stderr(option: str, run: Any, tmp_path: Path) -> None:
    result = run("overcrank", "render", "a cat", option, "--steps", 1, "-o", tmp_path / "clip.mp4")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


def test_a_prompt_outside_the_demos_world_is_told_what_it_knows_and_renders(run: Any, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    prompts = ["a cat on the moon", "a blue square moving up", "a red circle explodes"]
    jobs.write_text("\n".join(json.dumps({"prompt": p, "steps": 1}) for p in prompts))
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: this demo model knows one red, ")]
    for words in (
        "purple circle, square",
        "moving left, right, up or down, growing",
        "black, gray or white background",
    ):
        assert words in note
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_captions_of_the_demo_are_known() -> None:
    from random import Random

    random, demo = Random(5), resolve("ltx-demo")
    captions = [clips.caption(clips.random_clip(random, t), random) for t in clips.triples() * 5]
    captions += (FOLDER / "prompts.txt").read_text("utf-8").splitlines()
    assert not [caption for caption in captions if prompt_note(demo, caption)]
    for other in ("a red circle", "circle moving right", "a red fox moving right", "a pink circle growing", "rotating"):
        assert prompt_note(demo, other), other
    assert not prompt_note(resolve("ltx"), "a cat on the moon")
