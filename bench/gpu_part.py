"""One part of `bench-gpu`, in a process of its own: the card's peak, one way to run one network, or renders."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_ways import COMPONENTS, Case, Way
from overcrank.engines.manifest import BundledEngine, read_manifest
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME
from overcrank.export.module import part, random_module
from overcrank.export.quantization.recipe import IN_16_BIT, QUANTIZED, LayerFormat, Recipe, Rule, default_recipe
from overcrank.models import components, local_folder, resolve
from overcrank.models.base import Component
from overcrank.runtime.sessions.card import card_of
from overcrank.runtime.sessions.engine_module import EngineModule, Slot
from overcrank.runtime.sessions.parameters import compute_of, own_parameters, packed_parameters, parameters_of
from overcrank.runtime.sessions.session import Ledger, Session
from overcrank.runtime.sessions.sources import Quantization, graph_session
from overcrank.runtime.sessions.workspace import Workspace
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

BUILD = [sys.executable, "-c", "from overcrank.cli import build_engine; build_engine()"]
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and for how long a call is measured."""

    device: torch.device
    store: Store
    seconds: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed(call: Callable[[], Any], at: Setting) -> dict[str, Any]:
    """Milliseconds of a call, by device events on a card; the first one, which compiles, by itself."""
    at.wait()
    start = time.perf_counter()
    call()
    at.wait()
    first = time.perf_counter() - start
    for _ in range(2):
        call()
    at.wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < at.seconds and len(times) < 200):
        times.append(_one(call, at))
    p10, p50, p90 = np.percentile(times, [10, 50, 90])
    figures = {"ms": round(float(p50), 3), "p10_ms": round(float(p10), 3), "p90_ms": round(float(p90), 3)}
    return {**figures, "calls": len(times), "first_call_s": round(first, 3)}


def _one(call: Callable[[], Any], at: Setting) -> float:
    if at.device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(at.device)
    return begin.elapsed_time(end)


def peak(at: Setting) -> dict[str, Any]:
    """The largest matrix product rate that PyTorch reaches here, TFLOP/s, by type."""
    n = PEAK_SIZE[at.device.type]
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        if at.device.type == "cpu" and name == "fp16":
            continue
        a, b = (torch.randn(n, n, device=at.device, dtype=dtype) for _ in range(2))
        found[name] = round(2 * n**3 / timed(lambda a=a, b=b: a @ b, at)["ms"] / 1e9, 2)
    if at.device.type == "cuda" and torch.cuda.get_device_capability(at.device) >= (8, 9):
        one = torch.ones((), device=at.device)
        x = torch.randn(n, n, device=at.device).to(torch.float8_e4m3fn)
        multiply = timed(lambda: torch._scaled_mm(x, x.t(), one, one, out_dtype=torch.bfloat16), at)
        found["fp8"] = round(2 * n**3 / multiply["ms"] / 1e9, 2)
    return {"size": n, "tflops": found}


def measured(case: Case, way: Way, at: Setting) -> dict[str, Any]:
    """Every component by this way; what fails is told in its place."""
    found: dict[str, Any] = {}
    for name in COMPONENTS:
        if name != "denoiser" and (way.precision in QUANTIZED or way.embedded):
            continue  # as it is without
        try:
            found[name] = _component(case, way, name, at)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        if at.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _component(case: Case, way: Way, name: str, at: Setting) -> dict[str, Any]:
    (component,) = components(resolve(case.model), (name,))
    module = _module(case, component, at)
    sizes = {**component.free_axes, **component.sizes(case.shape)}
    with torch.no_grad():
        call = _placed(component.sample(module, sizes, torch.Generator().manual_seed(0)), at)
        expected = _first(module(**call))
        figures: dict[str, Any] = {"tflop": _tflop(module, call)} if way.kind == "eager" else {}
        if at.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(at.device)
        start = time.perf_counter()
        run: Callable[[], Any] = lambda: module(**call)  # noqa: E731
        if way.kind == "compile":
            compiled = torch.compile(module, mode=way.mode, dynamic=False)
            run = lambda: compiled(**call)  # noqa: E731
        elif way.kind != "eager":
            session, about = _session(case, way, component, module, at)
            EngineModule(module, [Slot(component, lambda: session)], Ledger(strict=True))
            figures |= about
        figures["load_s"] = round(time.perf_counter() - start - figures.get("build_s", 0.0), 3)
        figures |= timed(run, at)
        figures |= _likeness(_first(run()), expected)
        if way.kind == "engine":
            session.save_kernels()
    if at.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(at.device)
        figures["torch_peak_gb"] = round(torch.cuda.max_memory_allocated(at.device) / 1e9, 3)
        figures["card_used_gb"] = round((total - free) / 1e9, 3)
    return figures


def _module(case: Case, component: Component, at: Setting) -> Any:
    import diffusers

    folder = local_folder(case.model)
    if folder is None:
        made = random_module(component, component.config, "bf16")  # with what diffusers keeps in fp32
        return made.to(at.device) if at.device.type == "cuda" else made.float()
    cls = getattr(diffusers, component.cls)
    whole = cls.from_pretrained(folder / component.subfolder, torch_dtype=at.dtype)
    return part(whole, component).to(at.device).eval().requires_grad_(False)


def _placed(call: dict[str, Any], at: Setting) -> dict[str, Any]:
    """On the device; what a pipeline holds in its own type is in it."""
    fixed = ("timestep", "coords", "ids", "fps", "sigma", "scale")

    def placed(path: Any, leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        name = str(path[0])
        cast = leaf.is_floating_point() and not any(word in name for word in fixed)
        return leaf.to(at.device, at.dtype if cast else leaf.dtype)

    placed_call: dict[str, Any] = pytree.tree_map_with_path(placed, call)
    return placed_call


def _first(result: Any) -> torch.Tensor:
    tensor: torch.Tensor = next(x for x in pytree.tree_leaves(result) if torch.is_tensor(x) and x.is_floating_point())
    return tensor


def _tflop(module: Any, call: dict[str, Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        module(**call)
    return round(counter.get_total_flops() / 1e12, 6)


def _likeness(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    a, b = found.double().flatten(), expected.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()))
    return {"relative_error": float((a - b).norm() / b.norm()), "cosine": cosine}


def _layers(way: Way) -> LayerFormat:
    return LayerFormat(way.precision, "dynamic") if way.precision in QUANTIZED else IN_16_BIT  # type: ignore[arg-type]


def _recipe(case: Case, way: Way) -> Recipe | None:
    """That keeps attention in 16 bit; None where the default says what is wanted."""
    if way.precision not in QUANTIZED or way.attention:
        return None
    (component,) = components(resolve(case.model), ("denoiser",))
    made = default_recipe(component, _layers(way))
    kept = Rule(layers="*.attn?", format="16bit", reason="to compare")
    own = made.model_copy(update={"rules": [kept, *made.rules]})
    return Recipe(model=resolve(case.model).name, precision=_layers(way).format, components={"denoiser": own})


def _session(case: Case, way: Way, component: Component, module: Any, at: Setting) -> tuple[Session, dict[str, Any]]:
    if way.kind == "onnxruntime":
        quantization = Quantization(_layers(way), _recipe(case, way)) if way.precision in QUANTIZED else None
        return graph_session(component, component.subfolder, module, at.store, quantization), {}
    from overcrank.runtime.sessions.trt import TrtSession

    start = time.perf_counter()
    bundle = built(case, way, component, module, at)
    seconds = time.perf_counter() - start
    manifest = read_manifest(bundle)
    entry = manifest.component(component.name)
    parameters: dict[str, Any] = {}
    if not way.embedded:
        parameters |= own_parameters(module, component, parameters_of(entry))
        parameters |= packed_parameters(module, entry.formats, {}, compute_of(entry))
    card = card_of(at.device)
    session = TrtSession(BundledEngine(bundle, manifest, entry), parameters, Workspace(), at.store, card, True)
    about = {"build_s": round(seconds, 3), "engine_mb": round(entry.engine.bytes / 1e6, 2), "target": manifest.target}
    about |= {"activation_gb": round((entry.activation_bytes or 0) / 1e9, 3), "engine_key": entry.key.digest()}
    return session, about


def built(case: Case, way: Way, component: Component, module: Any, at: Setting) -> Path:
    """The bundle of a component by `build-engine`: for this card, or for all if it is none that has a target."""
    card = card_of(at.device).target
    target = card if card in BY_NAME and "tensorrt_rtx" in BY_NAME[card].flavours else "rtx"
    shape = case.shape
    limits = [f"--{side}-{a}={getattr(shape, a)}" for side in ("max",) for a in ("height", "width", "frames")]
    limits += [f"--{a}={getattr(shape, a)}" for a in ("height", "width", "frames")]
    options = ["--gpu", target, "--components", component.name, "--store", str(at.store.root)]
    options += ["--precision", way.precision]
    folder = at.store.root / "bench" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(case, way)
    if recipe is not None:
        (folder / f"{way.name}.json").write_text(recipe.model_dump_json(), "utf-8")
        options += ["--recipe", str(folder / f"{way.name}.json")]
    model = case.model
    if way.embedded:
        model = str(local_folder(model) or _checkpoint(folder, component, module))
        options += ["--embed-weights"]
    command = [*BUILD, "--model", model, *options, *limits, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "build-engine failed")
    return Path(json.loads(done.stdout)["bundles"][0]["path"])


def _checkpoint(folder: Path, component: Component, module: Any) -> Path:
    """The random module as a diffusers folder, for weights to be embedded from."""
    module.save_pretrained(folder / "checkpoint" / component.subfolder)
    index = {component.subfolder: ["diffusers", component.cls]}
    (folder / "checkpoint" / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder / "checkpoint"
