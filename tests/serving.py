"""Builds a bundle by every variant's name, and asks whether it serves the checkpoint that is published under it.

    python -m tests.serving STORE [VARIANT ...] [--components denoiser,vae_decoder]

Every variant takes its small form, in the data as in the checkpoint; the data is the product's, the checkpoint the
publishers' (tests/checkpoints.py). The engines are real ones, of TensorRT for RTX for sm_89; that they are chosen is
what is asked, for no card is needed for that.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import overcrank
import torch
from overcrank.engines.build import build
from overcrank.engines.matrix import cells_of, expanded
from overcrank.engines.refusals import CannotServe
from overcrank.engines.store import Store
from overcrank.engines.types import own_precision
from overcrank.engines.worker import BuildJob
from overcrank.engines.workers import Work
from overcrank.models import components, families, family, registry, resolve
from overcrank.models.base import Variant
from overcrank.runtime.sessions.select import compute_type, engine_of, fitting_bundles

from tests import by_hand, checkpoints, tiny, without_torchvision

NAMES = [v.name for name in families() for v in family(name).variants if not v.packaged]
CARD = "sm_89"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def small_families() -> Iterator[None]:
    """While the block runs, every published variant has its small form, published where it is."""
    known = {name: family(name).variants for name in families()}
    made = {name: tuple(v if v.packaged else _small(v) for v in variants) for name, variants in known.items()}
    try:
        _put(made)
        yield
    finally:
        _put(known)


def _small(variant: Variant) -> Variant:
    made = tiny.variant(variant.name)
    return replace(made, hub_id=variant.hub_id, repositories=variant.repositories, hub_file=variant.hub_file)


def _put(variants: dict[str, tuple[Variant, ...]]) -> None:
    for name, own in variants.items():
        import_module(f"{registry.PACKAGE}.{name}").FAMILY = replace(family(name), variants=own)
    registry.published.cache_clear()


class Here:
    """Workers that are this process: 240 small tasks would spend their time on starting."""

    count = 1

    def submit(self, work: Work, job: BuildJob) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(work(job, lambda done: None))
        except Exception as error:
            future.set_exception(error)
        return future

    def said(self) -> Iterator[tuple[str, str]]:
        yield from ()

    def ram(self) -> int:
        return 0

    def stop(self) -> None: ...


def built(name: str, store: Path, names: tuple[str, ...] = ()) -> Path:
    """The bundle of a variant, built by its name as `engines build` does; to be called among small families.

    `names`: of its components, the default ones if there are none.
    """
    (request,) = expanded(cells_of(name, CARD, "auto")).requests.values()
    (made,) = build([replace(request, components=names)], Store(store), lambda title, done: None, Here)
    return made.path


def refusal(name: str, bundle: Path, root: Path, names: tuple[str, ...] = ()) -> str:
    """Why the bundle does not serve the published checkpoint, of which every part has its published type; else ""."""
    checkpoints.published(root, name)
    pipe = by_hand.loaded(root, name)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.to(TYPES[resolve(name).dtype_of(part)])
    overcrank.accelerate(pipe, backend="eager")
    variant = pipe.overcrank.variant
    try:
        fitting = fitting_bundles([bundle], variant, CARD, own_precision(variant))
        for component in components(variant, names):
            engine_of(component, fitting, compute_type(getattr(pipe, component.subfolder)))
    except CannotServe as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("variants", nargs="*", default=NAMES)
    parser.add_argument("--components", default="", help="[default: each variant's own]")
    options = parser.parse_args()
    parts = tuple(filter(None, options.components.split(",")))
    without_torchvision.install()
    without_torchvision.pass_guardrail()
    served = 0
    with small_families(), tempfile.TemporaryDirectory() as root:
        for name in options.variants:
            named = tuple(p for p in parts if p in {c.name for c in components(resolve(name))}) if parts else ()
            why = refusal(name, built(name, options.store, named), Path(root) / name, named)
            served += not why
            print(f"{name:<34} {why or 'served'}", flush=True)
    print(f"{served} of {len(options.variants)}")
    sys.exit(served < len(options.variants))


if __name__ == "__main__":
    main()
