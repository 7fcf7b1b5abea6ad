"""`overcrank doctor`: every machine that is met, on inventories; this one, for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines import cards
from overcrank.engines.cards import Card
from overcrank.engines.manifest import Manifest
from overcrank.engines.store import Store
from overcrank.errors import IntegrityError, TargetError
from overcrank.runtime.doctor import Machine, findings, of_store, why_not
from overcrank.runtime.kernel_cache import kernel_cache
from overcrank.runtime.measured import Measurement, record

ADA = Card(0, "NVIDIA GeForce RTX 4090", "sm_89", 24 * 2**30, 20 * 2**30, "580.1")
GOOD = Machine((ADA,), "", "2.11.0", "13.0", 1, None, {"tensorrt_rtx": "1.7.1"}, {"tensorrt": "TensorRT is not here."})


def said(machine: Machine, verdict: str) -> str:
    return " | ".join(f"{f.subject}: {f.text}" for f in findings(machine, []) if f.verdict == verdict)


def test_a_good_machine() -> None:
    assert not said(GOOD, "bad")
    assert "card 0: NVIDIA GeForce RTX 4090, sm_89" in said(GOOD, "ok")
    assert "bundles: none yet; build one" in said(GOOD, "note")


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        ({"cards": (), "no_cards": "nvidia-smi is not installed"}, "note", "engines can be built for any card"),
        ({"torch_cuda": ""}, "bad", "is a build without CUDA; install one with it"),
        ({"torch_sees": 0, "hidden": ""}, "bad", "sees no card: CUDA_VISIBLE_DEVICES is ''"),
        ({"torch_sees": 0}, "bad", "sees no card: the driver may be too old for CUDA 13.0"),
        ({"cards": (replace(ADA, target="sm_61"),)}, "bad", "sm_61, 25.77 GB, 21.47 GB free"),
        ({"cards": (replace(ADA, target="sm_90"),)}, "bad", "needs TensorRT, which is not usable here"),
        ({"flavours": {}}, "bad", "needs TensorRT for RTX or TensorRT, which is not usable here"),
        ({"cards": (replace(ADA, memory=0),)}, "ok", "memory shared with the processor"),
    ],
)
def test_machines_with_something_wrong(change: dict[str, Any], verdict: str, says: str) -> None:
    assert says in said(replace(GOOD, **change), verdict)


def test_what_earlier_renders_have_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert [f.text for f in of_store(GOOD, store)] == ["none yet; the first render on a card compiles them"]
    file = kernel_cache(store, "ab" * 32, ADA.name, ADA.driver)
    file.write(b"x" * 2_000_000)
    lost = Measurement(component="vae_decoder", shape="64x64x17", engine_ms=3.0, eager_ms=2.0, date="2026-11-21")
    record(store, ADA.name, ADA.driver, "key", lost)
    caches, slow = (f.text for f in of_store(GOOD, store))
    assert caches == "1 runtime caches, 2.0 MB"
    assert slow == (
        "its engine for 64x64x17 took 3.0 ms and eager 2.0 ms (2026-11-21): not used without --slow-engines"
    )
    file.path.write_bytes(b"short")
    assert "is damaged and will be compiled again" in next(of_store(GOOD, store)).text


def bundle(**fields: Any) -> Manifest:
    known = {
        "target": "sm_89",
        "precision": "bf16",
        "flavour": "tensorrt_rtx",
        "flavour_version": "1.7.1",
        "weights": "inputs",
    }
    return Manifest.model_construct(**(known | fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, ""),
        ({"target": "sm_120"}, "for sm_120, and the cards here are sm_89"),
        ({"flavour_version": "1.6.0"}, "built with TensorRT for RTX 1.6.0, and 1.7.1 is usable here; rebuild it"),
        ({"flavour": "tensorrt"}, "built with TensorRT 1.7.1, and none is usable here"),
        ({"weights": "embedded:ab"}, "its weights are embedded"),
    ],
)
def test_why_a_bundle_does_not_serve(fields: dict[str, str], says: str) -> None:
    found = why_not(bundle(**fields), GOOD)
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_a_damaged_bundle_is_named() -> None:
    (last,) = [f for f in findings(GOOD, [(Path("x"), IntegrityError("its manifest is cut off"))]) if f.subject == "x"]
    assert last.text == "its manifest is cut off"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("exit 9", "nvidia-smi finds no card: exit status 9"),
        (
            "echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9",
            "it could not communicate",
        ),
        ("true", "nvidia-smi finds no card: exit status 0"),
    ],
)
def test_drivers_that_do_not_answer(answer: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(TargetError, match=says):
        cards.installed_cards()


def test_cards_as_the_driver_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("0, NVIDIA GeForce RTX 4090, 8.9, 24564, 20000, 580.1", "1, NVIDIA GB10, 12.1, [N/A], [N/A], 580.1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = cards.installed_cards()
    assert first == Card(0, "NVIDIA GeForce RTX 4090", "sm_89", 24564 * 2**20, 20000 * 2**20, "580.1")
    assert (second.target, second.memory) == ("sm_121", 0)


def test_this_machine(tmp_path: Path, run: Any) -> None:
    shown = run("overcrank", "doctor", "--store", tmp_path / "s")
    import torch

    if torch.cuda.is_available():
        assert "of PyTorch, in" in shown.output
        return
    assert shown.exit_code == 0, shown.output
    assert "engines can be built for any card" in shown.output
    assert "compiled a small engine for sm_89 in" in shown.output
