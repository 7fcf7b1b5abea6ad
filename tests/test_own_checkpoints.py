"""Folders of a user's own: small networks, files that an editor marked, weights that are damaged."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.engines.profiles import profile_for
from overcrank.models import check_shape, family, resolve
from overcrank.models.demo import FOLDER
from overcrank.models.matching import variant_from_configs
from safetensors.torch import load_file, save_file

from tests import pipelines, tiny

USUAL = ("--prompt", "a red circle", "--steps", 1, "--backend", "eager", "--formats", "latents", "--quiet")
TEXTS = ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "mine"))


@pytest.mark.quick
@pytest.mark.parametrize("name", tiny.TINY)
def test_a_network_that_is_made_small_takes_a_small_video_by_default(name: str) -> None:
    shrunk = tiny.variant(name)
    main = "transformer" if "transformer" in shrunk.configs else "unet" if "unet" in shrunk.configs else ""
    if not main:
        return
    cls = next(c.cls.rpartition(".")[2] for c in family(shrunk.family).components(shrunk) if c.subfolder == main)
    own = variant_from_configs("mine", cls, shrunk.configs, next(iter(shrunk.tasks.values())))
    assert (own.native.height, own.native.width) == (64, 64)
    for shape in (own.native, own.minimum, own.maximum):
        check_shape(own, shape)
    assert profile_for(own).opt.height == 64
    whole = resolve(tiny.layout(name).like)
    same = variant_from_configs("mine", cls, whole.configs, next(iter(whole.tasks.values())))
    assert same.native.height > 64


@pytest.mark.heavy
def test_a_tiny_folder_renders_without_a_size(tmp_path: Path, run: Any) -> None:
    model = pipelines.saved("wan", tmp_path)
    result = run("overcrank", "render", "--model", model, *USUAL, "--frames", 5, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    request = json.loads((tmp_path / "out.json").read_text())["request"]
    assert (request["height"], request["width"]) == (64, 64)


@pytest.mark.heavy
def test_files_with_a_byte_order_mark_are_read(folder: Path, tmp_path: Path, run: Any) -> None:
    before = run("overcrank", "render", "--model", folder, *USUAL, "-o", tmp_path / "plain")
    assert before.exit_code == 0, before.output
    for name in (*TEXTS, *(str(p.relative_to(folder)) for p in folder.glob("tokenizer*/*.json"))):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    marked = {p: p.read_bytes() for p in folder.rglob("*.json")}
    assert (
        resolve(str(folder)).configs["transformer"]["num_layers"]
        == resolve("ltx-demo").configs["transformer"]["num_layers"]
    )
    after = run("overcrank", "render", "--model", folder, *USUAL, "-o", tmp_path / "marked")
    assert after.exit_code == 0, after.output
    one, other = (load_file(tmp_path / f"{name}.latents.safetensors") for name in ("plain", "marked"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    sidecars = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "marked")]
    assert sidecars[0]["source"] == sidecars[1]["source"] == "mine"
    assert sidecars[0]["request_sha256"] == sidecars[1]["request_sha256"]
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == marked


@pytest.mark.heavy
def test_calibrate_names_a_tensor_of_nan(folder: Path, tmp_path: Path, run: Any) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = float("inf")  # behind every layer that is quantized
    save_file(tensors, file, {"format": "pt"})
    words = ["--model", folder, "--precision", "fp8", "--samples", 1, "--steps", 1, "-o", tmp_path / "recipe.json"]
    result = run("overcrank", "calibrate", *words)
    assert result.exit_code == 2, result.output
    assert "transformer's proj_out.weight holds NaN or infinities, so the checkpoint is damaged" in result.output
    assert not (tmp_path / "recipe.json").exists()
