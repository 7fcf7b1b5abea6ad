"""Which fields of a class's configuration show in a component's graph, found by changing them (test_network.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from overcrank.export.graph import _program
from overcrank.export.module import abstract_module
from overcrank.models import family
from overcrank.models.base import Component, Config, Variant
from overcrank.models.network import class_fields

from tests import tiny

# What may be left out of a network's identity: fields that no network multiplies by, whatever else it has. A field
# that happens to show in no tiny network (one of equal widths, say) may well show in a large one, and is not here.
OUTSIDE = {
    *("dropout", "attention_dropout", "initializer_range", "initializer_factor", "projection_dim"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "invert_scale_latents"),
    *("use_quant_conv", "use_post_quant_conv", "double_z", "in_channels", "out_channels"),
    *("sample_size", "sample_height", "sample_width", "sample_frames", "num_frames"),
    *("spatial_compression_ratio", "temporal_compression_ratio", "scale_factor_spatial", "scale_factor_temporal"),
    *("rope_max_seq_len", "rope_scale", "rope_theta", "rope_double_precision", "max_size", "base_height", "base_width"),
    *("pos_embed_max_pos", "audio_pos_embed_max_pos", "audio_sampling_rate", "audio_hop_length", "audio_scale_factor"),
    *("vae_scale_factors", "causal_offset", "sample_rate", "mel_hop_length", "output_sampling_rate"),
    *("spatial_interpolation_scale", "temporal_interpolation_scale"),
}
# Of those, what changes tables that a graph may get as inputs: for them the graph is asked.
TRACED = ("rope", "pos_embed", "max_size", "sample_", "interpolation_scale", "base_", "audio_", "scale_f", "causal_o")
NO_EFFECT = (torch.nn.Dropout,)  # of modules that do not train


def kinds() -> list[tuple[str, str]]:
    """(class, component) of every network that becomes an engine."""
    return sorted({(c.cls, c.name) for name in tiny.TINY for c in _components(tiny.variant(name))})


def cases(cls: str, name: str) -> Iterator[tuple[Variant, Component]]:
    """That component in every tiny variant."""
    seen = set()
    for variant in map(tiny.variant, tiny.TINY):
        for c in _components(variant):
            if (c.cls, c.name) == (cls, name) and repr(c.config) not in seen:
                seen.add(repr(c.config))
                yield variant, c


def unread(cls: str, name: str) -> list[str]:
    """Fields whose change shows in the component's graph in no tiny variant."""
    asked = [f for f in class_fields(cls) if f in OUTSIDE]
    found = [f for f in asked if all(not shows(v, c, f) for v, c in cases(cls, name))]
    return [f for f in found if f not in _strings(cls, name)]


def shows(variant: Variant, component: Component, field: str) -> bool:
    for value in other_values(component.config.get(field, class_fields(component.cls)[field])):
        changed = with_values(variant, component, {field: value})
        if changed is None:
            return True
        try:
            same = fingerprint(changed) == fingerprint(component)
            if not same and any(word in field for word in TRACED):
                same = program_digest(changed) == program_digest(component)
        except Exception:  # a network that cannot be built is another one
            return True
        if not same:
            return True
    return False


def other_values(value: Any) -> list[Any]:
    """Values of the same kind; none for words, of which only the class knows others."""
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [1, True]
    if isinstance(value, int):
        return [value + 1, value * 2 or 2]
    if isinstance(value, float):
        return [value + 0.25, value * 3 + 1]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float)):
        return [[other_values(v)[0] for v in value]]
    return []


def with_values(variant: Variant, component: Component, values: Config) -> Component | None:
    """The component of the variant so changed; None if the family cannot describe it."""
    config = {**class_fields(component.cls), **component.config, **values}
    try:
        changed = replace(variant, configs={**variant.configs, component.subfolder: config})
        return next((c for c in _components(changed) if (c.cls, c.name) == (component.cls, component.name)), None)
    except Exception:
        return None


def fingerprint(component: Component) -> str:
    """Of the description and of the module it is traced from: all its attributes, parameters and buffers."""
    module = abstract_module(component, component.traced_config or component.config, "bf16")
    lines = [description(component)]
    for name, sub in module.named_modules():
        if isinstance(sub, NO_EFFECT):
            continue
        plain = {k: _plain(v) for k, v in vars(sub).items() if not k.startswith("_")}
        lines.append(f"{name} {type(sub).__name__} {sorted(plain.items())}")
        lines += [f"{name}.{k} {tuple(p.shape)} {p.dtype}" for k, p in sub.named_parameters(recurse=False)]
        lines += [f"{name}.{k} {_content(b)}" for k, b in sub.named_buffers(recurse=False)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def description(component: Component) -> str:
    specs = [asdict(t) for t in (*component.inputs, *component.outputs)]
    return repr((specs, component.repeats, dict(component.trace_sizes), dict(component.bounds)))


def program_digest(component: Component) -> str:
    """Of the traced program, constants included: the ONNX graph is a function of it."""
    shallow = component.traced_config or component.config
    program = _program(component, abstract_module(component, shallow, "bf16"), "bf16")
    text = [description(component), str(program.graph)]
    used = {n.target: n for n in program.graph.nodes if n.op == "placeholder" and n.users}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and spec.arg.name in used:
            tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
            text.append(f"{spec.target} {_content(tensor)}")
    # every buffer is a placeholder of the program, whether or not it is used; names of those unused say nothing
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _content(tensor: Any) -> str:
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor) or not isinstance(tensor, torch.Tensor):
        return f"{getattr(tensor, 'shape', tensor)} {getattr(tensor, 'dtype', '')}"
    content = tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().reshape(1)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content.numpy().tobytes()).hexdigest()}"


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return type(value).__name__


def _strings(cls: str, name: str) -> set[str]:
    """Fields that hold words somewhere: always part of the identity."""
    held = [{**class_fields(cls), **c.config} for _, c in cases(cls, name)]
    return {f for config in held for f, v in config.items() if not other_values(v)}


def _components(variant: Variant) -> tuple[Component, ...]:
    every: tuple[Component, ...] = family(variant.family).components(variant)
    return every


__all__ = ["cases", "kinds", "program_digest", "shows", "unread", "with_values"]
