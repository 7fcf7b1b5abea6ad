"""Bundles and what else a store holds, printed for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from overcrank.cli.terminal import SafeConsole
from overcrank.engines.lint import Comparison, compared, lint_bundle, profile_of
from overcrank.engines.maintenance import Item
from overcrank.engines.manifest import Manifest, check_files, profile_line, read_manifest
from overcrank.engines.remote import Listed
from overcrank.engines.store import Store
from overcrank.engines.targets import BY_NAME
from overcrank.engines.trust import Keyring, fingerprint, is_unsigned
from overcrank.errors import IntegrityError, safe_text
from overcrank.models import components, variant_from_manifest
from overcrank.models.base import Component
from overcrank.units import human_bytes


def listed(store: Store) -> list[dict[str, Any]]:
    """As plain data, for programs; a bundle whose manifest cannot be read has an `error`."""
    return [
        {
            "name": path.name,
            "path": path,
            "model": manifest.model,
            "target": manifest.target,
            "precision": manifest.precision,
            "profile": {"min": manifest.min, "opt": manifest.opt, "max": manifest.max},
            "components": [c.name for c in manifest.components],
            "lora_rank": max((c.lora_rank for c in manifest.components), default=0),
            "engine_bytes": sum(c.engine.bytes for c in manifest.components),
            "flavour": manifest.flavour,
            "flavour_version": manifest.flavour_version,
        }
        if isinstance(manifest, Manifest)
        else {"name": path.name, "path": path, "error": str(manifest)}
        for path, manifest in store.list()
    ]


def described(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"path": item.path, "why": item.why, "bytes": item.bytes} for item in items]


def published(bundle: Listed) -> dict[str, Any]:
    return bundle.model_dump(mode="json", exclude={"files"}) | {"bytes": bundle.bytes}


def print_list(store: Store) -> None:
    """Each bundle's name on a line of its own, unbroken for pasting, and what it is below."""
    bundles = store.list()
    console = SafeConsole()
    if not bundles:
        console.print(f"no bundles in {store.bundles}; build one: build-engine --model ltx --gpu sm_89")
        return
    console.print(str(store.bundles))
    for path, manifest in bundles:
        console.print(f"\n{path.name}")
        for line in _about(manifest):
            console.print(f"  {line}")


def _about(manifest: Manifest | IntegrityError) -> tuple[str, ...]:
    if not isinstance(manifest, Manifest):
        return (f"unreadable: {manifest}",)
    size = human_bytes(sum(c.engine.bytes for c in manifest.components))
    engines = f"engines of {size} by {manifest.flavour} {manifest.flavour_version}"
    if rank := max((c.lora_rank for c in manifest.components), default=0):
        engines += f", LoRAs of rank {rank}"
    return f"{manifest.target}, {manifest.precision}, {engines}", profile_line(manifest)


def print_bundle(bundle: Path) -> bool:
    """Print the manifest and the check of every file; returns whether all files match."""

    manifest = read_manifest(bundle)
    wrong = check_files(bundle, manifest)
    console = SafeConsole()
    for label, value in (
        ("bundle", str(bundle)),
        ("model", f"{manifest.model} (family {manifest.family}{', ' + manifest.hub_id if manifest.hub_id else ''})"),
        ("target", f"{manifest.target}, {manifest.precision}, {manifest.flavour} {manifest.flavour_version}"),
        ("profile", profile_line(manifest)),
        ("weights", manifest.weights),
        ("signed", signed(bundle)),
        (
            "built",
            f"{manifest.created} by overcrank {manifest.overcrank} in {manifest.build_seconds:.1f} s, "
            f"peak RAM {human_bytes(manifest.peak_ram_bytes or None)}",
        ),
        ("with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
    ):
        console.print(f"{label:<9}{value}")
    for entry in manifest.components:
        values = sum(_product(p.shape) for p in entry.parameters)
        console.print(f"\n{entry.name} ({entry.cls}{'.' + entry.attribute if entry.attribute else ''})")
        console.print(f"  engine      {human_bytes(entry.engine.bytes)}, sha256 {entry.engine.sha256}")
        console.print(f"  graph       {human_bytes(entry.graph.bytes)}, sha256 {entry.graph.sha256}")
        console.print(f"  activation  {human_bytes(entry.activation_bytes)} at the largest shape")
        console.print(f"  parameters  {len(entry.parameters)} ({values / 1e9:.2f} billion values)")
        console.print(f"  plan        {entry.verdict}")
        if entry.loras:
            console.print(f"  LoRA        beside {len(entry.lora_layers)} layers, of rank {entry.lora_rank} together")
        for tensor in entry.inputs:
            shapes = f"{tensor.min} … {tensor.opt} … {tensor.max}" if tensor.min else str(tensor.dims)
            console.print(f"  input       {tensor.name} {tensor.dtype} {shapes}")
        for tensor in entry.outputs:
            console.print(f"  output      {tensor.name} {tensor.dtype} {tensor.dims}")
    for problem in wrong:
        console.print(f"\nWRONG {safe_text(problem)}")
    console.print("\nfiles do NOT match the manifest" if wrong else "\nevery file matches its SHA-256")
    return not wrong


def signed(bundle: Path) -> str:
    try:
        who = Keyring().check(bundle)
    except IntegrityError as error:
        return f"NOT VALID: {safe_text(error)}"
    if who is None:
        return "not asked for; pulled with --allow-unsigned" if is_unsigned(bundle) else "no; it was built here"
    return f"by {who.name}, {fingerprint(who.public)[:16]}"


def _product(shape: list[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def print_items(items: Sequence[Item], store: Store) -> None:
    console = SafeConsole()
    for item in items:
        path = item.path.relative_to(store.root) if item.path.is_relative_to(store.root) else item.path
        console.print(f"{human_bytes(item.bytes):>10}  {safe_text(path)}: {safe_text(item.why)}")


def lint_report(bundle: Path, compare: bool) -> dict[str, Any]:
    """What `print_lint` prints, as plain data."""
    plans = [{"name": name, "verdict": report.verdict(), "plan": report} for name, report in lint_bundle(bundle)]
    pairs = [
        {"name": c.name, "inputs": r.inputs, "embedded": r.embedded, "difference": r.inputs.difference(r.embedded)}
        for c, r in (_comparisons(bundle) if compare else ())
    ]
    return {"components": plans, "comparisons": pairs}


def _comparisons(bundle: Path) -> Iterator[tuple[Component, Comparison]]:
    manifest = read_manifest(bundle)
    target, profile = BY_NAME[manifest.target].narrowed(manifest.precision), profile_of(manifest)
    for component in components(variant_from_manifest(manifest), tuple(e.name for e in manifest.components)):
        yield component, compared(component, manifest.precision, target, profile, manifest.flavour)


def print_lint(bundle: Path, compare: bool) -> None:
    console = SafeConsole()
    for name, report in lint_bundle(bundle):
        console.print(f"{name}: {report.verdict()}")
        for epilogue, count in report.epilogues.most_common():
            console.print(f"  {count:>5} × GEMM+{epilogue}")
    if not compare:
        return
    for component, result in _comparisons(bundle):
        depth = ", ".join(f"{r.traced} of {r.full} {r.path}" for r in component.repeats) or "full depth"
        console.print(f"\n{component.name} at {depth}, compiled both ways")
        console.print(f"  weights as inputs  {result.inputs.verdict()}")
        console.print(f"  weights embedded   {result.embedded.verdict()}")
        console.print(f"  difference         {result.inputs.difference(result.embedded)}")
