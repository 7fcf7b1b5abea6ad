"""Jobs of one batch with LoRAs of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.errors import UserError
from overcrank.models.demo import FOLDER
from safetensors.torch import load_file, save_file

from tests.test_batch import write_jobs

USUAL = {"prompt": "a red circle", "steps": 2, "seed": 1, "formats": ["latents"]}
LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.5.ff.net.2")


def lora_file(path: Path, seed: int, layers: tuple[str, ...] = LAYERS, value: float = 1) -> Path:
    shapes = {k: v.shape for k, v in load_file(FOLDER / "transformer/diffusion_pytorch_model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        outputs, inner = shapes[f"{layer}.weight"]
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, inner, generator=generator) * value
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.3
    save_file(tensors, path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [lora_file(tmp_path / "a.safetensors", 0), lora_file(tmp_path / "b.safetensors", 1, LAYERS[1:])]


def latents(folder: Path, name: str) -> torch.Tensor:
    (tensor,) = load_file(folder / f"{name}.latents.safetensors").values()
    return tensor


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.heavy
def test_each_job_has_its_own_set_as_a_render_has(backend: str, run: Any, tmp_path: Path, files: list[Path]) -> None:
    a, b = files
    words: dict[str, list[str]] = {
        "a": ["--lora", f"{a}:0.8"],
        "b": ["--lora", str(b)],
        "both": ["--lora", str(a), "--lora", f"transformer={b}:-0.5"],
        "none": [],
    }
    sets: dict[str, Any] = {
        "a": [{"file": "a.safetensors", "scale": 0.8}],
        "b": None,  # the batch's
        "both": [{"file": str(a)}, {"file": str(b), "scale": -0.5, "part": "transformer"}],
        "none": [],
    }
    jobs = [{**USUAL, "output": f"{n}{i}", "seed": i} | ({"lora": s} if s is not None else {})
            for i in range(2) for n, s in sets.items()]  # fmt: skip
    jobs_file, out = write_jobs(tmp_path / "jobs.jsonl", jobs), tmp_path / "out"
    batch = ["batch", jobs_file, "-o", out, "--json", "--backend", backend, "--lora", b, "--lanes", 2]
    done = run("overcrank", *batch)
    assert done.exit_code == 0, done.output
    assert [job["name"] for job in json.loads(done.stdout)["jobs"]] == [job["output"] for job in jobs]
    for name, more in words.items():
        options = ["--steps", 2, "--seed", 1, "--formats", "latents", "--backend", backend, "--quiet"]
        alone = run("overcrank", "render", "--prompt", USUAL["prompt"], *options, *more, "-o", tmp_path / name)
        assert alone.exit_code == 0, alone.output
        assert torch.equal(latents(out, f"{name}1"), latents(tmp_path, name))
        mine, one = (json.loads((folder / file).read_text())
                     for folder, file in ((out, f"{name}1.json"), (tmp_path, f"{name}.json")))  # fmt: skip
        assert mine.get("loras") == one.get("loras")
        assert mine["request_sha256"] == one["request_sha256"]
        assert backend == "eager" or list(mine["calls"]["denoiser"]) == [backend]
    assert len({latents(out, f"{name}1").numpy().tobytes() for name in words}) == len(words)
    again = json.loads(run("overcrank", *batch).stdout)["jobs"]
    assert {job["status"] for job in again} == {"skipped"}
    b.write_bytes(lora_file(tmp_path / "other.safetensors", 9, LAYERS[1:]).read_bytes())
    changed = {job["name"]: job["status"] for job in json.loads(run("overcrank", *batch).stdout)["jobs"]}
    assert changed == {job["output"]: "done" if job["output"][0] == "b" else "skipped" for job in jobs}


@pytest.mark.heavy
def test_quantized_layers_are_packed_of_each_set(
    run: Any, tmp_path: Path, files: list[Path], shared_store: Path
) -> None:
    options = ["--precision", "int8", "--backend", "onnxruntime", "--store", shared_store]
    sets = {"a": [{"file": "a.safetensors"}], "none": [], "again": [{"file": "a.safetensors"}]}
    jobs = [{**USUAL, "output": name, "seed": 1, "lora": own} for name, own in sets.items()]
    jobs_file, out = write_jobs(tmp_path / "jobs.jsonl", jobs), tmp_path / "out"
    done = run("overcrank", "batch", jobs_file, "-o", out, "--json", *options)
    assert done.exit_code == 0, done.output
    for name, more in {"a": ["--lora", files[0]], "none": []}.items():
        words = ["--prompt", USUAL["prompt"], "--steps", 2, "--seed", 1, "--formats", "latents", "--quiet"]
        assert run("overcrank", "render", *words, *options, *more, "-o", tmp_path / name).exit_code == 0
        assert torch.equal(latents(out, name), latents(tmp_path, name))
        assert list(json.loads((out / f"{name}.json").read_text())["calls"]["denoiser"]) == ["onnxruntime"]
    assert torch.equal(latents(out, "a"), latents(out, "again"))
    assert not torch.equal(latents(out, "a"), latents(out, "none"))


@pytest.mark.heavy
def test_the_request_of_a_sidecar_is_a_job_with_its_loras(run: Any, tmp_path: Path, files: list[Path]) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", [{**USUAL, "output": "one", "lora": [{"file": "a.safetensors"}]}])
    assert run("overcrank", "batch", jobs, "-o", tmp_path / "out", "--quiet").exit_code == 0
    request = json.loads((tmp_path / "out/one.json").read_text())["request"]
    assert request["lora"] == [{"file": "../a.safetensors", "scale": 1.0, "part": ""}]
    again = write_jobs(tmp_path / "out/again.jsonl", [request])
    done = run("overcrank", "batch", again, "-o", tmp_path / "out", "--json")
    assert [job["status"] for job in json.loads(done.stdout)["jobs"]] == ["skipped"], done.output


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ([{"file": "nowhere.safetensors"}], "line 1: lora nowhere.safetensors does not exist."),
        ([{"file": "."}], "line 1: lora . is no file."),
        ([{"file": "a.safetensors", "scale": float("nan")}], "lora.0.scale: input should be a finite number (got nan)"),
        ([{"file": "a.safetensors", "strength": 1}], "lora.0.strength: no such field; there are file, scale, part"),
        ([{"scale": 1}], "lora.0.file: field required"),
        ("a.safetensors", "lora: input should be a valid tuple"),
        (["a.safetensors:0.8"], "lora.0: input should be"),
        ([{"file": "x" * 300}], "lora has a name of 300 bytes"),
    ],
)
def test_what_can_be_no_lora_is_refused_before_the_batch(lora: Any, says: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    jobs = write_jobs(tmp_path / "jobs.jsonl", [{**USUAL, "lora": lora}, USUAL])
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_a_lora_that_cannot_be_merged_fails_alone(run: Any, tmp_path: Path, files: list[Path]) -> None:
    layer = "transformer.blocks.9.to_q"
    halves = {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    save_file(halves, tmp_path / "other.safetensors")
    lora_file(tmp_path / "nan.safetensors", 0, LAYERS, float("nan"))
    names = {"plain": [], "other": ["other"], "broken": ["a", "nan"], "after": [], "a": ["a"]}
    jobs = [
        {**USUAL, "output": name, "lora": [{"file": f"{x}.safetensors"} for x in own]} for name, own in names.items()
    ]
    result = run("overcrank", "batch", write_jobs(tmp_path / "jobs.jsonl", jobs), "-o", tmp_path / "out", "--json")
    rows = {job["name"]: job for job in json.loads(result.stdout)["jobs"]}
    assert [job["status"] for job in rows.values()] == ["done", "failed", "failed", "done", "done"]
    assert "other.safetensors is for another model" in rows["other"]["error"]
    assert "nan.safetensors holds NaN" in rows["broken"]["error"]
    assert torch.equal(latents(tmp_path / "out", "plain"), latents(tmp_path / "out", "after"))


@pytest.mark.heavy
def test_weights_that_are_packed_take_no_other_set(run: Any, tmp_path: Path, files: list[Path]) -> None:
    from overcrank import load
    from overcrank.runtime.render.job_loras import JobLora
    from overcrank.runtime.render.renderer import Renderer, RenderJob, Silent
    from overcrank.runtime.render.request import RenderRequest

    (tmp_path / "pack.safetensors").write_bytes(b"")
    jobs = write_jobs(tmp_path / "jobs.jsonl", [{**USUAL, "lora": []}])
    words = ["--precision", "int8", "--pack", tmp_path / "pack.safetensors"]
    result = run("overcrank", "batch", jobs, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert "leave the pack out, or render those jobs apart" in result.output
    pipe = load("ltx-demo", loras=[str(files[0])], backend="eager")
    request = RenderRequest(prompt="x", steps=1, lora=(JobLora(file=files[1]),)).completed(pipe.overcrank.variant)
    (outcome,) = Renderer(pipe, "ltx-demo", Silent()).run([RenderJob(request, tmp_path / "x")])
    assert "this pipeline has LoRAs" in outcome.error
    with pytest.raises(UserError, match="this pipeline has LoRAs"):
        Renderer(pipe, "ltx-demo", Silent()).video(request)
