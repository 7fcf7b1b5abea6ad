"""CLIP's image encoder (transformers), which some image-to-video models look at their picture through."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models._common import given
from overcrank.models.base import Call, Component, Config, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

VIT_H: Config = {  # laion/CLIP-ViT-H-14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "projection_dim": 1024,
    "layer_norm_eps": 1e-5,
}


def component(config: Config, *, hidden: int = 0) -> Component:
    """Picture → its projected embedding, or with `hidden` the hidden state of that index."""
    side = config["image_size"]
    tokens = (side // config["patch_size"]) ** 2 + 1
    states = (1, tokens, config["hidden_size"])
    out = TensorSpec("hidden", states) if hidden else TensorSpec("embeds", (1, config["projection_dim"]))
    return Component(
        name="image_encoder",
        cls="CLIPVisionModel" if hidden else "CLIPVisionModelWithProjection",
        subfolder="image_encoder",
        config=config,
        inputs=(TensorSpec("pixel_values", (1, 3, side, side)),),
        outputs=(out,),
        forward=partial(_encoded, hidden=hidden),
        adapt=partial(_adapt, hidden=hidden),
        returns=partial(_returns, hidden=hidden, layers=config["num_hidden_layers"]),
        sample=partial(_sample, side=side, hidden=hidden),
        sizes=lambda shape: {},
        trace_sizes={},
    )


def _encoded(module: nn.Module, pixel_values: T, *, hidden: int) -> T:
    m: Any = module
    if not hidden:
        out: T = m(pixel_values).image_embeds
        return out
    states: T = m(pixel_values, output_hidden_states=True).hidden_states[hidden]
    return states


def _adapt(module: nn.Module, call: Call, *, hidden: int) -> dict[str, Any]:
    """Raises ShapeError for hidden states where the graph gives the embedding, and the other way round."""
    if bool(call.get("output_hidden_states")) != bool(hidden):
        raise ShapeError(f"this call wants {'no' if hidden else 'its'} hidden states")
    return given(call, "pixel_values")


def _returns(outputs: Mapping[str, T], call: Mapping[str, Any], *, hidden: int, layers: int) -> Any:
    """Only what the pipelines read is filled in."""
    if not hidden:
        from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

        return CLIPVisionModelOutput(image_embeds=outputs["embeds"])
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    states: list[Any] = [None] * (layers + 1)
    states[hidden] = outputs["hidden"]
    return BaseModelOutputWithPooling(hidden_states=tuple(states))


def _sample(module: nn.Module, sizes: Any, generator: Any, *, side: int, hidden: int) -> dict[str, Any]:
    import torch

    call: dict[str, Any] = {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}
    return call | ({"output_hidden_states": True} if hidden else {})
