"""Graphs and weight packs of strangers' signed bundles: what reaches out of them is refused, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from overcrank.engines.envelope import STATEMENT, statement
from overcrank.engines.manifest import PULLED, SIGNATURE, file_entry, read_manifest
from overcrank.engines.trust import Keyring
from overcrank.errors import CheckpointError, IntegrityError
from overcrank.runtime.sessions.graphs import bundled_graph
from overcrank.runtime.sessions.parameters import require_packed


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From elsewhere, and signed by a publisher who is trusted."""
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    copied = shutil.copytree(demo_bundle, tmp_path / demo_bundle.name)
    (copied / PULLED).write_text("{}")
    Keyring().new("studio")
    Keyring().sign(copied, "studio")
    return copied


def changed(bundle: Path, change: Callable[[Any], None]) -> None:
    """The graph changed by the publisher, who signs what he made."""
    model = onnx.load(bundle / "denoiser.onnx", load_external_data=False)
    change(model)
    (bundle / "denoiser.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["components"][0]["graph"] = file_entry(bundle / "denoiser.onnx").model_dump()
    content = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(content)
    files = read_manifest(bundle).files()
    (bundle / SIGNATURE).write_bytes(Keyring().seal(STATEMENT, statement(content, files), "studio")[0])


def _external(tensor: Any, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)


def _initializer(location: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = TensorProto(name="leak", data_type=TensorProto.FLOAT, dims=[1])
        _external(tensor, location)
        model.graph.initializer.append(tensor)

    return change


def _constant(model: Any) -> None:
    tensor = TensorProto(name="leak", data_type=TensorProto.FLOAT, dims=[1])
    _external(tensor, ".ssh/id_ed25519")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["leak"], value=tensor))


def _sparse(model: Any) -> None:
    sparse = model.graph.sparse_initializer.add()
    _external(sparse.values, ".ssh/id_ed25519")


def _function(model: Any) -> None:
    made = helper.make_function("acme", "Leak", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    model.functions.append(made)


def _domain(model: Any) -> None:
    model.graph.node.append(helper.make_node("Leak", [], ["leak"], domain="acme"))


def _branch(kind: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        body = helper.make_graph([], "body", [], [])
        names = ("then_branch", "else_branch") if kind == "If" else ("body",)
        model.graph.node.append(helper.make_node(kind, [], ["leak"], **dict.fromkeys(names, body)))

    return change


ATTACKS: dict[str, tuple[Callable[[Any], None], str]] = {
    "weights beside the bundle": (_initializer("../secret"), r"reads weights from another file \(external data\)"),
    "weights of the working directory": (_initializer(".ssh/id_ed25519"), "reads weights from another file"),
    "weights by an absolute path": (_initializer("/etc/passwd"), "reads weights from another file"),
    "weights within the bundle": (_initializer("denoiser.engine"), "reads weights from another file"),
    "a constant": (_constant, "reads a constant from another file"),
    "a sparse initializer": (_sparse, "reads weights from another file"),
    "a function": (_function, "defines a function 'acme:Leak'"),
    "an operator of nobody's": (_domain, "has an operator 'acme:Leak'"),
    "a loop": (_branch("Loop"), r"has control flow \(Loop\)"),
    "a branch": (_branch("If"), r"has control flow \(If\)"),
    "a scan": (_branch("Scan"), r"has control flow \(Scan\)"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_signed_graph_that_reaches_out_is_refused(attack: str, bundle: Path) -> None:
    change, says = ATTACKS[attack]
    assert bundled_graph(bundle, read_manifest(bundle).components[0].graph).graph
    changed(bundle, change)
    manifest = Keyring().whole(bundle)
    with pytest.raises(IntegrityError, match=rf"denoiser\.onnx is refused: it {says}"):
        bundled_graph(bundle, manifest.components[0].graph)


def test_the_commands_refuse_it(bundle: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(bundle, _initializer("secret"))
    (tmp_path / "secret").write_bytes(b"\x00\x00\x80?")
    monkeypatch.chdir(tmp_path)
    says = "denoiser.onnx is refused: it reads weights from another file (external data)"
    verified = run("overcrank", "verify", bundle)
    assert verified.exit_code == 1, verified.output
    assert says in verified.output
    words = ["--prompt", "x", "--steps", 1, "--backend", "onnxruntime", "--bundle", bundle, "-o", tmp_path / "a.mp4"]
    rendered = run("overcrank", "render", *words, "--formats", "png")
    assert rendered.exit_code == 0, rendered.output
    assert says in rendered.output
    advice = f"overcrank engines rm {bundle.name}, then build-engine --model ltx-demo --gpu sm_89."
    assert advice in " ".join(rendered.output.split())
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["bundles"] == {}
    assert any(says in json.dumps(fallback) for fallback in about["fallbacks"])


def test_verify_asks_for_the_signature_before_a_graph_is_read(bundle: Path, run: Any) -> None:
    Keyring().revoke("studio")
    (bundle / "denoiser.onnx").rename(bundle / "x")
    shutil.copy(bundle / "x", bundle / "denoiser.onnx")
    for command in (["verify", bundle], ["engines", "lint", bundle, "--no-compare"]):
        result = run("overcrank", *command)
        assert result.exit_code == 1
        assert "is signed by 'studio', whose key was revoked" in result.output


def test_bytes_that_changed_after_the_check_are_not_parsed(bundle: Path) -> None:
    entry = read_manifest(bundle).components[0].graph
    content = (bundle / entry.name).read_bytes()
    for other in (content[:-1], content + b"x", bytes(len(content))):
        (bundle / entry.name).write_bytes(other)
        with pytest.raises(IntegrityError, match=r"denoiser\.onnx does not match the manifest"):
            bundled_graph(bundle, entry)


PACKED = {"input": "a.weight", "layer": "a", "role": "weight", "dtype": "int8", "shape": [4, 6]}
FP4 = {**PACKED, "dtype": "float4e2m1"}


@pytest.mark.parametrize(
    ("packed", "tensor", "says"),
    [
        (PACKED, torch.zeros(4, 6, dtype=torch.int8), ""),
        (FP4, torch.zeros(4, 3, dtype=torch.uint8), ""),
        (PACKED, torch.zeros(4, 5, dtype=torch.int8), r"a\.weight as int8 \[4, 5\], and the engine takes it as int8"),
        (PACKED, torch.zeros(24, dtype=torch.int8), r"as int8 \[24\], and the engine"),
        (PACKED, torch.zeros(4, 6, dtype=torch.uint8), r"as uint8 \[4, 6\], and the engine takes it as int8 \[4, 6\]"),
        (FP4, torch.zeros(4, 6, dtype=torch.uint8), r"as uint8 \[4, 6\], and the engine takes it as float4e2m1"),
        (PACKED, None, r"has a\.weight not at all"),
    ],
)
def test_a_pack_is_of_the_types_and_shapes_that_the_engine_reads(
    packed: dict[str, Any], tensor: Any, says: str, demo_bundle: Path
) -> None:
    from overcrank.engines.manifest import PackedEntry

    entry = read_manifest(demo_bundle).components[0].model_copy(update={"packed": [PackedEntry(**packed)]})
    tensors = {} if tensor is None else {"a.weight": tensor}
    if not says:
        require_packed(entry, tensors)
        return
    with pytest.raises(CheckpointError, match=says):
        require_packed(entry, tensors)
