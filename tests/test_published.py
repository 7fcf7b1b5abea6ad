"""The published checkpoints' own files, as facts (tests/published), against what this product holds of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from overcrank.models import families, family
from overcrank.models.base import Variant
from overcrank.models.matching import completed_variant, variant_from_configs
from overcrank.models.network import as_class_sees, network

from bench import published

pytestmark = pytest.mark.quick

FOLDER = Path(__file__).parent / "published"
VARIANTS = [v for name in families() for v in family(name).variants if not v.packaged]


def facts(variant: Variant) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((FOLDER / f"{variant.name}.json").read_text("utf-8"))
    return known


def configs_of(known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Part → published configuration, as a checkpoint's folder has them."""
    found = {}
    for file, entry in known["files"].items():
        part, _, name = file.partition("/")
        if name in ("config.json", "scheduler_config.json") and "values" in entry:
            found[part] = entry["values"]
    return found


def resolved(variant: Variant, sources: tuple[str, ...]) -> Variant:
    known = facts(variant)
    configs = configs_of(known)
    pipeline = known["files"].get("model_index.json", {}).get("values", {}).get("_class_name", "")
    main = next(c for c in family(variant.family).components(variant) if not c.attribute)
    return variant_from_configs("a-folder", main.cls.rpartition(".")[2], configs, pipeline, sources)


def test_the_page_is_what_the_facts_say() -> None:
    written = (FOLDER.parents[1] / "docs/published.md").read_text("utf-8")
    assert written == published.markdown(), "run ./build.sh pages"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_the_published_configuration_is_this_variant(variant: Variant) -> None:
    """By its files and where they were read from; and every network is the one that is built by name."""
    own = completed_variant(variant)
    found = resolved(variant, (facts(variant)["hub_id"],))
    assert found.like == variant.name
    built = {c.name: network(c) for c in family(variant.family).components(own)}
    served = {c.name: network(c) for c in family(variant.family).components(found)}
    assert served == built


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_without_its_source_it_is_one_network_with_what_it_follows(variant: Variant) -> None:
    found = resolved(variant, ())
    built = {c.name: network(c) for c in family(variant.family).components(completed_variant(variant))}
    assert {c.name: network(c) for c in family(found.family).components(found)} == built


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_data_agrees_with_what_is_published(variant: Variant) -> None:
    """Field by field, of every part that both describe; fields that only one lists have the class's default."""
    own, known = completed_variant(variant), configs_of(facts(variant))
    classes = {part: c.cls for c in family(own.family).components(own) for part in (c.subfolder, *c.also_serves)}
    for part, config in own.configs.items():
        if part not in known:
            continue
        theirs = as_class_sees(classes[part], known[part]) if part in classes else known[part]
        differing = {f: (v, theirs[f]) for f, v in config.items() if f in theirs and theirs[f] != v and f[0] != "_"}
        assert not differing, part
