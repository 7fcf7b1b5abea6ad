"""Counts the parameters of every variant's networks into models/parameters.json, without making one.

python bench/count_parameters.py
"""

from __future__ import annotations

import json
from pathlib import Path

import overcrank
from overcrank.export.module import abstract_module
from overcrank.models import components, families, family
from overcrank.models.base import Variant

FILE = Path(overcrank.__file__).parent / "models" / "parameters.json"


def counted(variant: Variant, known: dict[str, int]) -> dict[str, int]:
    """Component → number of parameters; `known` remembers networks that variants share."""
    found = {}
    for component in components(variant):
        key = repr((component.cls, component.attribute, component.config))
        if key not in known:
            module = abstract_module(component, component.config, "bf16")
            known[key] = sum(p.numel() for p in module.parameters())
        found[component.name] = known[key]
    return found


def main() -> None:
    known: dict[str, int] = {}
    table = {v.name: counted(v, known) for name in families() for v in family(name).variants}
    FILE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
