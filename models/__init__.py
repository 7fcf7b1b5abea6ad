"""What `--model` means: a family, a published variant, a diffusers folder, or a hub id."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from overcrank.errors import ModelError, ShapeError
from overcrank.files import user_path
from overcrank.models._hub_files import INDEX
from overcrank.models.base import Config, Repository, Variant, VideoShape
from overcrank.models.hub import hub_folder, hub_json, read_json
from overcrank.models.matching import completed_variant, variant_from_configs, variant_from_manifest
from overcrank.models.registry import components, families, family, main_part, published, variant_named
from overcrank.options import option

__all__ = [
    "check_shape",
    "closest_family",
    "components",
    "families",
    "family",
    "hub_folder",
    "local_folder",
    "main_part",
    "packaged_model",
    "parameter_counts",
    "prompt_note",
    "resolve",
    "variant_from_configs",
    "variant_from_manifest",
]


def parameter_counts(variant: Variant) -> dict[str, int]:
    """Component → number of parameters of a published variant; empty for others (bench/count_parameters.py)."""
    counts: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "parameters.json").read_text("utf-8"))
    return counts.get(variant.name, {})


def check_shape(variant: Variant, shape: VideoShape) -> None:
    """Raise ShapeError naming every invalid value and the nearest valid ones."""
    wrong = []
    for axis, (step, offset) in family(variant.family).grid(variant).items():
        value = getattr(shape, axis)
        smallest = offset if offset else step
        if value >= smallest and (value - offset) % step == 0:
            continue
        below = max(smallest, (value - offset) // step * step + offset)
        near = str(below) if value < below else f"{below} or {below + step}"
        rule = f"a multiple of {step}" if offset == 0 else f"{step}k+{offset}"
        wrong.append(f"{axis} {value} is not {rule} (nearest: {near})")
    if shape.batch < 1:
        wrong.append(f"batch {shape.batch} is not positive")
    if wrong:
        raise ShapeError(f"{variant.name} cannot make {shape}: {'; '.join(wrong)}.")


def resolve(model: str) -> Variant:
    """Family, variant, local diffusers folder or hub id → Variant.

    Raises ModelError with the nearest names, or with what the folder lacks.
    """
    names = families()
    variant = variant_named(family(model).default if model in names else model)
    if variant is not None:
        return completed_variant(variant)
    path = user_path(model, option("model"))
    if path.exists():
        return _from_folder(path)
    if path.is_symlink():
        raise ModelError(f"{path} is a link to {path.readlink()}, which is not there.")
    by_hub = _known_repository(model)
    if by_hub is not None:
        return completed_variant(by_hub)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    close = difflib.get_close_matches(model, [*names, *published()], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(names)}."
    raise ModelError(f"Unknown model '{model}' (not a family, a variant, a folder or a hub id like owner/name): {hint}")


def _known_repository(model: str) -> Variant | None:
    """The published variant of a hub id; ids that differ only in case, and former ones, are the same model's."""
    for variant in published().values():
        source = variant.sources[0] if variant.sources and not variant.hub_file else None
        if source is not None and model.lower() in (name.lower() for name in (source.id, *source.former)):
            return variant
    return None


def _from_folder(path: Path) -> Variant:
    if path.suffix in (".safetensors", ".gguf", ".ckpt"):
        raise ModelError(
            f"{path} is a weight file, no diffusers folder; overcrank inspect {path} says which model it is: give that "
            f"as {option('model')}."
        )
    if not path.is_dir():
        raise ModelError(
            f"{path} is a file; {option('model')} takes a diffusers folder (with model_index.json), a family or a "
            f"variant."
        )
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"{path} is not a diffusers checkpoint: it has no model_index.json. Save one with "
            f"pipe.save_pretrained(folder), or name a family: {option('model', 'ltx')} needs no files."
        )
    index = _with_classes(read_json(path / INDEX), str(path))
    configs = {
        sub.name: read_json(file)
        for sub in sorted(path.iterdir())
        for file in (sub / "config.json", sub / "scheduler_config.json")
        if file.is_file()
    }
    return _from_index(path.name, str(path), index, configs)


def _from_index(name: str, where: str, index: Config, configs: Mapping[str, Config]) -> Variant:
    part = _main_part(index)
    if part is None:
        raise ModelError(f"{where}/model_index.json names neither a transformer nor a unet; it is no video model.")
    if part not in configs:
        raise ModelError(f"{where} lacks {part}/config.json, which model_index.json names.")
    sources = (where, *(str(c["_name_or_path"]) for c in configs.values() if c.get("_name_or_path")))
    return variant_from_configs(name, str(index[part][1]), configs, str(index.get("_class_name", "")), sources)


def _with_classes(index: Config, where: str) -> Config:
    """The index; raises ModelError for a part that is not [library, class], or [null, null]."""
    for part, entry in index.items():
        kinds = [type(word) for word in entry] if isinstance(entry, list) else [str, str]
        if kinds not in ([str, str], [type(None)] * 2):
            raise ModelError(f"{where}/{INDEX}: {part} is {str(entry)[:80]}, not a library and a class; correct it.")
    return index


def _main_part(index: Config) -> str | None:
    """`main_part` of a model_index.json."""
    return main_part({part: str(entry[1]) for part, entry in index.items() if isinstance(entry, list)})


def _from_hub(hub_id: str) -> Variant:
    """Only the configuration files are fetched, from the local hub cache or the network."""
    source = Repository(hub_id)
    index = _with_classes(hub_json(source, INDEX), hub_id)
    engines = {part for variant in published().values() for part in variant.configs if part != "scheduler"}
    parts = [p for p, entry in index.items() if p in engines and isinstance(entry, list) and entry[0]]
    configs = {p: hub_json(source, f"{p}/config.json") for p in parts}
    return replace(_from_index(hub_id.split("/")[1], hub_id, index, configs), hub_id=hub_id)


def packaged_model() -> str:
    """The model whose checkpoint ships with this package."""
    return next(v.name for v in published().values() if v.packaged)


def prompt_note(variant: Variant, prompt: str) -> str:
    """What a model in this package knows, when the prompt asks for something else; empty for other models."""
    from overcrank.models.demo import captions

    return captions.note(prompt) if variant.packaged else ""


def local_folder(model: str) -> Path | None:
    """The diffusers folder that `model` names: one on disk, or one that ships with this package."""
    variant = variant_named(model)
    if variant is not None and variant.packaged:
        return Path(__file__).parent / variant.packaged
    path = user_path(model, option("model"))
    return path if path.is_dir() else None


def closest_family(text: str) -> str:
    """The family whose name is in the text, for advice."""
    names = families()
    hits = [n for n in names if n.replace("_", "") in text.lower().replace("-", "").replace("_", "")]
    return hits[0] if hits else names[0]
