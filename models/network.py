"""What makes two configurations one network: the class's own view of them, without what no graph reads.

A configuration is a dictionary somebody wrote: a publisher's of another diffusers version lists other fields than
ours, with the same meaning. `classes.json` (made by bench/class_fields.py, which tests/test_network.py repeats)
holds each class's fields with their defaults, and the fields that do not show in a component's graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from overcrank.models.base import Component, Config, Variant

TABLE = Path(__file__).parent / "classes.json"
LIBRARIES = ("diffusers", "transformers")


def network(component: Component) -> Config:
    """The fields of the component's configuration that its graph is made from, as plain JSON values.

    Two components of one class and name with equal networks export the same graph.
    """
    unread = _table()["unread"].get(component.cls, {}).get(component.name, ())
    config = as_class_sees(component.cls, component.config)
    return {field: _plain(value) for field, value in config.items() if field not in unread}


def as_class_sees(cls: str, config: Config) -> Config:
    """Every field of the class with the value it gets from `config`: its default where none is given.

    Fields that the class does not know are left out, as from_pretrained leaves them out.
    """
    return {field: _listed(config.get(field, default)) for field, default in class_fields(cls).items()}


def unknown_fields(cls: str, config: Config) -> list[str]:
    """Fields of a configuration that the diffusers class does not have; transformers' classes keep any."""
    fields = class_fields(cls)
    if cls in _table()["of_transformers"]:
        return []
    return sorted(f for f in config if f not in fields and not f.startswith("_") and f != "quantization_config")


def completed(variant: Variant, components: Iterable[Component]) -> Variant:
    """The variant with the configuration of each of its components as the class sees it."""
    classes = {part: c.cls for c in components for part in (c.subfolder, *c.also_serves) if part in variant.configs}
    configs = {part: as_class_sees(cls, variant.configs[part]) for part, cls in classes.items()}
    return replace(variant, configs={**variant.configs, **configs})


def differences(here: Config, there: Config, place: str) -> list[str]:
    """Fields in which two networks of one class differ, with both values; `place` is "in the engine", say."""
    fields = sorted(f for f in {**here, **there} if here.get(f) != there.get(f))
    return [f"{f}: {short(here.get(f))} here, {short(there.get(f))} {place}" for f in fields]


def class_fields(cls: str) -> Config:
    """The class's configuration fields with their defaults, from the table if it is of the installed libraries."""
    defaults: dict[str, Config] = _table()["defaults"]
    return defaults[cls] if cls in defaults and _of_installed_libraries() else inspected_fields(cls)


@lru_cache
def inspected_fields(cls: str) -> Config:
    """`class_fields` read from the class itself, which imports its library."""
    import dataclasses
    import inspect

    import diffusers

    where, _, name = cls.rpartition(".")
    library_class: Any = getattr(import_module(f"diffusers.{where}") if where else diffusers, name, None)
    if library_class is not None:
        taken = inspect.signature(library_class.__init__).parameters
        return {n: _listed(p.default) for n, p in taken.items() if n not in ("self", "kwargs")}
    import transformers

    config = getattr(transformers, cls).config_class
    own = set(config.__annotations__)
    return {f.name: _listed(f.default) for f in dataclasses.fields(config) if f.name in own and f.name != "model_type"}


@lru_cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table


@lru_cache
def _of_installed_libraries() -> bool:
    return all(metadata.version(name) == _table()["versions"][name] for name in LIBRARIES)


def _listed(value: Any) -> Any:
    """As JSON has it: lists in place of tuples."""
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Whole numbers as integers: 1.0 and 1 make the same graph."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
