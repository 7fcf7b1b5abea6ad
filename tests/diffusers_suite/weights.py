"""Changes of the weights themselves, and of where they are."""

from __future__ import annotations

from typing import Any

import torch

from tests.diffusers_suite.cells import Changed
from tests.diffusers_suite.changes import denoiser, has

Pipe = Any

# ── weights ──────────────────────────────────────────────────────────────────────────


def _weights(pipe: Pipe) -> list[torch.nn.Parameter]:
    """Some of the denoiser's and of the decoder's."""
    wanted = ("proj_out.weight", "to_v.weight", "conv_out.weight", "to_out.0.weight", "final_conv.weight")
    found = [p for n, p in denoiser(pipe).named_parameters() if n.endswith(wanted)]
    found = found or [p for p in denoiser(pipe).parameters() if p.ndim > 1]
    decoder = getattr(pipe.vae, "decoder", None)
    last = [p for p in decoder.parameters() if p.ndim > 1][-1:] if decoder is not None else []
    return [*found, *last]


def new_data(pipe: Pipe) -> Changed:
    """`parameter.data = …`"""
    weights = _weights(pipe)
    before = [p.data for p in weights]
    for parameter in weights:
        parameter.data = parameter.data * 0.5

    def undo() -> None:
        for parameter, data in zip(weights, before, strict=True):
            parameter.data = data

    return Changed(undo=undo)


def in_place(pipe: Pipe) -> Changed:
    weights = _weights(pipe)
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for parameter in weights:
            parameter.mul_(0.5)

    def undo() -> None:
        with torch.no_grad():
            for parameter, value in zip(weights, before, strict=True):
                parameter.copy_(value)

    return Changed(undo=undo)


def new_parameters(pipe: Pipe) -> Changed:
    """Other Parameter objects in the modules' registries."""
    root = denoiser(pipe)
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim > 1:
                setattr(module, name, torch.nn.Parameter(parameter.detach() * 0.5, requires_grad=False))
    return Changed()


def loaded(pipe: Pipe) -> Changed:
    module = denoiser(pipe)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict({k: v * 0.5 if v.ndim > 1 else v for k, v in before.items()})
    return Changed(undo=lambda: module.load_state_dict(before))


def loaded_over(pipe: Pipe) -> Changed:
    """load_state_dict that puts the file's tensors in the place of the module's."""
    module = denoiser(pipe)
    halved = {k: v * 0.5 if v.ndim > 1 else v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(halved, assign=True)
    return Changed()


def layerwise(pipe: Pipe) -> Changed:
    has(pipe, "enable_layerwise_casting").enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )
    return Changed()


# ── offloading ───────────────────────────────────────────────────────────────────────


def whole_offload(pipe: Pipe) -> Changed:
    """accelerate's hook that brings a whole part, and takes it away when the next one runs."""
    from accelerate import cpu_offload_with_hook

    hook = None
    for part in (denoiser(pipe), pipe.vae):
        _, hook = cpu_offload_with_hook(part, torch.device("cpu"), prev_module_hook=hook)
    return Changed()


def layer_offload(pipe: Pipe) -> Changed:
    """accelerate's hooks that bring each layer's weights: between calls parameters are on no device."""
    from accelerate import cpu_offload

    for part in (denoiser(pipe), pipe.vae):
        cpu_offload(part, torch.device("cpu"))
    return Changed()


def group_offload(pipe: Pipe) -> Changed:
    module = has(pipe, "enable_group_offload")
    here = torch.device("cpu")
    module.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    return Changed()


def moved(pipe: Pipe) -> Changed:
    """Away and back: other storages."""
    for parameter in [*denoiser(pipe).parameters(), *pipe.vae.parameters()]:
        parameter.data = parameter.data.clone()
    return Changed()
