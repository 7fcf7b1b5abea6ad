"""The type of each part of a pipeline."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.types import NAMES, typed
from overcrank.errors import UserError
from overcrank.models.base import Variant
from overcrank.options import option

if TYPE_CHECKING:
    import torch


def check_parts(names: Mapping[str, Any], folder: Path | str) -> None:
    """Raise UserError when a part is named that the checkpoint in `folder` has not."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text("utf-8-sig"))
    except (OSError, ValueError):
        return  # what is wrong with it is said when it is read
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] and "tokenizer" not in k]
    for part in names:
        if part and part not in parts:
            close = difflib.get_close_matches(part, parts, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"its parts are {', '.join(parts)}."
            raise UserError(f"{option('dtype', part)}: {Path(folder).name} has no such part; {hint}")


def dtypes_of(
    variant: Variant, device: str, dtypes: torch.dtype | Mapping[str, torch.dtype] | Sequence[str] | None
) -> dict[str, torch.dtype]:
    """Part → type, "" standing for those not named: the publisher's on a card, fp32 on a processor, or as asked.

    A type for all parts stands for every part; one for a single part leaves the others as they are. A card without
    bf16 runs fp16 in its place unless bf16 was asked for.
    """
    import torch

    if isinstance(dtypes, torch.dtype):
        return {"": dtypes}
    types = dict(dtypes) if isinstance(dtypes, Mapping) else _read(typed(dtypes or ()))
    if "" in types:
        return types
    if device == "cpu":
        return {"": torch.float32} | types
    usual = _read({"": "bf16"} | dict(variant.dtypes))
    if torch.cuda.get_device_capability(device)[0] < 8:
        usual = {k: torch.float16 if v is torch.bfloat16 else v for k, v in usual.items()}
    return usual | types


def _read(names: Mapping[str, str]) -> dict[str, torch.dtype]:
    import torch

    return {part: getattr(torch, NAMES[name]) for part, name in names.items()}


def of_parts(pipe: Any) -> dict[str, str]:
    """Part → type of a pipeline that was loaded, in our names."""
    import torch

    ours = {v: k for k, v in NAMES.items()}
    types = {
        n: str(m.dtype).removeprefix("torch.") for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)
    }
    return {name: ours.get(dtype, dtype) for name, dtype in types.items()}
