"""Device memory for activations, shared by sessions that never run at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overcrank.runtime.session import CannotServe

if TYPE_CHECKING:
    import torch


class Workspace:
    """One buffer for each CUDA stream, as large as the largest session on it needs.

    Sessions on one stream run one after the other, so they take turns; a denoiser and a VAE
    of the same job need the larger of their activations, not the sum.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, size: int, device: torch.device, stream: int, component: str) -> torch.Tensor:
        """At least `size` bytes; raises CannotServe with what is needed and what is free."""
        import torch

        key = (str(device), stream)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = None
            self._buffers.pop(key, None)  # freed before the larger one is taken
            try:
                buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            except torch.cuda.OutOfMemoryError as error:
                raise out_of_memory(component, size, device) from error
            self._buffers[key] = buffer
        return buffer

    def release(self, device: torch.device) -> None:
        """Leave the current stream's buffer to PyTorch, such as for a VAE that runs eagerly."""
        import torch

        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self._buffers.pop((str(device), stream), None)


def free_memory(device: torch.device) -> str:
    """Of the card, now that PyTorch has given back what it had kept."""
    import torch
    from overcrank.engines.report import human_bytes

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return f"{human_bytes(free)} of {human_bytes(total)} are free"


def out_of_memory(component: str, needed: int, device: torch.device) -> CannotServe:
    """Why a call cannot be served: bytes needed (0: unknown) and free; a later, smaller one may be."""
    from overcrank.engines.report import human_bytes

    needs = f"it needs {human_bytes(needed)} for activations and " if needed else ""
    return CannotServe(
        f"the engine of {component} ran out of GPU memory: {needs}{free_memory(device)}",
        "render fewer frames or a smaller size, with --vram low, or free the card",
        lasting=False,
    )
