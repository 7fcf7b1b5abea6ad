"""Families found by file name, and what `--model` means.

A family is a module of this package with `TITLE`, `VARIANTS`, `DEFAULT`, `DENOISER_CLASSES`,
`components(variant)`, `grid(variant)` and `latent(variant, shape)`; what else it may define for
rendering has its defaults in _common.py. Its file name is its name. Names with an underscore are
no families.
"""

from __future__ import annotations

import difflib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError, ShapeError
from overcrank.models.base import Component, Config, Variant, VideoShape

__all__ = [
    "check_shape",
    "components",
    "families",
    "family",
    "hook",
    "hub_folder",
    "local_folder",
    "main_part",
    "packaged_model",
    "parameter_counts",
    "resolve",
    "variant_from_configs",
    "variant_from_manifest",
]


def families() -> tuple[str, ...]:
    names = (m.name for m in pkgutil.iter_modules(__path__))
    return tuple(sorted(n for n in names if n not in ("base", "demo") and not n.startswith("_")))


def family(name: str) -> Any:
    """The family's module; a broken import inside it surfaces as itself."""
    return import_module(f"{__name__}.{name}")


def hook(variant: Variant, name: str) -> Any:
    """A function of the variant's family, or what families share where it has none of its own."""
    from overcrank.models import _common

    return getattr(family(variant.family), name, None) or getattr(_common, name)


def components(variant: Variant, names: tuple[str, ...] = ()) -> tuple[Component, ...]:
    """The variant's components: the default ones, or the named ones in the family's order."""
    every: tuple[Component, ...] = family(variant.family).components(variant)
    known = [c.name for c in every]
    for name in names:
        if name not in known:
            raise ModelError(f"{variant.name} has no component '{name}'; it has {', '.join(known)}.")
    return tuple(c for c in every if (c.name in names if names else c.default))


def main_part(classes: Mapping[str, str]) -> str | None:
    """Of a checkpoint's or pipeline's parts, by their class, the one that a family is known by."""
    known = {cls for name in families() for cls in family(name).DENOISER_CLASSES}
    named = [part for part in ("transformer", "unet") if part in classes]  # named in errors, if of no family
    return next((part for part, cls in classes.items() if cls in known), named[0] if named else None)


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
    known = _variants()
    if model in names:
        return known[family(model).DEFAULT]
    if model in known:
        return known[model]
    path = Path(model).expanduser()
    if path.exists():
        return _from_folder(path)
    by_hub = [v for v in known.values() if v.hub_id == model and not v.hub_file]
    if by_hub:
        return by_hub[0]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    close = difflib.get_close_matches(model, [*names, *known], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(names)}."
    raise ModelError(f"Unknown model '{model}' (not a family, a variant, a folder or a hub id like owner/name): {hint}")


def variant_from_configs(name: str, denoiser: str, configs: Mapping[str, Config], pipeline: str = "") -> Variant:
    """A variant of the family whose denoiser class is `denoiser`; `pipeline` is the checkpoint's pipeline class.

    What configs cannot tell (native shape, guidance, steps) comes from the published
    variant of the same architecture, else from the family's default.
    """
    for owner in families():
        module = family(owner)
        if denoiser not in module.DENOISER_CLASSES:
            continue
        nearest = _nearest(module, configs, pipeline)
        filled = {k: {**c, **configs.get(k, {})} for k, c in nearest.configs.items()}
        return replace(nearest, name=name, title=name, configs=filled, hub_id="", hub_file="", packaged="")
    raise ModelError(f"{name}: no family here runs a {denoiser}; overcrank has {', '.join(families())}.")


def variant_from_manifest(manifest: Any) -> Variant:
    """The variant a bundle was built from; a published one, or one made of the bundle's configs."""
    known = _variants().get(manifest.model)
    if known is not None and all(_same(known.configs[k], manifest.configs.get(k, {})) for k in known.configs):
        return known
    nearest = _nearest(family(manifest.family), manifest.configs, "")
    return replace(nearest, name=manifest.model, title=manifest.model, configs=manifest.configs, hub_id=manifest.hub_id)


def _nearest(module: Any, configs: Mapping[str, Config], pipeline: str) -> Variant:
    """The family's published variant most like these; its default before equals."""
    default: Variant = _variants()[module.DEFAULT]
    found: Variant = max((default, *module.VARIANTS), key=lambda v: _likeness(v, configs, pipeline))
    return found


def _same(published: Config, given: Config) -> bool:
    return all(_plain(published[k]) == _plain(given[k]) for k in published if k in given and not k.startswith("_"))


def _likeness(variant: Variant, configs: Mapping[str, Config], pipeline: str) -> tuple[bool, bool, int, int]:
    """(made for this pipeline, all that is given agrees, number of fields set alike, number that agree)."""
    pairs = [(c, configs.get(k, {})) for k, c in variant.configs.items()]
    both = [(c[f], given[f]) for c, given in pairs for f in c if f in given]
    return (
        pipeline in (*variant.tasks.values(), *variant.saved_as),
        all(_same(c, given) for c, given in pairs),
        sum(bool(a) == bool(b) for a, b in both),
        sum(_plain(a) == _plain(b) for a, b in both),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _variants() -> dict[str, Variant]:
    return {v.name: v for name in families() for v in family(name).VARIANTS}


def _from_folder(path: Path) -> Variant:
    if not path.is_dir():
        raise ModelError(
            f"{path} is a file; --model takes a diffusers folder (with model_index.json), a family or a variant."
        )
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"{path} is not a diffusers checkpoint: it has no model_index.json. Save one with "
            f"pipe.save_pretrained(folder), or name a family: --model ltx needs no files."
        )
    index = _read_json(path / "model_index.json")
    configs = {
        sub.name: _read_json(file)
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
    return variant_from_configs(name, str(index[part][1]), configs, str(index.get("_class_name", "")))


def _main_part(index: Config) -> str | None:
    """`main_part` of a model_index.json."""
    return main_part({part: str(entry[1]) for part, entry in index.items() if isinstance(entry, list)})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object.")
    return content


def _from_hub(hub_id: str) -> Variant:
    """Only the configuration files are fetched, from the local hub cache or the network."""
    index = _read_json(Path(_fetched(hub_id, "model_index.json")))
    parts = [p for p in (_main_part(index), "vae") if p is not None and p in index]
    configs = {p: _read_json(Path(_fetched(hub_id, f"{p}/config.json"))) for p in parts}
    return _from_index(hub_id.split("/")[1], hub_id, index, configs)


def packaged_model() -> str:
    """The model whose checkpoint ships with this package."""
    return next(v.name for v in _variants().values() if v.packaged)


def local_folder(model: str) -> Path | None:
    """The diffusers folder that `model` names: one on disk, or one that ships with this package."""
    known = _variants().get(model)
    if known is not None and known.packaged:
        return Path(__file__).parent / known.packaged
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def hub_folder(variant: Variant, whole: bool = False) -> Path:
    """The variant's checkpoint as a diffusers folder, from the hub cache or the network.

    Holds the folders of the components, or with `whole` all a pipeline needs.
    """
    if variant.hub_file:
        raise ModelError(
            f"{variant.name} is published as one file ({variant.hub_id}: {variant.hub_file}); convert it with "
            f"diffusers (from_single_file, save_pretrained) and give the folder as --model."
        )
    try:
        _fetched(variant.hub_id, "model_index.json")
    except ModelError as error:
        if not whole:
            raise
        raise ModelError(
            f"The checkpoint of {variant.name} ('{variant.hub_id}') is not in the local hub cache and cannot be "
            f"fetched; give its diffusers folder as --model, or leave --model out to render the demo."
        ) from error
    from huggingface_hub import snapshot_download

    folders = sorted({c.subfolder for c in components(variant)})
    if whole:
        folders += ["text_encoder*", "tokenizer*", "image_encoder", "feature_extractor", "scheduler"]
    return Path(snapshot_download(variant.hub_id, allow_patterns=["*.json", *(f"{f}/*" for f in folders)]))


def _fetched(hub_id: str, file: str) -> str:
    """Path of a hub file; the network is tried once, not for half a minute."""
    import os
    import socket
    from urllib.parse import urlsplit

    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, file)
    if isinstance(cached, str):
        return cached
    try:
        if os.environ.get("HF_HUB_OFFLINE"):
            raise OSError("HF_HUB_OFFLINE is set")
        host = urlsplit(constants.ENDPOINT)
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
        return str(hf_hub_download(hub_id, file))
    except Exception as error:
        raise ModelError(
            f"'{hub_id}' is not in the local hub cache and cannot be fetched ({error}). The architecture alone "
            f"suffices for engines with weights as inputs: --model {_closest_family(hub_id)} needs no download."
        ) from error


def _closest_family(text: str) -> str:
    names = families()
    hits = [n for n in names if n.replace("_", "") in text.lower().replace("-", "").replace("_", "")]
    return hits[0] if hits else names[0]
