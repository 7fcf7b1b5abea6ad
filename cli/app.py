"""Command line: parse, call, print. Nothing heavy is imported before it is needed.

Exit status: 0 done; 1 the work failed; 2 the request is wrong, and nothing was done; 3 some of the work failed;
130 cancelled.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from overcrank import __version__
from overcrank.cli.build import build_engine
from overcrank.cli.completion import BUNDLE, MODEL
from overcrank.cli.engines import engines
from overcrank.cli.json_output import json_option, print_json
from overcrank.cli.keys import keys
from overcrank.cli.options import (
    Command,
    Group,
    Numbers,
    file_options,
    quantization_options,
    ray_option,
    render_options,
    store_option,
)
from overcrank.errors import UserError
from overcrank.files import user_path


def _versions(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib import metadata

    click.echo(f"overcrank {__version__}")
    names = {
        "TensorRT for RTX": ("tensorrt-rtx",),
        "TensorRT": ("tensorrt",),
        "torch": ("torch",),
        "diffusers": ("diffusers",),
        "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    }
    for title, distributions in names.items():
        version = "not installed"
        for name in distributions:
            try:
                version = f"{metadata.version(name)}{' (' + name + ')' if title == 'onnxruntime' else ''}"
                break
            except metadata.PackageNotFoundError:
                continue
        click.echo(f"{title} {version}")
    context.exit()


@click.group(cls=Group)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions, help="Show versions.")
def main() -> None:
    """Faster video diffusion: TensorRT engines for any card, built on any machine."""


main.add_command(engines)
main.add_command(keys)


main.add_command(build_engine)
main.add_command(build_engine, "build")


@main.command(cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Diffusers folder whose weights are used [default: random]."
)
@file_options
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Largest relative error.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also render prompts, and write here what a quantized bundle costs in quality.",
)
@click.option("--prompts", type=click.Path(path_type=Path, dir_okay=False), help="For the report, one a line.")
@click.option("--samples", type=click.IntRange(min=1), default=4, show_default=True, help="Prompts of the report.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps of the report [default: the model's].")
@json_option
@store_option
def verify(
    bundle: str,
    checkpoint: Path | None,
    tolerance: float,
    report: Path | None,
    as_json: bool,
    store: Path | None,
    **options: Any,
) -> None:
    """Run a bundle's graphs in ONNX Runtime against the eager modules."""
    from overcrank.cli.checks import print_checks
    from overcrank.engines.store import Store
    from overcrank.runtime.verify import Weights, verify_bundle

    path = Store(store).resolve(bundle)
    folder = None if checkpoint is None else user_path(str(checkpoint), "--checkpoint")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--checkpoint {checkpoint} is no folder; give a diffusers folder.")
    weights = Weights(folder, options.pop("weights"), options.pop("comfy"))
    if report is not None and weights.words:
        raise UserError("--report renders a whole checkpoint: leave --weights out, or --report.")
    if as_json:
        checks = list(verify_bundle(path, weights))
        good = all(check.within(tolerance) for check in checks)
        print_json("verify", path=path, good=good, tolerance=tolerance, checks=checks)
    else:
        good = print_checks(verify_bundle(path, weights), tolerance)
    if report is not None:
        from overcrank.cli.calibration import print_quality

        print_quality(path, folder, report, **options)
    if not good:
        sys.exit(1)


@main.command(cls=Command)
@click.option("--model", type=MODEL, help="Family, variant, diffusers folder, or hub id [default: the demo model].")
@click.option("--precision", type=click.Choice(["fp8", "int8", "nvfp4"]), required=True, help="Of quantized layers.")
@click.option(
    "--method",
    type=click.Choice(["max", "percentile", "mse", "smoothquant"]),
    default="max",
    show_default=True,
    help="How ranges follow from what is seen; mse and smoothquant are for int8.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="One a line, or jobs as for batch (.jsonl) [default: the model's own, or 64 that ship].",
)
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="First frames, for image-to-video."
)
@click.option("--samples", type=int, default=16, show_default=True, help="Videos to denoise.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps [default: the model's].")
@click.option("--auto", is_flag=True, help="Keep the most sensitive blocks in 16 bit until --quality holds.")
@click.option("--quality", help="For --auto: PSNR of frames (35dB) or cosine of latents (0.995) [default: 35dB].")
@click.option("--device", help="cuda or cpu [default: cuda when there is a card].")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.json"),
    show_default=True,
    help="The recipe to write.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
@store_option
def calibrate(**options: Any) -> None:
    """Denoise prompts in 16 bit, measure every layer's range, and write the recipe."""
    from overcrank.calibration import run as calibration
    from overcrank.cli.calibration import print_recipe, print_search
    from overcrank.cli.display import counting, downloading

    auto, quality = options.pop("auto"), options.pop("quality")
    if quality is not None and not auto:
        raise UserError("--quality is what --auto searches for; add --auto.")
    model, quiet = options.pop("model") or "", options.pop("quiet")
    settings = calibration.CalibrationOptions(**options, quality=(quality or "35dB") if auto else "")
    watching = calibration.Watching(partial(downloading, quiet=quiet), partial(counting, quiet=quiet), print_search)
    started = time.monotonic()
    recipe = calibration.calibrate(model, settings, watching=watching)
    print_recipe(recipe, options["out"], time.monotonic() - started)


@main.command(cls=Command)
@click.option(
    "--model",
    type=MODEL,
    required=True,
    help="Family, variant, diffusers folder, hub id, or a file that tells which model it is.",
)
@file_options
@click.option("--precision", type=click.Choice(["fp8", "int8", "nvfp4"]), required=True, help="Of quantized layers.")
@quantization_options
@click.option(
    "--compute", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True, help="Of the engine."
)
@click.option(
    "--lora", "loras", multiple=True, metavar="[PART=]FILE[:SCALE]", help="Merged before packing; repeatable."
)
@click.option("--out", "-o", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The pack to write.")
@click.option("--quiet", is_flag=True, help="No progress.")
@store_option
def pack(model: str, compute: str, loras: tuple[str, ...], out: Path, quiet: bool, **options: Any) -> None:
    """Quantize a checkpoint's layers, one at a time, into a file that engines and renders read."""
    from overcrank.calibration.pack import Packing
    from overcrank.cli.calibration import timed_pack
    from overcrank.engines.store import Store
    from overcrank.export.quantization.recipe import layers_of
    from overcrank.runtime.options import LoadOptions
    from overcrank.runtime.pipeline.naming import with_paths

    recipe, layers = layers_of(options["precision"], options["activations"], options["recipe"])
    named = LoadOptions(weights=options["weights"], loras=loras, comfy=options["comfy"])
    model, named = with_paths(model, named)
    packing = Packing(layers, recipe, compute, named.loras, named.weights)
    timed_pack(model, packing, out, Store(options["store"]), quiet)


@main.command(
    cls=Command,
    examples=(
        'overcrank render "a red circle moving right"',
        'overcrank render "a yellow square growing on a black background" -o square.gif',
        'overcrank render "a fox in the snow" --model wan-2.2-t2v-a14b --preset lightx2v-4step -o fox.mp4',
    ),
)
@click.argument("text", metavar="[PROMPT]", default="")
@render_options
@click.option("--prompt", default="", help="What the video shows; the same as PROMPT.")
@click.option("--negative-prompt", help='What it should not show; "" is nothing [default: the publisher\'s].')
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("out.mp4"), show_default=True, help="File to write."
)
@click.option("--image", type=click.Path(path_type=Path), help="First frame: image-to-video.")
@click.option("--last-image", type=click.Path(path_type=Path), help="Last frame, alone or with --image.")
@click.option("--video", type=click.Path(path_type=Path), help="Input video: video-to-video.")
@click.option("--strength", type=float, help="Denoising strength of video-to-video, 0 to 1 [default: 0.8].")
@click.option("--audio", type=click.Path(path_type=Path), help="Sound track to mux into the MP4.")
@click.option("--steps", type=int, help="Denoising steps [default: the model's].")
@click.option("--guidance", type=float, help="Classifier-free guidance scale; 1 is none [default: the model's].")
@click.option(
    "--guidance-2",
    type=float,
    help="Guidance scale of the low-noise expert, of a model with two [default: the model's].",
)
@click.option("--guidance-rescale", type=float, help="Against overexposure by guidance, 0 to 1 [default: the model's].")
@click.option("--guidance-until", type=float, help="Share of the steps that are guided, such as 0.7 [default: 1].")
@click.option("--scheduler", help="Scheduler class of diffusers [default: the publisher's].")
@click.option(
    "--shift", type=float, help="Of the schedule: more spends more steps at high noise [default: the model's]."
)
@click.option(
    "--sigmas", type=Numbers(), help="The schedule, falling from at most 1: 1,0.94,0.83,0.63; nothing shifts it."
)
@click.option("--timesteps", type=Numbers(), help="The schedule in timesteps of 1000: 1000,750,500,250.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same frames.")
@click.option("--height", type=int, help="Pixels [default: the model's native].")
@click.option("--width", type=int, help="Pixels [default: the model's native].")
@click.option("--frames", type=int, help="How many [default: the model's native].")
@click.option("--seconds", type=float, help="In place of --frames: as many as come next to it.")
@click.option("--fit", is_flag=True, help="A size the model cannot make is rounded up, and cropped back.")
@click.option("--fps", type=float, help="Frames a second of the file [default: the model's].")
@click.option("--formats", default="", help="Of mp4, gif, png, sheet, latents [default: OUT's suffix and sheet].")
@click.option("--overwrite", is_flag=True, help="Replace a result of this name, with all its files.")
def render(**options: Any) -> None:
    """Render one video: an MP4, its contact sheet, and a JSON sidecar that reproduces it."""
    from overcrank.cli.render import render_one

    text = options.pop("text")
    if text and options["prompt"]:
        raise UserError(f"The prompt is given twice, as '{text}' and as --prompt '{options['prompt']}'; give it once.")
    options["prompt"] = text or options["prompt"]
    sys.exit(render_one(options))


@main.command(
    cls=Command,
    examples=(
        "overcrank batch jobs.jsonl -o renders",
        "overcrank batch jobs.jsonl -o renders --model ltx-2b-0.9.5 --lanes 2",
    ),
)
@click.argument("jobs", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", "-o", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of results.")
@render_options
@click.option("--again", is_flag=True, help="Render finished jobs again in place of skipping them.")
@click.option(
    "--lanes", type=click.IntRange(1, 4), help="Jobs at a time [default: 2 on a GPU of 24 GB or more, else 1]."
)
@ray_option
def batch(**options: Any) -> None:
    """Render every line of JOBS, a JSON Lines file; run it again to finish what was interrupted."""
    from overcrank.cli.render import render_batch

    sys.exit(render_batch(options))


@main.group(cls=Group, invoke_without_command=True)
@json_option
@click.option(
    "--markdown", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="As docs/models.md, after NOTES."
)
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False), help="bench/results, for the Markdown.")
@click.pass_context
def models(context: click.Context, as_json: bool, markdown: Path | None, figures: Path | None) -> None:
    """Every family and variant: parameters, native shape, tasks, components."""
    from overcrank.cli import catalogue

    if context.invoked_subcommand is not None:
        return
    if markdown is not None:
        click.echo(catalogue.markdown(figures, markdown.read_text("utf-8")), nl=False)
    else:
        catalogue.print_models(as_json)


@models.command("show", cls=Command)
@click.argument("model")
@json_option
def models_show(model: str, as_json: bool) -> None:
    """One family, variant, diffusers folder or hub id, explained."""
    from overcrank.cli.catalogue import explained, print_model

    if as_json:
        print_json("models show", **explained(model))
    else:
        print_model(model)


@main.command(
    cls=Command,
    examples=(
        "overcrank inspect wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "overcrank inspect https://…/model.gguf",
    ),
)
@click.argument("file")
@json_option
def inspect(file: str, as_json: bool) -> None:
    """What a weight file is, from its header alone: model, layers by format, and the commands that run it."""
    from overcrank.cli.files import as_data, lines
    from overcrank.runtime.inspect import inspect_file

    inspection = inspect_file(file)
    if as_json:
        print_json("inspect", **as_data(inspection))
    else:
        click.echo("\n".join(lines(inspection)))


@main.command(cls=Command)
@click.option("--quick", is_flag=True, help="Without compiling and running a small engine.")
@json_option
@store_option
def doctor(quick: bool, as_json: bool, store: Path | None) -> None:
    """What this machine has: card, driver, PyTorch, TensorRT; which bundles serve, and why others do not."""
    from overcrank.cli.checks import print_doctor
    from overcrank.engines.store import Store
    from overcrank.runtime.doctor import every_finding

    if not as_json:
        sys.exit(0 if print_doctor(Store(store), quick) else 1)
    findings = every_finding(Store(store), quick)
    print_json("doctor", findings=findings)
    sys.exit(1 if any(f.verdict == "bad" for f in findings) else 0)
