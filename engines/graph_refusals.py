"""Reasons for which a graph is not run in ONNX Runtime, or a session of it cannot be made."""

from __future__ import annotations

from dataclasses import dataclass

from overcrank.engines.refusals import BUILD, OfThisCall, Refusal
from overcrank.units import human_bytes


@dataclass(frozen=True)
class GraphRefused(Refusal):
    """Its bundle is whole, and signed where it must be: to get the same one again would change nothing."""

    bundle: str
    problem: str
    what = "{problem}"
    fix = "overcrank engines rm {bundle}, then {build}"


@dataclass(frozen=True)
class SessionRefused(Refusal):
    """By one of our own errors, which says what to do."""

    component: str
    problem: str
    advice: str
    what = "{component}: {problem}"
    fix = "{advice}"


@dataclass(frozen=True)
class ScoresTooLarge(OfThisCall):
    """PyTorch's attention never has all of its scores at once."""

    needed: int  # bytes
    free: int
    fix = "PyTorch needs less; for ONNX Runtime, render fewer frames or a smaller size"

    def words(self, build: str = BUILD) -> tuple[str, str]:
        what = (
            f"ONNX Runtime would hold {human_bytes(self.needed)} of attention scores for this size at once, and "
            f"{human_bytes(self.free)} of memory are free"
        )
        return what, super().words(build)[1]
