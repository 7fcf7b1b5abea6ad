"""What --model, --weights and --lora name: a model, the files of its parts, here or in a ComfyUI models tree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from overcrank.errors import CheckpointError, ModelError, UserError
from overcrank.export.files.comfy import ComfyTree, comfy_tree, kinds_of_part
from overcrank.export.files.contents import Contents, contents_of
from overcrank.export.files.identify import Identified
from overcrank.export.files.kinds import LORA, encoder_part, kind_of
from overcrank.export.files.nearest import unlike
from overcrank.export.files.parts import parts_of
from overcrank.export.files.single_file import VAE_PREFIXES
from overcrank.export.files.weight_file import open_weights
from overcrank.models import families, family, resolve
from overcrank.models.base import Variant
from overcrank.models.registry import variant_named
from overcrank.options import option
from overcrank.runtime.options import LoadOptions

Words = Sequence[str] | Mapping[str, str | Path]
WEIGHTS = (".safetensors", ".sft", ".gguf", ".safetensors.index.json", ".ckpt", ".pt", ".pth", ".bin")
_WRITTEN = re.compile(r"(?P<part>[A-Za-z_]\w*)=(?P<file>.+)", re.DOTALL)
_LORA_SCALE = re.compile(r"(?P<file>.+?)(?P<scale>:[-+.\deE]+)?", re.DOTALL)


@dataclass(frozen=True)
class Named:
    """A model by a name that `resolve` takes, and the files that its parts come from."""

    model: str
    files: dict[str, Path] = field(default_factory=dict)


def weights_of(variant: Variant, weights: Words, comfy: str | Path | None = None) -> dict[str, Path]:
    """Part of the variant → file, of words [PART=]FILE; raises UserError as `with_paths`."""
    tree = _tree(comfy)
    return _given([_asked(word, tree) for word in _listed(weights)], variant)


def layout_words(model: str, words: Words, comfy: str | Path | None = None) -> list[str]:
    """PART=FILE of words [PART=]FILE, in which a URL has its part; raises UserError as `with_paths`."""
    listed = list(_listed(words))
    urls = [word for word in listed if "://" in word]
    here = weights_of(resolve(model), [word for word in listed if word not in urls], comfy)
    return urls + [f"{part}={file}" for part, file in here.items()]


def with_paths(model: str, options: LoadOptions) -> tuple[str, LoadOptions]:
    """The model's own name, and options in which every file has its path; the same again for what has them already.

    Raises UserError for a file that is not there, or does not tell which model or part it is.
    """
    tree = _tree(options.comfy)
    named = named_files(model, options.weights, tree)
    loras = [_lora_with_path(word, tree) for word in options.loras]
    words = [f"{part}={file}" for part, file in named.files.items()]
    return named.model, replace(options, weights=words, loras=loras, comfy=None)


def named_files(model: str, weights: Words, tree: ComfyTree | None = None) -> Named:
    """`model`: as for `resolve`, or a weight file that tells which model it is; `weights`: [PART=]FILE."""
    asked = [_asked(word, tree) for word in _listed(weights)]
    whole = _whole(model, tree)
    if whole is not None:
        variant = _variant_of(whole, {part for part, _ in asked} - {""})
        files = {network.part: whole for network in contents_of(whole).networks}
        model = variant.name
    elif asked:
        variant, files = resolve(model), {}
    else:
        return Named(model)
    return Named(model, files | _given(asked, variant))


def _given(asked: Iterable[tuple[str, Path]], variant: Variant) -> dict[str, Path]:
    given: dict[str, Path] = {}
    for part, file in asked:
        for name in [_part(part, file, variant)] if part else _parts_of(file, variant):
            if name in given:
                raise UserError(f"{option('weights', [f'{name}={file}'])}: {name} is given twice; give it once.")
            given[name] = file
    return given


def _listed(weights: Words) -> Sequence[str]:
    return [f"{part}={file}" for part, file in weights.items()] if isinstance(weights, Mapping) else weights


def _tree(comfy: str | Path | None) -> ComfyTree | None:
    folder = comfy or os.environ.get("OVERCRANK_COMFY")
    return comfy_tree(Path(folder)) if folder else None


def files_of(options: LoadOptions) -> dict[str, Path]:
    """Part → file, of options that `with_paths` gave."""
    return {part: Path(file) for part, _, file in (str(word).partition("=") for word in options.weights)}


def is_file(model: str) -> bool:
    """Whether `model` is written as a weight file's name is."""
    return model.lower().endswith(WEIGHTS) and not Path(model).expanduser().is_dir()


def _asked(word: str, tree: ComfyTree | None) -> tuple[str, Path]:
    """(part, file) of a word; the part is "" where it says none."""
    match = None if Path(word).expanduser().is_file() else _WRITTEN.fullmatch(word)
    part, name = (match["part"], match["file"]) if match else ("", word)
    if not name or (not match and "=" in word and word.startswith("=")):
        raise UserError(f"{option('weights', [word])}: write PART=FILE, such as transformer=model.safetensors.")
    path = Path(name).expanduser()
    if path.exists() or tree is None:
        if not path.is_file():
            raise UserError(
                f"{option('weights', [word])}: {path} {'is a folder' if path.is_dir() else 'does not exist'}; give "
                f"PART=FILE with a .safetensors or .gguf file."
            )
        return part, path.absolute()
    return part, tree.file(name, kinds_of_part(part), option("weights", [word])).absolute()


def _whole(model: str, tree: ComfyTree | None) -> Path | None:
    """The weight file that `model` is; None for the name of a model, a folder or a hub id."""
    path = Path(model).expanduser()
    if not is_file(model):
        return None
    if path.is_file():
        return path.absolute()
    if tree is not None:
        return tree.file(model, ("diffusion_models", "checkpoints"), option("model", model)).absolute()
    raise ModelError(f"{option('model', model)}: {path} does not exist; give a .safetensors or .gguf file, or a model.")


def _variant_of(file: Path, parts: Iterable[str]) -> Variant:
    """The one published variant that a file's networks, and the parts named beside it, are of."""
    contents = contents_of(file)
    denoiser = next((n for n in contents.networks if n.part not in VAE_PREFIXES), None)
    if denoiser is None:
        raise ModelError(f"{option('model', file)}: it {_no_model(contents)}.")
    every = [variant for name in contents.variants if (variant := variant_named(name)) is not None]
    variants = [v for v in every if all(word in words_of(v) or _of_encoder(word) for word in parts)] or every
    if len(variants) == 1:
        return variants[0]
    if not variants:
        raise ModelError(
            f"{option('model', file)}: it {unlike(denoiser, contents.shapes)}; download it again, or convert it with "
            f"diffusers (from_single_file, save_pretrained) and give the folder."
        )
    raise ModelError(
        f"{option('model', file)}: it is the {denoiser.part} of {' and of '.join(v.name for v in variants)}, which are "
        f"one network; say which: {option('model', variants[0].name)} "
        f"{option('weights', [f'{denoiser.part}={file}'])}."
    )


def _no_model(contents: Contents) -> str:
    """What a file is that tells no model, and how to give it."""
    file, vae = contents.file.path, next(iter(contents.networks), None)
    if contents.kind == LORA:
        return f"is a LoRA, which goes onto a model's own weights: give a model, and {option('loras', [file])}"
    if vae is not None:
        of = f" of {', '.join(vae.variants[:3])}" if vae.variants else ""
        return f"holds a {vae.cls}{of} alone: give a model, and {option('weights', [f'{vae.part}={file}'])}"
    if contents.encoder:
        own = option("weights", [f"{encoder_part(contents.kind)}={file}"])
        return f"is a {contents.kind}: give a model, and {own}"
    names = ", ".join(sorted(contents.shapes)[:3])
    return f"is of no model that overcrank has, by its tensors ({names} …); it has {', '.join(families())}"


def words_of(variant: Variant) -> dict[str, str]:
    """What a part with engines may be called → the part."""
    parts = {part: part for part in parts_of(variant)}
    words = family(variant.family).part_words
    return parts | (dict(words) if set(words.values()) <= parts.keys() else {})


def _part(word: str, file: Path, variant: Variant) -> str:
    """The part of a word; text encoders, which have no engines, are compared with the checkpoint when it is there."""
    known = words_of(variant)
    if word not in known and not _of_encoder(word):
        raise UserError(
            f"{option('weights', [f'{word}={file}'])}: {variant.name} has no part '{word}'; it has "
            f"{', '.join(known)}, text_encoder."
        )
    return known.get(word, word)


def _of_encoder(part: str) -> bool:
    return part.startswith(("text_encoder", "image_encoder"))


def _parts_of(file: Path, variant: Variant) -> list[str]:
    """Parts that a file given without one is for."""
    contents = contents_of(file)
    parts: list[str] = []
    for network in contents.networks:
        own = [part for part, c in parts_of(variant).items() if c.cls.rpartition(".")[2] == network.cls]
        if len(own) > 1:
            words = [word for word, part in words_of(variant).items() if part in own and word != part] or own
            raise UserError(
                f"{option('weights', [file])}: {variant.name} has {len(own)} parts of this network; say which: "
                f"{' or '.join(option('weights', [f'{word}={file}']) for word in words)}."
            )
        parts += own
    if not parts and contents.encoder:
        return [encoder_part(contents.kind)]
    if not parts:
        raise UserError(f"{option('weights', [file])}: it {_foreign(contents, variant)}.")
    return parts


def _foreign(contents: Contents, variant: Variant) -> str:
    others: Iterable[Identified] = (n for n in contents.networks if n.variants)
    for network in others:
        return (
            f"is the {network.part} of {', '.join(network.variants[:3])}, not of {variant.name}; give "
            f"{option('model', network.variants[0])}"
        )
    return _no_model(contents)


def _lora_with_path(word: str, tree: ComfyTree | None) -> str:
    """[PART=]FILE[:SCALE] with the file's path; as it is for what `lora_of` will not find either.

    Raises UserError for a file that is no LoRA but a model's own weights.
    """
    match = None if Path(word).expanduser().is_file() else _WRITTEN.fullmatch(word)
    part, rest = (f"{match['part']}=", match["file"]) if match else ("", word)
    split = _LORA_SCALE.fullmatch(rest)
    name, scale = (split["file"], split["scale"] or "") if split else (rest, "")
    path = Path(name).expanduser()
    if not path.is_file() and tree is None:
        return word
    file = path if path.is_file() or tree is None else tree.file(name, ("loras",), option("loras", [word]))
    _require_lora(file)
    return f"{part}{file.absolute()}{scale}"


def _require_lora(file: Path) -> None:
    try:
        if kind_of(open_weights(file).tensors) == LORA:
            return
        contents = contents_of(file)
    except CheckpointError:
        return  # who merges it says what is wrong
    what = next(
        (network.part for network in contents.networks), encoder_part(contents.kind) if contents.encoder else ""
    )
    if what:
        kind = f"a model's {what}" if contents.networks else f"a {contents.kind}"
        raise UserError(
            f"{option('loras', [file])}: it is {kind}, no LoRA; give {option('weights', [f'{what}={file}'])}."
        )
