"""`overcrank doctor`: what this machine has, which bundles serve its cards, and why others do not."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from overcrank.engines.cards import Card, installed_cards
from overcrank.engines.kernel_cache import kept_caches
from overcrank.engines.manifest import Manifest
from overcrank.engines.measurements import measurements
from overcrank.engines.refusals import SLOW_ENGINES
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME, FLAVOUR_TITLES, serves
from overcrank.engines.tensorrt import DISTRIBUTIONS, flavour_version, install_command, load_flavour, too_old
from overcrank.errors import IntegrityError, OvercrankError, TargetError
from overcrank.runtime.sessions.card import in_pytorchs_order, why_no_card
from overcrank.units import human_bytes

SELF_TEST_TARGET = "sm_89"
SIZE = 256


@dataclass(frozen=True)
class Finding:
    verdict: Literal["ok", "note", "bad"]
    """"bad" is what keeps engines from running; "note" what one should know."""
    subject: str
    text: str


@dataclass(frozen=True)
class Machine:
    """What was found, apart from the store."""

    cards: tuple[Card, ...]
    no_cards: str
    """Why there are none."""
    torch: str
    torch_cuda: str
    """CUDA version PyTorch was made for; empty for a build without."""
    torch_sees: int
    """Cards PyTorch can use."""
    hidden: str | None
    """CUDA_VISIBLE_DEVICES."""
    flavours: Mapping[str, str]
    """Flavour → version, of those that load."""
    broken: Mapping[str, str]
    """Flavour → why it does not load or is absent."""


def examined() -> Machine:
    """This machine; loads PyTorch and the TensorRT flavours that are installed."""
    import torch

    cards: tuple[Card, ...] = ()
    no_cards = ""
    try:
        cards = installed_cards()
    except TargetError as error:
        no_cards = str(error)
    sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = in_pytorchs_order(cards, [str(torch.cuda.get_device_properties(i).uuid) for i in range(sees)])
    flavours, broken = {}, {}
    for flavour in DISTRIBUTIONS:
        try:
            load_flavour(flavour)
            flavours[flavour] = flavour_version(flavour) or ""
        except OvercrankError as error:
            broken[flavour] = str(error)
    return Machine(
        cards=cards,
        no_cards=no_cards,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        torch_sees=sees,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        flavours=flavours,
        broken=broken,
    )


def findings(machine: Machine, bundles: Sequence[tuple[Path, Manifest | IntegrityError]]) -> Iterator[Finding]:
    """All that can be said without running anything on a card."""
    yield from _of_cards(machine)
    yield from _of_torch(machine)
    for flavour, version in machine.flavours.items():
        yield Finding("ok", FLAVOUR_TITLES[flavour], version)
    for reason in machine.broken.values():
        yield Finding("note" if machine.flavours else "bad", "TensorRT", reason)
    if not bundles:
        yield Finding("note", "bundles", "none yet; build one: build-engine --model ltx --gpu sm_89")
    for path, manifest in bundles:
        reason = str(manifest) if isinstance(manifest, IntegrityError) else why_not(manifest, machine)
        yield Finding("note" if reason else "ok", path.name, reason or "serves a card of this machine")


def _of_cards(machine: Machine) -> Iterator[Finding]:
    if not machine.cards:
        works = "engines can be built for any card, and videos rendered in PyTorch or ONNX Runtime on the processor"
        yield Finding("note", "card", f"{machine.no_cards}; {works}")
    for number, card in enumerate(machine.cards):
        target = BY_NAME.get(card.target)
        usable = [flavour for flavour in machine.flavours if target and flavour in target.flavours]
        drivers = [too_old(flavour, card.driver) for flavour in usable]
        memory = "memory shared with the processor"
        if card.memory:
            memory = f"{human_bytes(card.memory)}, {human_bytes(card.free)} free"
        text = f"{card.name}, {card.target}, {memory}, driver {card.driver}"
        if target is None:
            yield Finding("bad", f"card {number}", f"{text}: not among {', '.join(BY_NAME)}")
        elif not usable:
            titles = " or ".join(FLAVOUR_TITLES[f] for f in target.flavours)
            yield Finding("bad", f"card {number}", f"{text}: needs {titles}, which is not usable here")
        elif all(drivers):
            yield Finding("bad", f"card {number}", f"{text}: {drivers[0].sentence() if drivers[0] else ''}")
        else:
            yield Finding("ok", f"card {number}", f"{text}: {', '.join(target.precisions)}")


def _of_torch(machine: Machine) -> Iterator[Finding]:
    if not machine.torch_cuda:
        reason = why_no_card(machine.torch, None, machine.cards)
        words = reason.sentence().removeprefix("PyTorch ") if reason else f"{machine.torch} is a build without CUDA"
        yield Finding("bad" if reason else "note", "PyTorch", words)
    elif machine.cards and not machine.torch_sees:
        why = f"the driver may be too old for CUDA {machine.torch_cuda}"
        if machine.hidden is not None:
            why = f"CUDA_VISIBLE_DEVICES is '{machine.hidden}'"
        yield Finding("bad", "PyTorch", f"{machine.torch} sees no card: {why}")
    else:
        yield Finding("ok", "PyTorch", f"{machine.torch}, CUDA {machine.torch_cuda}, {machine.torch_sees} cards")


def of_store(machine: Machine, store: Store) -> Iterator[Finding]:
    """What earlier renders and measurements on this machine have left."""
    caches = kept_caches(store)
    damaged = [file for file, size in caches if not size]
    text = "none yet; the first render on a card compiles them"
    if caches:
        text = f"{len(caches)} runtime caches, {human_bytes(sum(size for _, size in caches))}"
    if damaged:
        text += f"; {damaged[0].path} is damaged and will be compiled again"
    yield Finding("note", "kernels", text)
    for card in machine.cards:
        for times in measurements(store, card.name, card.driver).values():
            if times.lost:
                text = f"its engine for {times.shape} took {times.engine_ms:.1f} ms and eager {times.eager_ms:.1f} ms"
                yield Finding("note", times.component, f"{text} ({times.date}): not used without {SLOW_ENGINES}")


def why_not(manifest: Manifest, machine: Machine) -> str:
    """Why no card here is served by a bundle; empty if one is."""
    if not machine.cards:
        return f"for {manifest.target}, and there is no card here"
    if not any(serves(manifest.target, manifest.precision, card.target) for card in machine.cards):
        return f"for {manifest.target}, and the cards here are {', '.join(sorted({c.target for c in machine.cards}))}"
    version = machine.flavours.get(manifest.flavour)
    title = FLAVOUR_TITLES.get(manifest.flavour, manifest.flavour)
    if version != manifest.flavour_version:
        fix = install_command(manifest.flavour, manifest.flavour_version)
        fix = f"{fix}, or rebuild it" if fix else "rebuild it"
        return f"built with {title} {manifest.flavour_version}, and {version or 'none'} is usable here; {fix}"
    if manifest.weights != "inputs":
        return "its weights are embedded, and renders bind their own; build it without --embed-weights"
    return ""


# ── self-test ────────────────────────────────────────────────────────────────────────


def self_test(machine: Machine) -> Finding:
    """Compile a small network, for the first card or else for an Ada; on a card, run it against PyTorch."""
    flavour = next(iter(machine.flavours), None)
    if flavour is None:
        return Finding("bad", "self-test", "no TensorRT to compile with")
    target = machine.cards[0].target if machine.cards else SELF_TEST_TARGET
    if target not in BY_NAME or flavour not in BY_NAME[target].flavours:
        return Finding("bad", "self-test", f"{FLAVOUR_TITLES[flavour]} does not compile for {target}")
    start = time.monotonic()
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            error = pool.submit(_compiled_and_run, flavour, target, _runs(machine, flavour)).result()
    except Exception as failure:  # whatever TensorRT or the card raises is the finding
        return Finding("bad", "self-test", f"a small engine for {target} failed: {failure}")
    seconds = time.monotonic() - start
    if error is None:
        return Finding(
            "ok", "self-test", f"compiled a small engine for {target} in {seconds:.1f} s; no card to run it on"
        )
    good = error < 1e-2
    text = f"a small engine for {target} compiled, ran, and is within {error:.1e} of PyTorch, in {seconds:.1f} s"
    return Finding("ok" if good else "bad", "self-test", text)


def _runs(machine: Machine, flavour: str) -> bool:
    """Whether there is a card to run the engine on, with a driver that does."""
    return bool(machine.torch_sees) and not (machine.cards and too_old(flavour, machine.cards[0].driver))


def _compiled_and_run(flavour: str, target: str, run: bool) -> float | None:
    """Relative error of the engine's output on the card, or None where there is none."""
    import onnx_ir as ir
    from overcrank.engines.compile import engine_from_graph

    half = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", shape=ir.Shape([SIZE, SIZE]), type=half)
    w = ir.Value(name="w", shape=ir.Shape([SIZE, SIZE]), type=half)
    product = ir.node("MatMul", [x, w])
    last = ir.node("Tanh", [product.outputs[0]])
    y = last.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([SIZE, SIZE]), half
    graph = ir.Graph([x, w], [y], nodes=[product, last], opset_imports={"": 23}, name="self_test")
    with tempfile.TemporaryDirectory(prefix="overcrank-doctor-") as folder:
        file = Path(folder) / "self_test.onnx"
        ir.save(ir.Model(graph, ir_version=10), file)
        plan = engine_from_graph(file, BY_NAME[target], {}, flavour=flavour).plan
    return _error_on_card(flavour, plan) if run else None


def _error_on_card(flavour: str, plan: Any) -> float:
    import torch
    from overcrank.engines.compile import logger_of

    trt = load_flavour(flavour)
    log = logger_of(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise TargetError(f"it cannot be loaded on the card ({log.errors[-1] if log.errors else 'no reason given'})")
    generator = torch.Generator("cpu").manual_seed(0)
    x, w = (torch.randn(SIZE, SIZE, generator=generator).half().cuda() / 8 for _ in range(2))
    y = torch.empty_like(x)
    for name, tensor in (("x", x), ("w", w), ("y", y)):
        context.set_tensor_address(name, tensor.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise TargetError(f"it does not run on the card ({log.errors[-1] if log.errors else 'no reason given'})")
    torch.cuda.synchronize()
    expected = (x.float() @ w.float()).tanh()
    return float((y.float() - expected).norm() / expected.norm())


def every_finding(store: Store, quick: bool) -> list[Finding]:
    """Of this machine and a store; `quick` leaves the self-test out."""
    machine = examined()
    results = [*findings(machine, store.list()), *of_store(machine, store)]
    return results if quick else [*results, self_test(machine)]
