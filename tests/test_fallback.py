"""Which bundle serves a pipeline, and why one does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.cards import Card
from overcrank.engines.manifest import TensorEntry, read_manifest
from overcrank.engines.store import Store
from overcrank.errors import CannotServe
from overcrank.models import components, resolve
from overcrank.runtime.sessions.parameters import bound_parameters, parameters_of
from overcrank.runtime.sessions.select import bundle_of, fitting_bundles
from overcrank.runtime.sessions.trt import check_shape
from overcrank.runtime.sessions.workspace import Workspace


@pytest.fixture
def bundle(demo_bundle: Path) -> Path:
    return demo_bundle


def refusal(*arguments: Any) -> CannotServe:
    with pytest.raises(CannotServe) as caught:
        fitting_bundles(*arguments)
    return caught.value


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
    assert "are for rtx, sm_89, this card is sm_75" in str(refusal(both, demo, "sm_75", "bf16"))


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
    assert bundle_of(plain, fitting, "build")[0] == bundle
    assert bundle_of(conditioned, fitting, "build")[0] == later
    with pytest.raises(CannotServe, match="no bundle has an engine of vae_decoder") as missing:
        bundle_of(decoder, fitting, "build")
    assert missing.value.fix == "build --components vae_decoder"


def test_every_reason_against_a_bundle_comes_with_the_command_that_helps(bundle: Path, tmp_path: Path) -> None:
    demo = resolve("ltx-demo")
    none = refusal([], demo, "sm_89", "bf16")
    assert (none.reason, none.fix) == ("there is no engine of ltx-demo", "build-engine --model ltx-demo --gpu sm_89")
    other = refusal([bundle], resolve("ltx"), "sm_89", "bf16")
    assert other.reason.startswith("there is no engine of ltx-2b-0.9.5; the denoiser of ltx-demo differs in ")
    assert "attention_head_dim: 64 here, 32 in the engine" in other.reason
    card = refusal([bundle], demo, "sm_120", "bf16")
    assert card.reason == "the engines of ltx-demo are for sm_89, this card is sm_120"
    assert card.fix == "build-engine --model ltx-demo --gpu sm_120"
    precision = refusal([bundle], demo, "sm_89", "fp16")
    assert "are bf16 with weights as inputs, and the pipeline's weights are fp16" in precision.reason
    assert precision.fix.endswith("--precision fp16")
    damaged = tmp_path / bundle.name
    shutil.copytree(bundle, damaged)
    engine = next(damaged.glob("*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
    fitting = fitting_bundles([damaged], demo, "sm_89", "bf16")
    with pytest.raises(CannotServe, match="does not match the manifest") as broken:
        bundle_of(components(demo, ("denoiser",))[0], fitting, "build-engine")
    assert "engines rm" in broken.value.fix
    (damaged / "manifest.json").write_text("{}")
    assert "there is no engine" in refusal([damaged], demo, "sm_89", "bf16").reason


def test_shapes_outside_the_profile_are_refused_for_that_call_only() -> None:
    spec = TensorEntry(name="x", dtype="bf16", dims=["batch", 4], min=[1, 4], opt=[2, 4], max=[2, 4])
    check_shape("denoiser", spec, (2, 4), "build")
    with pytest.raises(CannotServe, match="outside the engine's profile") as caught:
        check_shape("denoiser", spec, (3, 4), "build-engine")
    assert not caught.value.lasting
    assert "--max-frames" in caught.value.fix


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
    with pytest.raises(CannotServe, match=r"has no parameter transformer_blocks\.5"):
        bound_parameters(module, component, parameters_of(entry))


def test_an_engine_of_another_tensorrt_or_without_a_driver_is_refused(bundle: Path, tmp_path: Path) -> None:
    import torch
    from overcrank.runtime.sessions.trt import TrtSession

    manifest = read_manifest(bundle)
    entry, store = manifest.component("denoiser"), Store(tmp_path)
    card = Card(0, "a card", "sm_89", 0, 0, "580")
    other = manifest.model_copy(update={"flavour_version": "0.1"})
    with pytest.raises(CannotServe, match=r"built with TensorRT for RTX 0\.1 and .* is installed") as caught:
        TrtSession(other, bundle, entry, {}, Workspace(), "build-engine --model ltx-demo", store, card)
    assert caught.value.fix == "pip install tensorrt-rtx==0.1, or build again: build-engine --model ltx-demo"
    if not torch.cuda.is_available():
        with pytest.raises(CannotServe, match=r"PyTorch .* sees no card; overcrank doctor"):
            TrtSession(manifest, bundle, entry, {}, Workspace(), "build", store, card)


def test_the_demo_bundle_says_what_it_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"] == "ltx-demo"
    assert manifest["max"]["frames"] == 33


def test_an_engine_in_another_type_than_the_part_is_named_with_both_ways_out(bundle: Path) -> None:
    demo = resolve("ltx-demo")
    (denoiser,) = components(demo, ("denoiser",))
    fitting = fitting_bundles([bundle], demo, "sm_89", "bf16")
    assert bundle_of(denoiser, fitting, "build-engine", "bf16")[2].compute == "bf16"
    with pytest.raises(CannotServe, match="computes in bf16, and the pipeline's transformer is fp32") as caught:
        bundle_of(denoiser, fitting, "build-engine", "fp32")
    assert caught.value.fix == "build-engine --dtype transformer=fp32, or render with --dtype transformer=bf16"


def test_a_bundle_of_version_0_1_gets_one_clear_sentence(bundle: Path, tmp_path: Path, run: Any) -> None:
    old = tmp_path / "bundles" / bundle.name
    shutil.copytree(bundle, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["like"]
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1, "overcrank": "0.1.0"}))
    says = "was built by overcrank 0.1.0 in another format of bundles (1; this version reads 2); build it again: "
    says += "build-engine --model ltx-demo --gpu sm_89 --precision bf16"
    assert says in str(refusal([old], resolve("ltx-demo"), "sm_89", "bf16"))
    shown = run("overcrank", "engines", "show", bundle.name, "--store", tmp_path)
    assert shown.exit_code == 1
    assert says in shown.output
