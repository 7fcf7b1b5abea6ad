"""What a TensorRT session does around its engine: kept kernels, shared memory, addresses told once, measurements.

The engine itself needs a card (test_gpu.py); here stand recorders in the place of TensorRT's objects.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from overcrank.engines.manifest import TensorEntry
from overcrank.engines.store import Store
from overcrank.runtime.kernel_cache import Kernels, kernel_cache
from overcrank.runtime.measured import Measurement, measurements, record, require_not_slower
from overcrank.runtime.session import CannotServe
from overcrank.runtime.trt import TrtSession
from overcrank.runtime.workspace import Workspace

CARD = ("NVIDIA GeForce RTX 4090", "580.95.05")


class Config:
    """An IRuntimeConfig whose cache takes what this driver made."""

    def __init__(self, compiled: bytes) -> None:
        self.compiled, self.loaded, self.cache = compiled, b"", None

    def create_runtime_cache(self) -> Any:
        def deserialize(blob: bytes) -> bool:
            good = blob.startswith(b"this driver")
            self.loaded = blob if good else b""
            return good

        return SimpleNamespace(deserialize=deserialize, serialize=lambda: self.compiled or None)

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


def test_kernels_are_kept_and_found_again(tmp_path: Path) -> None:
    file = kernel_cache(Store(tmp_path), "ab" * 32, *CARD)
    assert file.path.name == "abababababababab-580_95_05-NVIDIA_GeForce_RTX_4090.kernels"
    first = Config(b"this driver: one kernel")
    kernels = Kernels(first, file)
    assert not kernels.known
    assert first.cache is not None
    kernels.keep()
    second = Config(b"this driver: one kernel")
    again = Kernels(second, file)
    assert again.known
    assert second.loaded == b"this driver: one kernel"
    before = file.path.stat().st_mtime_ns
    again.keep()  # nothing new: not written again
    assert file.path.stat().st_mtime_ns == before
    second.compiled += b", and another"
    again.keep()
    assert file.read() == b"this driver: one kernel, and another"


def test_the_fuller_cache_of_two_processes_stays(tmp_path: Path) -> None:
    file = kernel_cache(Store(tmp_path), "ab" * 32, *CARD)
    assert file.write(b"this driver: both kernels")
    assert not file.write(b"this driver: one")
    assert file.read() == b"this driver: both kernels"


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty", "another driver"])
def test_what_cannot_be_used_is_compiled_again(damage: str, tmp_path: Path) -> None:
    file = kernel_cache(Store(tmp_path), "ab" * 32, *CARD)
    file.write(b"that driver: " + b"x" * 100 if damage == "another driver" else b"this driver: " + b"x" * 100)
    content = bytearray(file.path.read_bytes())
    if damage == "truncated":
        del content[-10:]
    if damage == "one byte":
        content[50] ^= 1
    if damage == "empty":
        content.clear()
    file.path.write_bytes(content)
    config = Config(b"this driver: new")
    kernels = Kernels(config, file)
    assert not kernels.known
    assert config.loaded == b""
    kernels.keep()
    assert file.read() == b"this driver: new"


def test_a_full_disk_does_not_fail_the_render(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from overcrank.models import resolve
    from overcrank.runtime.accelerate import Acceleration
    from overcrank.runtime.session import Ledger

    (tmp_path / "runtime").write_text("a file is in the way")
    kernels = Kernels(Config(b"this driver: new"), kernel_cache(Store(tmp_path), "ab" * 32, *CARD))
    slot: Any = SimpleNamespace(
        session=SimpleNamespace(settle=kernels.keep), component=SimpleNamespace(name="denoiser")
    )
    module: Any = SimpleNamespace(slots=[slot])
    Acceleration(resolve("ltx-demo"), "auto", Ledger(False), [module]).settle()
    assert "the kernels compiled for denoiser are not kept" in caplog.text


def test_sessions_on_a_stream_share_the_larger_workspace() -> None:
    workspace, device = Workspace(), torch.device("cpu")
    small = workspace.take(1000, device, 0, "vae")
    assert workspace.take(500, device, 0, "denoiser") is small
    large = workspace.take(4000, device, 0, "denoiser")
    assert large.numel() == 4000
    assert workspace.take(1000, device, 0, "vae") is large
    other = workspace.take(1000, device, 8, "vae")
    assert other is not large
    workspace.release(device)
    assert workspace.take(10, device, 0, "vae").numel() == 10
    assert workspace.take(10, device, 8, "vae") is other


class Context:
    """An IExecutionContext that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory: list[int] = []
        self.runs = 0

    def set_tensor_address(self, name: str, address: int) -> None:
        self.told.append((name, address))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def update_device_memory_size_for_shapes(self) -> int:
        return 8 * self.shapes["x"][0]

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory.append(size)

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        return self.runs < 5


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    import contextlib

    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    made = TrtSession.__new__(TrtSession)
    tensors = {"inputs": [("x", [1], [4], [8])], "outputs": [("y", None, None, None)]}
    entries = {
        side: [
            TensorEntry(name=n, dtype="float16", dims=["tokens"], **({"min": a, "opt": b, "max": c} if a else {}))
            for n, a, b, c in specs
        ]
        for side, specs in tensors.items()
    }
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    vars(made).update(
        _entry=SimpleNamespace(name="denoiser", **entries),
        _rebuild="rebuild it",
        _workspace=Workspace(),
        _context=Context(),
        _engine=SimpleNamespace(get_tensor_dtype=lambda name: "half"),
        _dtypes={"half": torch.float16},
        _parameters={"w": weight},
        _bound={},
        _inputs={},
        _outputs={},
        _needed=0,
        _side=None,
        _kernels=None,
        _logger=SimpleNamespace(errors=["CUDA error 719"]),
    )
    return made


def test_addresses_are_told_once_and_again_when_they_change(session: Any) -> None:
    context, x = session._context, {"x": torch.ones(4)}
    first = session(x)["y"]
    assert {name for name, _ in context.told} == {"w", "x", "y"}
    assert context.memory == [32]
    told = len(context.told)
    second = session(x)["y"]
    assert len(context.told) == told  # the same buffers, so a CUDA graph can be replayed
    assert first.data_ptr() != second.data_ptr()  # and results of their own
    session._parameters["w"].data = torch.ones(3, dtype=torch.float16)  # as a module that was moved
    session({"x": torch.ones(6)})
    assert [name for name, _ in context.told[told:]] == ["w", "x", "y"]
    assert context.memory == [32, 48]
    assert context.shapes["x"] == (6,)


def test_calls_that_the_engine_cannot_take(session: Any) -> None:
    session._parameters["w"] = torch.zeros(3, device="meta")
    with pytest.raises(CannotServe, match="holds w on meta and runs on cpu"):
        session({"x": torch.ones(4)})
    session._parameters = {}
    with pytest.raises(CannotServe, match="lies outside the engine's profile"):
        session({"x": torch.ones(9)})
    session._context.runs = 10
    with pytest.raises(CannotServe, match=r"of denoiser failed while running .CUDA error 719.; overcrank doctor"):
        session({"x": torch.ones(4)})


def test_a_dtype_or_layout_that_the_pipeline_holds_otherwise(session: Any) -> None:
    session._parameters["w"] = torch.zeros(3)
    with pytest.raises(CannotServe, match=r"takes w as torch.float16 and the pipeline holds it as torch.float32"):
        session._check_dtypes()
    session._parameters["w"] = torch.zeros(3, 4).half().T
    with pytest.raises(CannotServe, match="holds w in another memory format"):
        session._check_dtypes()


def test_an_engine_that_lost_on_this_card_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    require_not_slower(store, *CARD, "key")
    slow = Measurement(component="denoiser", shape="768x512x121", engine_ms=120.0, eager_ms=100.0, date="2026-11-21")
    record(store, *CARD, "key", slow)
    record(store, *CARD, "other", slow.model_copy(update={"engine_ms": 50.0}))
    assert set(measurements(store, *CARD)) == {"key", "other"}
    with pytest.raises(CannotServe, match=r"took 120\.0 ms a call on this card and eager PyTorch 100\.0 ms") as caught:
        require_not_slower(store, *CARD, "key")
    assert "--slow-engines" in caught.value.fix
    require_not_slower(store, *CARD, "other")
    require_not_slower(store, "another card", CARD[1], "key")
    (file,) = (tmp_path / "measured").iterdir()
    file.write_text("damaged")
    require_not_slower(store, *CARD, "key")
    assert measurements(store, *CARD) == {}


def test_engines_are_loaded_ahead_and_only_those_a_render_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from overcrank.models import resolve
    from overcrank.runtime.accelerate import Acceleration
    from overcrank.runtime.module import EngineModule, Slot
    from overcrank.runtime.session import Ledger

    opened: list[str] = []

    def slot(name: str) -> Any:
        def make() -> Any:
            opened.append(name)
            if name == "vae_decoder":
                raise CannotServe("it is damaged", "rebuild it")
            return SimpleNamespace(copies=False)

        part = torch.nn.Linear(1, 1)
        component: Any = SimpleNamespace(name=name)
        module = EngineModule(part, [Slot(component, make)], Ledger(False))
        monkeypatch.setattr(module, "_bind", lambda: None)
        return module

    modules: Any = [slot(name) for name in ("denoiser", "vae_decoder", "vae_encoder")]
    acceleration = Acceleration(resolve("ltx-demo"), "auto", Ledger(False), modules)
    acceleration.preload(pictures=False)
    assert opened == ["denoiser", "vae_decoder"]
    acceleration.preload(pictures=True)
    assert opened == ["denoiser", "vae_decoder", "vae_encoder"]
    with pytest.raises(CannotServe, match="it is damaged"):
        modules[1].slots[0].opened()
