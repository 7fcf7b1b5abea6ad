"""Variations of a pipeline's call: each gives the arguments of the call to make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from tests import pipelines
from tests.diffusers_suite.cells import NotHere
from tests.diffusers_suite.classes import Arguments, Subject, picture

Pipe = Any
Call = Callable[[Pipe, Subject, Arguments], Arguments]
OTHER = "a blue square moving up"


def takes(pipe: Pipe, *names: str) -> None:
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in names:
        if name not in taken:
            raise NotHere(f"the call takes no {name}")


def given(**more: Any) -> Call:
    """Further arguments of the call."""

    def made(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
        takes(pipe, *more)
        return arguments | more

    return made


def guided(scale: float, true: float) -> Call:
    """By whatever the class calls guidance; `true` is that of the classes whose network takes the other as input."""

    def made(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
        taken = inspect.signature(type(pipe).__call__).parameters
        if "true_cfg_scale" in taken:
            return arguments | {"true_cfg_scale": true, "negative_prompt": "a dog"}
        if "guidance_scale" in taken:
            more = {"negative_prompt": "a dog"} if "negative_prompt" in taken else {}
            return arguments | {"guidance_scale": scale} | more
        if "max_guidance_scale" in taken:
            return arguments | {"min_guidance_scale": scale, "max_guidance_scale": scale}
        if hasattr(pipe, "guider"):
            pipe.guider = type(pipe.guider)(guidance_scale=scale)
            return arguments
        raise NotHere("no guidance")

    return made


def two_prompts(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    if not subject.prompt:
        raise NotHere("no prompt")
    return arguments | {"prompt": [pipelines.PROMPT, OTHER]}


def two_seeds(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """A generator for each of two videos."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return two_videos(pipe, subject, arguments) | {"generator": seeds}


def two_videos(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    taken = inspect.signature(type(pipe).__call__).parameters
    name = "num_images_per_prompt" if "num_images_per_prompt" in taken else "num_videos_per_prompt"
    takes(pipe, name)
    return arguments | {name: 2}


def embeds(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """What the pipeline's own encode_prompt made of the prompt, by the names its call takes."""
    takes(pipe, "prompt_embeds")
    encode = pipe.encode_prompt
    seen: list[Any] = []

    def spy(*args: Any, **named: Any) -> Any:
        seen.append(encode(*args, **named))
        return seen[-1]

    pipe.encode_prompt = spy
    torch.manual_seed(0)
    with torch.no_grad():
        pipe(**subject.arguments())
    del pipe.encode_prompt
    return {k: v for k, v in arguments.items() if k != "prompt"} | _named(pipe, seen)


def _named(pipe: Pipe, seen: list[Any]) -> Arguments:
    """encode_prompt's results in the order in which the classes return them."""
    taken = inspect.signature(type(pipe).__call__).parameters
    kind = type(pipe).__name__
    if kind.startswith("HunyuanVideo15"):
        names = ["prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"]
        sides = ["", "negative_"]
        pairs = zip(sides, seen, strict=False)
        return {f"{side}{n}": v for side, result in pairs for n, v in zip(names, result, strict=True)}
    if kind.startswith("Hunyuan"):
        names = ["prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"]
        pairs = zip(["", "negative_"], seen, strict=False)
        return {f"{side}{n}": v for side, result in pairs for n, v in zip(names, result, strict=True) if v is not None}
    (result,) = seen[:1]
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if "prompt_attention_mask" in taken and len(result) == 2:
        names = ["prompt_embeds", "prompt_attention_mask"]
    elif "prompt_attention_mask" in taken:
        names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    elif "pooled_prompt_embeds" in taken:
        names = [*names, "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    return {n: v for n, v in zip(names, result, strict=False) if v is not None and n in taken}


def latents(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """Noise that is given, of the shape that the pipeline makes."""
    takes(pipe, "latents")
    if "latents" in arguments:
        raise NotHere("latents are what it takes")
    prepare = pipe.prepare_latents
    seen: list[Any] = []

    def spy(*args: Any, **named: Any) -> Any:
        seen.append(prepare(*args, **named))
        return seen[-1]

    pipe.prepare_latents = spy
    torch.manual_seed(0)
    with torch.no_grad():
        pipe(**subject.arguments())
    del pipe.prepare_latents
    like = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(5))
    return arguments | {"latents": noise.to(like.dtype)}


def another_size(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    if not subject.sized:
        raise NotHere("the picture tells the size")
    return subject.arguments(subject.width + 32 * (1 + (subject.width >= 128)), subject.height)


def longer(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    step = {4: 1, 7: 6, 9: 8, 17: 8}.get(subject.frames, 0)
    if not step:
        raise NotHere("one frame")
    return subject.arguments(frames=subject.frames + step)


def stepped(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """A callback that changes the latents."""
    takes(pipe, "callback_on_step_end")

    def halve(pipe: Pipe, step: int, timestep: Any, tensors: Arguments) -> Arguments:
        return {"latents": tensors["latents"] * 0.5}

    return arguments | {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["latents"]}


def interrupted(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    takes(pipe, "callback_on_step_end")

    def stop(pipe: Pipe, step: int, timestep: Any, tensors: Arguments) -> Arguments:
        pipe._interrupt = True
        return {}

    return arguments | {"callback_on_step_end": stop}


def short_text(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    takes(pipe, "max_sequence_length")
    return arguments | {"max_sequence_length": 16}


def more_steps(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """For caches, which leave out later ones."""
    if subject.steps:
        return arguments | {"num_inference_steps": 4}
    return arguments


def attention_arguments(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    """How strong a LoRA is, for this call."""
    taken = inspect.signature(type(pipe).__call__).parameters
    name = next((n for n in ("attention_kwargs", "cross_attention_kwargs") if n in taken), "")
    if not name:
        raise NotHere("the call takes no attention_kwargs")
    return arguments | {name: {"scale": 0.5}}


def last_picture(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    takes(pipe, "last_image")
    return arguments | {"last_image": picture(subject.width, subject.height, 9)}


def clip_skip(pipe: Pipe, subject: Subject, arguments: Arguments) -> Arguments:
    takes(pipe, "clip_skip")
    return arguments | {"clip_skip": 1}
