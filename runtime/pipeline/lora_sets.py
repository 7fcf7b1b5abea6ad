"""Sets of LoRAs that jobs ask for: a loaded pipeline has one after the other (adapters.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from overcrank.runtime.pipeline.adapters import Adapters
from overcrank.runtime.pipeline.lora import LoraFile

LoraSet = tuple[LoraFile, ...]


class LoraSets:
    """What a pipeline has beside its checkpoint and preset; jobs that overlap have the same."""

    def __init__(self, adapters: Adapters, usual: Sequence[LoraFile] = ()) -> None:
        """`usual`: the set of jobs that name none."""
        self._adapters, self.usual = adapters, tuple(usual)
        self._about: dict[LoraSet, list[dict[str, Any]]] = {}
        self._jobs = 0
        self._turn = threading.Condition()

    def of(self, own: Sequence[LoraFile] | None) -> LoraSet:
        """The set of a job, which may name its own."""
        return self.usual if own is None else tuple(own)

    def about(self, files: LoraSet) -> list[dict[str, Any]]:
        """What a sidecar says of a set, the preset's among them; raises UserError for files of another model."""
        if files not in self._about:
            self._about[files] = self._adapters.described(files)
        return self._about[files]

    @contextmanager
    def merged(self, files: LoraSet) -> Iterator[None]:
        """The pipeline has this set meanwhile; jobs with another are waited for."""
        with self._turn:
            self._turn.wait_for(lambda: not self._jobs or files == self._adapters.files)
            if files != self._adapters.files:
                self._adapters.set(files)  # which leaves the set before where it fails
            self._jobs += 1
        try:
            yield
        finally:
            with self._turn:
                self._jobs -= 1
                self._turn.notify_all()
