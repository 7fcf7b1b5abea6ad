"""A quantized engine through the simulated runtime: packed weights are on the card, those they stand for are not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank import accelerate
from overcrank.engines.store import Store
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.models import resolve
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.pipeline.lora import LoraFile
from overcrank.runtime.pipeline.lora_sets import LoraSets
from overcrank.runtime.sessions import parked

from tests.simulated_tensorrt import Simulated, bundle_of
from tests.test_job_loras import lora_file
from tests.test_simulated_batch import PROFILE

INT8 = LayerFormat("int8", "dynamic")
CALL = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}


@pytest.fixture
def pipe(simulated: Simulated, seeded: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    card = simulated.card
    monkeypatch.setattr(parked, "on_a_card", card.holds)
    monkeypatch.setattr(parked, "to_host", card.sent_away)
    monkeypatch.setattr(parked, "to_device", lambda tensor, device: card.brought(tensor))
    store = Store(seeded(tmp_path / "store"))
    built = bundle_of(resolve("ltx-demo"), PROFILE, store, "denoiser", wide=False, layers=INT8)
    simulated.plans.register(built)
    made = load("ltx-demo", backend="eager", device="cpu", dtype=torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    return accelerate(made, backend="tensorrt", store=store, precision="int8", activations=INT8.activations)


def latents(pipe: Any) -> torch.Tensor:
    torch.manual_seed(0)
    made: torch.Tensor = pipe(**CALL, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    return made


def test_weights_are_parked_fetched_for_pytorch_and_parked_again(simulated: Simulated, pipe: Any) -> None:
    card, ledger = simulated.card, pipe.overcrank.ledger
    whole = card.allocated
    with ledger.eagerly():
        eager = latents(pipe)
    with ledger.recording() as record:
        first = latents(pipe)
    assert record.backends() == {"denoiser": {"tensorrt_rtx": 2}}
    layers = pipe.overcrank.modules[0].slots[0].session.replaced
    weights = [pipe.transformer.get_parameter(f"{name}.weight") for name in layers]
    assert len(weights) > 20
    assert not any(map(card.holds, weights))
    gc.collect()
    assert card.allocated < whole - sum(w.nbytes for w in weights) * 0.4  # an int8 weight and two factors in its place
    with ledger.eagerly():
        assert torch.equal(latents(pipe), eager)
    assert all(map(card.holds, weights))
    with ledger.recording() as record:
        assert torch.equal(latents(pipe), first)
    assert record.backends() == {"denoiser": {"tensorrt_rtx": 2}}
    assert not any(map(card.holds, weights))
    error = (first.float() - eager.float()).pow(2).mean() / eager.float().pow(2).mean()
    assert 0 < float(error) < 1e-2


def test_loras_that_come_and_go_are_packed_where_weights_are_parked(
    simulated: Simulated, pipe: Any, tmp_path: Path
) -> None:
    own = (LoraFile(lora_file(tmp_path / "a.safetensors", 0)),)
    sets = LoraSets(pipe, pipe.overcrank.variant)
    with pipe.overcrank.ledger.recording() as record:
        plain = latents(pipe)
        with sets.merged(own):
            merged = latents(pipe)
        with sets.merged(()):
            assert torch.equal(latents(pipe), plain)
        with sets.merged(own):
            assert torch.equal(latents(pipe), merged)
    assert not torch.equal(plain, merged)
    assert record.backends() == {"denoiser": {"tensorrt_rtx": 8}}
    with sets.merged(own), pipe.overcrank.ledger.eagerly():
        eager = latents(pipe)
    error = (merged.float() - eager.float()).pow(2).mean() / eager.float().pow(2).mean()
    assert 0 < float(error) < 1e-2
