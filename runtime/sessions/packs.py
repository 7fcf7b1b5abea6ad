"""Weight packs that are kept in the store, for checkpoints whose weights are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from overcrank.engines.store import Store
from overcrank.files import atomic_write, write_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def kept_pack(
    identity: Sequence[object], store: Store, make: Callable[[], Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """What `make` returns, from the store if it was made before; `identity` is all it depends on, as JSON."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    key = sha256(json.dumps(identity).encode()).hexdigest()[:32]
    file = store.root / "packs" / f"{key}.safetensors"
    store.prepare()
    with write_errors(file), store.lock(f"pack-{key}"):
        file.parent.mkdir(exist_ok=True)
        with suppress(OSError, SafetensorError):  # there is none, or it is damaged
            tensors: dict[str, Tensor] = load_file(file, device=str(device))
            return tensors
        tensors = dict(make())
        with atomic_write(file) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        return tensors
