"""Which files of a repository a pipeline is loaded from, told by their names alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from overcrank.errors import ModelError
from overcrank.options import option

INDEX = "model_index.json"
TEXT = (".json", ".txt", ".model", ".jinja", ".vocab", ".tiktoken", ".spm")
"""Endings of configurations and vocabularies; code, pictures and documents are not among them."""
NAMES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
"""Of weight files, as diffusers and transformers look for them; the first that is there is read."""
VOCABULARIES = (
    *(("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",)),
    *((f"*.{ending}",) for ending in ("model", "spm", "vocab", "tiktoken")),
)
"""File names, each row enough for a tokenizer."""
OPTIONAL = ("safety_checker",)  # every pipeline that has one goes without it
_WEIGHT_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$|\.[\w-]+\.index\.json$")

Read = Callable[[str], Mapping[str, Any]]
"""Content of a JSON file of the repository, by its path."""


def parts_in(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a model_index.json names, without those it sets to null."""
    return tuple(k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(v))


def part_files(where: str, files: Iterable[str], part: str, folder: str, variant: str, read: Read) -> tuple[str, ...]:
    """Paths of the part's files: configurations and vocabularies first, then weights.

    `folder` is where they lie ("" is the top of the repository), `variant` the file variant to prefer. Raises
    ModelError, naming the repository as `where`, for a part that is missing or has no weights.
    """
    prefix = f"{folder}/" if folder else ""
    text = text_files(where, files, part, folder)
    here = _inside(files, prefix)
    worded = part.startswith("tokenizer") or "tokenizer_config.json" in here
    if worded and not any(_matches(kind, here) for kind in VOCABULARIES) and not _of_bytes(here, prefix, read):
        raise ModelError(
            f"{where} lacks the vocabulary of '{part}': {prefix} holds neither tokenizer.json nor another file that "
            f"words are read from; download it again, or give a whole diffusers folder as {option('model')}."
        )
    weights: tuple[str, ...] = ()
    if "config.json" in here and "tokenizer_config.json" not in here:
        weights = weight_names(here, variant, lambda name: read(prefix + name))
        if not weights:
            raise ModelError(
                f"{where} lacks the weights of '{part}': {prefix or 'its top'} holds neither {NAMES[0][0]}.safetensors "
                f"nor another name that diffusers reads{_instead(here)}; give a diffusers folder as {option('model')}."
            )
    missing = [n for n in weights if n not in here]
    if missing:
        raise ModelError(f"{where} lacks {prefix}{missing[0]}, which the index of '{part}' names; it is not whole.")
    return (*text, *(prefix + n for n in weights))


def text_files(where: str, files: Iterable[str], part: str, folder: str) -> tuple[str, ...]:
    """As `part_files` without the weights: all that is taken of a part whose weights come from elsewhere."""
    prefix = f"{folder}/" if folder else ""
    text = sorted(n for n in _inside(files, prefix) if n.endswith(TEXT) and not _WEIGHT_INDEX.search(n))
    if not folder:
        text = [n for n in text if n == "config.json"]
    if not text:
        raise ModelError(
            f"{where} lacks the part '{part}', which its pipeline needs; it is not whole, or holds another layout: "
            f"give a diffusers folder as {option('model')}."
        )
    return tuple(prefix + n for n in text)


def _inside(files: Iterable[str], prefix: str) -> set[str]:
    """Names of the files that lie in a folder itself."""
    return {f[len(prefix) :] for f in files if f.startswith(prefix) and "/" not in f[len(prefix) :]}


def weight_names(here: set[str], variant: str, read: Read) -> tuple[str, ...]:
    """One set of weight files of a folder's `here`: a single file, or an index and the files it names."""
    for suffix in (f".{variant}", "") if variant else ("",):
        for stem, ending in NAMES:
            single = f"{stem}{suffix}.{ending}"
            indices = (f"{stem}{suffix}.{ending}.index.json", f"{stem}.{ending}.index{suffix}.json")
            index = next((n for n in indices if n in here), None)
            if index is not None and (single not in here or stem == NAMES[0][0]):  # what each library looks for first
                return (index, *_mapped(index, read(index)))
            if single in here:
                return (single,)
    return ()


def _mapped(index: str, content: Mapping[str, Any]) -> list[str]:
    """The files that an index of shards names; raises ModelError for a name that leads out of its folder."""
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{index} is no index of weight files: it has no weight_map of file names.")
    for file in files.values():
        if "/" in file or "\\" in file or file in ("", ".", "..") or "\0" in file:
            raise ModelError(f"{index} names {file!r}, which is no file beside it; its files are not read.")
    return sorted(set(files.values()))


def _of_bytes(names: set[str], prefix: str, read: Read) -> bool:
    """Whether a tokenizer has no vocabulary, as ByT5's, whose words are bytes."""
    file = "tokenizer_config.json"
    return file in names and str(read(prefix + file).get("tokenizer_class")).startswith(("ByT5", "Canine", "Perceiver"))


def _matches(patterns: tuple[str, ...], names: set[str]) -> bool:
    return all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)


def _instead(names: Iterable[str]) -> str:
    """What lies there in the place of weights under their own name."""
    for name in sorted(names):
        if re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name):
            index = re.sub(r"-\d+-of-\d+(\.\w+)$", r"\1.index.json", name)
            return f" ({name} is one of several files, whose index {index} is not there: download it too)"
        if name.endswith(".gguf"):
            return f" ({name} is GGUF, whose quantized weights are not read here)"
        if name.endswith((".safetensors", ".bin")):
            return f" ({name} may be it under another name: rename it)"
    return ""
