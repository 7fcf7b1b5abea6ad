"""Which bundle serves a pipeline, and why one does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines import refusals
from overcrank.engines.cards import Card
from overcrank.engines.manifest import BundledEngine, TensorEntry, read_manifest
from overcrank.engines.module_refusals import NoParameter
from overcrank.engines.refusals import CannotServe, Refusal
from overcrank.engines.store import Store
from overcrank.models import components, resolve
from overcrank.runtime.sessions.parameters import bound_parameters, parameters_of
from overcrank.runtime.sessions.select import build_command, engine_of, fitting_bundles
from overcrank.runtime.sessions.trt import check_shape
from overcrank.runtime.sessions.workspace import Workspace


@pytest.fixture
def bundle(demo_bundle: Path) -> Path:
    return demo_bundle


def refusal(*arguments: Any) -> Refusal:
    with pytest.raises(CannotServe) as caught:
        fitting_bundles(*arguments)
    return caught.value.why


def test_the_bundle_of_this_network_card_and_precision_is_chosen(bundle: Path) -> None:
    demo = resolve("ltx-demo")
    assert fitting_bundles([bundle], demo, "sm_89", "bf16")[0][0] == bundle
    tuned = replace(demo, name="my-finetune")
    assert fitting_bundles([bundle], tuned, "sm_89", "bf16")[0][0] == bundle


def test_a_portable_bundle_serves_where_no_engine_of_the_card_itself_does(bundle: Path, tmp_path: Path) -> None:
    portable = tmp_path / "portable"
    shutil.copytree(bundle, portable)
    manifest = json.loads((portable / "manifest.json").read_text())
    (portable / "manifest.json").write_text(json.dumps(manifest | {"target": "rtx", "created": "2999-01-01"}))
    demo = resolve("ltx-demo")
    both = [bundle, portable]
    assert [p for p, _ in fitting_bundles(both, demo, "sm_89", "bf16")] == [bundle, portable]
    assert [p for p, _ in fitting_bundles(both, demo, "sm_120", "bf16")] == [portable]
    assert refusal(both, demo, "sm_75", "bf16") == refusals.OtherCard("ltx-demo", ("rtx", "sm_89"), "sm_75")


def test_each_component_comes_from_the_newest_bundle_that_has_it(bundle: Path, tmp_path: Path) -> None:
    """A later bundle with only the conditioned denoiser must not take the plain one away."""
    later = tmp_path / "later"
    shutil.copytree(bundle, later)
    manifest = json.loads((later / "manifest.json").read_text())
    manifest["created"] = "2999-01-01T00:00:00+00:00"
    manifest["components"][0]["name"] = "denoiser_conditioned"
    (later / "manifest.json").write_text(json.dumps(manifest))
    fitting = fitting_bundles([bundle, later], resolve("ltx-demo"), "sm_89", "bf16")
    assert [p for p, _ in fitting] == [later, bundle]
    plain, decoder, conditioned = (
        components(resolve("ltx-demo"), (n,))[0] for n in ("denoiser", "vae_decoder", "denoiser_conditioned")
    )
    assert engine_of(plain, fitting).folder == bundle
    assert engine_of(conditioned, fitting).folder == later
    with pytest.raises(CannotServe) as missing:
        engine_of(decoder, fitting)
    assert missing.value.why == refusals.NoComponent("vae_decoder")


def test_every_reason_against_a_bundle_comes_with_the_command_that_helps(bundle: Path, tmp_path: Path) -> None:
    demo = resolve("ltx-demo")
    build = build_command(demo, "sm_89")
    none = refusal([], demo, "sm_89", "bf16")
    assert none == refusals.NoEngine("ltx-demo")
    assert none.words(build) == ("there is no engine of ltx-demo", "build-engine --model ltx-demo --gpu sm_89")
    other = refusal([bundle], resolve("ltx"), "sm_89", "bf16")
    near = "the denoiser of ltx-demo differs in attention_head_dim: 64 here, 32 in the engine"
    assert other == refusals.NoEngine("ltx-2b-0.9.5", (near,))
    card = refusal([bundle], demo, "sm_120", "bf16")
    assert card == refusals.OtherCard("ltx-demo", ("sm_89",), "sm_120")
    precision = refusal([bundle], demo, "sm_89", "fp16")
    have = ("bf16 with weights as inputs",)
    assert precision == refusals.OtherPrecision("ltx-demo", "sm_89", have, "fp16")
    assert precision.words(build)[1] == f"{build} --precision fp16"
    damaged = tmp_path / bundle.name
    shutil.copytree(bundle, damaged)
    engine = next(damaged.glob("*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
    fitting = fitting_bundles([damaged], demo, "sm_89", "bf16")
    with pytest.raises(CannotServe) as broken:
        engine_of(components(demo, ("denoiser",))[0], fitting)
    wrong = f"{engine.name} does not match the manifest (SHA-256 differs)"
    assert broken.value.why == refusals.Damaged(bundle.name, wrong)
    assert broken.value.why.words(build)[1] == f"overcrank engines rm {bundle.name}, then {build}"
    (damaged / "manifest.json").write_text("{}")
    assert refusal([damaged], demo, "sm_89", "bf16") == refusals.NoEngine("ltx-demo")


def test_shapes_outside_the_profile_are_refused_for_that_call_only() -> None:
    spec = TensorEntry(name="x", dtype="bf16", dims=["batch", 4], min=[1, 4], opt=[2, 4], max=[2, 4])
    check_shape("denoiser", spec, (2, 4))
    with pytest.raises(CannotServe) as caught:
        check_shape("denoiser", spec, (3, 4))
    assert caught.value.why == refusals.OutsideProfile("denoiser", "x", (3, 4), (1, 4), (2, 4))
    assert not caught.value.why.lasting


def test_parameters_are_bound_from_the_modules_own_storage(bundle: Path) -> None:
    from overcrank.models.demo import networks

    module = networks.denoiser()
    entry = read_manifest(bundle).component("denoiser")
    component = components(resolve("ltx-demo"), ("denoiser",))[0]
    bound = bound_parameters(module, component, parameters_of(entry))
    storage = {p.data_ptr() for p in module.parameters()}
    assert len(bound) > 100
    assert {t.data_ptr() for t in bound.values()} <= storage
    del module.transformer_blocks[5]
    with pytest.raises(CannotServe) as caught:
        bound_parameters(module, component, parameters_of(entry))
    assert isinstance(caught.value.why, NoParameter)
    assert caught.value.why.parameter.startswith("transformer_blocks.5.")


def test_an_engine_of_another_tensorrt_or_without_a_driver_is_refused(bundle: Path, tmp_path: Path) -> None:
    import torch
    from overcrank.runtime.sessions.trt import TrtSession

    manifest = read_manifest(bundle)
    entry, store = manifest.component("denoiser"), Store(tmp_path)
    card = Card(0, "a card", "sm_89", 0, 0, "580")
    other = manifest.model_copy(update={"flavour_version": "0.1"})
    with pytest.raises(CannotServe) as caught:
        TrtSession(BundledEngine(bundle, other, entry), {}, Workspace(), store, card)
    install = "pip install tensorrt-rtx==0.1"
    assert caught.value.why == refusals.OtherTensorRT("TensorRT for RTX", "0.1", manifest.flavour_version, install)
    if not torch.cuda.is_available():
        with pytest.raises(CannotServe) as caught:
            TrtSession(BundledEngine(bundle, manifest, entry), {}, Workspace(), store, card)
        assert caught.value.why == refusals.NoCard(torch.__version__)


def test_the_demo_bundle_says_what_it_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"] == "ltx-demo"
    assert manifest["max"]["frames"] == 33


def test_an_engine_in_another_type_than_the_part_is_named_with_both_ways_out(bundle: Path) -> None:
    demo = resolve("ltx-demo")
    (denoiser,) = components(demo, ("denoiser",))
    fitting = fitting_bundles([bundle], demo, "sm_89", "bf16")
    assert engine_of(denoiser, fitting, "bf16").entry.compute == "bf16"
    with pytest.raises(CannotServe) as caught:
        engine_of(denoiser, fitting, "fp32")
    assert caught.value.why == refusals.OtherType("denoiser", "transformer", "bf16", "fp32")
    both = "build-engine --dtype transformer=fp32, or render with dtype=['transformer=bf16']"
    assert caught.value.why.words("build-engine")[1] == both


def test_a_bundle_of_version_0_1_gets_one_clear_sentence(bundle: Path, tmp_path: Path, run: Any) -> None:
    old = tmp_path / "bundles" / bundle.name
    shutil.copytree(bundle, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["like"]
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1, "overcrank": "0.1.0"}))
    says = "was built by overcrank 0.1.0 in another format of bundles (1; this version reads 2); build it again: "
    says += "build-engine --model ltx-demo --gpu sm_89 --precision bf16"
    assert says in refusal([old], resolve("ltx-demo"), "sm_89", "bf16").reason
    shown = run("overcrank", "engines", "show", bundle.name, "--store", tmp_path)
    assert shown.exit_code == 1
    assert says in shown.output
