"""The table of docs/diffusers.md: class by variation, with the reasons as notes."""

from __future__ import annotations

from collections.abc import Mapping

from tests.diffusers_suite.cells import Outcome, counts
from tests.diffusers_suite.unserved import UNSERVED, answer

INTRODUCTION = """# diffusers' pipelines over engines

Made by `python -m tests.diffusers_suite --markdown docs/diffusers.md`. Every pipeline class of diffusers that makes
video, at tiny size, with what users do to pipelines: once in eager PyTorch, once with the engines' graphs in ONNX
Runtime on CPU.

- **equal**: engines served, frames within 1e-3 of eager's (in 16 bit: within twice eager's own rounding)
- **fallback**: the denoiser ran in eager PyTorch, with the reason that the note gives
- **eager**: engines were taken away, or the copy has none: the same bits as eager
- **refused**: `accelerate` raised the sentence of the note
- **–**: the class or eager PyTorch cannot do it
- in capitals: wrong, and to be mended
"""


def page(table: Mapping[tuple[str, str], Outcome], cells: int) -> str:
    """One table for each class would be long: variations are rows, and each outcome lists its classes."""
    notes: dict[str, int] = {}
    total = ", ".join(f"{n} {kind}" for kind, n in counts(table).items())
    if len(table) < cells:
        total += f"; {cells - len(table)} of {cells} cells were not run for this page"
    lines = [INTRODUCTION, f"{total}.\n", "| variation | outcome | classes |", "|---|---|---|"]
    for variation in dict.fromkeys(v for _, v in table):
        grouped: dict[str, list[str]] = {}
        for (name, other), outcome in table.items():
            if other == variation and outcome.kind != "n/a":
                grouped.setdefault(_told(outcome, notes), []).append(name.replace("Pipeline", ""))
        left = sum(v == variation and o.kind == "n/a" for (_, v), o in table.items())
        for row, (told, names) in enumerate(grouped.items()):
            lines.append(f"| {'' if row else variation} | {told} | {', '.join(names)} |")
        if left:
            lines.append(f"| {'' if grouped else variation} | – | {left} classes |")
    lines += ["", "## Notes", "", *(f"{number}. {note}" for note, number in notes.items())]
    lines += ["", "## Classes that no family runs", "", "| class | what `accelerate` says |", "|---|---|"]
    lines += [f"| {name} | {answer(name)} |" for name in UNSERVED]
    return "\n".join(lines) + "\n"


def _told(outcome: Outcome, notes: dict[str, int]) -> str:
    """The kind, with the number of its note."""
    if not outcome.note:
        return outcome.kind
    note = outcome.note.replace("|", "\\|").replace("<", "&lt;")
    return f"{outcome.kind} [{notes.setdefault(note, len(notes) + 1)}]"
