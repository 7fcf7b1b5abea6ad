"""Reasons for which a graph is not run in ONNX Runtime, or a session of it cannot be made."""

from __future__ import annotations

from dataclasses import dataclass

from overcrank.engines.refusals import Refusal


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
