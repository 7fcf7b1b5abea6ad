"""Bundles through the console scripts: built, cached, resumed, shared, verified, removed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from overcrank.engines.manifest import MANIFEST, read_manifest

from tests.conftest import SMALL, Once, files_under

COMMAND = [sys.executable, "-c", "from overcrank.cli import build_engine; build_engine()"]


@pytest.fixture(scope="session")
def built(checkpoint: Path, once: Once, seeded: Callable[[Path], Path]) -> Path:
    """A bundle of the tiny checkpoint, built once, in a store with a space in its path."""

    def build(store: Path) -> None:
        seeded(store)
        arguments = ["--model", str(checkpoint), "--gpu", "sm_89", *SMALL, "--store", str(store), "--quiet", "--json"]
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    (bundle,) = (once("a störe", build) / "bundles").glob("[!.]*")
    return bundle


def store_of(bundle: Path) -> Path:
    return bundle.parent.parent


def test_a_bundle_holds_engines_graphs_and_their_description(built: Path) -> None:
    manifest = read_manifest(built)
    assert {p.name for p in built.iterdir()} == {MANIFEST} | {
        f"{c}.{kind}" for c in ("denoiser", "vae_decoder", "vae_encoder") for kind in ("engine", "onnx")
    }
    denoiser = manifest.component("denoiser")
    assert denoiser.activation_bytes
    assert denoiser.engine.bytes == (built / "denoiser.engine").stat().st_size
    assert {p.parameter for p in denoiser.parameters} >= {"proj_in.weight", "transformer_blocks.4.attn1.to_q.bias"}
    assert manifest.component("vae_decoder").parameters[0].parameter.startswith("decoder.")
    assert manifest.peak_ram_bytes > 0
    assert manifest.weights == "inputs"


def test_the_same_build_again_is_a_cache_hit(built: Path, checkpoint: Path, run: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.iterdir()}
    arguments = ["--model", checkpoint, "--gpu", "sm_89", *SMALL, "--store", store_of(built)]
    result = run("build-engine", *arguments)
    assert result.exit_code == 0, result.output
    assert "cache hit" in result.output
    assert {p: p.stat().st_mtime_ns for p in built.iterdir()} == before


def test_show_list_and_lint(built: Path, run: Any) -> None:
    store = ["--store", store_of(built)]
    shown = run("overcrank", "engines", "show", built.name, *store)
    assert shown.exit_code == 0
    assert "every file matches its SHA-256" in shown.output
    linted = run("overcrank", "engines", "lint", built, "--no-compare")
    assert "no weight transposed, cast or moved" in linted.output
    assert "GEMM+" in linted.output


def test_a_list_can_be_pasted_from_a_pipe_and_from_a_narrow_terminal(built: Path, tmp_path: Path) -> None:
    """Names and the store's path stay on one line, whatever their length, and the rest fits in 80 columns."""
    long = tmp_path / "bundles" / f"{built.name}-{'x' * 100}"
    shutil.copytree(built, long)
    (tmp_path / "bundles" / "damaged").mkdir()
    (tmp_path / "bundles" / "damaged" / MANIFEST).write_text("{")
    command = [sys.executable, "-m", "overcrank", "engines", "list", "--store", str(tmp_path)]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    piped = subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout
    narrow = subprocess.run(command, env=plain | {"COLUMNS": "80"}, capture_output=True, text=True, check=True).stdout
    assert {narrow, on_terminal(command, plain, columns=80)} == {piped}
    lines = piped.splitlines()
    assert {str(tmp_path / "bundles"), long.name, "damaged"} <= set(lines)
    about = lines[lines.index(long.name) + 1 : lines.index(long.name) + 3]
    assert about[0].startswith("  sm_89, bf16, engines of ")
    assert "(32x32x1 … 96x96x33), batch 1 … 2" in about[1]
    assert max(map(len, about)) <= 80
    assert lines[lines.index("damaged") + 1].startswith("  unreadable: ")


def on_terminal(command: list[str], env: dict[str, str], columns: int) -> str:
    """What a command writes to a terminal of this width."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, env=env | {"TERM": "xterm"}, stdin=its, stdout=its, stderr=its)
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # as its end is told on Linux
        while chunk := os.read(ours, 65536):
            written += chunk
    os.close(ours)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n")


def test_verify_passes_and_notices_a_changed_file(built: Path, run: Any) -> None:
    result = run("overcrank", "verify", built)
    assert result.exit_code == 0, result.output
    assert result.output.count("ok  ") == 9
    assert run("overcrank", "verify", built, "--tolerance", "1e-12").exit_code == 1
    engine = built / "vae_encoder.engine"
    content = engine.read_bytes()
    try:
        engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        changed = run("overcrank", "verify", built)
        assert changed.exit_code == 1
        assert "vae_encoder.engine does not match the manifest (SHA-256 differs)" in changed.output
        assert run("overcrank", "engines", "show", built).exit_code == 1
    finally:
        engine.write_bytes(content)


def test_verify_with_the_checkpoint_weights(built: Path, checkpoint: Path, run: Any) -> None:
    result = run("overcrank", "verify", built, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output


def test_embedded_weights_make_a_self_contained_engine(checkpoint: Path, built: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"
    arguments = ["--model", checkpoint, "--gpu", "sm_89", *SMALL, "--store", store_of(built), "--out", out]
    result = run("build-engine", *arguments, "--embed-weights", "--components", "denoiser", "--json")
    assert result.exit_code == 0, result.output
    bundle = json.loads(result.output)["bundles"][0]
    manifest = read_manifest(Path(bundle["path"]))
    assert manifest.weights.startswith("embedded:")
    assert Path(bundle["path"]).parent == out
    weights = sum(int(_size(p.shape)) for p in manifest.components[0].parameters) * 2
    grown = manifest.components[0].engine.bytes - read_manifest(built).component("denoiser").engine.bytes
    assert grown > 0.5 * weights
    assert not [f for f in files_under(out) if "embedded" in Path(f).name]


def _size(shape: list[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def test_several_gpus_share_one_export(checkpoint: Path, built: Path, tmp_path: Path, run: Any) -> None:
    arguments = ["--model", checkpoint, "--gpu", "sm_75,rtx3090", "--gpu", "sm_120", *SMALL, "--store", tmp_path / "s"]
    result = run("build-engine", *arguments, "--components", "denoiser", "--json")
    assert result.exit_code == 0, result.output
    manifests = [b["manifest"] for b in json.loads(result.output)["bundles"]]
    assert [(m["target"], m["precision"]) for m in manifests] == [
        ("sm_75", "fp16"),
        ("sm_86", "bf16"),
        ("sm_120", "bf16"),
    ]
    assert len(list((tmp_path / "s" / "graphs").iterdir())) == 2


def test_a_killed_build_leaves_no_half_bundle_and_is_resumed(
    checkpoint: Path, seeded: Callable[[Path], Path], tmp_path: Path
) -> None:
    store = seeded(tmp_path / "store")
    arguments = [*COMMAND, "--model", str(checkpoint), "--gpu", "sm_89", *SMALL, "--store", str(store)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert any(line.rstrip().endswith(": done") for line in process.stderr)
        os.kill(process.pid, signal.SIGKILL)
    assert not list((store / "bundles").glob("[!.]*")), "a half bundle is visible"
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "done in an earlier run" in again.stderr
    (bundle,) = (store / "bundles").glob("[!.]*")
    assert len(read_manifest(bundle).components) == 3
    assert not list((store / "bundles").glob(".*")), "staging was left behind"


def test_ctrl_c_says_how_to_go_on(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [*COMMAND, "--model", str(checkpoint), "--gpu", "sm_89", *SMALL, "--store", str(tmp_path)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    next(line for line in process.stderr if line.rstrip().endswith(": exporting"))  # a worker is at work
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors


def test_two_builds_at_once_make_one_bundle(checkpoint: Path, seeded: Callable[[Path], Path], tmp_path: Path) -> None:
    store = seeded(tmp_path / "store")
    arguments = [*COMMAND, "--model", str(checkpoint), "--gpu", "sm_86", *SMALL, "--store", str(store)]
    arguments += ["--components", "denoiser", "--json"]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [json.loads(p.communicate(timeout=300)[0]) for p in both]
    assert {r["bundles"][0]["path"] for r in reports} == {str(p) for p in (store / "bundles").glob("[!.]*")}
    assert sorted(r["bundles"][0]["cached"] for r in reports) == [False, True]


def test_removal(built: Path, tmp_path: Path, run: Any) -> None:
    import shutil

    copy = tmp_path / "home" / "bundles" / built.name
    shutil.copytree(built, copy)
    result = run("overcrank", "engines", "rm", built.name)
    assert result.exit_code == 0
    assert not copy.exists()
    gone = run("overcrank", "engines", "show", built.name)
    assert gone.exit_code == 2
    assert "no bundle matches" in gone.output


class Layer:
    """An attention, as TensorRT's network has it."""

    def __init__(self) -> None:
        self.type, self.attention = "attention", SimpleNamespace(decomposable=False)


def test_the_settings_of_the_compiler_are_in_the_key_and_keys_stay() -> None:
    """Bundles on disk are found by it. What the key says is set is what the compiler is told, one by one."""
    from overcrank.engines import compile as compiling
    from overcrank.engines.manifest import EngineKey

    own = ("denoiser", "g", "r", "sm_89", "p", "tensorrt_rtx", "1.7", compiling.FLAGS, "inputs")
    assert EngineKey(*own).digest() == "9d9cf5619dcc964cbf476882adbbcd1ecac15330f6fa63ce5fb5b035e0fa625c"
    names = compiling.FLAGS.split(",")
    assert names == [name.lower() for name in compiling.NETWORK_FLAGS] + list(compiling.SETTINGS)
    told: list[Any] = []
    trt = SimpleNamespace(
        BuilderFlag=SimpleNamespace(REQUIRE_USER_ALLOCATION="user"),
        LayerType=SimpleNamespace(ATTENTION_INPUT="attention"),
        IAttentionInputLayer=Layer,
    )
    layer = Layer()
    network = SimpleNamespace(num_layers=1, get_layer=lambda i: layer)
    config = SimpleNamespace(set_flag=told.append, max_aux_streams=None)
    for set_flag in compiling.SETTINGS.values():
        set_flag(trt, network, config)
    assert (told, config.max_aux_streams, layer.attention.decomposable) == (["user"], 0, True)


def test_bundles_that_tell_what_their_plans_do_in_words_are_read(built: Path, tmp_path: Path) -> None:
    old = json.loads((built / MANIFEST).read_text("utf-8"))
    said = "398 generated kernels, 287 GEMMs (173 with fused epilogue, 114 without); 2 weights cast at every call"
    for entry in old["components"]:
        del entry["plan"]
        entry["lint"] = said
    (tmp_path / MANIFEST).write_text(json.dumps(old), "utf-8")
    assert {entry.verdict for entry in read_manifest(tmp_path).components} == {said}
    fresh = read_manifest(built).component("denoiser")
    assert fresh.plan is not None
    assert fresh.plan.gemms >= fresh.plan.fused_gemms > 0
    assert fresh.verdict.startswith(f"{fresh.plan.kernels} generated kernels, {fresh.plan.gemms} GEMMs (")
    assert fresh.verdict.endswith("no weight transposed, cast or moved")
    nobody_knows = fresh.model_copy(update={"plan": None})
    assert "nothing is claimed" in nobody_knows.verdict
