"""Presets of few steps: those that a model has, and a variant as one of them renders it."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError, RequestError
from overcrank.models import families, family
from overcrank.models.base import Preset, PublishedLora, Rendering, Repository, Variant
from overcrank.models.hub import one_file
from overcrank.options import option


def every_preset() -> tuple[Preset, ...]:
    return tuple(p for name in families() for p in family(name).presets)


def presets(variant: Variant) -> tuple[Preset, ...]:
    """Those of the variant, or of the published one it follows."""
    return tuple(p for p in family(variant.family).presets if {variant.name, variant.like} & set(p.variants))


def with_preset(variant: Variant, name: str | None) -> tuple[Variant, Preset | None]:
    """The variant as the preset renders it, and the preset; the variant as it is for no name.

    Raises RequestError for a preset that does not exist, with the nearest names, or is of other models, with theirs.
    """
    if not name:
        return variant, None
    for preset in presets(variant):
        if preset.name == name:
            return applied(variant, preset), preset
    own = dict.fromkeys(p.name for p in presets(variant))
    has = f"{variant.name} has {', '.join(own) or 'no preset'}"
    others = [v for p in every_preset() if p.name == name for v in p.variants]
    if others:
        raise RequestError(f"{option('preset', name)} is for {', '.join(others)}; {has}.")
    names = dict.fromkeys(p.name for p in every_preset())
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise RequestError(f"{option('preset', name)}: there is no such preset; {hint}{has}.")


def applied(variant: Variant, preset: Preset) -> Variant:
    """The variant with what the preset changes of each task's rendering; tasks it is not for are gone."""
    tasks = preset.tasks or tuple(variant.renders)
    renders = {task: _changed(r, preset) for task, r in variant.renders.items() if task in tasks}
    rendered = replace(variant, renders=renders, preset=preset.name)
    return replace(rendered, hub_id=preset.checkpoint, hub_file="", repositories=()) if preset.checkpoint else rendered


def fetched(preset: Preset) -> list[tuple[PublishedLora, Path]]:
    """The preset's LoRA files, from the hub cache or the network; raises ModelError naming one that is in neither."""
    files = []
    for lora in preset.loras:
        try:
            files.append((lora, one_file(Repository(lora.repository), lora.file)))
        except ModelError as error:
            raise ModelError(
                f"{option('preset', preset.name)} needs {lora.file} of '{lora.repository}', which cannot be had: "
                f"{error}"
            ) from error
    return files


def schedule_of(rendering: Rendering) -> str:
    """In words: the exact steps of a rendering, or their number, with shift and guidance."""
    shift = next((v for k, v in rendering.scheduler.items() if k in ("shift", "flow_shift")), None)
    if rendering.sigmas or rendering.timesteps:
        lists = {"sigmas": rendering.sigmas, "timesteps": rendering.timesteps}
        steps = ", ".join(f"{k} {' '.join(f'{v:g}' for v in values)}" for k, values in lists.items() if values)
    else:
        steps = f"{rendering.steps} steps" + (f" at shift {shift:g}" if shift is not None else "")
    second = f" and {rendering.guidance_2:g}" if rendering.guidance_2 is not None else ""
    return f"{steps}, guidance {rendering.guidance:g}{second}"


def _changed(rendering: Rendering, preset: Preset) -> Rendering:
    """Field by field; arguments of the call are laid over those there are, as some belong to the decoder."""
    changes: dict[str, Any] = {"source": preset.source, "differs": "", **preset.changes}
    if "arguments" in changes:
        changes["arguments"] = {**rendering.arguments, **changes["arguments"]}
    return replace(rendering, **changes)
