"""What `calibrate`, `pack` and `verify --report` print."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from overcrank.calibration.pack import Packing, pack
from overcrank.calibration.quality import markdown, quality_report
from overcrank.calibration.sensitivity import QualityTarget, SearchResult
from overcrank.cli.display import downloading
from overcrank.cli.terminal import SafeConsole
from overcrank.engines.manifest import read_manifest
from overcrank.engines.store import Store
from overcrank.errors import UserError
from overcrank.export.quantization.recipe import Recipe
from overcrank.models import hub_folder, local_folder, resolve, variant_from_manifest
from overcrank.runtime.options import LoadOptions
from overcrank.runtime.pipeline.naming import files_of
from overcrank.runtime.render.request import RenderRequest, prompts_of
from rich.console import Console
from rich.markdown import Markdown


def print_recipe(recipe: Recipe, out: Path, seconds: float) -> None:
    """What a person reads at the end."""

    console = SafeConsole()
    for name, component in recipe.components.items():
        for part, ranges in component.ranges.items():
            widest = max(ranges, key=lambda layer: ranges[layer].amax)
            console.print(f"{name} ({part}): {len(ranges)} ranges for {recipe.precision}")
            console.print(f"widest   {ranges[widest].amax:g} in {widest}")
    console.print(f"{recipe.calibration.samples if recipe.calibration else 0} samples in {seconds:.0f} s")
    console.print(f"recipe   {out}")
    console.print(
        f"next     build-engine --model {recipe.model} --precision {recipe.precision} --recipe {out} --gpu auto"
    )


def print_search(result: SearchResult, target: QualityTarget) -> None:
    """What a person reads of the search."""

    console = SafeConsole()
    for block, effect in list(result.effects.items())[: max(5, len(result.kept))]:
        console.print(
            f"{'16 bit ' if block in result.kept else result.recipe.precision:<8} {effect:8.3%} of the output  {block}"
        )
    now, low, high = (n / 1e6 for n in result.bytes)
    counts = f"{len(result.kept)} of {len(result.effects)} blocks in 16 bit"
    console.print(f"reached  {QualityTarget(target.kind, result.reached)}, asked {target}; {counts}")
    whole = f"{low:,.1f} MB all in {result.recipe.precision}, {high:,.1f} MB in 16 bit"
    console.print(f"weights  {now:,.1f} MB of these layers; {whole}")


def print_pack(out: Path, seconds: float) -> None:
    print(f"pack     {out}  {out.stat().st_size / 1e9:.2f} GB in {seconds:.1f} s")


def timed_pack(model: str, packing: Packing, out: Path, store: Store, quiet: bool) -> None:
    """`pack` with a line a layer on a terminal, and its size and time at the end."""

    started = time.monotonic()
    if local_folder(model) is None:  # first, for a terminal shows one thing that moves
        given = files_of(LoadOptions(weights=packing.weights))
        hub_folder(resolve(model), home=store.root, watch=partial(downloading, quiet=quiet), elsewhere=given)
    with Console(stderr=True, quiet=quiet).status("packing") as status:
        pack(model, packing, out, store, lambda layer: status.update(f"packing {layer}"))
    print_pack(out, time.monotonic() - started)


def print_quality(
    bundle: Path, checkpoint: Path | None, folder: Path, prompts: Path | None, samples: int, steps: int | None
) -> None:
    """Make the report and print its figures; `checkpoint` may be None for a model that ships with its own."""

    variant = variant_from_manifest(read_manifest(bundle))
    checkpoint = checkpoint or local_folder(variant.name)
    if checkpoint is None:
        raise UserError("--report renders, for which it needs the checkpoint: give --checkpoint FOLDER.")
    lines = prompts_of(prompts, variant)[-samples:]  # calibration takes the first ones
    requests = [
        RenderRequest(prompt=p, seed=1000 + i, steps=steps, formats=("latents",)).completed(variant)
        for i, p in enumerate(lines)
    ]
    report = quality_report(bundle, checkpoint, requests, folder)
    Console().print(Markdown(markdown(report).partition("![cosine")[0]))
    print(f"report   {folder / 'report.md'}")
