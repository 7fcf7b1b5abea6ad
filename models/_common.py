"""What the families share: forwards patched while tracing, patches ↔ tokens, and calls made of random tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypedDict

from overcrank.errors import ShapeError
from overcrank.models.base import Call, Config, Latents, Repeat, Sizes, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

Patch = tuple[int, int, int]
"""(frames, height, width) of the latent patch that is one token."""
TRACED_BLOCKS = 3
_BLOCKS = {"num_layers": "transformer_blocks"}

# ── what a component says ────────────────────────────────────────────────────────────


class Depth(TypedDict):
    """How deep a `Component` is traced."""

    traced_config: Config
    repeats: tuple[Repeat, ...]


def shallow(config: Config, chains: Mapping[str, str] = _BLOCKS, after: int = 0) -> Depth:
    """Chains of blocks are traced three deep and repeated; `chains` maps the field that counts one to its path.

    `after` of the counted blocks are the last ones, which are of another kind (Repeat.after).
    """
    deep = {field: path for field, path in chains.items() if config.get(field, 0) > TRACED_BLOCKS + after}
    return {
        "traced_config": config | dict.fromkeys(deep, TRACED_BLOCKS + after) if deep else {},
        "repeats": tuple(Repeat(path, TRACED_BLOCKS, config[field] - after, after) for field, path in deep.items()),
    }


def token_count(latents: Latents, patch: Patch = (1, 1, 1)) -> int:
    """Tokens of a latent video."""
    return prod(n // p for n, p in zip(latents, patch, strict=True))


def token_sizes(latents: Latents, patch: Patch, **more: int) -> Sizes:
    """Axis lengths of a transformer of patches; the latents' sides, of no input, are what `sample` makes latents of."""
    return {
        "tokens": token_count(latents, patch),
        **dict(zip(("frames", "height", "width"), latents, strict=True)),
        **more,
    }


# ── while tracing ────────────────────────────────────────────────────────────────────


@contextmanager
def forwards(modules: list[Any], forward: Any, *more: Any) -> Iterator[None]:
    """Each module runs `forward(module, …)`, still as a module call: nodes know who made them."""
    for module in modules:
        module.forward = partial(forward, module, *more)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def patched(module: nn.Module, kinds: Mapping[str, Any]) -> Iterator[None]:
    """Every submodule of a class named in `kinds` runs that function in place of its forward."""
    with ExitStack() as stack:
        for cls, forward in kinds.items():
            named = [m for m in module.modules() if type(m).__name__ == cls]
            stack.enter_context(forwards(named, forward))
        yield


def rotated(x: T, cos: T, sin: T) -> T:
    """Rotary embedding on interleaved pairs, in fp32: x [..., d], cos and sin [..., d / 2, 1].

    The stock form writes two halves in place, and the compiler keeps what it writes for every layer.
    """
    import torch

    real, imag = x.unflatten(-1, (-1, 2)).float().chunk(2, dim=-1)
    turned = torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def scaled_norm(norm: Any, x: T) -> T:
    """WanRMS_norm.forward, and its copy in HunyuanVideo 1.5, over dim 1 or the last.

    The stock form multiplies a 16-bit tensor by sqrt(dim), which a graph would round to 16 bits.
    """
    from torch.nn.functional import normalize

    unit = normalize(x.float(), dim=1 if norm.channel_first else -1) * norm.scale
    out: T = unit.to(x.dtype) * norm.gamma + norm.bias
    return out


def flat(x: T) -> T:
    """[B, S, C] → [1, B·S, C]."""
    return x.reshape(1, -1, x.shape[-1])


def modulations(table: T, temb: tuple[T, ...]) -> list[T]:
    """adaLN values: [n, C] and n of [1, N, C] → n of [1, N, C], N being 1 or B·S.

    One sum per value, not one of [N, n·C]: with a timestep per token the compiler makes the
    latter for every block in advance and keeps them all.
    """
    rows = table.view(1, 1, -1).chunk(table.shape[0], dim=-1)
    return [row + value for row, value in zip(rows, temb, strict=True)]


def attend(q: T, k: T, v: T, heads: int, mask: T | None = None) -> T:
    """q, k, v [B, S, heads · d] → [B, S, heads · d]."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return sdpa(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def embedded(conv: Any, tokens: T) -> T:
    """A patch embedding convolution as the matrix product it is: tokens [1, S, C · patch]."""
    from torch.nn.functional import linear

    return linear(tokens, conv.weight.flatten(1), conv.bias)


# ── around a call ────────────────────────────────────────────────────────────────────


def patches(latents: T, patch: Patch) -> T:
    """[B, C, F, H, W] → [B, S, C · patch], features ordered as a convolution's weight is."""
    batch, channels, *sizes = latents.shape
    t, h, w = (n // p for n, p in zip(sizes, patch, strict=True))
    x = latents.reshape(batch, channels, t, patch[0], h, patch[1], w, patch[2])
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * h * w, -1)


def unpatched(tokens: T, like: T, patch: Patch) -> T:
    """[B, S, patch · C] of the latents' size in `like` → [B, C, F, H, W]."""
    t, h, w = (n // p for n, p in zip(like.shape[2:], patch, strict=True))
    x = tokens.reshape(like.shape[0], t, h, w, *patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def unpatched_first(tokens: T, like: T, patch: Patch) -> T:
    """[B, S, C · patch] of the latents' size in `like` → [B, C, F, H, W]."""
    t, h, w = (n // p for n, p in zip(like.shape[2:], patch, strict=True))
    x = tokens.reshape(like.shape[0], t, h, w, -1, *patch)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def sample_output(result: T, call: Mapping[str, Any]) -> Any:
    """What a stock denoiser returns."""
    if not call.get("return_dict", True):
        return (result,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=result)


def named_output(outputs: Mapping[str, T], call: Mapping[str, Any]) -> Any:
    return sample_output(outputs["sample"], call)


def from_patches(outputs: Mapping[str, T], call: Mapping[str, Any], *, patch: Patch) -> Any:
    return sample_output(unpatched(outputs["sample"], call["hidden_states"], patch), call)


def one_time(timestep: Any, device: Any) -> T:
    """The timestep that all items of a call share, [1] in fp32; raises ShapeError when they do not share one."""
    import torch

    time = torch.as_tensor(timestep, device=device)
    if all(step == 0 or length == 1 for length, step in zip(time.shape, time.stride(), strict=True)):
        return time.as_strided((1,), (1,)).float()  # expanded from one, as pipelines do: nothing to compare
    return first_of_equal(time.reshape(-1), "timesteps").float()


def first_of_equal(tensor: T, what: str) -> T:
    """[B, …] whose rows are the same → [1, …]; raises ShapeError when a call's items differ in it."""
    if len(tensor) > 1 and tensor.stride(0) and not bool((tensor == tensor[:1]).all()):
        raise ShapeError(f"this call gives its videos different {what}")
    return tensor[:1]


def given(call: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The named arguments of a call; raises ShapeError for one that is missing: a call of another kind."""
    for name in names:
        if call.get(name) is None:
            raise ShapeError(f"this call gives no {name}")
    return {name: call[name] for name in names}


def tensors_named(module: nn.Module, call: Call, *, names: tuple[str, ...]) -> dict[str, Any]:
    """`Component.adapt` for calls whose arguments are the inputs."""
    return given(call, *names)


def random_call(
    module: nn.Module, sizes: Sizes, generator: Any, *, specs: tuple[TensorSpec, ...], **more: Any
) -> dict[str, Any]:
    """`Component.sample`: normal tensors for `specs`, and `more` as it is."""
    import torch

    return {t.name: torch.randn(t.shape(sizes), generator=generator) for t in specs} | more


class PerOwnerCache:
    """What is the same from step to step, kept for as long as its owner, a module or a tensor, lives."""

    def __init__(self) -> None:
        self._kept: Any = None

    def get(self, owner: Any, key: Any, make: Any) -> Any:
        from torch.utils.weak import WeakIdKeyDictionary

        if self._kept is None:
            self._kept = WeakIdKeyDictionary()
        entry = self._kept.get(owner)
        if entry is None or entry[0] != key:
            entry = self._kept[owner] = (key, make())
        return entry[1]


def state_of(tensors: Iterable[T]) -> tuple[tuple[int, int], ...]:
    """Changes when tensors that something was made of are written, replaced or moved."""
    return tuple((t.data_ptr(), t._version) for t in tensors)
