"""What a weight file is, from its header alone: which network, how its layers are stored, what serves it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from overcrank.errors import present
from overcrank.export.files.contents import Contents, read_contents
from overcrank.export.files.identify import Identified
from overcrank.export.files.kinds import LORA
from overcrank.export.files.nearest import unlike
from overcrank.export.files.parts import AS_STORED, parts_of
from overcrank.export.files.remote import local_header
from overcrank.export.files.single_file import DENOISER_PREFIXES, VAE_PREFIXES
from overcrank.export.files.stored_layers import BLOCKS, PLAIN, StoredLayer
from overcrank.export.files.weight_file import WeightFile, open_weights
from overcrank.models import family
from overcrank.models.registry import variant_named
from overcrank.runtime.inspect_lora import LoraFacts, lora_facts

MODELS = 4
"""For so many there are commands."""


@dataclass(frozen=True)
class Inspection:
    """Bytes and values are of the header's tensors; nothing of their content was read."""

    file: str
    kind: str
    """"checkpoint", "LoRA", or which encoder it is, in words."""
    networks: tuple[Identified, ...]
    variants: tuple[str, ...]
    """Published models that have all of these."""
    unlike: tuple[str, ...]
    """Of each network, what keeps it from being a published one, "" for nothing."""
    keys: str
    """How its tensors are named: diffusers' names or original ones, and the prefix."""
    layers: dict[str, int]
    """Format → how many linear layers are stored in it."""
    scales: dict[str, str]
    """Format → what scales such layers have, in words."""
    others: dict[str, int]
    """Type → how many other tensors."""
    rotated: tuple[int, ...]
    """Sizes of ConvRot's groups, if any."""
    parameters: int
    bytes: int
    metadata: dict[str, str]
    lora: LoraFacts | None = None

    @property
    def precision(self) -> str:
        """Of the engine that multiplies most layers as they are stored; auto (16 bit) where none does."""
        own = {AS_STORED[form]: count for form, count in self.layers.items() if form in AS_STORED}
        return max(own, key=lambda form: own[form]) if own else "auto"

    def commands(self) -> list[str]:
        """Those that fetch the file, build for it, and render with it; none where its model is not known."""
        file = self.file.partition("?")[0].rpartition("/")[2] if "://" in self.file else self.file
        lines = list(self._commands(shlex.quote(file)))
        return [_download(self.file), *lines] if "://" in self.file and lines else lines

    def experts(self) -> list[str]:
        """Models that have several parts of the file's network, and what they are called; a sentence for each."""
        words = {model: _experts(model, network) for network in self.networks for model in network.variants}
        return [
            f"{model} has one for {' and one for '.join(own)} noise: give both files"
            for model, own in words.items()
            if own
        ]

    def _commands(self, file: str) -> Iterator[str]:
        if self.lora is not None:
            for model in _some(self.lora.fits):
                yield f'overcrank render "a prompt" --model {model} --lora {file}{_media(model)}'
        for model in _some(self.variants):
            own = {n.part: n for n in self.networks if model in n.variants}
            layered = next((part for part in own if part not in VAE_PREFIXES), "") if self.layers else ""
            layout = f" --layout {layered}={file}" if layered else ""
            yield f"overcrank build --model {model}{layout} --gpu auto"
            names = [next(iter(_experts(model, network)), part) for part, network in own.items()]
            words = " ".join(f"--weights {name}={file}" for name in names)
            yield f'overcrank render "a prompt" --model {model} {words}{_media(model)}'


def inspect_file(where: str) -> Inspection:
    """`where`: a path, or a URL that is read in ranges. Raises CheckpointError for what is no such file."""
    with local_header(where) as path:
        contents = read_contents(open_weights(path), holes="://" in where)
        file, layers = contents.file, contents.layers
        own = {f"{name}.weight" for name in layers}
        beside = {n: file.tensors[n].dtype for n in contents.shapes if n not in own}
        others = Counter(PLAIN.get(dtype, dtype) for dtype in beside.values())
        return Inspection(
            file=where,
            kind=contents.kind,
            networks=contents.networks,
            variants=tuple(contents.variants),
            unlike=tuple("" if n.variants else unlike(n, contents.shapes) for n in contents.networks),
            keys=_keys(contents),
            layers=dict(Counter(layer.format for layer in layers.values()).most_common()),
            scales={form: _scales(file, [x for x in layers.values() if x.format == form]) for form in _formats(layers)},
            others=dict(others.most_common()),
            rotated=tuple(sorted({layer.rotation for layer in layers.values()} - {0})),
            parameters=sum(prod(shape) for shape in contents.shapes.values()),
            bytes=file.bytes,
            metadata=dict(file.metadata),
            lora=lora_facts(file) if contents.kind == LORA else None,
        )


def _some(models: Sequence[str]) -> list[str]:
    """MODELS of them, of each family in turn."""
    turns: dict[str, int] = {}
    order = []
    for model in models:
        owner = present(variant_named(model), model).family
        order.append((turns.setdefault(owner, 0), model))
        turns[owner] += 1
    return [model for _, model in sorted(order, key=lambda turn: turn[0])][:MODELS]


def _formats(layers: Mapping[str, StoredLayer]) -> list[str]:
    return list(dict.fromkeys(layer.format for layer in layers.values()))


def _scales(file: WeightFile, layers: list[StoredLayer]) -> str:
    """What scales layers of one format have."""
    form, kinds = layers[0].format, Counter[str]()
    for layer in layers:
        scale = file.tensors[layer.scales["scale"]].shape if "scale" in layer.scales else None
        if form in BLOCKS:
            kinds[f"for each {BLOCKS[form]} inputs{' and the tensor' if 'scale_2' in layer.scales else ''}"] += 1
        elif scale is None:
            kinds["in its blocks" if file.path.suffix == ".gguf" else "none"] += 1
        else:
            kinds["of the tensor" if prod(scale) == 1 else "for each row"] += 1
    words = ", ".join(k if len(kinds) == 1 else f"{count} {k}" for k, count in kinds.most_common())
    return words + (", of inputs too (not used)" if any("input_scale" in layer.scales for layer in layers) else "")


def _keys(contents: Contents) -> str:
    """How tensors are named, by network."""
    words = []
    for network in contents.networks:
        tensors = [rows[0].tensor for rows in network.origins.values()]
        prefixes = VAE_PREFIXES.get(network.part, DENOISER_PREFIXES)
        prefix = next((p for p in prefixes if all(t.startswith(p) for t in tensors)), "")
        own = all(f"{prefix}{name}" == rows[0].tensor for name, rows in network.origins.items())
        words.append(f"{'diffusers' if own else 'original'} names{f', prefix {prefix}' if prefix else ''}")
    return "; ".join(dict.fromkeys(words))


def _experts(model: str, network: Identified) -> list[str]:
    """What people call the parts of a model that are of this network, if there are several."""
    variant = variant_named(model)
    if variant is None:
        return []
    parts = [part for part, c in parts_of(variant).items() if c.cls.rpartition(".")[2] == network.cls]
    words = [word for word, part in family(variant.family).part_words.items() if part in parts]
    return words if len(parts) > 1 else []


def _media(model: str) -> str:
    """What a render of a model needs beside its prompt."""
    tasks = present(variant_named(model), model).renders
    media = {"text-to-video": "", "image-to-video": " --image first.png", "video-to-video": " --video video.mp4"}
    return next((words for task, words in media.items() if task in tasks), " --image first.png --last-image last.png")


def _download(url: str) -> str:
    return f"curl -L -O {shlex.quote(url)}"
