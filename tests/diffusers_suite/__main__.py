"""`python -m tests.diffusers_suite [CLASS…] [--variation WORD…] [--results FILE] [--markdown FILE]`: the table.

All cells take hours. With `--results` each outcome is a line of that file as soon as it is known: what is right
there is not run again, so that a run can be stopped, go on, and run beside another one of other classes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tests import without_torchvision
from tests.diffusers_suite.cells import Outcome, Suite, counts, shared_sessions
from tests.diffusers_suite.classes import CLASSES
from tests.diffusers_suite.markdown import page
from tests.diffusers_suite.variations import CELLS, VARIATIONS


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("classes", nargs="*", help="parts of their names")
    asked.add_argument("--variation", action="append", default=[], help="a part of its name; may be repeated")
    asked.add_argument("--store", type=Path, help="where graphs are kept [default: a new folder]")
    asked.add_argument("--all", action="store_true", help="print good cells too")
    asked.add_argument("--results", type=Path, help="outcomes, one to a line: read first, and added to")
    asked.add_argument("--known", action="store_true", help="run nothing: only what --results has")
    asked.add_argument("--markdown", type=Path, help="write the table there")
    options = asked.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    without_torchvision.install()
    without_torchvision.pass_guardrail()
    torch.set_num_threads(1)
    names = [n for n in CLASSES if not options.classes or any(c in n for c in options.classes)]
    varied = [v for v in VARIATIONS if not options.variation or any(w in v for w in options.variation)]
    suite = Suite(options.store or Path(tempfile.mkdtemp()))
    known = _read(options.results)
    table: dict[tuple[str, str], Outcome] = {}
    for name in names:
        started = time.monotonic()
        with shared_sessions():
            for variation in (v for v in varied if VARIATIONS[v].of(name)):
                found = known.get((name, variation))
                if options.known and found is None:
                    continue
                if not options.known and (found is None or not found.good):
                    found = suite.run(name, VARIATIONS[variation])
                    _write(options.results, (name, variation), found)
                assert found is not None
                table[name, variation] = found
                if options.all or not found.good:
                    print(f"{found.kind:9} {name} | {variation} | {found.note}", flush=True)
        print(f"# {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(counts(table))
    if options.markdown:
        options.markdown.write_text(page(table, len(CELLS)), "utf-8")


def _read(results: Path | None) -> dict[tuple[str, str], Outcome]:
    """Of several lines about a cell the last one holds."""
    if results is None or not results.exists():
        return {}
    lines = (json.loads(line) for line in results.read_text("utf-8").splitlines())
    return {(name, variation): Outcome(kind, note) for name, variation, kind, note in lines}


def _write(results: Path | None, cell: tuple[str, str], found: Outcome) -> None:
    if results is not None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps([*cell, found.kind, found.note], ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
