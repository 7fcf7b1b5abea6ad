"""docs/published.md: what is known of each variant's published files, and from where (tests/published).

python bench/published.py > docs/published.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overcrank.cli.catalogue import variants

FACTS = Path(__file__).parents[1] / "tests/published"
HEAD = """# What is known of the published checkpoints

Made by `./build.sh pages` from tests/published, where the values and their sources are; do not edit. The tests make
every variant's small checkpoint from these files, and compare the product's own data with them field by field.
*Seen*: the file itself, or a copy of it, was read. *Derived*: what the script writes that converted the checkpoint, or
the file of the model it was made of. *Unknown*: neither could be had; no engine and no default of a render hangs on
these (they are text encoders and tokenizers, which are read from the checkpoint)."""
ORDER = ("seen", "derived", "unknown")


def markdown() -> str:
    """The page."""
    known = [json.loads((FACTS / f"{v.name}.json").read_text("utf-8")) for v in variants() if not v.packaged]
    every = [entry["status"] for facts in known for entry in facts["files"].values()]
    counts = ", ".join(f"{every.count(status)} {status}" for status in ORDER)
    lines = [HEAD, "", f"{len(known)} variants, {len(every)} files: {counts}.", "", "| variant | repository | seen | "]
    lines[-1] += "derived | unknown | licence |"
    lines.append("|---|---|---|---|---|---|")
    return (
        "\n".join([*lines, *map(_row, known), "", "## Notes", "", *(n for facts in known for n in _notes(facts))])
        + "\n"
    )


def _row(facts: dict[str, Any]) -> str:
    at = facts["hub_id"] + (f" @ {facts['revision']}" if facts["revision"] != "main" else "")
    files = {s: [f for f, entry in facts["files"].items() if entry["status"] == s] for s in ORDER}
    cells = [", ".join(_short(f) for f in files[s]) for s in ORDER]
    return f"| {facts['variant']} | {at} | {' | '.join(cells)} | {facts['licence']['name']} |"


def _short(file: str) -> str:
    return file.removesuffix("/config.json").removesuffix("/scheduler_config.json").removesuffix(".json")


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    if facts.get("notes"):
        yield f"- **{facts['variant']}**: {' '.join(facts['notes'])}"


if __name__ == "__main__":
    sys.stdout.write(markdown())
