"""The simulated runtime itself: it has the real one's names, and finds what it is there to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simulated_tensorrt import Card, Fault, Simulated, runtime, small


@pytest.mark.parametrize("name", ["ICudaEngine", "IExecutionContext", "IRuntimeCache", "IRuntimeConfig", "Runtime"])
def test_what_it_has_the_real_module_has(name: str) -> None:
    import tensorrt_rtx

    real = getattr(tensorrt_rtx, name)
    own = {n for n in vars(getattr(runtime, name)) if not n.startswith("_")}
    assert own
    assert own <= set(dir(real))


@pytest.mark.parametrize(
    "name", ["ExecutionContextAllocationStrategy", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"]
)
def test_its_words_are_the_real_modules(name: str) -> None:
    import tensorrt_rtx

    real = getattr(tensorrt_rtx, name).__members__
    assert list(getattr(runtime, name).__members__) == list(real)


class Told:
    """A context that has been told everything for four tokens, and what it was told of."""

    def __init__(self, on: Simulated, folder: Path, attribute: str = "decoder") -> None:
        self.card = on.card
        self.session = small.session(on, folder, attribute)
        self.context: Any = on.context
        self.tensors = {n: self.card.empty((4, 8), torch.float16) for n in ("x", "cache", "y", "kept")}
        self.tensors["w"] = self.card.empty((8, 8), torch.float16)
        for name in ("x", "cache"):
            self.context.set_input_shape(name, (4, 8))
        self.memory = self.card.empty((self.context.update_device_memory_size_for_shapes(),), torch.uint8)
        self.context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        for name, tensor in self.tensors.items():
            self.context.set_tensor_address(name, self.card.address(tensor))

    def run(self, stream: Any = None) -> bool:
        stream = stream or self.card.new_stream()
        for tensor in (self.memory, *self.tensors.values()):
            self.card.used(tensor, stream)
        with self.card.active():
            return bool(self.context.execute_async_v3(stream.handle))


def freed(told: Told) -> None:
    told.tensors.pop("x")


def misaligned(told: Told) -> None:
    told.context.set_tensor_address("x", told.tensors["x"].data_ptr() + 2)


def too_small(told: Told) -> None:
    told.tensors["x"] = told.card.empty((3, 8), torch.float16)
    told.context.set_tensor_address("x", told.card.address(told.tensors["x"]))


def unknown(told: Told) -> None:
    told.context.set_tensor_address("x", 64)


def of_host_memory(told: Told) -> None:
    module = torch.nn.Linear(8, 4).half()
    told.card.send_away(module)
    told.tensors["x"] = module.weight
    told.context.set_tensor_address("x", told.card.address(module.weight))


def of_a_shape_outside(told: Told) -> None:
    told.context.set_input_shape("x", (65, 8))


def of_another_shape(told: Told) -> None:
    told.context.set_input_shape("x", (3, 8))


def with_less_memory(told: Told) -> None:
    told.context.set_device_memory(told.memory.data_ptr(), told.memory.numel() - 1)


def unset(told: Told) -> None:
    del told.context.addresses["w"]


def from_two_threads(told: Told) -> None:
    told.context.busy.acquire()


def unordered(told: Told) -> None:
    stream = told.card.new_stream()
    with told.card.over(stream):
        told.card.copy(told.tensors["x"], torch.ones(4, 8))
    told.card.used(told.tensors["x"], stream)


def overwritten(told: Told) -> None:
    assert told.run()  # another stream, which nobody waits for, reads and writes


FAULTS = {
    freed: "x of denoiser has been freed",
    misaligned: "x is bound at the misaligned address",
    too_small: "x of denoiser has 48 bytes and is taken for 64",
    unknown: "x of denoiser has an address that nobody was given",
    of_host_memory: "x of denoiser is in host memory",
    of_a_shape_outside: r"x \[65, 8\] is outside",
    of_another_shape: "shapes have changed and nobody has asked for the memory they need",
    with_less_memory: "bytes were given for activations, and",
    unset: "no address is set for w",
    from_two_threads: "two threads are in one context",
    unordered: "reads x of denoiser before stream",
    overwritten: "overwrites the memory for activations before stream",
}


def test_without_a_fault_it_runs(simulated: Simulated, tmp_path: Path) -> None:
    told = Told(simulated, tmp_path)
    stream = simulated.card.new_stream()
    assert told.run(stream)
    assert told.run(stream)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_faults(fault: Any, simulated: Simulated, tmp_path: Path) -> None:
    told = Told(simulated, tmp_path)
    with pytest.raises(Fault, match=FAULTS[fault]):  # noqa: PT012
        fault(told)
        told.run()
    assert simulated.card.faults
    simulated.card.faults.clear()


def test_the_default_stream_is_not_captured(simulated: Simulated, tmp_path: Path) -> None:
    told = Told(simulated, tmp_path, attribute="")
    with pytest.raises(Fault, match="the default stream cannot be captured"), simulated.card.active():
        told.context.execute_async_v3(0)
    with pytest.raises(Fault, match="while another card may be the current one"):
        told.context.execute_async_v3(1)
    simulated.card.faults.clear()


def test_memory_that_is_freed_while_a_stream_may_use_it() -> None:
    card = Card()
    block = card.empty((4,), torch.float32)
    with card.over(card.new_stream()):
        card.copy(block, torch.ones(4))
    del block
    assert card.faults == ["memory of stream 0 is freed while stream 1 may use it"]


def test_freed_memory_is_poisoned_and_counted() -> None:
    card = Card()
    block = card.empty((4,), torch.float32)
    copy = block.fill_(1.0).numpy()
    address = block.data_ptr()
    assert card.allocated == 16
    del block, copy
    assert (card.allocated, card.peak, card.allocations) == (0, 16, 1)
    again = card.empty((4,), torch.float32)
    assert again.data_ptr() != address
    assert set(again.view(torch.uint8).tolist()) == {0xCD}
