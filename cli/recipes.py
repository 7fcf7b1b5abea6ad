"""docs/recipes.md: for every variant and task the call and schedule that a default render makes, and where from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from overcrank.cli.catalogue import variants
from overcrank.models import _negative_prompts
from overcrank.models.base import Rendering, Variant

HEAD = """# How each model is rendered

Made by `./build.sh pages` from the data that `overcrank render` reads; do not edit. A render does what is written here
unless an option says otherwise (docs/rendering.md). Where a publisher's own way and diffusers' differ, the publisher's
is taken. *Carried* is the scheduler that the checkpoint holds, *laid over* what the publisher changes of it. Sigmas and
timesteps that are listed are final. Types are those on a card with bf16; on a processor everything is fp32."""


def markdown() -> str:
    """The page."""
    lines = [HEAD]
    heading = ""
    for variant in variants():
        if variant.family != heading:
            heading = variant.family
            lines += ["", f"## {heading}"]
        lines += ["", f"### {variant.name}", "", *_facts(variant), *_tasks(variant)]
    lines += ["", "## Negative prompts", ""]
    lines += [f"- **{name}**: {text}" for name, text in _prompts().items()]
    return "\n".join(lines) + "\n"


def _facts(variant: Variant) -> Iterator[str]:
    types = [f"{part or ('the rest' if len(variant.dtypes) > 1 else 'all')} {t}" for part, t in variant.dtypes.items()]
    yield f"- types: {', '.join(sorted(types, key=lambda t: t.startswith('the rest')))}"
    if variant.text_length:
        yield f"- text: {variant.text_length} tokens"
    if "scheduler" in variant.configs:
        yield f"- carried: {_settings(variant.configs['scheduler'])}"


def _tasks(variant: Variant) -> list[str]:
    """One paragraph for tasks that are rendered alike."""
    grouped: dict[str, list[str]] = {}
    for task, rendering in variant.renders.items():
        grouped.setdefault("\n".join(_recipe(variant, rendering)), []).append(task)
    return [f"\n**{', '.join(tasks)}**\n\n{text}" for text, tasks in grouped.items()]


def _recipe(variant: Variant, rendering: Rendering) -> Iterator[str]:
    shape = rendering.shape or variant.native
    size = f"{shape.width}x{shape.height}" if rendering.sized else "of the picture's shape"
    yield f"- call: {rendering.pipeline}, {size}, {shape.frames} frames at {rendering.fps or variant.fps:g} fps"
    if "scheduler" in variant.configs:
        yield f"- schedule: {_schedule(rendering)}"
    if variant.text_length:
        prompt = next((name for name, text in _prompts().items() if text == rendering.negative_prompt), "none")
        yield f"- guidance: {_guidance(rendering)}; negative prompt: {prompt}"
    elif rendering.guidance != 1:
        yield f"- guidance: {_guidance(rendering)}"
    if rendering.arguments:
        yield f"- also: {', '.join(f'{k} {_word(v)}' for k, v in rendering.arguments.items())}"
    yield f"- source: {rendering.source}"
    if rendering.differs:
        yield f"- not as there: {rendering.differs}"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _schedule(rendering: Rendering) -> str:
    steps = f"{rendering.steps} steps"
    for name in ("sigmas", "timesteps"):
        if getattr(rendering, name):
            steps += f" at {name} {', '.join(f'{x:.8g}' for x in getattr(rendering, name))}"
    return f"{steps}; laid over: {_settings(rendering.scheduler) if rendering.scheduler else 'nothing'}"


def _guidance(rendering: Rendering) -> str:
    text = f"{rendering.guidance:g}"
    if rendering.guidance_2 is not None:
        text = f"{text} (high-noise expert), {rendering.guidance_2:g} (low-noise expert)"
    if not rendering.contrasted:
        text += ", an input of the network"
    return text + (f", rescaled by {rendering.guidance_rescale:g}" if rendering.guidance_rescale else "")


def _settings(config: Mapping[str, Any]) -> str:
    words = [str(config["_class_name"])] if "_class_name" in config else []
    return ", ".join(words + [f"{k} {v}" for k, v in config.items() if k != "_class_name"])


def _prompts() -> dict[str, str]:
    return {n.lower().replace("_", " "): v for n, v in vars(_negative_prompts).items() if n.isupper()}


if __name__ == "__main__":
    import click

    click.echo(markdown(), nl=False)
