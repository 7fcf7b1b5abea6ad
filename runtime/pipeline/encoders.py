"""Text and image encoders out of single files: transformers' classes, configured as the checkpoint's folder says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from overcrank.errors import CheckpointError, UserError
from overcrank.export.files.contents import Contents, contents_of
from overcrank.export.files.kinds import LORA
from overcrank.export.files.parts import PartFile
from overcrank.export.files.single_file import Origins, Rows, difference
from overcrank.models._hub_files import INDEX
from overcrank.models.hub import read_json
from overcrank.options import option
from overcrank.runtime.pipeline.weights import filled
from torch import nn


def encoder_of(path: Path, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """The part of the checkpoint in `folder` with the file's weights; quantized layers stay so (StoredLinear).

    Raises UserError for a part that the checkpoint has not, CheckpointError for a file of another encoder or layout.
    """
    index = read_json(folder / INDEX)
    entry = index.get(part)
    named = option("weights", [f"{part}={path}"])
    if not isinstance(entry, list) or entry[0] != "transformers":
        parts = [name for name, e in index.items() if isinstance(e, list) and e[0] and "tokenizer" not in name]
        raise UserError(f"{named}: {folder.name} has no such encoder; its parts are {', '.join(parts)}.")
    module = _empty(str(entry[1]), folder / part)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    contents = contents_of(path)
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    places = _places(contents, wanted, _tied(module))
    needed = {name: shape for name, shape in wanted.items() if name not in _tied(module)}
    if reason := _mismatch(contents, needed, places):
        raise CheckpointError(f"{path} is not the {part} of this model ({entry[1]}): it {reason}.")
    filled(module, PartFile(contents.file, contents.layers, places))
    module.tie_weights()  # type: ignore[operator]
    return module


def _empty(cls: str, folder: Path) -> nn.Module:
    import transformers
    from accelerate import init_empty_weights

    model: Any = getattr(transformers, cls)
    config = model.config_class.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        module: nn.Module = model(config)
    return module


def _tied(module: nn.Module) -> set[str]:
    """Parameters that are others under a second name."""
    return set(getattr(module, "_tied_weights_keys", None) or ())


def _mismatch(contents: Contents, needed: Mapping[str, tuple[int, ...]], places: Origins) -> str:
    if contents.kind == LORA:
        return f"is a LoRA; give {option('loras', [contents.file.path])}"
    if not places:
        what = f"{contents.networks[0].part}" if contents.networks else contents.kind
        names = ", ".join(sorted(contents.shapes)[:2])
        return f"is a {what}, whose tensors ({names} …) have other names; give a file with the names of transformers"
    return difference(needed, places, contents.shapes)


def _places(contents: Contents, wanted: Mapping[str, tuple[int, ...]], tied: set[str]) -> Origins:
    """Where each parameter is; empty where the file's names are of another layout.

    What lies beside the encoder, such as another head or its vocabulary, is left out.
    """
    names = _of_gguf(contents, wanted) or _prefixed(contents.shapes, wanted)
    tops = {name.partition(".")[0] for name in wanted}
    own = {to: name for to, name in names.items() if to in wanted or to.partition(".")[0] in tops}
    rows = {to: (Rows(name, 0, (contents.shapes[name] or (1,))[0]),) for to, name in own.items() if to not in tied}
    return rows if any(to in wanted for to in rows) else {}


def _prefixed(shapes: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Parameter → tensor, by the prefix that the file puts before names, or leaves out, for the most of them."""
    names, wanted = list(shapes), set(wanted)
    tails = {".".join(w.split(".")[i:]) for w in wanted for i in range(3)}
    shorter = {n[: -len(t)] for n in names[:40] for t in tails & {".".join(n.split(".")[i:]) for i in range(6)}}
    longer = {w.partition(".")[0] + "." for w in wanted}
    ways = [{n.removeprefix(p): n for n in names if n.startswith(p)} for p in sorted(shorter | {""})]
    ways += [{p + n: n for n in names} for p in sorted(longer)]
    return max(ways, key=lambda way: len(wanted & way.keys()))


def _of_gguf(contents: Contents, wanted: Iterable[str]) -> dict[str, str]:
    """Parameter → tensor of a T5 in llama.cpp's names; others', whose rows it reorders, are not read."""
    if contents.file.metadata.get("general.architecture") not in ("t5", "t5encoder"):
        return {}
    import gguf

    wanted = list(wanted)
    blocks = 1 + max((int(n) for w in wanted for n in re.findall(r"block\.(\d+)\.", w)), default=0)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, blocks)
    named = {w: table.get_name(w, try_suffixes=(".weight", ".bias")) for w in wanted}
    return {w: name for w, name in named.items() if name in contents.shapes}
