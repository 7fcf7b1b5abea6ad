"""Engines that take LoRAs beside their layers: what is asked for, what the compiler makes of it, what bundles say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from overcrank import build
from overcrank.engines.request import BuildOptions, requests_for
from overcrank.engines.store import Store
from overcrank.errors import UserError
from overcrank.models import resolve


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_rank": 20}, r"lora_rank=20 is no multiple of 16; use 16 or 32\."),
        ({"lora_rank": 4}, r"lora_rank=4 is no multiple of 16; use 16\."),
        ({"lora_rank": -16}, r"lora_rank=-16 is no multiple of 16; use 16\."),
        ({"lora_rank": 16, "precision": "bf16"}, r"no layer is quantized with precision='bf16'; add lora_layers='all'"),
        ({"lora_rank": 16, "lora_layers": "some"}, r"lora_layers='some': use quantized or all\."),
        (
            {"lora_rank": 16, "precision": "fp8", "embed_weights": True},
            "for engines whose weights are inputs; leave embed_weights=True out",
        ),
    ],
)
def test_what_no_engine_takes_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        requests_for(resolve("ltx-demo"), ["sm_89"], BuildOptions(**options))


def test_ranks_and_layers_are_other_engines(tmp_path: Path) -> None:
    from overcrank.engines.build import key_of

    store, keys = Store(tmp_path), []
    for more in ({}, {"lora_rank": 16}, {"lora_rank": 32}, {"lora_rank": 16, "lora_layers": "all"}):
        options = BuildOptions(precision="fp8", **more)  # type: ignore[arg-type]
        keys.append(key_of(requests_for(resolve("ltx-demo"), ["sm_89"], options)[0], store))
    assert len(set(keys)) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_its_plan_multiplies_in_the_format_with_two_small_products_more(
    tmp_path: Path, precision: str, run: Any
) -> None:
    """The quantized product stays one, and no weight, nor A or B, is moved at a call."""
    plans = []
    for rank in (0, 16):
        options: dict[str, Any] = {
            "precision": precision,
            "lora_rank": rank,
            "components": ["denoiser"],
            "static": True,
        }
        (built,) = build("ltx-demo", "sm_89", store=tmp_path, height=128, width=128, frames=9, **options)
        (entry,) = built.manifest.components
        assert (entry.lora_rank, bool(entry.key.lora)) == (rank, rank > 0)
        assert entry.plan is not None
        plans.append(entry.plan)
    plain, with_loras = plans
    layers = {name for name, form in entry.formats.items() if form.kind == "linear"}
    assert entry.lora_layers == dict.fromkeys(layers, 16)
    assert plain.gemm_formats == with_loras.gemm_formats == {precision: len(layers)}
    assert with_loras.gemms == plain.gemms + 2 * len(layers)
    assert with_loras.kernels <= plain.kernels + len(layers)
    assert with_loras.weights_moved == {}
    shown = run("overcrank", "engines", "show", built.path.name, "--store", tmp_path)
    assert f"LoRA        beside {len(layers)} layers, of rank 16 together" in shown.output
    listed = json.loads(run("overcrank", "engines", "list", "--json", "--store", tmp_path).output)
    assert sorted(bundle["lora_rank"] for bundle in listed["bundles"]) == [0, 16]
