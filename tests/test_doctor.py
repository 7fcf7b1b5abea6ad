"""`overcrank doctor`: every machine that is met, on inventories; this one, for real."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines import cards
from overcrank.engines.cards import Card
from overcrank.engines.kernel_cache import kernel_cache
from overcrank.engines.manifest import Manifest
from overcrank.engines.measurements import Measurement, record
from overcrank.engines.refusals import CardsUnseen, OldDriver, TorchWithoutCuda
from overcrank.engines.store import Store
from overcrank.engines.targets import targets_for
from overcrank.engines.tensorrt import driver_notes
from overcrank.errors import IntegrityError, TargetError
from overcrank.runtime import doctor
from overcrank.runtime.doctor import Machine, findings, of_store, why_not
from overcrank.runtime.sessions.card import in_pytorchs_order, why_no_card

pytestmark = pytest.mark.quick

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
        (
            {"torch_cuda": ""},
            "bad",
            "without CUDA, and this machine has NVIDIA GeForce RTX 4090; install the wheel torch==2.11.0+cu130",
        ),
        ({"cards": (replace(ADA, driver="570.86"),)}, "bad", "driver 570.86 is installed, and TensorRT for RTX"),
        ({"torch_sees": 0, "hidden": ""}, "bad", "sees no card: CUDA_VISIBLE_DEVICES is ''"),
        ({"torch_sees": 0}, "bad", "sees no card: the driver may be too old for CUDA 13.0"),
        ({"cards": (replace(ADA, target="sm_61"),)}, "bad", "sm_61, 25.8 GB, 21.5 GB free"),
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
    lost = Measurement(
        component="vae_decoder", shape="64x64x17", engine_ms=3.0, eager_ms=2.0, date="2026-11-21", kernels="eager"
    )
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
        (
            {"flavour_version": "1.6.0"},
            "built with TensorRT for RTX 1.6.0, and 1.7.1 is usable here; pip install tensorrt-rtx==1.6.0, or",
        ),
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
    lines = (
        "0, NVIDIA GeForce RTX 4090, 8.9, 24564, 20000, 580.1, GPU-aa",
        "1, NVIDIA GB10, 12.1, [N/A], [N/A], 580.1, GPU-bb",
    )
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = cards.installed_cards()
    assert first == Card(0, "NVIDIA GeForce RTX 4090", "sm_89", 24564 * 2**20, 20000 * 2**20, "580.1", "GPU-aa")
    assert (second.target, second.memory) == ("sm_121", 0)


def test_cards_are_numbered_as_pytorch_numbers_them() -> None:
    first, second, third = (replace(ADA, index=i, uuid=f"GPU-{i}a") for i in range(3))
    assert in_pytorchs_order((first, second, third), ["2a", "GPU-0a"]) == (third, first, second)
    assert in_pytorchs_order((first, second), []) == (first, second)
    two = replace(GOOD, cards=(replace(second, target="sm_120"), first))
    assert [f.subject for f in findings(two, []) if f.subject.startswith("card")] == ["card 0", "card 1"]


def test_why_pytorch_sees_no_card() -> None:
    assert why_no_card("2.13.0", "13.0", ()) is None
    without = why_no_card("2.13.0+cpu", None, (ADA,))
    assert without == TorchWithoutCuda("2.13.0+cpu", "torch==2.13.0+cu130", (ADA.name,))
    old = why_no_card("2.13.0", "13.0", (replace(ADA, driver="570.1"),))
    assert isinstance(old, OldDriver)
    assert old.driver == "570.1"
    hidden = why_no_card("2.13.0", "13.0", (ADA,))
    assert hidden == CardsUnseen("2.13.0", "13.0", (ADA.name,))


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.heavy
def test_a_render_without_cuda_names_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    smi(tmp_path, monkeypatch, "0, NVIDIA GeForce RTX 4090, 8.9, 24564, 20000, 580.1, GPU-aa")
    words = ["render", "--prompt", "x", "--steps", 1, "--frames", 1, "-o", tmp_path / "a.png", "--store", tmp_path]
    made = run("overcrank", *words)
    assert made.exit_code == 0, made.output
    assert "is a build without CUDA, and this machine has NVIDIA GeForce RTX 4090; install the wheel" in made.output
    assert "warning: rendering on the processor, in ONNX Runtime: PyTorch" in made.output
    assert "eager" not in made.output
    refused = run("overcrank", *words, "--overwrite", "--device", "cuda")
    assert refused.exit_code == 2
    assert "--device cuda: PyTorch" in refused.output
    assert "+cu130" in refused.output


def test_a_build_for_a_card_whose_driver_is_too_old_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("0, NVIDIA GeForce RTX 4090, 8.9, 1, 1, 570.1, GPU-a", "1, NVIDIA RTX 5090, 12.0, 1, 1, 570.1, GPU-b")
    smi(tmp_path, monkeypatch, *lines, lines[0])
    both = targets_for(["auto"], "tensorrt_rtx")
    assert [t.name for t in both] == ["sm_89", "sm_120"]
    (note,) = driver_notes("tensorrt_rtx", both)
    assert note.startswith("driver 570.1 is installed, and TensorRT for RTX")
    assert not driver_notes("tensorrt_rtx", targets_for(["sm_75"], "tensorrt_rtx"))


def test_a_self_test_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the card or TensorRT raises: doctor is run where something is wrong."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error 35")

    monkeypatch.setattr(doctor, "ProcessPoolExecutor", fails)
    assert doctor.self_test(GOOD).text == "a small engine for sm_89 failed: CUDA error 35"


def test_the_self_test_s_engine_runs_where_a_driver_can_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Pool(ThreadPoolExecutor):
        """In place of the process in which an engine is compiled, and run if the last argument says so."""

        def submit(self, work: Any, *arguments: Any, **_: Any) -> Future[Any]:
            asked.append(arguments[-1])
            done = Future[Any]()
            done.set_result(1e-4 if arguments[-1] else None)
            return done

    monkeypatch.setattr(doctor, "ProcessPoolExecutor", lambda count, mp_context: Pool(count))
    old = replace(GOOD, cards=(replace(ADA, driver="570.1"),))
    assert "is within 1.0e-04 of PyTorch" in doctor.self_test(GOOD).text
    assert "no card to run it on" in doctor.self_test(old).text
    assert asked == [True, False]


@pytest.mark.heavy
def test_this_machine(tmp_path: Path, run: Any) -> None:
    shown = run("overcrank", "doctor", "--store", tmp_path / "s")
    import torch

    if torch.cuda.is_available():
        assert "of PyTorch, in" in shown.output
        return
    assert shown.exit_code == 0, shown.output
    assert "engines can be built for any card" in shown.output
    assert "compiled a small engine for sm_89 in" in shown.output
