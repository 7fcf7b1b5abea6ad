"""Why an engine does not serve, in words: every kind has a sentence, and a command that is of its own figures."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from overcrank.engines import graph_refusals, module_refusals, refusals
from overcrank.engines.module_refusals import ModuleChange, ModuleChanged, ParameterUnfit, Unfit
from overcrank.engines.refusals import CannotServe, Refusal
from overcrank.options import named_as_flags
from overcrank.runtime.sessions.session import Ledger

pytestmark = pytest.mark.quick
BUILD = "build-engine --model ltx --gpu sm_89"
WORD = "{the name}"
SAMPLES = {str: WORD, int: 2, float: 1.5, bool: True, tuple[str, ...]: (WORD, "more"), tuple[int, ...]: (1, 2)}
BASES = {"OfThisCall", "TensorRTRefusal"}


def sample(kind: type[Refusal]) -> Refusal:
    """With a value for each field; names with braces, as no figure is read as part of a sentence."""
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(*(SAMPLES.get(hints[name], (1, "tokens")) for name in fields))


def kinds() -> Iterator[Refusal]:
    for module in (refusals, module_refusals, graph_refusals):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, Refusal) and kind.__module__ == module.__name__:
                if kind is Refusal or name in BASES or name in ("ModuleChanged", "ParameterUnfit"):
                    continue
                yield sample(kind)
    yield from (ModuleChanged(change, "a.place", "own", "stock") for change in ModuleChange)
    yield from (ParameterUnfit(problem, "w", "own", "wanted") for problem in Unfit)


ALL = list(kinds())


@pytest.mark.parametrize("why", ALL, ids=lambda why: why.kind)
def test_every_kind_says_what_is_wrong_and_what_to_do(why: Refusal) -> None:
    what, fix = why.words(BUILD)
    assert len(what) > 4
    assert len(fix) > 8
    assert not re.search(r"\.$|\s\s|\bNone\b", f"{what}|{fix}")
    for field in dataclasses.fields(why):  # type: ignore[arg-type]
        if isinstance(getattr(why, field.name), str) and not isinstance(why, ModuleChanged | ParameterUnfit):
            assert getattr(why, field.name) in what + fix, "a figure is not told"
    again: Any = pickle.loads(pickle.dumps(CannotServe(why)))
    assert (again.why, str(again)) == (why, why.sentence())


def test_there_are_as_many_as_are_raised() -> None:
    assert len(ALL) > 45
    assert len({why.kind for why in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("why", "sentence"),
    [
        (
            refusals.OutsideProfile("denoiser", "x", (3, 4), (1, 4), (2, 4)),
            "denoiser: x [3, 4] lies outside the engine's profile [1, 4] … [2, 4]; "
            f"{BUILD} with --max-height, --max-width or --max-frames large enough",
        ),
        (
            refusals.OutOfMemory("denoiser", 2_000_000_000, 1_000_000_000, 8_000_000_000),
            "the engine of denoiser ran out of GPU memory: it needs 2.0 GB for activations and 1.0 GB of 8.0 GB are "
            "free; render fewer frames or a smaller size, with vram='low', or free the card",
        ),
        (
            refusals.LoadFailed("denoiser.engine", "CUDA error 35"),
            f"denoiser.engine could not be loaded on this card (CUDA error 35); {BUILD}",
        ),
        (
            refusals.OtherPrecision("ltx", "sm_89", ("bf16 with weights as inputs",), "float32"),
            "the engines of ltx for sm_89 are bf16 with weights as inputs, and the pipeline's weights are float32; "
            "load the pipeline in bf16 or fp16",
        ),
        (
            refusals.Damaged("ltx-demo-sm_89", "denoiser.engine is missing"),
            "bundle ltx-demo-sm_89 is damaged: denoiser.engine is missing; "
            f"overcrank engines rm ltx-demo-sm_89, then {BUILD}",
        ),
        (
            ModuleChanged(ModuleChange.LORA, "blocks.0.to_q"),
            "blocks.0.to_q has LoRA layers; fuse them: pipe.fuse_lora(), then pipe.unload_lora_weights()",
        ),
        (
            ParameterUnfit(Unfit.TYPE, "w", "torch.float32", "torch.bfloat16"),
            "the pipeline holds w as torch.float32, and the engine takes it as torch.bfloat16; "
            "load the pipeline with dtype=torch.bfloat16",
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_sentences_as_a_person_reads_them(why: Refusal, sentence: str) -> None:
    assert why.sentence(BUILD) == sentence


@pytest.mark.parametrize(
    ("why", "here", "on_the_command_line"),
    [
        (refusals.OtherOnProcessor("fp32", "bf16"), "render with dtype=['fp32']", "render with --dtype fp32"),
        (
            refusals.Slower("denoiser", 2.0, 1.0, "64x64x17", "2026-11-21"),
            "measure again with ./build.sh bench-gpu, or add slow_engines=True",
            "measure again with ./build.sh bench-gpu, or add --slow-engines",
        ),
        (
            ParameterUnfit(Unfit.PLACE, "w", "cpu"),
            "keep the whole part on the card, or let it come and go with vram='low'",
            "keep the whole part on the card, or let it come and go with --vram low",
        ),
        (
            module_refusals.NoRange("to_q"),
            "calibrate, and render with recipe, or build with activations='dynamic'",
            "calibrate, and render with --recipe, or build with --activations dynamic",
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_options_are_named_as_they_are_given(why: Refusal, here: str, on_the_command_line: str) -> None:
    assert why.words(BUILD)[1] == here
    with named_as_flags():
        assert why.words(BUILD)[1] == on_the_command_line


def test_a_warning_has_the_command_for_this_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(strict=False)
    ledger.build = BUILD
    with ledger.recording() as record:
        for _ in range(2):
            ledger.fall_back(["vae_decoder"], refusals.NoComponent("vae_decoder"))
    (fallback,) = record.fallbacks
    assert (fallback.kind, fallback.fix) == ("NoComponent", f"{BUILD} --components vae_decoder")
    assert caplog.text.count(f"rendering with eager PyTorch: {fallback.reason}; {fallback.fix}.") == 1
