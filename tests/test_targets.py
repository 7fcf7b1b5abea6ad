from __future__ import annotations

import pytest
from overcrank.engines.manifest import EngineKey
from overcrank.engines.targets import BY_NAME, TARGETS, gpu_names, precision_for, serves, targets_for
from overcrank.errors import TargetError

pytestmark = pytest.mark.quick

RTX = "tensorrt_rtx"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("sm_89", ["sm_89"]),
        ("SM89", ["sm_89"]),
        ("rtx4090", ["sm_89"]),
        ("RTX-5090", ["sm_120"]),
        ("rtx 3060 Ti", ["sm_86"]),
        ("dgx-spark", ["sm_121"]),
        ("RTX 4070", ["sm_89"]),
        ("4070", ["sm_89"]),
        ("3060 ti", ["sm_86"]),
        ("1660", ["sm_75"]),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", ["sm_89"]),
        ("NVIDIA GeForce RTX 2080 Super with Max-Q Design", ["sm_75"]),
        ("NVIDIA GeForce RTX 5090", ["sm_120"]),
        ("NVIDIA RTX 6000 Ada Generation", ["sm_89"]),
        ("NVIDIA RTX A6000", ["sm_86"]),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", ["sm_120"]),
        ("NVIDIA A100-SXM4-80GB", ["sm_80"]),
        ("NVIDIA GB10", ["sm_121"]),
        ("Tesla T4", ["sm_75"]),
        ("Quadro RTX 4000", ["sm_75"]),
        ("all", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]),
    ],
)
def test_gpu_names(word: str, names: list[str]) -> None:
    assert [t.name for t in targets_for([word], RTX)] == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtx4090,sm_75", ["rtx4090", "sm_75"]),
        ("sm_89 sm_120", ["sm_89", "sm_120"]),
        ("RTX 4070, NVIDIA GeForce RTX 3060 Laptop GPU", ["RTX 4070", "NVIDIA GeForce RTX 3060 Laptop GPU"]),
        ("4070 5090", ["4070", "5090"]),
        ("RTX 4900", ["RTX 4900"]),
        (" , ", []),
    ],
)
def test_names_of_gpus_in_one_text(text: str, names: list[str]) -> None:
    assert gpu_names(text) == names


@pytest.mark.parametrize(
    "word",
    ["GTX 1080 Ti", "NVIDIA GeForce GTX 1060 6GB", "1070", "Tesla V100-SXM2-16GB", "Tesla P40", "TITAN Xp", "GTX 970"],
)
def test_a_card_that_is_too_old_is_told_so(word: str) -> None:
    with pytest.raises(TargetError, match="older than what TensorRT for RTX builds for"):
        targets_for([word], RTX)


def test_several_gpus_are_taken_once_each() -> None:
    assert [t.name for t in targets_for(["rtx4090", "sm_89", "sm_75"], RTX)] == ["sm_89", "sm_75"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("rtx4900", "did you mean"),
        ("banana", "Unknown GPU 'banana'"),
        ("sm_90", "TensorRT for RTX cannot build for sm_90"),
        ("", "^gpu is empty"),
    ],
)
def test_bad_gpus(word: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        targets_for(word.split(), RTX)


@pytest.mark.parametrize(
    ("target", "precision", "says"),
    [
        ("sm_86", "fp8", "fp8 needs one of sm_89"),
        ("sm_75", "bf16", "sm_75 .Turing. has no bf16"),
        ("sm_89", "nvfp4", "nvfp4 needs one of sm_100, sm_120, sm_121"),
    ],
)
def test_precisions_a_target_lacks(target: str, precision: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        precision_for(targets_for([target], RTX)[0], precision)


def test_auto_precision_is_bf16_where_the_target_has_it() -> None:
    auto = {t.name: precision_for(t, "auto") for t in TARGETS}
    assert auto["rtx"] == "bf16"
    assert auto.pop("sm_75") == "fp16"
    assert set(auto.values()) == {"bf16"}


def test_a_portable_target_is_those_of_its_members_that_have_the_precision() -> None:
    assert targets_for(["rtx"], RTX)[0].narrowed("fp8").compute_capabilities == ("SM89", "SM120", "SM121")
    assert BY_NAME["sm_89"].narrowed("fp8").compute_capabilities == ("SM89",)
    assert serves("rtx", "bf16", "sm_86")
    assert serves("rtx", "fp8", "sm_89")
    assert not serves("rtx", "fp8", "sm_86")
    assert not serves("rtx", "bf16", "sm_75")
    assert not serves("sm_86", "bf16", "sm_89")
    assert not serves("sm_999", "bf16", "sm_89")


def test_a_key_names_what_differs() -> None:
    key = EngineKey("denoiser", "g", "r", "sm_89", "p", RTX, "1.7", "f", "inputs")
    assert key.differing(key._replace(target="sm_86", flavour_version="1.8")) == ["target", "flavour_version"]
    fields = [key._replace(**{f: "other"}).digest() for f in key._fields]
    assert len({key.digest(), *fields}) == len(fields) + 1
