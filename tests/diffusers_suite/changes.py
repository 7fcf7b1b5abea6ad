"""What users do to a pipeline's parts, each with the way back."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.diffusers_suite.cells import Changed, NotHere

Pipe = Any


def denoiser(pipe: Pipe) -> Any:
    parts = ("transformer", "unet", "latent_upsampler")
    return next(m for p in parts if (m := getattr(pipe, p, None)) is not None)


def part_name(pipe: Pipe) -> str:
    module = denoiser(pipe)
    return next(name for name, part in pipe.components.items() if part is module)


def has(pipe: Pipe, method: str) -> Any:
    """The denoiser, if its class has a method."""
    module = denoiser(pipe)
    if not hasattr(module, method):
        raise NotHere(f"{type(module).__name__} has no {method}")
    return module


def before(change: Callable[[Pipe], Any]) -> Callable[[Pipe], None]:
    """The change alone, of a pipeline that is not accelerated yet."""

    def made(pipe: Pipe) -> Any:
        return change(pipe).pipe

    return made


# ── adapters ─────────────────────────────────────────────────────────────────────────


def _add_lora(pipe: Pipe, name: str = "one", seed: int = 0) -> Any:
    from peft import LoraConfig

    module = has(pipe, "add_adapter")
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v", "to_k"], init_lora_weights=False)
    module.add_adapter(config, adapter_name=name)
    return module


def lora(pipe: Pipe) -> Changed:
    module = _add_lora(pipe)
    return Changed(undo=module.unload_lora)


def lora_fused(pipe: Pipe) -> Changed:
    """The layers of the adapter stay, their weights are in the module's own."""
    module = _add_lora(pipe)
    module.fuse_lora()

    def undo() -> None:
        module.unfuse_lora()
        module.unload_lora()

    return Changed(undo=undo)


def lora_in(pipe: Pipe) -> Changed:
    """Fused, and its layers taken out: the module looks as before, with other weights."""
    module = _add_lora(pipe)
    module.fuse_lora()
    module.unload_lora()
    return Changed()


def lora_in_16_bit(pipe: Pipe) -> Changed:
    pipe.to(torch.bfloat16)
    return lora_in(pipe)


def two_loras(pipe: Pipe) -> Changed:
    module = _add_lora(pipe, "one", 0)
    _add_lora(pipe, "two", 1)
    module.set_adapters(["one", "two"], [0.5, 1.0])
    return Changed(undo=module.unload_lora)


def lora_off(pipe: Pipe) -> Changed:
    module = _add_lora(pipe)
    module.disable_lora()
    return Changed(undo=module.unload_lora)


# ── what is inside the denoiser ──────────────────────────────────────────────────────


def _attentions(pipe: Pipe) -> list[Any]:
    found = [m for m in denoiser(pipe).modules() if hasattr(m, "set_processor") and hasattr(m, "processor")]
    if not found:
        raise NotHere("no attention with a processor")
    return found


def processors(pipe: Pipe) -> Changed:
    """Processors of another class, which halve what an attention gives."""
    attentions = _attentions(pipe)
    before = [m.processor for m in attentions]
    for module in attentions:
        module.set_processor(_halving(module.processor))

    def undo() -> None:
        for module, processor in zip(attentions, before, strict=True):
            module.set_processor(processor)

    return Changed(undo=undo)


def _halving(inner: Any) -> Any:
    class Halving:
        @functools.wraps(type(inner).__call__)
        def __call__(self, *args: Any, **named: Any) -> Any:
            out = inner(*args, **named)
            return tuple(o * 0.5 for o in out) if isinstance(out, tuple) else out * 0.5

    return Halving()


def same_processors(pipe: Pipe) -> Changed:
    """New processors of the classes that were there."""
    for module in _attentions(pipe):
        module.set_processor(copy.copy(module.processor))
    return Changed()


def _layer(pipe: Pipe) -> Any:
    """The last layer of the denoiser, which every step runs."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return [m for m in denoiser(pipe).modules() if isinstance(m, kinds)][-1]


def hook_inside(pipe: Pipe) -> Changed:
    handle = _layer(pipe).register_forward_hook(lambda m, args, out: out * 0.5)
    return Changed(undo=handle.remove)


def early_hook_inside(pipe: Pipe) -> Changed:
    handle = _layer(pipe).register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]))
    return Changed(undo=handle.remove)


def hook_outside(pipe: Pipe) -> Changed:
    """On the denoiser itself, around whatever runs it."""

    def halve(module: Any, args: Any, out: Any) -> Any:
        return tuple(o * 0.5 for o in out) if isinstance(out, tuple) else type(out)(out[0] * 0.5)

    handle = denoiser(pipe).register_forward_hook(halve)
    return Changed(undo=handle.remove)


def forward_inside(pipe: Pipe) -> Changed:
    """Another forward on a submodule, as some extensions put there."""
    layer = _layer(pipe)
    inner = layer.forward
    layer.forward = lambda *args, **named: inner(*args, **named) * 0.5
    return Changed(undo=lambda: vars(layer).pop("forward"))


def submodule(pipe: Pipe) -> Changed:
    """A layer replaced by another of its kind."""
    root, target = denoiser(pipe), _layer(pipe)
    path = next(name for name, m in root.named_modules() if m is target)
    owner, _, name = path.rpartition(".")
    other = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    setattr(root.get_submodule(owner), name, other)
    return Changed(undo=lambda: setattr(root.get_submodule(owner), name, target))


# ── caches ───────────────────────────────────────────────────────────────────────────


def cache(kind: str) -> Callable[[Pipe], Changed]:
    """One of diffusers' caches, so set that it leaves out what it can."""

    def made(pipe: Pipe) -> Changed:
        module = has(pipe, "enable_cache")

        def now() -> Any:
            return pipe.current_timestep if hasattr(pipe, "current_timestep") else pipe._current_timestep

        config = {
            "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=1e6),
            "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
                cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(-1, 2000),
                current_timestep_callback=now,
            ),
            "mag": lambda: diffusers.MagCacheConfig(
                threshold=1e6, max_skip_steps=5, retention_ratio=0.0, num_inference_steps=4, mag_ratios=[1.0] * 8
            ),
            "faster": lambda: diffusers.FasterCacheConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
                unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 2000),
                current_timestep_callback=now, is_guidance_distilled=False,
            ),
            "taylor": lambda: diffusers.TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=1, max_order=1
            ),
        }[kind]()  # fmt: skip
        module.enable_cache(config)
        return Changed(undo=module.disable_cache)

    return made


# ── of the pipeline ──────────────────────────────────────────────────────────────────


def switched(on: str, off: str, **options: Any) -> Callable[[Pipe], Changed]:
    """A pipeline's own switch."""

    def made(pipe: Pipe) -> Changed:
        if not hasattr(pipe, on):
            raise NotHere(f"no {on}")
        getattr(pipe, on)(**options)
        middle = getattr(getattr(pipe, "unet", None), "mid_block", None)
        if on == "enable_free_noise" and not hasattr(middle, "motion_modules"):
            return Changed()  # diffusers cannot switch it off: disable_free_noise() raises AttributeError
        return Changed(undo=getattr(pipe, off))

    return made


def tiles(pipe: Pipe) -> Changed:
    """In tiles that are smaller than the video."""
    if not hasattr(pipe.vae, "enable_tiling"):
        raise NotHere(f"{type(pipe.vae).__name__} has no tiling")
    pipe.vae.enable_tiling()
    for name, value in vars(pipe.vae).items():
        if name.startswith("tile_sample_min") and "frames" not in name:
            setattr(pipe.vae, name, 48)
        if name.startswith("tile_sample_stride") and "frames" not in name:
            setattr(pipe.vae, name, 32)
        if name in ("tile_latent_min_size", "tile_latent_min_height", "tile_latent_min_width") and value:
            setattr(pipe.vae, name, 6)
    return Changed(undo=pipe.vae.disable_tiling)


def slices(pipe: Pipe) -> Changed:
    if not hasattr(pipe.vae, "enable_slicing"):
        raise NotHere(f"{type(pipe.vae).__name__} has no slicing")
    pipe.vae.enable_slicing()
    return Changed()


def in_type(dtype: torch.dtype, part: str = "") -> Callable[[Pipe], Changed]:
    def made(pipe: Pipe) -> Changed:
        (denoiser(pipe) if part else pipe).to(dtype)
        return Changed()

    return made


def saved(pipe: Pipe) -> Changed:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = type(pipe).from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    if hasattr(pipe, "target_size"):
        again.target_size = pipe.target_size
    return Changed(again)


def weights_of_part_saved(pipe: Pipe) -> Changed:
    """The denoiser saved from the pipeline, loaded, and put in its place."""
    module, name = denoiser(pipe), part_name(pipe)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        setattr(pipe, name, type(module).from_pretrained(folder))
    return Changed()


def copied(pipe: Pipe) -> Changed:
    return Changed(copy.deepcopy(pipe))


def pickled(pipe: Pipe) -> Changed:
    return Changed(pickle.loads(pickle.dumps(pipe)))


def part_copied(pipe: Pipe) -> Changed:
    """A copy of the denoiser, changed, in its place: the first one's engine must not answer for it."""
    own = denoiser(pipe)
    module = copy.deepcopy(own)
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("to_out.0.weight") or p.ndim > 1).mul_(3.0)
    setattr(pipe, part_name(pipe), module)
    return Changed(undo=lambda: setattr(pipe, part_name(pipe), own))


def part_pickled(pipe: Pipe) -> Changed:
    setattr(pipe, part_name(pipe), pickle.loads(pickle.dumps(denoiser(pipe))))
    return Changed()


def removed(pipe: Pipe) -> Changed:
    if hasattr(pipe, "overcrank"):
        pipe.overcrank.remove()
    return Changed()


def compiled(pipe: Pipe) -> Changed:
    setattr(pipe, part_name(pipe), torch.compile(denoiser(pipe), backend="eager"))
    return Changed()


def compiled_in_place(pipe: Pipe) -> Changed:
    denoiser(pipe).compile(backend="eager")
    return Changed()
