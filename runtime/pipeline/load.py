"""A model's name → a diffusers pipeline on this machine's device, with engines under it."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.store import Store
from overcrank.errors import CheckpointError, ModelError, RequestError, UserError
from overcrank.export.files.weight_file import open_weights
from overcrank.export.quantization.pack import require_loras
from overcrank.models import components, family, hub_folder, local_folder, resolve
from overcrank.models.base import Preset, Variant
from overcrank.models.hub import Watch, progress_bar
from overcrank.models.presets import fetched, with_preset
from overcrank.options import merged, option
from overcrank.runtime.options import LoadOptions
from overcrank.runtime.pipeline.checkpoint import (
    checkpoint_digest,
    file_variant,
    files_digest,
    require_calibrated_on,
    require_whole,
)
from overcrank.runtime.pipeline.dtypes import check_parts, dtypes_of, of_parts
from overcrank.runtime.pipeline.imports import pipeline_class
from overcrank.runtime.pipeline.lora import LoraFile
from overcrank.runtime.pipeline.lora_parts import lora_of
from overcrank.runtime.pipeline.lora_sets import LoraSets
from overcrank.runtime.pipeline.marks import without_marks
from overcrank.runtime.pipeline.naming import files_of, with_paths
from overcrank.runtime.pipeline.placement import AUTO, parts_of, place, planned, vram_of, working_bytes
from overcrank.runtime.render.schedule import scheduler_of
from overcrank.runtime.sessions.card import card_of, no_card
from overcrank.runtime.sessions.fingerprint import sample_of

if TYPE_CHECKING:
    import torch
    from overcrank.runtime.render.request import RenderRequest
    from overcrank.runtime.sessions.sources import Quantization
    from torch import nn

log = logging.getLogger("overcrank")


def load(model: str, options: LoadOptions | None = None, *, watch: Watch = progress_bar, **changes: Any) -> Any:
    """The model's pipeline with the weights it is published with, accelerated (see `accelerate`).

    `model`: family, variant, diffusers folder, hub id, or a weight file that tells which model it is. `changes`:
    fields of LoadOptions, over those of `options`, such as vram="low". What the hub's cache lacks is downloaded, which
    `watch` shows.

    Raises UserError for an unknown option, part or type, ModelError when the checkpoint cannot be found or read,
    StoreError when the disk is too small for it, CheckpointError for a LoRA of another model.
    """
    return loaded(model, merged(LoadOptions, options, changes), watch)


def loaded(model: str, options: LoadOptions, watch: Watch = progress_bar, changing: bool = False) -> Any:
    """As `load`; `changing`: jobs bring LoRAs of their own, so those of the options are merged when a job has none."""
    import torch
    from overcrank.runtime.pipeline.accelerate import denoisers, with_engines
    from overcrank.runtime.pipeline.adapters import adapters_of
    from overcrank.runtime.pipeline.parts import parts_from_files

    model, options = with_paths(model, options)
    given = files_of(options)
    quantization, vram, store = options.quantization(), vram_of(options.vram), Store(options.store)
    variant, preset = with_preset(resolve(model), options.preset)
    asked = [lora_of(argument) for argument in options.loras]
    if changing and options.pack is not None:
        raise UserError(
            f"{option('pack', options.pack)} holds weights with the LoRAs they were packed with, and jobs name their "
            f"own; leave the pack out, or render those jobs apart."
        )
    require_files(options, variant)
    folder = checkpoint_folder(model, variant, store, watch, given)
    if quantization is not None:
        require_calibrated_on(folder, quantization.recipe, variant, store, given)
    device = _usable_device(options.device)
    dtypes = dtypes_of(variant, device, options.dtype)
    check_parts(dtypes if options.dtype else {}, folder)
    pipe = _read(folder, variant, dtypes, parts_from_files(given, variant, folder, dtypes))
    family(variant.family).prepare(pipe, variant)
    adapters = adapters_of(pipe, variant)
    adapters.always = _of_preset(preset)
    if not options.fuse_loras:
        adapters.leave_unmerged([module for module, _ in denoisers(pipe, variant)])
    adapters.set([] if changing else asked, keep=changing or not options.fuse_loras)
    if quantization is not None and not changing:  # else what is packed is of one set, and not kept for the next
        merged_ones = adapters.about(merged_alone=True)
        digest = _weights_of(folder, variant, (given, merged_ones), store)
        quantization = _of_weights(quantization, digest, merged_ones, adapters.parts)
    moved = _placed(pipe, variant, torch.device(device), vram, store)
    name = preset.checkpoint if preset and preset.checkpoint else variant.name
    about = with_engines(pipe, replace(options, model=name), quantization).overcrank
    about.moved, about.dtypes = moved, of_parts(pipe) if options.dtype else {}
    about.weights = {part: _about_file(file, store) for part, file in given.items()}
    about.variant = replace(about.variant, renders=variant.renders, preset=variant.preset)
    if adapters.changeable and options.pack is None:
        about.lora_sets = LoraSets(adapters, asked)
    return pipe


def require_files(options: LoadOptions, variant: Variant) -> None:
    """Compare the files of parts with the variant's networks before anything is downloaded; warn of what will be slow.

    `options`: with paths (naming.py). Raises CheckpointError for a file that is not the part's.
    """
    given = files_of(options)
    if not given:
        return
    from overcrank.runtime.pipeline.parts import require_parts, warn_of_card

    parts = require_parts(given, variant)
    if options.precision == "auto" and options.backend != "eager":
        warn_of_card(parts, variant, _usable_device(options.device))


def _of_weights(
    quantization: Quantization, digest: str, loras: list[dict[str, Any]], parts: Mapping[str, nn.Module]
) -> Quantization:
    """With the digest of the weights it is for; raises UserError for a pack of other LoRAs."""
    if quantization.pack is not None:
        require_loras(quantization.pack, loras)
    samples = {part: sample_of(list(module.parameters())) for part, module in parts.items()} if digest else {}
    return replace(quantization, source=digest, samples=samples)


def checkpoint_folder(
    model: str, variant: Variant, store: Store, watch: Watch = progress_bar, given: Collection[str] = ()
) -> Path:
    """The diffusers folder that `model` names, or the variant's, downloaded where the hub's cache lacks it.

    Of parts that are `given`, configurations alone are downloaded.
    """
    own = local_folder(model)
    return own or hub_folder(variant, whole=True, home=store.root, watch=watch, elsewhere=given)


def _read(folder: Path, variant: Variant, dtypes: Mapping[str, torch.dtype], parts: Mapping[str, nn.Module]) -> Any:
    """The pipeline of the variant's first task, on the processor, as diffusers reads it but for `parts`."""
    name = next(iter(variant.tasks.values()))
    pipeline = pipeline_class(name)
    kind = file_variant(folder, variant)
    require_whole(folder, pipeline, kind, given=parts.keys())
    try:
        each = {part or "default": dtype for part, dtype in dtypes.items()}
        with without_marks(folder) as plain:
            pipe = pipeline.from_pretrained(plain, dtype=each, local_files_only=True, variant=kind or None, **parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder} cannot be loaded as {name}: {str(error).rstrip('.')}.") from error
    if plain != folder:
        pipe.register_to_config(_name_or_path=str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _placed(pipe: Any, variant: Variant, device: torch.device, vram: str | int, store: Store) -> tuple[str, ...]:
    """Put the parts where they belong; returns those that are on the card only while they run."""
    from overcrank.runtime.pipeline.accelerate import denoisers
    from overcrank.runtime.sessions.select import engines_of

    if device.type != "cuda":
        if vram != AUTO:
            raise UserError(f"{option('vram')} is for a card, and this render is on the processor; leave it out.")
        pipe.to(device)
        return ()
    parts = parts_of(pipe, [module for module, _ in denoisers(pipe, variant)])
    plan = planned(parts, working_bytes(engines_of(store, variant)), vram, card_of(device).free)
    if plan.moved:
        log.info("%s: %s", option("vram", vram), plan.line())
    place(pipe, plan.moved, device)
    return plan.moved


def _of_preset(preset: Preset | None) -> list[LoraFile]:
    if preset is None:
        return []
    return [LoraFile(file, lora.strength, lora.part, lora.repository) for lora, file in fetched(preset)]


def _weights_of(
    folder: Path, variant: Variant, added: tuple[Mapping[str, Path], Sequence[dict[str, Any]]], store: Store
) -> str:
    """Digest of the weights a pipeline has; empty for a checkpoint that is not in safetensors.

    `added`: files in the place of parts, and what a sidecar says of LoRAs.
    """
    given, loras = added
    try:
        digest = checkpoint_digest(folder, components(variant), store, given)
    except CheckpointError:
        return ""
    return sha256(json.dumps([digest, [[x["sha256"], x["scale"], x["parts"]] for x in loras]]).encode()).hexdigest()


def _about_file(file: Path, store: Store) -> dict[str, str]:
    """What a sidecar says of a part's file."""
    return {"file": file.name, "sha256": files_digest(open_weights(file).files, store)}


def _usable_device(device: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if device is None:
        return "cuda" if there else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"{option('device', device)}: use cpu, cuda, or cuda:N.")
    if device.startswith("cuda") and not there:
        if reason := no_card():
            raise UserError(f"{option('device', device)}: {reason.sentence()}.")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES is '{visible}')" if visible is not None else ""
        what = f"PyTorch {torch.__version__} finds no NVIDIA GPU here{why}"
        raise UserError(f"{option('device', device)}: {what}; use {option('device', 'cpu')}.")
    return device


def pipeline_for(pipe: Any, variant: Variant, task: str, request: RenderRequest | None = None) -> Any:
    """A pipeline of the class for `task` over the same modules, with a scheduler of its own (schedule.py).

    Raises RequestError when the variant has no such pipeline.
    """
    import diffusers

    if task not in variant.tasks:
        raise RequestError(f"{variant.name} cannot do {task}: it does {', '.join(variant.tasks)}.")
    cls = getattr(diffusers, variant.tasks[task])
    scheduler = getattr(pipe, "scheduler", None)
    own = {"scheduler": scheduler_of(scheduler, variant.rendering(task), request)} if scheduler else {}
    parameters = inspect.signature(cls.__init__).parameters
    parts = {k: v for k, v in {**pipe.config, **pipe.components}.items() if k in parameters}
    pipeline = cls(**(parts | own))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
