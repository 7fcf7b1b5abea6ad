"""What `bench-gpu` measured of engines on this machine's cards; an engine that loses to eager PyTorch is not used.

One JSON file for each card and driver in the store's `measured` folder: digest of the EngineKey →
milliseconds of a call at the shape that was measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from overcrank.engines.refusals import CannotServe, Slower
from overcrank.engines.store import Store
from overcrank.files import atomic_write, write_errors
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class Measurement(BaseModel):
    """Medians of one component's calls, in milliseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    component: str
    shape: str
    engine_ms: float
    eager_ms: float
    date: str
    kernels: Literal["eager", "lazy"] = "lazy"
    """When kernels for the shape were compiled; "lazy" may have been measured with those that fit any shape."""

    @property
    def lost(self) -> bool:
        """Whether the engine is known to be slower than eager PyTorch."""
        return self.kernels == "eager" and self.engine_ms > self.eager_ms


_FILE = TypeAdapter(dict[str, Measurement])


def _file(store: Store, card: str, driver: str) -> Path:
    words = "-".join(re.sub(r"\W+", "_", word) for word in (card, driver))
    return store.root / "measured" / f"{words}.json"


def measurements(store: Store, card: str, driver: str) -> dict[str, Measurement]:
    """By digest of the EngineKey; none where nothing, or nothing readable, was recorded."""
    try:
        return _FILE.validate_json(_file(store, card, driver).read_bytes())
    except (OSError, ValidationError):
        return {}


def record(store: Store, card: str, driver: str, engine: str, measurement: Measurement) -> None:
    """Kept in place of an earlier measurement of the same engine."""
    store.prepare()
    file = _file(store, card, driver)
    with write_errors(file.parent):
        file.parent.mkdir(exist_ok=True)
    with store.lock(f"measured-{file.stem}"), atomic_write(file) as part:
        entries = measurements(store, card, driver) | {engine: measurement}
        content = {key: m.model_dump() for key, m in sorted(entries.items())}
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def require_not_slower(store: Store, card: str, driver: str, engine: str) -> None:
    """Raise CannotServe for an engine that was measured, with kernels made for its shape, to lose on this card."""
    times = measurements(store, card, driver).get(engine)
    if times is not None and times.lost:
        raise CannotServe(Slower(times.component, times.engine_ms, times.eager_ms, times.shape, times.date))
