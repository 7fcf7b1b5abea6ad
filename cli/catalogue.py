"""What `overcrank models` shows, and docs/models.md: every family and variant, from the same data that builds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from overcrank.cli.json_output import print_json
from overcrank.engines.targets import TARGETS
from overcrank.models import components, families, family, parameter_counts, resolve
from overcrank.models.base import Preset, Variant
from overcrank.models.hub import published
from overcrank.models.presets import applied, presets, schedule_of
from overcrank.units import human_bytes


def variants() -> Iterator[Variant]:
    """Of every family, its default first."""
    for name in families():
        own = family(name)
        yield from sorted(own.variants, key=lambda v: v.name != own.default)


def described(variant: Variant) -> dict[str, Any]:
    """One variant as plain data; `parameters` is the first component's number: the denoiser's."""
    counts = parameter_counts(variant)
    return {
        "name": variant.name,
        "family": variant.family,
        "title": variant.title,
        "parameters": next(iter(counts.values()), 0),
        "native": str(variant.native),
        "fps": variant.fps,
        "tasks": variant.tasks,
        "components": [c.name for c in family(variant.family).components(variant)],
        "default_components": [c.name for c in components(variant)],
        "checkpoint": variant.hub_id,
        "steps": variant.rendering().steps,
        "guidance": variant.rendering().guidance,
        "presets": [preset.name for preset in presets(variant)],
    }


def precisions() -> dict[str, list[str]]:
    """Target → what this version builds for it."""
    return {t.name: list(t.precisions) for t in TARGETS}


def print_models(as_json: bool) -> None:
    import click

    if as_json:
        print_json("models", models=[described(v) for v in variants()], targets=precisions())
        return
    rows = [described(v) for v in variants()]
    width = max(len(r["name"]) for r in rows)
    heading = ""
    for row in rows:
        if row["family"] != heading:
            heading = row["family"]
            click.echo(f"\n{family(heading).title} ({heading}): {', '.join(row['default_components'])}")
        cells = f"{_billions(row['parameters']):>8}  {row['native']:>12} at {row['fps']:>2} fps"
        click.echo(f"  {row['name']:<{width}}  {cells}  {', '.join(row['tasks'])}")
    click.echo("\nA family's name alone means its first variant. Precisions built for each target:")
    for target, names in precisions().items():
        click.echo(f"  {target:<7} {', '.join(names)}")
    click.echo("overcrank models show NAME explains one.")


def explained(name: str) -> dict[str, Any]:
    """What `print_model` prints, as plain data; dimensions of inputs are lengths, or names of axes."""
    variant = resolve(name)
    counts = parameter_counts(variant)
    networks = [
        {
            "name": c.name,
            "class": c.cls,
            "default": c.default,
            "parameters": counts.get(c.name),
            "inputs": [{"name": t.name, "dims": t.dims, "dtype": t.dtype} for t in c.inputs],
        }
        for c in family(variant.family).components(variant)
    ]
    profile = {"min": str(variant.minimum), "opt": str(variant.native), "max": str(variant.maximum)}
    return described(variant) | {"networks": networks, "profile": profile, "download": published(variant)}


def print_model(name: str) -> None:
    """One variant: its networks with their sizes and inputs, what it renders, and the command that builds it."""
    from overcrank.cli.terminal import SafeConsole

    variant = resolve(name)
    row, counts = described(variant), parameter_counts(variant)
    console = SafeConsole()
    console.print(f"{row['title']} ({row['name']}, family {row['family']})", style="bold")
    for line in _checkpoint(variant):
        console.print(line)
    console.print(
        f"native       {row['native']} at {row['fps']} fps, {row['steps']} steps, guidance {row['guidance']:g}"
    )
    low, high = variant.minimum, variant.maximum
    console.print(f"profile      {low} … {high} unless --min-… and --max-… say otherwise")
    for axis, (step, offset) in family(variant.family).grid(variant).items():
        console.print(f"  {axis:<10} {f'a multiple of {step}' if not offset else f'{step}k+{offset}'}")
    for task, pipeline in row["tasks"].items():
        console.print(f"{task:<17}{pipeline}")
    for component in family(variant.family).components(variant):
        size = f"{_billions(counts[component.name])} parameters" if component.name in counts else ""
        note = "" if component.default else " (built with --components)"
        console.print(f"{component.name}{note}  {component.cls}  {size}", style="bold")
        for tensor in component.inputs[:8]:
            console.print(f"    {tensor.name} [{', '.join(map(str, tensor.dims))}]")
        if len(component.inputs) > 8:
            console.print(f"    and {len(component.inputs) - 8} more inputs")
    for preset in presets(variant):
        for line in _preset_lines(variant, preset):
            console.print(line)
    console.print(f"\nbuild-engine --model {row['name']} --gpu rtx4090")


def _preset_lines(variant: Variant, preset: Preset) -> list[str]:
    """What `--preset NAME` does: its schedule, what it fetches, and where the publisher says so."""
    rendered = applied(variant, preset)
    lines = [f"--preset {preset.name}  {preset.title}: {', '.join(rendered.tasks)}"]
    lines.append(f"    {schedule_of(rendered.rendering())}")
    if preset.checkpoint:
        lines.append(f"    in place of the checkpoint: {preset.checkpoint}")
    lines += [f"    {x.part} + {x.strength:g} × {x.repository}: {x.file}" for x in preset.loras]
    return [*lines, f"    {preset.source}"]


def _checkpoint(variant: Variant) -> Iterator[str]:
    """Where a render's checkpoint comes from, how large it is, and under which licence."""
    if not variant.sources:
        yield "checkpoint   (local)"
        return
    for i, source in enumerate(variant.sources):
        revision = f", revision {source.revision}" if source.revision != "main" else ""
        parts = f" ({', '.join(source.parts)})" if source.parts else ""
        yield f"{'' if i else 'checkpoint':<13}{source.id}{revision}{parts}"
    if variant.hub_file:
        yield f"             {variant.hub_file} (one file: convert it first)"
    about = published(variant)
    size = (
        f"{'about ' if about.get('about') else ''}{human_bytes(about['bytes'])}"
        if "bytes" in about
        else "size not known"
    )
    yield f"download     {size}" + (", gated: accept the licence and log in first" if about.get("gated") else "")
    page = f"https://huggingface.co/{variant.sources[0].id}"
    yield f"licence      {about['licence']}, {page}" if "licence" in about else f"licence      see {page}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count else "?"


# ── docs/models.md ───────────────────────────────────────────────────────────────────


def markdown(figures: Path | None, notes: str) -> str:
    """docs/models.md: `notes` (its hand-written part), every variant, and the figures in bench/results."""
    lines = [notes.rstrip(), "", "## Variants", ""]
    rows = []
    for variant in variants():
        row = described(variant)
        mark = " (default)" if variant.name == family(variant.family).default else ""
        tasks = ", ".join(f"{t} ({p})" for t, p in row["tasks"].items())
        cells = [f"`{row['name']}`{mark}", _billions(row["parameters"]), row["native"], row["fps"], tasks]
        rows.append([*cells, ", ".join(row["components"])])
    lines += _table("model | parameters | native | fps | tasks (diffusers pipeline) | components", rows)
    lines += ["", "## Targets and precisions", ""]
    lines += _table("target | builds", [(t, ", ".join(p)) for t, p in precisions().items()])
    if figures is not None and figures.is_dir():
        builds, parity = (json.loads((figures / f"{n}.json").read_text("utf-8")) for n in ("families", "parity"))
        lines += _builds(builds["rows"], parity["components"]) + _pipelines(parity["pipelines"])
    return "\n".join(lines) + "\n"


def _table(head: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _builds(rows: list[dict[str, Any]], parity: list[dict[str, Any]]) -> list[str]:
    """Full-size builds, one row a component and target; parity is that of tiny networks of the same class."""
    worst: dict[tuple[str, str], float] = {}
    for p in parity:
        key = (p["class"], p["component"])
        worst[key] = max(worst.get(key, 0.0), p["parity"])
    table = []
    for r in sorted(rows, key=lambda r: (r["family"], r["variant"], r["component"], r["target"])):
        (component,) = components(resolve(r["variant"]), (r["component"],))
        error = worst.get((component.cls, component.name))
        cells = [
            r[k] for k in ("variant", "component", "target", "export_s", "compile_s", "engine_mb", "activation_gb")
        ]
        table.append([*cells, "not compared" if error is None else f"{error:.0e}"])
    totals = {r["variant"]: (r["build_s"], r["peak_ram_gb"]) for r in rows}
    return [
        "",
        "## Full-size builds, weights as inputs",
        "",
        "Measured by `python bench/build_families.py`, two cores, no GPU; activation memory at the native shape.",
        "Parity is the largest error, relative to the largest value, of the same class and component at tiny widths",
        "(`python bench/parity.py`).",
        "",
        *_table("model | component | target | export s | compile s | engine MB | activation GB | parity", table),
        "",
        *_table("model | all targets together, s | peak RAM GB", [(n, *t) for n, t in sorted(totals.items())]),
    ]


def _pipelines(rows: list[dict[str, Any]]) -> list[str]:
    """Renders of tiny pipelines through the public command, ONNX Runtime against eager PyTorch."""
    table = [(r["pipeline"], {"": "text"}.get(r["media"], r["media"]), r["psnr"]) for r in rows]
    head = "diffusers pipeline | from | PSNR dB"
    return ["", "## Pipelines rendered, graphs against eager", "", *_table(head, table)]
