"""An engine belongs to a network: which fields of a configuration are part of it, and which bundle serves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from overcrank.errors import ModelError
from overcrank.export.cache import graph_digest
from overcrank.models import components, family, resolve
from overcrank.models.base import Component
from overcrank.models.matching import completed_variant, same_networks, variant_from_configs
from overcrank.models.network import _table, class_fields, inspected_fields, network
from overcrank.models.registry import published

from tests import fields, tiny, without_torchvision

pytestmark = pytest.mark.quick

without_torchvision.install()
UNREAD = [
    (cls, name, field)
    for cls, by_name in _table()["unread"].items()
    for name, listed in by_name.items()
    for field in listed
]


USUAL = (("AutoencoderKL", "vae_decoder", "in_channels"), ("LTX2VideoTransformer3DModel", "denoiser", "base_width"))


@pytest.mark.parametrize("cls", sorted(_table()["defaults"]))
def test_the_table_is_what_the_classes_say(cls: str) -> None:
    assert class_fields(cls) == inspected_fields(cls), "run python bench/class_fields.py"


def test_every_class_that_becomes_an_engine_is_in_the_table() -> None:
    every = {c.cls for v in published().values() for c in family(v.family).components(v)}
    assert every == set(_table()["defaults"])
    assert {(cls, name) for cls, name, _ in UNREAD} <= set(fields.kinds())
    assert {field for *_, field in UNREAD} <= fields.OUTSIDE


@pytest.mark.parametrize(("cls", "name", "field"), tiny.specimens(UNREAD, *USUAL))
@pytest.mark.heavy
def test_a_field_left_out_of_the_identity_shows_in_no_graph(cls: str, name: str, field: str) -> None:
    """Traced anew with another value: the program is the same, to its constants."""
    for variant, component in fields.cases(cls, name):
        before = fields.program_digest(component)
        for value in fields.other_values(component.config.get(field, class_fields(cls)[field])):
            changed = fields.with_values(variant, component, {field: value})
            assert changed is not None
            assert fields.program_digest(changed) == before, variant.name


@pytest.mark.parametrize(
    ("name", "which", "field", "value"),
    [
        ("tiny-wan-2.1", "denoiser", "num_layers", 6),
        ("tiny-wan-2.1", "denoiser", "eps", 1e-5),
        ("tiny-ltx-0.9.0", "vae_decoder", "resnet_norm_eps", 1e-5),
        ("tiny-svd", "denoiser", "num_attention_heads", (2, 4)),
    ],
)
def test_a_field_that_a_graph_reads_makes_another_network(name: str, which: str, field: str, value: Any) -> None:
    variant = tiny.variant(name)
    (component,) = components(variant, (which,))
    changed = fields.with_values(variant, component, {field: value})
    assert changed is not None
    assert network(changed) != network(component)
    assert graph_digest(changed, "bf16") != graph_digest(component, "bf16")
    assert fields.fingerprint(changed) != fields.fingerprint(component)


def test_defaults_that_are_spelled_out_make_the_same_network() -> None:
    for variant in published().values():
        for component in family(variant.family).components(variant):
            spelled = _with(component, class_fields(component.cls) | component.config | {"_diffusers_version": "0.1"})
            assert graph_digest(spelled, "bf16") == graph_digest(component, "bf16")


def _with(component: Component, config: Any) -> Component:
    return replace(component, config=config)


# ── configurations that are nobody's here ────────────────────────────────────────────


def held_out(like: str, part: str, **changes: Any) -> Any:
    own = completed_variant(published()[like])
    main = next(c for c in family(own.family).components(own) if not c.attribute)
    configs = {**own.configs, part: {**own.configs[part], **changes}}
    return variant_from_configs("my-finetune", main.cls, configs, next(iter(own.tasks.values())), ("/models/mine",))


def test_a_finetune_with_more_layers_is_its_own_network() -> None:
    found = held_out("wan-2.1-t2v-1.3b", "transformer", num_layers=36)
    assert found.like == "wan-2.1-t2v-1.3b"
    assert found.where == "/models/mine"
    assert not same_networks(found, resolve("wan-2.1-t2v-1.3b"))


def test_another_rope_scale_is_the_same_network() -> None:
    """Rotary tables are inputs of the graph, made by the module itself."""
    found = held_out("cosmos-predict2-2b-video2world", "transformer", rope_scale=(1.0, 2.0, 2.0))
    assert same_networks(found, resolve("cosmos-predict2-2b-video2world"))
    assert found.where == "cosmos-predict2-2b-video2world"


def test_a_field_that_nobody_knows_is_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    found = held_out("mochi-1-preview", "transformer", num_griffins=2)
    assert same_networks(found, resolve("mochi-1-preview"))
    assert "transformer/config.json has the field 'num_griffins'" in caplog.text


def test_another_latent_statistic_is_the_same_network() -> None:
    found = held_out("wan-2.1-t2v-14b", "vae", latents_mean=[0.5] * 16)
    assert same_networks(found, resolve("wan-2.1-t2v-14b"))


def test_two_experts_are_known_without_a_name() -> None:
    own = completed_variant(published()["wan-2.2-t2v-a14b"])
    both = {**own.configs, "transformer_2": own.configs["transformer"]}
    found = variant_from_configs("WanPipeline", "WanTransformer3DModel", both, "WanPipeline")
    assert found.like == "wan-2.2-t2v-a14b"
    one = {k: v for k, v in both.items() if k != "transformer_2"}
    assert variant_from_configs("x", "WanTransformer3DModel", one, "WanPipeline").like == "wan-2.1-t2v-14b"


def test_a_class_of_no_family() -> None:
    with pytest.raises(ModelError, match="no family here runs a FluxTransformer2DModel"):
        variant_from_configs("x", "FluxTransformer2DModel", {})
