"""Sizes whose attention ONNX Runtime has no memory for on a processor: told before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import psutil
import pytest
import torch
from overcrank.engines.graph_refusals import ScoresTooLarge
from overcrank.engines.refusals import CannotServe
from overcrank.engines.store import Store
from overcrank.export.packaged import packaged_graph
from overcrank.models import components, resolve
from overcrank.runtime.sessions.ort import OrtSession
from overcrank.runtime.sessions.ort_memory import Scores

from tests import tiny

HEADS, TEXT = 4, 8


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Of the demo's denoiser."""
    shapes = {
        "hidden_states": (2, tokens, 32),
        "encoder_hidden_states": (2, TEXT, 64),
        "encoder_attention_mask": (2, TEXT),
        "rope_cos": (1, tokens, 64),
        "rope_sin": (1, tokens, 64),
    }
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def demo() -> ir.Model:
    graph = packaged_graph(next(c for c in components(resolve("ltx-demo")) if c.name == "denoiser"))
    assert graph is not None
    return ir.load(graph.onnx)


@pytest.mark.quick
def test_scores_are_of_every_query_with_every_key() -> None:
    assert Scores(demo()).bytes(inputs(1000)) == 2 * HEADS * 1000 * 1000 * 4
    assert Scores(demo()).bytes(inputs(3)) == 2 * HEADS * 3 * TEXT * 4


@pytest.mark.parametrize("name", ["tiny-hunyuan", "tiny-svd", "tiny-cosmos-2", "tiny-mochi", "tiny-ltx2"])
@pytest.mark.heavy
def test_graphs_of_every_kind_tell_their_scores(name: str, shared_store: Path) -> None:
    component = components(tiny.variant(name))[0]
    model = ir.load(Store(shared_store).graph(component, "fp32").onnx)
    heads, found = 2, []
    for shape in (tiny.TINY[name].minimum, tiny.TINY[name].maximum):
        sizes = {**component.free_axes, **component.sizes(shape)}
        given = {t.name: torch.empty(t.shape(sizes), device="meta") for t in component.inputs}
        found.append(Scores(model).bytes(given))
        if name == "tiny-hunyuan":
            tokens = given["hidden_states"].shape[1] + given["encoder_hidden_states"].shape[1]
            assert found[-1] == heads * tokens**2 * 4
    assert 0 < found[0] < found[1]


@pytest.mark.heavy
def test_a_size_without_memory_falls_back_with_one_reason() -> None:
    tokens = int((psutil.virtual_memory().total / (2 * HEADS * 4)) ** 0.5 * 1.1)
    session = OrtSession(demo(), {})
    for _ in range(2):
        with pytest.raises(CannotServe) as refused:
            session(inputs(tokens))
        why = refused.value.why
        assert isinstance(why, ScoresTooLarge)
        assert not why.lasting
    assert "of attention scores for this size at once, and" in str(refused.value)
    assert "PyTorch needs less; for ONNX Runtime, render fewer frames or a smaller size" in str(refused.value)
