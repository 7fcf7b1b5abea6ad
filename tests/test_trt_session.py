"""TrtSession over the simulated runtime: addresses, lifetimes, order, memory, and the numbers of the graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from overcrank.engines import refusals
from overcrank.engines.module_refusals import ParameterUnfit, Unfit
from overcrank.engines.refusals import CannotServe
from overcrank.engines.tensorrt import flavour_version
from overcrank.runtime.sessions import device as devices
from overcrank.runtime.sessions.workspace import Workspace

from tests.simulated_tensorrt import Simulated, small
from tests.simulated_tensorrt.installed import CARD


@pytest.mark.parametrize("attribute", ["", "decoder"])
def test_a_call_computes_what_pytorch_computes_at_every_shape(
    attribute: str, simulated: Simulated, tmp_path: Path
) -> None:
    session = small.session(simulated, tmp_path, attribute)
    for tokens in (4, 4, 6, 1, 64, 4):
        given = small.call(tokens, tokens / 64)
        assert small.right(session(given), given, session.weight)


def test_results_are_the_callers_own(simulated: Simulated, tmp_path: Path) -> None:
    for attribute in ("", "decoder"):
        session = small.session(simulated, tmp_path, attribute)
        first = session(small.call(4, 0.25))
        before = {name: t.clone() for name, t in first.items()}
        session(small.call(4, 0.75))
        assert all(torch.equal(first[name], t) for name, t in before.items())


def test_what_steps_call_is_captured_once_and_again_when_addresses_change(simulated: Simulated, tmp_path: Path) -> None:
    session = small.session(simulated, tmp_path)
    tally = simulated.context.tally
    for _ in range(5):
        session(small.call(4))
    assert (tally.runs, tally.captures) == (5, 1)
    session(small.call(6))
    session.weight.data = session.weight.data * 2  # as a LoRA that is fused
    given = small.call(6)
    assert small.right(session(given), given, session.weight)
    assert (tally.runs, tally.captures) == (7, 3)


def test_a_part_of_a_vae_reads_the_callers_tensors_and_hands_its_outputs_over(
    simulated: Simulated, tmp_path: Path
) -> None:
    """Caches go in and out: two of them are all there ever is, as the one that came in is freed by its owner."""
    session, card = small.session(simulated, tmp_path, "decoder"), simulated.card
    given = small.call(64)
    given |= {name: card.empty(tuple(t.shape), t.dtype).copy_(t) for name, t in given.items()}
    size = given["cache"].nbytes
    made = session(given)
    weights, began = card.allocated - 4 * size, card.allocated
    card.peak = 0
    for _ in range(6):
        given["cache"] = made.pop("kept")
        made.clear()
        made |= session(given)
        assert card.allocated <= began
    assert card.peak - card.engines <= weights + 4 * size  # x, the cache that came in, and the two outputs
    assert simulated.context.tally.captures == 0


def test_a_tensor_that_is_not_as_the_engine_takes_it_is_copied(simulated: Simulated, tmp_path: Path) -> None:
    session, card = small.session(simulated, tmp_path, "decoder"), simulated.card
    long = torch.arange(6 * 8).view(6, 8).half() / 48
    for x in (long[1:5], long.float()[:4], long.view(8, 6).T[:4].reshape(8, 4).T):
        given = small.call(4) | {"x": x}
        assert small.right(session(given), given, session.weight)
    away = torch.nn.Linear(8, 4).half()
    card.send_away(away)
    given = small.call(4) | {"x": away.weight.detach()}
    assert not card.holds(given["x"])
    assert small.right(session(given), given, session.weight)


def test_a_refused_input_leaves_nothing_for_the_next_call(simulated: Simulated, tmp_path: Path) -> None:
    for attribute in ("", "decoder"):
        session = small.session(simulated, tmp_path, attribute)
        session(small.call(4))
        with pytest.raises(CannotServe) as caught:
            session(small.call(65))
        assert caught.value.why == refusals.OutsideProfile("denoiser", "x", (65, 8), (1, 8), (64, 8))
        assert not caught.value.why.lasting
        mixed = small.call(6) | {"cache": torch.ones(65, 8).half()}
        with pytest.raises(CannotServe) as caught:
            session(mixed)
        assert caught.value.why == refusals.OutsideProfile("denoiser", "cache", (65, 8), (1, 8), (64, 8))
        given = small.call(4)
        assert small.right(session(given), given, session.weight)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("attribute", ["", "decoder"])
def test_memory_that_runs_out_at_every_allocation_in_turn(
    attribute: str, lasting: bool, simulated: Simulated, tmp_path: Path, record_property: Any
) -> None:
    """For once: a call is made with what is given back. For good: one sentence, nothing is left. The next is right."""
    card = simulated.card
    usual = Shortage(simulated, tmp_path, attribute).allocations()
    assert usual >= 6  # engine, context, kernels, arena, two outputs; and buffers whose addresses stay
    record_property("allocations", usual)
    for n in range(1, usual + 1):
        outcome = Shortage(simulated, tmp_path, attribute).at(n, lasting)
        loading = n <= 2  # the engine, and its context
        assert outcome == ("refused" if lasting or loading else "served"), n
    assert not card.faults


class Shortage:
    """A session that is made and called while memory runs out."""

    def __init__(self, simulated: Simulated, folder: Path, attribute: str) -> None:
        self.simulated, self.card = simulated, simulated.card
        self.folder, self.attribute = folder, attribute
        self.given = small.call(4)

    def called(self) -> None:
        session = small.session(self.simulated, self.folder, self.attribute)
        assert small.right(session(self.given), self.given, session.weight)

    def allocations(self) -> int:
        before = self.card.allocations
        self.called()
        self.simulated.workspace.make_room()
        return self.card.allocations - before

    def at(self, n: int, lasting: bool) -> str:
        before = self.card.allocated, self.card.engines
        self.card.fail_at, self.card.fails_on = n, lasting
        outcome = "served"
        try:
            self.called()
        except CannotServe as refusal:
            memory = isinstance(refusal.why, refusals.OutOfMemory | refusals.LoadOutOfMemory)
            passing = memory and not refusal.why.lasting
            outcome = "refused" if passing else str(refusal)
        self.card.fail_at, self.card.fails_on = None, False
        self.called()
        self.simulated.workspace.make_room()
        assert (self.card.allocated, self.card.engines) == before
        return outcome


def test_a_refusal_holds_no_memory(simulated: Simulated, tmp_path: Path) -> None:
    """It is at hand while PyTorch runs the call in the engine's place."""
    session, card = small.session(simulated, tmp_path, "decoder"), simulated.card
    session(small.call(4))
    simulated.workspace.make_room()
    before = card.allocated
    for fault in ({"fail_at": 3, "fails_on": True}, {}):
        vars(card).update(fault)
        given = small.call(4) if fault else small.call(4) | {"x": torch.ones(99, 8).half()}
        with pytest.raises(CannotServe) as caught:
            session(given)
        card.fail_at, card.fails_on = None, False
        simulated.workspace.release()
        assert card.allocated == before
        assert isinstance(caught.value.why, refusals.OutOfMemory if fault else refusals.OutsideProfile)


def test_sessions_share_one_arena_and_jobs_take_turns(simulated: Simulated, tmp_path: Path) -> None:
    """A stream of its own for each job, as the driver makes them; the simulator looks at who waits for whom."""
    card = simulated.card
    sessions = [small.session(simulated, tmp_path, attribute, name) for attribute, name in PAIR]
    sizes = []
    for job in range(6):
        with simulated.own_stream(None):
            for session in sessions:
                given = small.call(64, job / 8)
                assert small.right(session(given), given, session.weight)
            sizes.append(card.allocated)
            simulated.workspace.release()
    assert len(set(sizes[1:])) == 1
    assert card.allocated < small.ACTIVATIONS  # the arena is gone with the last job
    assert sizes[0] < 2 * small.ACTIVATIONS


PAIR = (("", "denoiser"), ("decoder", "vae_decoder"))


def test_two_threads_that_call_at_once(simulated: Simulated, tmp_path: Path) -> None:
    sessions = [small.session(simulated, tmp_path, attribute, name) for attribute, name in PAIR]

    def job(number: int) -> bool:
        with simulated.own_stream(None):
            made = []
            for tokens in (4, 6, 64, 5):
                given = small.call(tokens, number / 16)
                made += [small.right(s(given), given, s.weight) for s in sessions]
            simulated.workspace.release()
        return all(made)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(12)))


def test_a_stage_that_ends_leaves_alone_what_another_job_uses(simulated: Simulated, tmp_path: Path) -> None:
    session, card = small.session(simulated, tmp_path), simulated.card
    first, second = card.new_stream(), card.new_stream()
    for stream in (first, second):
        with card.over(stream):
            session(small.call(64))
    before = card.allocated
    with card.over(first):
        simulated.workspace.release()
    assert card.allocated == before
    with card.over(second):
        simulated.workspace.release()
    assert card.allocated < before - small.ACTIVATIONS


def test_twins_share_one_engine(simulated: Simulated, tmp_path: Path) -> None:
    high, low = (small.session(simulated, tmp_path) for _ in range(2))
    low.weight.data = -low.weight.data
    given = small.call(4)
    assert small.right(high(given), given, high.weight)
    assert small.right(low(given), given, low.weight)
    assert simulated.card.loads == 1
    engines = simulated.card.engines
    del high
    assert 0 < simulated.card.engines < engines
    del low
    assert simulated.card.engines == 0


def test_parameters_that_move_are_followed(simulated: Simulated, tmp_path: Path) -> None:
    card = simulated.card
    module = torch.nn.Linear(8, 8, bias=False).half()
    card.bring(module)
    session = small.session(simulated, tmp_path, weight=module.weight)
    given = small.call(4)
    assert small.right(session(given), given, module.weight)
    card.send_away(module)
    with pytest.raises(CannotServe) as caught:
        session(given)
    assert caught.value.why == ParameterUnfit(Unfit.PLACE, "w", "cpu")
    for _ in range(3):
        card.bring(module)
        assert small.right(session(given), given, module.weight)
        card.send_away(module)
    card.bring(module)
    session.bind()
    assert small.right(session(given), given, module.weight)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.zeros(8, 8), ParameterUnfit(Unfit.TYPE, "w", "torch.float32", "torch.float16")),
        (torch.zeros(8, 16).half()[:, ::2], ParameterUnfit(Unfit.LAYOUT, "w")),
        (torch.zeros(9, 8).half().view(-1)[1:65].view(8, 8), ParameterUnfit(Unfit.ADDRESS, "w", wanted="64")),
        (torch.zeros(8, 8, device="meta").half(), ParameterUnfit(Unfit.PLACE, "w", "meta")),
    ],
)
def test_parameters_as_the_engine_cannot_take_them(
    weight: torch.Tensor, why: ParameterUnfit, simulated: Simulated, tmp_path: Path
) -> None:
    session = small.session(simulated, tmp_path, weight=weight)
    with pytest.raises(CannotServe) as caught:
        session(small.call(4))
    assert caught.value.why == why
    assert not why.lasting


def test_a_parameter_of_another_size(simulated: Simulated, tmp_path: Path) -> None:
    session = small.session(simulated, tmp_path)
    session.weight.data = torch.zeros(4, 8).half()
    with pytest.raises(CannotServe) as caught:
        session(small.call(4))
    assert caught.value.why == ParameterUnfit(Unfit.SIZE, "w", "32", "64")


def test_what_tensorrt_refuses_is_said_and_nothing_of_it_stays(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = small.call(4)
    said = "CUDA error 719"
    for name, why in (
        ("set_input_shape", refusals.ShapeRefused("denoiser", said, "x", (4, 8))),
        ("set_tensor_address", refusals.TensorRefused("denoiser", said, "w")),
        ("execute_async_v3", refusals.RunFailed("denoiser", said)),
    ):
        session = small.session(simulated, tmp_path)
        with monkeypatch.context() as patch:
            context = simulated.context

            def refuses(*_: Any, logger: Any = context.logger) -> bool:
                logger.log(1, said)
                return False

            patch.setattr(context, name, refuses)
            with pytest.raises(CannotServe) as caught:
                session(given)
            assert caught.value.why == why
            assert said in str(caught.value)
        assert small.right(session(given), given, session.weight)


def test_an_interrupted_call_leaves_nothing(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = small.session(simulated, tmp_path)
    session(small.call(4))
    for name in ("set_input_shape", "update_device_memory_size_for_shapes", "set_device_memory", "execute_async_v3"):
        with monkeypatch.context() as patch:

            def interrupts(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(simulated.context, name, interrupts)
            with pytest.raises(KeyboardInterrupt):
                session(small.call(6))
        for given in (small.call(6, 0.75), small.call(4, 0.25)):
            assert small.right(session(given), given, session.weight)


def test_a_session_made_in_another_thread_is_waited_for(simulated: Simulated, tmp_path: Path) -> None:
    """As the engines that are loaded while text is encoded: their packed weights are copied on that thread's stream."""
    card = simulated.card

    def preloaded() -> Any:
        with card.over(card.new_stream()):
            weight = card.empty((8, 8), torch.float16)
            card.copy(weight, torch.eye(8).half())
            return small.session(simulated, tmp_path, weight=weight)

    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(preloaded).result()
    with simulated.own_stream(None):
        given = small.call(4)
        assert small.right(session(given), given, session.weight)


def test_measuring_compiles_a_shapes_kernels_at_its_first_call(simulated: Simulated, tmp_path: Path) -> None:
    for measuring, kind in ((False, "LAZY"), (True, "EAGER")):
        session = small.session(simulated, tmp_path, measuring=measuring)
        assert session is not None
        assert simulated.context.config.dynamic_shapes_kernel_specialization_strategy.name == kind


def test_kernels_are_kept_and_taken_up(simulated: Simulated, tmp_path: Path) -> None:
    session = small.session(simulated, tmp_path)
    session(small.call(4))
    session.save_kernels()
    kernels = simulated.context.config.get_runtime_cache().kernels
    assert kernels
    for driver, taken_up in (("580.126.09", kernels), ("590.1", set())):  # of the same major version, and of another
        session = small.session(simulated, tmp_path, card=replace(CARD, driver=driver))
        assert simulated.context.config.get_runtime_cache().kernels == taken_up


@pytest.mark.parametrize("driver", ["570.86.15", "535.1"])
def test_a_driver_that_is_too_old_is_said_first(driver: str, simulated: Simulated, tmp_path: Path) -> None:
    with pytest.raises(CannotServe) as caught:
        small.session(simulated, tmp_path, card=replace(CARD, driver=driver), manifest=small.manifest("0.1"))
    version = flavour_version("tensorrt_rtx")
    assert caught.value.why == refusals.OldDriver(driver, "TensorRT for RTX", version or "", "580")
    small.session(simulated, tmp_path, card=replace(CARD, driver="unknown"))


def test_another_tensorrt_comes_with_the_command_that_installs_it(simulated: Simulated, tmp_path: Path) -> None:
    with pytest.raises(CannotServe) as caught:
        small.session(simulated, tmp_path, manifest=small.manifest("1.2.3"))
    installed, install = flavour_version("tensorrt_rtx") or "", "pip install tensorrt-rtx==1.2.3"
    assert caught.value.why == refusals.OtherTensorRT("TensorRT for RTX", "1.2.3", installed, install)
    assert caught.value.why.words("build it")[1] == f"{install}, or build again: build it"


def test_pytorchs_cache_makes_room_for_what_tensorrt_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Simulated(monkeypatch, capacity=1_000_000)
    simulated.install()
    card = simulated.card
    block = card.empty((900_000,), torch.uint8)
    del block
    assert card.memory()[0] < 200_000
    card.capacity = 900_500  # only without what PyTorch keeps is there room for the engine
    session = small.session(simulated, tmp_path, "decoder")
    given = small.call(4)
    assert small.right(session(given), given, session.weight)
    assert not card.faults


def test_sessions_are_made_on_the_card_that_the_pipeline_is_on(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(devices, "device_of", lambda index: asked.append(index) or simulated.card)
    workspace = Workspace()
    assert workspace.device_of(replace(CARD, index=1)) is simulated.card
    assert asked == [1]
    simulated.workspace = workspace
    session = small.session(simulated, tmp_path, card=replace(CARD, index=1))
    given = small.call(4)
    assert small.right(session(given), given, session.weight)  # the simulator asks for the card to be the current one


def test_the_card_through_torch_cuda_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session asks of a card, the thin layer over torch.cuda has; that it works test_gpu.py shows."""
    names = {name for name in vars(devices.Device) if not name.startswith("_")}
    assert names <= {*vars(devices.Cuda), "alignment"}
    assert {"handle", "mark", "wait"} <= set(vars(devices.CudaStream))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotServe) as caught:
        devices.device_of(3)
    assert caught.value.why == refusals.NoCard(torch.__version__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.device_of(3) is devices.device_of(3)
