"""`overcrank build`, which is `build-engine`."""

from __future__ import annotations

import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click
from overcrank.cli.completion import CARD, MODEL
from overcrank.cli.json_output import json_option, print_json
from overcrank.cli.options import Command, bounds_options, quantization_options, store_option


@click.command(
    cls=Command,
    name="build-engine",
    examples=(
        "build-engine --model ltx --gpu 4070",
        "build-engine --model wan-2.2-ti2v-5b --gpu sm_120 --precision fp8 --max-height 704",
        "build-engine --model wan-2.2-ti2v-5b --gpu 4090 --layout transformer=wan2.2_5B_fp8_scaled.safetensors",
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
    "--layout",
    multiple=True,
    help="PART=FILE of a quantized single file (or its URL), whose header says how layers are stored; repeatable.",
)
@click.option("--dtype", multiple=True, help="PART=TYPE, such as vae=bf16 [default: as published]; repeatable.")
@click.option(
    "--lora-rank",
    type=int,
    default=0,
    show_default=True,
    help="LoRAs beside the weights at run time, of up to this rank together: a multiple of 16; 0 for none.",
)
@click.option(
    "--lora-layers",
    type=click.Choice(["quantized", "all"]),
    default="quantized",
    show_default=True,
    help="Which linear layers take them; LoRAs are merged into the others.",
)
@click.option("--allow-fallback", is_flag=True, help="Keep an engine that runs quantized layers in 16 bit.")
@click.option("--embed-weights", is_flag=True, help="Weights inside the engine, in place of inputs of it.")
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
    from overcrank.api import build
    from overcrank.cli import build_report as report
    from overcrank.cli.display import building, downloading
    from overcrank.engines.request import BuildOptions
    from overcrank.engines.store import Store

    started = time.monotonic()
    quiet = options["quiet"] or options["as_json"]
    options["components"] = options["components"].replace(",", " ").split()
    settings = BuildOptions(**{field.name: options[field.name] for field in fields(BuildOptions)})
    store = Store(options["store"], options["out"])
    with building(quiet) as progress:
        bundles = build(
            options["model"],
            options["gpus"],
            settings,
            store=store,
            progress=progress,
            watch=partial(downloading, quiet=quiet),
        )
    seconds = time.monotonic() - started
    if options["as_json"]:
        print_json("build", seconds=round(seconds, 2), bundles=bundles)
    else:
        report.summary(bundles, seconds, settings.layout)
