"""Key names of single files: which rows of which of a file's tensors make a parameter of the diffusers class.

diffusers renames, splits and reorders original checkpoints in functions of its own (loaders/single_file_utils). They
are called here on tensors of row numbers in place of weights: where the numbers come out says where the rows go. So
nothing of them is repeated, and what is a run of rows in the file stays a view of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "transformer.", "net.")
VAE_PREFIXES = {"vae": ("vae.", "first_stage_model."), "audio_vae": ("audio_vae.",)}
"""diffusers' own renaming takes these off."""


@dataclass(frozen=True)
class Rows:
    """Rows `start` … `stop` - 1 of a file's tensor, by the first axis."""

    tensor: str
    start: int
    stop: int


Origins = Mapping[str, tuple[Rows, ...]]
"""Parameter of the diffusers class → the rows it is made of, in order."""


def origins(
    cls: type, shapes: Mapping[str, tuple[int, ...]], wanted: Iterable[str], part: str
) -> dict[str, tuple[Rows, ...]]:
    """Where each parameter of `cls` comes from in a file whose tensors have these names and shapes.

    `shapes`: of weights and other parameters, without what is beside quantized ones; a file of several networks is
    one of them here, that of the pipeline's `part`. `wanted`: the class's own names, which the file may have already.
    Raises CheckpointError where diffusers' own renaming fails.
    """
    own, wanted = _own_names(shapes, part), set(wanted)
    if wanted and own.keys() >= wanted:
        return as_named(shapes, part)
    named = {name: name for name in own.values()} if part in VAE_PREFIXES else own
    renamed = _renamed(cls, {short: shapes[name] for short, name in named.items()}, named)
    as_it_is = len(own.keys() & wanted) > len(renamed.keys() & wanted)  # with its names, and something missing
    return as_named(shapes, part) if as_it_is else renamed


def as_named(shapes: Mapping[str, tuple[int, ...]], part: str) -> dict[str, tuple[Rows, ...]]:
    """As `origins`, of a file that has diffusers' names already, with a prefix or without."""
    own = _own_names(shapes, part)
    return {short: (Rows(name, 0, _rows(shapes[name])),) for short, name in own.items()}


def _own_names(names: Iterable[str], part: str) -> dict[str, str]:
    """Name without the prefix of the part's network → name in the file."""
    names = list(names)
    prefix = _prefix(names, VAE_PREFIXES.get(part, DENOISER_PREFIXES))
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def _prefix(names: Collection[str], prefixes: Iterable[str]) -> str:
    """That of the network's names, such as "model.diffusion_model."; empty for none."""
    return next((p for p in prefixes if any(n.startswith(p) for n in names)), "")


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _renamed(cls: type, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> dict[str, tuple[Rows, ...]]:
    """By diffusers; `names`: as it is called there → as in the file."""
    import numpy as np
    import torch

    firsts, count = {}, 0
    ids: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        ids[name] = torch.arange(count, count + _rows(shape)).reshape(-1, *(1 for _ in shape[1:]))
        firsts[count] = names[name]
        count += _rows(shape)
    starts = np.array(sorted(firsts))
    return {name: tuple(_runs(tensor, starts, firsts)) for name, tensor in _converted(cls, ids).items()}


def _converted(cls: type, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_model as own

    known = own.SINGLE_FILE_LOADABLE_CLASSES
    own_names = (c.__name__ for c in cls.__mro__)  # diffusers' own search imports every class it knows
    name = next((name for name in own_names if name in known), None)
    if name is None:
        return ids
    convert: Any = known[name]["checkpoint_mapping_fn"]
    given = {"checkpoint": dict(ids), "config": {}}
    taken = inspect.signature(convert).parameters
    try:
        return dict(convert(**{k: v for k, v in given.items() if k in taken}))
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"diffusers cannot tell what its tensors are in {cls.__name__} ({type(error).__name__}: {error})"
        ) from error


def _runs(tensor: Tensor, starts: np.ndarray, firsts: Mapping[int, str]) -> Iterable[Rows]:
    """Row numbers as runs of rows, each of one tensor."""
    import numpy as np

    numbers = tensor.flatten().numpy()
    if not len(numbers):
        return
    homes = np.searchsorted(starts, numbers, "right") - 1
    ends = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(homes) != 0))
    for begin, last in zip([0, *(ends + 1).tolist()], [*ends.tolist(), len(numbers) - 1], strict=True):
        first = int(starts[homes[begin]])
        yield Rows(firsts[first], int(numbers[begin]) - first, int(numbers[last]) + 1 - first)


def difference(wanted: Mapping[str, tuple[int, ...]], given: Origins, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What keeps a file from being the network with the `wanted` parameters, in words; empty if nothing does."""
    missing = [name for name in wanted if name not in given]
    left = [name for name in given if name not in wanted]
    wrong = [
        f"{name} is {list(shape_of(given[name], shapes))}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in given and prod(shape_of(given[name], shapes)) != prod(shape)
    ]
    parts = []
    for what, names in (("lacks", missing), ("has no place for", left), ("", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}".strip())
    return "; ".join(parts)


def shape_of(rows: tuple[Rows, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    whole = shapes[rows[0].tensor]
    return (sum(r.stop - r.start for r in rows), *whole[1:])
