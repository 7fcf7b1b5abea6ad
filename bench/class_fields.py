"""Writes models/classes.json: the fields of every class that becomes an engine, and which of them no graph shows.

Those are among the fields in tests/fields.py OUTSIDE. Each is changed in a module built without weights: one that
leaves the module's every attribute, parameter and buffer as it was is left out of the network's identity, and so is
one that changes only a table which the traced graph does not hold. tests/test_network.py traces all of them again.

    python bench/class_fields.py
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import diffusers
from overcrank.models import families, family
from overcrank.models.network import LIBRARIES, TABLE, inspected_fields

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import fields, without_torchvision


def main() -> None:
    without_torchvision.install()
    classes = {c.cls for name in families() for v in family(name).variants for c in family(name).components(v)}
    defaults = {cls: inspected_fields(cls) for cls in sorted(classes)}
    table = {
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "of_transformers": [c for c in sorted(classes) if "." not in c and not hasattr(diffusers, c)],
        "defaults": defaults,
        "unread": {},
    }
    TABLE.write_text(json.dumps(table, indent=1), "utf-8")  # components are built from it below
    unread: dict[str, dict[str, list[str]]] = {}
    for cls, name in fields.kinds():
        unread.setdefault(cls, {})[name] = found = fields.unread(cls, name)
        print(cls, name, ", ".join(found), flush=True)
    table["unread"] = unread
    TABLE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
