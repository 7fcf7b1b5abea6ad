"""A network of a few values, as a bundle's component: for what a session does around its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from overcrank.engines.manifest import BundledEngine, ComponentEntry, EngineKey, Manifest, TensorEntry, file_entry
from overcrank.engines.store import Store
from overcrank.engines.tensorrt import flavour_version
from overcrank.runtime.sessions.trt import TrtSession

from tests.simulated_tensorrt.installed import CARD, Simulated

WIDTH, LONGEST, ACTIVATIONS = 8, 64, 64 * 1024


def component(folder: Path, attribute: str = "", name: str = "denoiser") -> ComponentEntry:
    """y = tanh(x @ w); kept = cache + y. `attribute`: "" for what steps call, else a part of a VAE."""
    half = ir.TensorType(ir.DataType.FLOAT16)

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=half)

    x, cache, w = value("x", "tokens", WIDTH), value("cache", "tokens", WIDTH), value("w", WIDTH, WIDTH)
    product = ir.node("MatMul", [x, w])
    tanh = ir.node("Tanh", [product.outputs[0]])
    kept = ir.node("Add", [cache, tanh.outputs[0]])
    for node, made in ((product, "product"), (tanh, "y"), (kept, "kept")):
        node.outputs[0].name, node.outputs[0].type = made, half
        node.outputs[0].shape = ir.Shape(["tokens", WIDTH])
    outputs = [tanh.outputs[0], kept.outputs[0]]
    graph = ir.Graph([x, cache, w], outputs, nodes=[product, tanh, kept], opset_imports={"": 23}, name=name)
    ir.save(ir.Model(graph, ir_version=10), folder / f"{name}.onnx")
    (folder / f"{name}.engine").write_text(f"small plan of {name} {attribute} " + "." * 1000)

    def tensor(name: str, ranged: bool = True) -> TensorEntry:
        more = {"min": [1, WIDTH], "opt": [4, WIDTH], "max": [LONGEST, WIDTH]} if ranged else {}
        return TensorEntry(name=name, dtype="float16", dims=["tokens", WIDTH], **more)

    return ComponentEntry.model_construct(
        name=name,
        attribute=attribute,
        compute="fp16",
        key=EngineKey(name, attribute, "", "sm_89", "", "tensorrt_rtx", "", "", "inputs"),
        engine=file_entry(folder / f"{name}.engine"),
        graph=file_entry(folder / f"{name}.onnx"),
        inputs=[tensor("x"), tensor("cache")],
        outputs=[tensor("y", ranged=False), tensor("kept", ranged=False)],
        formats={},
        activation_bytes=ACTIVATIONS,
    )


def manifest(version: str = "") -> Manifest:
    own = version or flavour_version("tensorrt_rtx")
    return Manifest.model_construct(flavour="tensorrt_rtx", flavour_version=own)


def session(on: Simulated, folder: Path, attribute: str = "", name: str = "denoiser", **more: Any) -> TrtSession:
    """With a parameter of its own, at `session.weight`, that stands for a module's."""
    entry = component(folder, attribute, name)
    on.plans.add(folder, entry)
    weight = more.pop("weight", None)
    if weight is None:
        weight = torch.nn.Parameter(torch.eye(WIDTH, dtype=torch.float16), requires_grad=False)
    card = more.pop("card", CARD)
    bundled = BundledEngine(folder, more.pop("manifest", manifest()), entry)
    made = TrtSession(bundled, {"w": weight}, on.workspace, Store(folder), card, **more)
    made.weight = weight  # type: ignore[attr-defined]
    return made


def call(tokens: int, value: float = 0.5) -> dict[str, torch.Tensor]:
    shape = (tokens, WIDTH)
    return {"x": torch.full(shape, value).half(), "cache": torch.ones(shape).half()}


def right(made: Any, given: dict[str, torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether the outputs are what PyTorch computes."""
    y = (given["x"].float() @ weight.detach().float()).tanh()
    expected = {"y": y, "kept": given["cache"].float() + y}
    return all(torch.allclose(made[name].float(), t, atol=2e-3) for name, t in expected.items())
