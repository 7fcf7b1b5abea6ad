"""Everything a user can get wrong: exit code 2, one sentence, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from overcrank.models import resolve

from tests.conftest import SMALL, files_under

pytestmark = pytest.mark.quick


def refused(result: Any, says: str, store: Path | None = None) -> None:
    assert result.exit_code == 2, result.output
    (line,) = [text for text in result.output.splitlines() if text.startswith("error: ")]
    assert says in line
    assert "Traceback" not in result.output
    if store is not None:
        assert not [f for f in files_under(store) if "graphs" not in f]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model ltxx --gpu sm_89", "did you mean ltx"),
        ("--model ltx-2b-0.9.4 --gpu sm_89", "did you mean ltx-2b-0.9"),
        ("--model ltx --gpu rtx4900", "did you mean"),
        ("--model ltx --gpu sm_90", "TensorRT for RTX cannot build for sm_90"),
        ("--model ltx --gpu auto", "--gpu auto needs an NVIDIA card"),
        ("--model ltx --gpu sm_89 --height 500", "height 500 is not a multiple of 32 (nearest: 480 or 512)"),
        ("--model ltx --gpu sm_89 --frames 120", "frames 120 is not 8k+1 (nearest: 113 or 121)"),
        ("--model ltx --gpu sm_89 --max-frames 9", "frames 121 lies outside the profile's 1 … 9"),
        ("--model ltx --gpu sm_89 --static --max-frames 161", "--static fixes every shape"),
        ("--model ltx --gpu sm_86 --precision fp8", "sm_86 (Ampere) has no fp8"),
        ("--model ltx --gpu sm_75 --precision bf16", "sm_75 (Turing) has no bf16"),
        ("--model ltx --gpu sm_89 --precision nvfp4", "sm_89 (Ada) has no nvfp4"),
        ("--model ltx --gpu sm_89 --precision fp12", "Unknown precision 'fp12'"),
        ("--model ltx --gpu sm_89 --components unet", "has no component 'unet'"),
        ("--model ltx --gpu sm_80 --flavour tensorrt", "TensorRT is not installed"),
        ("--model acme/ltx-video-tuned --gpu sm_89", "--model ltx needs no download"),
        ("--model ltx --gpu sm_89 --embed-weights", "--model ltx needs no download"),
        ("--model ltx-2b-0.9.6-dev --gpu sm_89 --embed-weights", "is published as one file"),
    ],
)
def test_refusals(arguments: str, says: str, tmp_path: Path, run: Any) -> None:
    result = run("build-engine", *arguments.split(), "--store", tmp_path / "store")
    refused(result, says, tmp_path)
    assert not files_under(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, run: Any) -> None:
    store = tmp_path / "store"
    folder = tmp_path / "nothing here"
    folder.mkdir()
    command = ["build-engine", "--gpu", "sm_89", "--store", store, "--model"]
    refused(run(*command, folder), "is not a diffusers checkpoint: it has no model_index.json", store)
    (folder / "model_index.json").write_text("{")
    refused(run(*command, folder), "model_index.json cannot be read as JSON", store)
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "LTXVideoTransformer3DModel"]}')
    refused(run(*command, folder), "lacks transformer/config.json", store)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    refused(run(*command, folder), "no family here runs a UNet2DModel", store)
    refused(run(*command, folder / "model_index.json"), "is a file", store)


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "broken")
    return tmp_path / "broken"


def embed(run: Any, model: Path, store: Path) -> Any:
    arguments = ["--model", model, "--gpu", "sm_89", *SMALL, "--store", store]
    return run("build-engine", *arguments, "--embed-weights", "--components", "denoiser")


def test_weights_are_the_plain_ones_and_never_a_single_shard(tmp_path: Path) -> None:
    from overcrank.errors import CheckpointError
    from overcrank.export.headers import weight_files

    stem = "diffusion_pytorch_model"
    empty = (2).to_bytes(8, "little") + b"{}"
    (tmp_path / f"{stem}-00001-of-00002.safetensors").write_bytes(empty)
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        weight_files(tmp_path)
    for name in (f"{stem}.fp16.safetensors", f"{stem}.safetensors"):
        (tmp_path / name).write_bytes(empty)
        assert [f.name for f in weight_files(tmp_path)] == [name]


def test_truncated_weights(broken: Path, tmp_path: Path, run: Any) -> None:
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refused(embed(run, broken, tmp_path / "s"), "is truncated: tensor '", tmp_path / "s")
    os.truncate(file, 5)
    refused(embed(run, broken, tmp_path / "s"), "is not a whole safetensors file", tmp_path / "s")
    file.unlink()
    refused(embed(run, broken, tmp_path / "s"), "has no diffusion_pytorch_model.safetensors", tmp_path / "s")


@pytest.mark.heavy
def test_weights_of_another_architecture(broken: Path, tmp_path: Path, run: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    narrow = tensors | {"proj_in.bias": tensors["proj_in.bias"][:-1].clone()}
    save_file(narrow, file)
    refused(embed(run, broken, tmp_path / "s"), "tensor 'proj_in.bias' is [31], the architecture needs [32]")
    del tensors["proj_in.bias"]
    save_file(tensors, file)
    refused(embed(run, broken, tmp_path / "s"), "has no tensor 'proj_in.bias'")
    assert not files_under(tmp_path / "s" / "bundles")


def test_a_config_field_diffusers_does_not_know_is_named_and_left_out(broken: Path, caplog: Any) -> None:
    from overcrank.models.matching import same_networks

    plain = resolve(str(broken))
    file = broken / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_dragons": 3}))
    assert same_networks(resolve(str(broken)), plain)
    assert "transformer/config.json has the field 'num_dragons', which LTXVideoTransformer3DModel" in caplog.text


@pytest.mark.heavy
def test_a_refusal_from_a_worker_is_one_line_on_the_terminal(broken: Path, tmp_path: Path) -> None:
    """In a process of its own, where a stray traceback of the process pool would show."""
    from tests.test_build import COMMAND

    file = broken / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"activation_fn": "dragon"}))
    arguments = ["--model", str(broken), "--gpu", "sm_89", *SMALL, "--store", str(tmp_path / "s"), "--quiet"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: LTXVideoTransformer3DModel cannot be built from transformer/config.json")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output_by_permission(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "locked"
    out.mkdir(mode=0o500)
    result = run("build-engine", "--model", checkpoint, "--gpu", "sm_89", *SMALL, "--out", out)
    refused(result, "cannot be written (Permission denied)")


def test_unwritable_output(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    file = tmp_path / "file"
    file.write_text("")
    arguments = ["--model", checkpoint, "--gpu", "sm_89", *SMALL]
    refused(run("build-engine", *arguments, "--out", file / "below"), "cannot be written (Not a directory)")
    refused(run("build-engine", *arguments, "--out", "/proc/overcrank"), "cannot be written (No such file")


@pytest.mark.heavy
def test_full_disk(checkpoint: Path, seeded: Callable[[Path], Path], tmp_path: Path, run: Any) -> None:
    disk = tmp_path / "small disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root: " + mounted.stderr.decode().strip())
    try:
        arguments = ["--model", checkpoint, "--gpu", "sm_89", *SMALL, "--out", disk, "--store", seeded(tmp_path / "s")]
        result = run("build-engine", *arguments, "--components", "denoiser", "--quiet")
        refused(result, "is full; free space or give --store or --out elsewhere")
        assert not files_under(disk)
    finally:
        subprocess.run(["umount", disk], check=False)


def test_a_bundle_that_is_none(tmp_path: Path, run: Any) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    result = run("overcrank", "verify", bundle)
    assert result.exit_code == 2
    assert "is not a bundle" in result.output
    (bundle / "manifest.json").write_text('{"schema_version": 99}')
    result = run("overcrank", "engines", "show", bundle)
    assert result.exit_code == 1
    assert "rebuild the bundle" in result.output


def test_a_folder_whose_name_no_manifest_may_have(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    """Said before an hour of building, and without the name's own escape."""
    folder = shutil.copytree(checkpoint, tmp_path / "a\x1b[31mname")
    result = run("build-engine", "--model", folder, "--gpu", "sm_89", *SMALL, "--store", tmp_path / "store")
    refused(result, r"the model's name 'a\x1b[31mname' is too long or holds control characters", tmp_path / "store")
    assert "\x1b" not in result.output
