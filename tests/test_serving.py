"""A bundle that is built by a variant's name serves the checkpoint that is published under it (tests/serving.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.refusals import CannotServe, NoEngine
from overcrank.models import components, resolve
from overcrank.runtime.sessions.select import build_command, engine_of, fitting_bundles

from tests import checkpoints, serving
from tests.test_render_families import _what_cannot_be_installed_here  # noqa: F401

# A model of two experts whose VAE is in fp32, one in fp16, and one whose checkpoint comes from three repositories.
FEW = ("wan-2.2-t2v-a14b", "modelscope-1.7b", "framepack-i2v-13b")


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with serving.small_families():
        yield


NAMES = [pytest.param(name, marks=() if name in FEW else pytest.mark.sweep) for name in serving.NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_by_name_serves_the_published_checkpoint(
    name: str, seeded: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert not serving.refusal(name, serving.built(name, seeded(tmp_path / "store")), tmp_path / "root")


def test_a_fine_tune_is_served_or_refused_by_its_network(
    run: Any, seeded: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Configurations that nothing here knows: what no graph reads serves, what one reads is named."""
    name = "wan-2.1-t2v-14b"
    words = [
        "--model",
        name,
        "--gpu",
        "sm_89",
        "--components",
        "denoiser",
        "--store",
        seeded(tmp_path / "store"),
        "--quiet",
    ]
    assert run("build-engine", *words).exit_code == 0
    (bundle,) = (tmp_path / "store/bundles").iterdir()
    checkpoints.published(tmp_path, name)
    tuned = tmp_path / "my fine-tune"
    checkpoints.at(tmp_path, resolve(name)).rename(tuned)
    config = json.loads((tuned / "transformer/config.json").read_text())

    def served(**changes: Any) -> str:
        (tuned / "transformer/config.json").write_text(json.dumps(config | changes))
        variant = resolve(str(tuned))
        fitting = fitting_bundles([bundle], variant, "sm_89", "bf16")
        return engine_of(components(variant, ("denoiser",))[0], fitting, "bf16").folder.name

    assert served() == bundle.name
    assert served(_diffusers_version="9.9.9", trained_by="me") == bundle.name
    assert "'trained_by', which WanTransformer3DModel of the installed diffusers does not know" in caplog.text
    more = config["num_layers"] + 2
    for changes, named in (
        ({"num_layers": more}, f"num_layers: {more} here, {more - 2} in the engine"),
        ({"eps": 1e-5}, "eps: 1e-05 here, 1e-06 in the engine"),
        ({"cross_attn_norm": False}, "cross_attn_norm: false here, true in the engine"),
    ):
        with pytest.raises(CannotServe) as refused:
            served(**changes)
        assert named in str(refused.value)
        assert refused.value.why == NoEngine("my fine-tune", refused.value.why.near)
        assert build_command(resolve(str(tuned)), "sm_89") == f"build-engine --model '{tuned}' --gpu sm_89"
