"""Writes export/files/networks.json: the names and shapes of every published network's tensors, digested.

python bench/index_networks.py
"""

from __future__ import annotations

import json
from typing import Any

from accelerate import init_empty_weights
from overcrank.export.files.identify import TABLE, digest, kinds
from overcrank.export.module import construct
from overcrank.models import components, families, family


def indexed() -> dict[str, Any]:
    """Class → the part of the pipeline it is, its parameters' names, and digest → variants."""
    table: dict[str, Any] = {}
    known: dict[str, dict[str, tuple[int, ...]]] = {}
    for variant in (v for name in families() for v in family(name).variants):
        for component in components(variant):
            cls = component.cls.rpartition(".")[2]
            if component.subfolder not in ("transformer", "unet", "vae", "audio_vae"):
                continue
            key = repr((component.cls, component.config))
            if key not in known:
                with init_empty_weights():
                    module = construct(component.cls, component.config, f"{variant.name}: {component.subfolder}")
                known[key] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
            shapes = known[key]
            about = {"part": component.subfolder, "nearest": variant.name, "names": [], "networks": {}}
            entry = table.setdefault(cls, about)
            if (names := sorted(kinds(shapes))) not in entry["names"]:
                entry["names"].append(names)
            same = entry["networks"].setdefault(digest(shapes), [])
            if variant.name not in same:
                same.append(variant.name)
    return table


if __name__ == "__main__":
    TABLE.write_text(json.dumps(indexed(), indent=1) + "\n", "utf-8")
