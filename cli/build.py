"""`overcrank build`, which is `build-engine`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from overcrank.cli.completion import CARD, MODEL
from overcrank.cli.json_output import json_option, print_json
from overcrank.cli.options import Command, bounds_options, quantization_options, quantized_layers, store_option
from overcrank.errors import UserError


@click.command(
    cls=Command,
    name="build-engine",
    examples=(
        "build-engine --model ltx --gpu 4070",
        "build-engine --model wan-2.2-ti2v-5b --gpu sm_120 --precision fp8 --max-height 704",
    ),
)
@click.option("--model", type=MODEL, required=True, help="Family (ltx), variant, diffusers folder, or hub id.")
@click.option(
    "--gpu",
    "gpus",
    type=CARD,
    required=True,
    multiple=True,
    help="sm_75 … sm_121, a card (rtx4090, dgx-spark), rtx (one engine for RTX 30, 40, 50), all, or auto; repeatable.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="fp16, bf16, fp8, int8, nvfp4, or auto (bf16 where there is bf16).",
)
@quantization_options
@click.option(
    "--dtype", "dtypes", multiple=True, help="PART=TYPE, such as vae=bf16 [default: as published]; repeatable."
)
@click.option("--allow-fallback", is_flag=True, help="Keep an engine that runs quantized layers in 16 bit.")
@click.option(
    "--weights",
    type=click.Choice(["inputs", "embedded"]),
    default="inputs",
    show_default=True,
    help="Weights as inputs of the engine, or inside it.",
)
@click.option("--height", type=int, help="Height in pixels the engine is best at [default: the model's native].")
@click.option("--width", type=int, help="Width in pixels.")
@click.option("--frames", type=int, help="Number of frames.")
@click.option(
    "--batch", type=int, help="Best-served batch; 1 and 2 (classifier-free guidance) always work [default: 2]."
)
@bounds_options("min")
@bounds_options("max")
@click.option("--static", is_flag=True, help="Serve this one shape only.")
@click.option("--components", default="", help="Comma-separated components [default: the family's usual ones].")
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt_rtx", "tensorrt"]),
    default="tensorrt_rtx",
    show_default=True,
    help="TensorRT for RTX, or TensorRT.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to put the bundle in.")
@store_option
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Worker processes [default: by cores and RAM].")
@click.option("--quiet", is_flag=True, help="No progress.")
@json_option
def build_engine(**options: Any) -> None:
    """Build TensorRT engines of MODEL for GPU, on any machine: no GPU, no weights needed."""
    from overcrank.cli import build_report as report
    from overcrank.engines.build import build
    from overcrank.engines.store import Store
    from overcrank.engines.workers import LocalWorkers

    started = time.monotonic()
    requests = _requests(options)
    store = Store(options["store"], options["out"])
    with report.progress_display(options["quiet"] or options["as_json"]) as progress:
        built = build(requests, store, progress, partial(LocalWorkers, options["jobs"]))
    seconds = time.monotonic() - started
    if options["as_json"]:
        print_json("build", seconds=round(seconds, 2), bundles=built)
    else:
        report.summary(built, seconds)


def _requests(options: dict[str, Any]) -> list[Any]:
    from overcrank.engines.build import Request
    from overcrank.engines.profiles import PartialShape, profile_for
    from overcrank.engines.targets import gpu_names, precision_for, targets_for
    from overcrank.engines.tensorrt import driver_notes
    from overcrank.engines.types import notes, own_precision
    from overcrank.models import components, resolve

    words = [name for option in options["gpus"] for name in gpu_names(option)]
    targets = targets_for(words, options["flavour"])
    for note in driver_notes(options["flavour"], targets):
        click.echo(f"note: {note}", err=True)
    variant = resolve(options["model"])
    dtypes = _part_types(options["dtypes"], variant)
    precisions = [precision_for(t, options["precision"], own_precision(variant)) for t in targets]
    for target, precision in zip(targets, precisions, strict=True):
        for note in notes(variant, target, precision, dtypes):
            click.echo(f"note: {note}", err=True)
    recipe, layers = quantized_layers(options, options["precision"])
    names = tuple(n for n in options["components"].replace(",", " ").split())
    components(variant, names)
    axes = ("height", "width", "frames")
    low, high = (PartialShape(*(options[f"{side}_{axis}"] for axis in axes)) for side in ("min", "max"))
    best = PartialShape(*(options[axis] for axis in (*axes, "batch")))
    profile = profile_for(variant, best, minimum=low, maximum=high, static=options["static"])
    checkpoint = _checkpoint(options, variant) if options["weights"] == "embedded" else None
    return [
        Request(
            variant,
            t,
            p,
            profile,
            options["flavour"],
            names,
            checkpoint,
            layers,
            recipe,
            options["allow_fallback"],
            dtypes,
        )
        for t, p in zip(targets, precisions, strict=True)
    ]


def _part_types(words: tuple[str, ...], variant: Any) -> dict[str, str]:
    """`--dtype PART=TYPE`; raises UserError for a part that has no engine."""
    from overcrank.models import family
    from overcrank.runtime.pipeline.dtypes import typed

    parts = dict.fromkeys(c.subfolder for c in family(variant.family).components(variant))
    found = typed(words)
    for part, name in found.items():
        if part not in parts:
            raise UserError(
                f"--dtype {part or name}: name a part of {variant.name} that has engines, such as vae=bf16; "
                f"they are {', '.join(parts)}."
            )
    return found


def _checkpoint(options: dict[str, Any], variant: Any) -> Path:
    """The diffusers folder whose weights are embedded: the one named or packaged, or the hub's copy."""
    from overcrank.cli.display import downloading
    from overcrank.engines.store import Store
    from overcrank.models import hub_folder, local_folder

    watch = partial(downloading, quiet=options["quiet"] or options["as_json"])
    return local_folder(options["model"]) or hub_folder(variant, home=Store(options["store"]).root, watch=watch)
