"""The precision of every layer as data. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recipe:
    """Which number format a graph's layers run in; today one 16-bit type for all of them,
    besides what diffusers keeps in fp32."""

    precision: str

    def digest(self) -> str:
        """SHA-256 of the recipe's canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
