"""What the commands share: errors as one sentence, and options that several of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from overcrank.cli.completion import BUNDLE, MODEL
from overcrank.cli.json_output import json_option
from overcrank.cli.streams import make_streams_safe
from overcrank.errors import OvercrankError, UserError, safe_text
from overcrank.options import named_as_flags

SOME_FAILED = 3
"""Exit status: some of the work failed, and the rest is done."""
SECTIONS = {
    "Input": "prompt negative_prompt image last_image video strength audio prompts images samples",
    "Size": "height width frames seconds fit fps "
    "batch min_height min_width min_frames max_height max_width max_frames static",
    "Quality and speed": "steps seed guidance guidance_2 guidance_rescale guidance_until scheduler shift sigmas "
    "timesteps preset loras fuse_loras cache method auto quality",
    "Engines": "model weights comfy models gpus gpu precision precisions activations recipe layout pack backend bundle "
    "pull slow_engines components flavour embed_weights lora_rank lora_layers allow_fallback compute retry_failed",
    "Machine and memory": "device dtype vram lanes ray jobs",
    "Output": "out formats overwrite again metadata preview index report store quiet as_json yes dry_run",
}
"""Headings of a long help, and the parameters under each."""


class _Described(click.Command):
    """`-h`, examples at the end, and the options of a long help under headings."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **named: Any) -> None:
        named.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        if examples:
            named["epilog"] = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        super().__init__(*args, **named)

    def main(self, *args: Any, **named: Any) -> Any:
        make_streams_safe()
        return super().main(*args, **named)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {
            p.name: row
            for p in self.get_params(context)
            if isinstance(p, click.Option) and (row := p.get_help_record(context)) is not None
        }
        if len(rows) < 9:
            super().format_options(context, formatter)
            return
        for title, names in SECTIONS.items():
            listed = [rows.pop(name) for name in names.split() if name in rows]
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)
        with formatter.section("Other"):
            formatter.write_dl(list(rows.values()))


class Group(_Described, click.Group):
    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group.format_options(self, context, formatter)

    def invoke(self, context: click.Context) -> Any:
        return exit_on_error(lambda: super(Group, self).invoke(context))


class Command(_Described):
    def invoke(self, context: click.Context) -> Any:
        return exit_on_error(lambda: super(Command, self).invoke(context))


def exit_on_error(call: Callable[[], Any]) -> Any:
    """Our errors are one sentence on stderr and their own exit code."""
    try:
        with named_as_flags():
            return call()
    except OvercrankError as error:
        echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        sys.exit(error.exit_code)


def echo(text: object, err: bool = False) -> None:
    """One line that holds data of others."""
    click.echo(safe_text(text), err=err)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas or spaces between them."""

    name = "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(word) for word in str(value).replace(",", " ").split())
        except ValueError as error:
            raise UserError(
                f"{param.opts[0] if param else 'list'} {value}: give numbers such as 1,0.75,0.5."
            ) from error


def store_option(function: Any) -> Any:
    return click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where bundles and cached graphs are kept [default: $OVERCRANK_HOME, else the user cache].",
    )(function)


def ray_option(function: Any) -> Any:
    return click.option(
        "--ray", metavar="ADDRESS", help="Work on this Ray cluster: host:port, or auto for the one of this machine."
    )(function)


def bounds_options(prefix: str) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for axis in ("frames", "width", "height"):
            word = "Largest" if prefix == "max" else "Smallest"
            function = click.option(f"--{prefix}-{axis}", type=int, help=f"{word} {axis} the engine takes.")(function)
        return function

    return add


def quantization_options(function: Any) -> Any:
    """How quantized layers multiply: options that `build-engine`, `render` and `batch` share."""
    activations = click.option(
        "--activations",
        type=click.Choice(["dynamic", "static", "16bit"]),
        default="dynamic",
        show_default=True,
        help="How activations of quantized layers are quantized without a recipe: per token at run time (dynamic), "
        "with calibrated ranges (static), or not at all (16bit).",
    )
    recipe = click.option(
        "--recipe",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Formats and ranges, made by overcrank calibrate.",
    )
    return recipe(activations(function))


_FILE_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--weights",
        multiple=True,
        metavar="[PART=]FILE",
        help="A part of the model out of a .safetensors or .gguf file: transformer=, vae=, text_encoder= (Wan 2.2: "
        "high=, low=); repeatable.",
    ),
    click.option(
        "--comfy",
        type=click.Path(path_type=Path, file_okay=False),
        help="ComfyUI's folder, in whose models names of files are looked up [default: $OVERCRANK_COMFY].",
    ),
)


def file_options(function: Any) -> Any:
    """Which files a model's weights come from: options that `render`, `batch`, `pack` and `verify` share."""
    for option in reversed(_FILE_OPTIONS):
        function = option(function)
    return function


_RENDER_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--model",
        type=MODEL,
        help="Family, variant, diffusers folder, hub id, or a file that tells which model it is "
        "[default: the demo model in this package].",
    ),
    file_options,
    click.option(
        "--backend",
        type=click.Choice(["auto", "tensorrt", "onnxruntime", "eager"]),
        default="auto",
        show_default=True,
        help="auto: TensorRT, without a card ONNX Runtime for graphs that are here, else eager with a warning; "
        "tensorrt: an error in place of eager.",
    ),
    click.option(
        "--bundle", type=BUNDLE, help="Bundle of engines to use [default: the newest for this network and card]."
    ),
    click.option(
        "--precision", default="auto", show_default=True, help="Of the engines: auto (16 bit), fp8, int8 or nvfp4."
    ),
    quantization_options,
    click.option(
        "--pack", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Made by overcrank pack."
    ),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="[PART=]FILE[:SCALE]",
        help="Merged into the weights, beside those a file has quantized; PART where it fits several (Wan 2.2: high, "
        "low); repeatable.",
    ),
    click.option(
        "--fuse-loras/--no-fuse-loras",
        default=True,
        help="Merge LoRAs into weights in 16 bit; without, beside them too (--lora-layers all) [default: merge].",
    ),
    click.option("--preset", default="", help="A published way to render in few steps: overcrank models show NAME."),
    click.option(
        "--cache",
        default="off",
        show_default=True,
        help="Step caching: off, safe, fast, or a threshold such as 0.08 (extrapolates what changes by less).",
    ),
    click.option(
        "--vram",
        default="auto",
        show_default=True,
        help="How much GPU memory to use: auto (what is free), low, balanced, high, or an amount such as 8GB.",
    ),
    click.option("--pull", metavar="URL", help="Fetch the engine from there if none in the store serves this card."),
    click.option(
        "--slow-engines",
        is_flag=True,
        help="Also use engines that were measured to be slower than eager PyTorch here.",
    ),
    click.option("--device", help="cuda or cpu [default: cuda when there is a card]."),
    click.option(
        "--dtype",
        multiple=True,
        metavar="[PART=]TYPE",
        help="fp32, fp16 or bf16, of all parts or one (vae=bf16); repeatable [default: publisher's; fp32 on cpu].",
    ),
    click.option("--preview", is_flag=True, help="Write NAME.preview.png at each denoising step."),
    click.option(
        "--metadata/--no-metadata", default=True, help="Write into the MP4 what it was made of [default: do]."
    ),
    click.option("--quiet", is_flag=True, help="No progress."),
    json_option,
    store_option,
)


def render_options(function: Any) -> Any:
    """Options that `render` and `batch` share."""
    for option in reversed(_RENDER_OPTIONS):
        function = option(function)
    return function
