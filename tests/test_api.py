"""The Python API, called as its documentation says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import overcrank
import pytest
import torch
from overcrank.errors import UserError

from tests import pipelines, tiny

MODEL = "tiny-ltx-0.9.5"
SMALL = {"components": ["denoiser"], "static": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, seeded: Callable[[Path], Path]) -> overcrank.Store:
    return overcrank.Store(seeded(tmp_path_factory.mktemp("api")))


@pytest.fixture(scope="module")
def built(store: overcrank.Store) -> Any:
    (bundle,) = overcrank.build("ltx-demo", "RTX 4070", store=store, jobs=1, **SMALL)
    return bundle


def test_names_are_found_without_importing_anything_heavy() -> None:
    code = "import overcrank, sys; print(set(overcrank.__all__) <= set(dir(overcrank)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    for name in overcrank.__all__:
        assert getattr(overcrank, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        overcrank.acelerate  # noqa: B018
    assert (Path(overcrank.__file__).parent / "py.typed").is_file()  # else a caller's mypy sees nothing of it


def test_what_was_built_is_verified_linted_and_found_again(store: overcrank.Store, built: Any) -> None:
    assert (built.cached, built.manifest.target) == (False, "sm_89")
    (again,) = overcrank.build("ltx-demo", ["sm_89"], overcrank.BuildOptions(**SMALL), store=store.root)
    assert (again.cached, again.path) == (True, built.path)
    checks = overcrank.verify(built.path)
    assert {check.component for check in checks} == {"denoiser"}
    assert all(check.within(1e-4) for check in checks)
    assert overcrank.plan_report(built.path.name, store=store)["denoiser"].kernels


def test_a_bundle_is_published_and_pulled(store: overcrank.Store, built: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from overcrank.engines.trust import Keyring

    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "keys"))
    ring = Keyring()
    ring.new("studio")
    (listed,) = overcrank.push(str(tmp_path / "shelf"), [built.path], "studio")
    assert listed.name == built.path.name
    pulled = overcrank.pull(str(tmp_path / "shelf"), "ltx-demo", gpu="4070", store=tmp_path / "other")
    assert (pulled / "manifest.json").read_bytes() == (built.path / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: overcrank.load("ltx-demo", vrm="low"), "no option 'vrm'; did you mean vram?"),
        (lambda: overcrank.load("ltx-demo", device="tpu"), "device='tpu': use cpu"),
        (lambda: overcrank.load("ltx-demo", precision="fp7"), "precision='fp7': use auto, fp8"),
        (lambda: overcrank.load("ltx-demo", recipe="r.json"), "recipe is for quantized layers"),
        (lambda: overcrank.load("ltx-demo", vram="low", device="cpu"), "vram is for a card"),
        (lambda: overcrank.build("ltx-demo", "sm_89", dtype={"vea": "bf16"}), "dtype='vea': name a part"),
        (lambda: overcrank.calibrate("ltx-demo", samples=0), "samples=0 measures nothing"),
        (lambda: overcrank.calibrate("ltx-demo", quality="loud"), "quality='loud': give decibels"),
    ],
)
def test_errors_speak_of_arguments(call: Any, said: str) -> None:
    """Not of flags, which a caller from Python has none of."""
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)
    assert "--" not in str(caught.value)


def test_options_are_whole_frozen_and_changed_by_name() -> None:
    options = overcrank.RenderOptions(backend="eager", vram="8GB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.vram = "low"  # type: ignore[misc]
    pipe = overcrank.load("ltx-demo", overcrank.LoadOptions(device="cpu", backend="eager"), dtype=["vae=fp32"])
    assert (pipe.overcrank.backend, pipe.overcrank.dtypes["vae"]) == ("eager", "fp32")


def test_a_summary_says_who_served_and_removal_leaves_nothing(store: overcrank.Store) -> None:
    from overcrank.models import components

    pipe = pipelines.ltx()
    before = {name: dict(vars(module)) for name, module in pipe.components.items() if hasattr(module, "forward")}
    own = set(vars(pipe))
    overcrank.accelerate(pipe, backend="onnxruntime", store=store)
    assert "nothing was called yet" in pipe.overcrank.summary()
    assert len(repr(pipe.overcrank)) < 80
    component = components(tiny.variant(MODEL), ("denoiser",))[0]
    sizes = {**component.free_axes, **component.sizes(tiny.TINY[MODEL].minimum)}
    call = component.sample(pipe.transformer, sizes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pipe.transformer(**call)
        pipe.transformer.set_attn_processor(
            type("Other", (type(pipe.transformer.transformer_blocks[0].attn1.processor),), {})()
        )
        pipe.transformer(**call)
    summary = pipe.overcrank.summary()
    assert "denoiser: eager 1 call, onnxruntime 1 call" in summary
    assert "Other" in summary  # why the second was not served
    pipe.overcrank.remove()
    assert set(vars(pipe)) == own
    for name, attributes in before.items():
        assert set(vars(getattr(pipe, name))) == set(attributes), name
