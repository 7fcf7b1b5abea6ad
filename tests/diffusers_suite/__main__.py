"""`python -m tests.diffusers_suite [CLASS…] [--variation WORD…] [--markdown FILE] [--store DIR]`: the table."""

from __future__ import annotations

import argparse
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
from tests.diffusers_suite.variations import VARIATIONS


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("classes", nargs="*", help="parts of their names")
    asked.add_argument("--variation", action="append", default=[], help="a part of its name; may be repeated")
    asked.add_argument("--store", type=Path, help="where graphs are kept [default: a new folder]")
    asked.add_argument("--all", action="store_true", help="print good cells too")
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
    table: dict[tuple[str, str], Outcome] = {}
    with shared_sessions():
        for name in names:
            started = time.monotonic()
            for variation in (v for v in varied if VARIATIONS[v].of(name)):
                began = time.monotonic()
                table[name, variation] = found = suite.run(name, VARIATIONS[variation])
                if options.all or not found.good:
                    print(
                        f"{found.kind:9} {name} | {variation} | {found.note} | {time.monotonic() - began:.1f}",
                        flush=True,
                    )
            print(f"# {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(counts(table))
    if options.markdown:
        options.markdown.write_text(page(table), "utf-8")


if __name__ == "__main__":
    main()
