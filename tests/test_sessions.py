"""What sessions leave for later ones: kept kernels, measurements; and engines that are loaded ahead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from overcrank.engines.kernel_cache import Kernels, kernel_cache
from overcrank.engines.measurements import Measurement, measurements, record, require_not_slower
from overcrank.engines.refusals import CannotServe, Damaged, Slower
from overcrank.engines.store import Store

from tests import tiny

pytestmark = pytest.mark.quick

RTX = ("NVIDIA GeForce RTX 4090", "580.95.05")


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
    file = kernel_cache(Store(tmp_path), "ab" * 32, *RTX)
    assert file.path.name == "abababababababab-580-NVIDIA_GeForce_RTX_4090.kernels"
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
    file = kernel_cache(Store(tmp_path), "ab" * 32, *RTX)
    assert file.write(b"this driver: both kernels")
    assert not file.write(b"this driver: one")
    assert file.read() == b"this driver: both kernels"


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty", "another driver"])
def test_what_cannot_be_used_is_compiled_again(damage: str, tmp_path: Path) -> None:
    file = kernel_cache(Store(tmp_path), "ab" * 32, *RTX)
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
    from overcrank.runtime.pipeline.accelerate import Acceleration
    from overcrank.runtime.sessions.session import Ledger

    (tmp_path / "runtime").write_text("a file is in the way")
    kernels = Kernels(Config(b"this driver: new"), kernel_cache(Store(tmp_path), "ab" * 32, *RTX))
    slot: Any = SimpleNamespace(
        session=SimpleNamespace(save_kernels=kernels.keep), component=SimpleNamespace(name="denoiser")
    )
    module: Any = SimpleNamespace(slots=[slot])
    Acceleration(lambda: None, resolve("ltx-demo"), "auto", Ledger(False), [module]).save_kernels()
    assert "the kernels compiled for denoiser are not kept" in caplog.text


def test_an_engine_that_lost_on_this_card_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    require_not_slower(store, *RTX, "key")
    slow = Measurement(component="denoiser", shape="768x512x121", engine_ms=120.0, eager_ms=100.0, date="2026-11-21")
    record(store, *RTX, "key", slow)  # with kernels for any shape: not believed
    require_not_slower(store, *RTX, "key")
    slow = slow.model_copy(update={"kernels": "eager"})
    record(store, *RTX, "key", slow)
    record(store, *RTX, "other", slow.model_copy(update={"engine_ms": 50.0}))
    assert set(measurements(store, *RTX)) == {"key", "other"}
    with pytest.raises(CannotServe) as caught:
        require_not_slower(store, *RTX, "key")
    assert caught.value.why == Slower("denoiser", 120.0, 100.0, "768x512x121", "2026-11-21")
    assert caught.value.why.lasting
    require_not_slower(store, *RTX, "other")
    require_not_slower(store, "another card", RTX[1], "key")
    (file,) = (tmp_path / "measured").iterdir()
    file.write_text("damaged")
    require_not_slower(store, *RTX, "key")
    assert measurements(store, *RTX) == {}


def test_engines_are_loaded_ahead_and_only_those_a_render_calls() -> None:
    from overcrank.export.module import random_module
    from overcrank.models import components, resolve
    from overcrank.runtime.pipeline.accelerate import Acceleration
    from overcrank.runtime.sessions.engine_module import EngineModule, Slot
    from overcrank.runtime.sessions.session import Ledger

    opened: list[str] = []

    def slot(name: str) -> Any:
        def make() -> Any:
            opened.append(name)
            if name == "vae_decoder":
                raise CannotServe(Damaged("ltx-demo", "vae_decoder.engine is missing"))
            return SimpleNamespace(copies=False)

        (component,) = components(tiny.variant("tiny-ltx-0.9.5"), (name,))
        part = random_module(component, component.config, "fp32")
        return EngineModule(part, [Slot(component, make)], Ledger(False))

    modules: Any = [slot(name) for name in ("denoiser", "vae_decoder", "vae_encoder")]
    acceleration = Acceleration(lambda: None, resolve("ltx-demo"), "auto", Ledger(False), modules)
    acceleration.preload(pictures=False)
    assert opened == ["denoiser", "vae_decoder"]
    acceleration.preload(pictures=True)
    assert opened == ["denoiser", "vae_decoder", "vae_encoder"]
    with pytest.raises(CannotServe, match="bundle ltx-demo is damaged"):
        modules[1].slots[0].opened()


@pytest.mark.parametrize(
    ("seconds", "settling"),
    [
        ([3.0, 2.9, 1.0, 1.0, 1.0, 1.05, 0.95, 1.0], 2),
        ([1.0, 1.05, 1.0, 1.0, 3.0, 1.0], 0),
        ([3.0, 3.0, 1.0, 1.0], 2),
        ([3.0, 1.0, 1.0], 0),
    ],
)
def test_steps_before_kernels_have_settled_are_left_out_of_the_times(seconds: list[float], settling: int) -> None:
    from overcrank.runtime.render.sidecar import timing

    found = timing(seconds, lazily=True)
    assert found.get("settling", 0) == settling
    assert found == timing(seconds[settling:]) | ({"settling": settling} if settling else {})
    assert "settling" not in timing(seconds)
