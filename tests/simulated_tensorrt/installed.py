"""The simulated runtime in the place of NVIDIA's, for one test, and bundles whose engines it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.engines import cards
from overcrank.engines.build import Request, build
from overcrank.engines.compile import Compiled
from overcrank.engines.manifest import MANIFEST
from overcrank.engines.profiles import Profile
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME
from overcrank.export.quantization.lora import NO_LORA_INPUTS, LoraInputs
from overcrank.export.quantization.recipe import IN_16_BIT, LayerFormat
from overcrank.models import family
from overcrank.models.base import Component, Variant
from overcrank.runtime.sessions.workspace import Workspace

from tests.simulated_tensorrt.card import Card
from tests.simulated_tensorrt.plans import Plans
from tests.simulated_tensorrt.runtime import IExecutionContext, module

CARD = cards.Card(0, "Simulated card", "sm_89", 0, 0, "580.95.05")
BYTES = 2  # of activations for each byte of the largest inputs


class Here:
    """engines.workers.Workers, one job after the other in this process."""

    count = 1

    def submit(self, work: Any, job: Any) -> Future[None]:
        done: Future[None] = Future()
        try:
            work(job, lambda what: None)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def said(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def ram(self) -> int:
        return 0

    def stop(self) -> None:
        pass


class Simulated:
    """One card and its runtime; what is accelerated under it runs on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacity: int | None = None) -> None:
        self.card = Card(capacity) if capacity else Card()
        self.plans = Plans()
        self.trt = module(self.card, self.plans)
        self.workspace = Workspace(self.card)
        self._patch = monkeypatch

    def install(self) -> None:
        patch, trt = self._patch.setattr, self.trt
        patch("overcrank.runtime.sessions.trt.load_flavour", lambda flavour: trt)
        patch("overcrank.runtime.sessions.device.device_of", lambda index: self.card)
        patch("overcrank.runtime.pipeline.accelerate._card", self.brought)
        patch("overcrank.runtime.render.renderer._own_stream", self.own_stream)

    @property
    def context(self) -> IExecutionContext:
        """The last that was made, while its session lives."""
        made = self.card.latest_context()
        assert made is not None
        return made

    def brought(self, pipe: Any) -> cards.Card:
        """The card, with all parts of the pipeline on it, as `load` puts them there."""
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                self.card.bring(part)
        return CARD

    @contextmanager
    def own_stream(self, device: object) -> Iterator[None]:
        """As the driver gives each job one."""
        stream = self.card.new_stream()
        stream.wait(self.card.stream().mark())
        with self.card.over(stream):
            yield


def every_component(variant: Variant) -> tuple[Component, ...]:
    return tuple(family(variant.family).components(variant))


def bundle_of(
    variant: Variant,
    profile: Profile,
    store: Store,
    *names: str,
    wide: bool = True,
    layers: LayerFormat = IN_16_BIT,
    lora: LoraInputs = NO_LORA_INPUTS,
) -> Path:
    """Of these components [default: all of the variant's], with plans of a few bytes for engines.

    All else is as the product builds it in bf16, or with quantized `layers`. `wide`: for a pipeline in fp32, whose
    types the engine then has.
    """
    precision = "bf16" if layers == IN_16_BIT else layers.format
    parts = dict.fromkeys(variant.configs, "bf16")
    names = names or tuple(c.name for c in every_component(variant))
    more: dict[str, Any] = {"components": names, "dtypes": parts, "layers": layers, "lora": lora}
    request = Request(variant, BY_NAME["sm_89"], precision, profile, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overcrank.engines.worker.engine_from_graph", _compiled)
        (built,) = build([request], store, lambda title, what: None, Here)
    if wide:
        entries = [entry.model_copy(update={"compute": "fp32"}) for entry in built.manifest.components]
        widened = built.manifest.model_copy(update={"precision": "float32", "components": entries})
        (built.path / MANIFEST).write_text(widened.model_dump_json(), "utf-8")
    return built.path


def _compiled(graph: Path, target: Any, ranges: Mapping[str, Any], **_: Any) -> Compiled:
    """A plan that says which graph it is of."""
    count = 0
    for _low, _best, high in ranges.values():
        size = 4
        for n in high:
            size *= n
        count += size
    digest = hashlib.sha256(graph.read_bytes()).hexdigest()
    words = f"simulated plan of {graph.name} {digest} {sorted(ranges.items())}"
    return Compiled(words.encode(), BYTES * count // 256 * 256 + 256, [])


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """The simulated runtime, installed; at the end nothing may have been wrong that the test did not expect."""
    made = Simulated(monkeypatch)
    made.install()
    yield made
    assert not made.card.faults, made.card.faults
