"""Sets of LoRAs that jobs ask for: a loaded pipeline's weights take one after the other.

They are written in place, so engines that read them follow. What a set changes is kept in host memory as it was: a
sum that is subtracted again leaves other bits than there were.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from overcrank.models import family
from overcrank.models.base import Variant
from overcrank.runtime.pipeline.lora import Lora, LoraFile, Parts, Place, merge
from overcrank.runtime.pipeline.lora_parts import read_loras

if TYPE_CHECKING:
    from torch import Tensor

LoraSet = tuple[LoraFile, ...]


def with_weights(pipe: Any) -> Parts:
    """The parts of a pipeline that LoRAs may be for."""
    return {name: module for name, module in pipe.components.items() if hasattr(module, "named_parameters")}


class LoraSets:
    """What a pipeline's weights have beside those of its checkpoint and preset; jobs that overlap have the same."""

    def __init__(self, pipe: Any, variant: Variant, usual: Sequence[LoraFile] = ()) -> None:
        """`usual`: the set of jobs that name none."""
        self._usual = tuple(usual)
        self._pipeline, self._parts = type(pipe), with_weights(pipe)
        self._words = family(variant.family).part_words
        self._about: dict[LoraSet, list[dict[str, Any]]] = {}
        self._merged: LoraSet = ()
        self._plain: dict[Place, Tensor] = {}  # what the set in the weights has changed, as it was
        self._jobs = 0
        self._turn = threading.Condition()

    def of(self, own: Sequence[LoraFile] | None) -> LoraSet:
        """The set of a job, which may name its own."""
        return self._usual if own is None else tuple(own)

    def about(self, files: LoraSet) -> list[dict[str, Any]]:
        """What a sidecar says of a set; raises UserError for files that cannot be merged into this pipeline."""
        if files not in self._about:
            self._about[files] = [lora.about() for lora in self._read(files)]
        return self._about[files]

    @contextmanager
    def merged(self, files: LoraSet) -> Iterator[None]:
        """The weights have this set meanwhile; jobs with another are waited for."""
        with self._turn:
            self._turn.wait_for(lambda: not self._jobs or files == self._merged)
            if files != self._merged:
                self._change(files)
            self._jobs += 1
        try:
            yield
        finally:
            with self._turn:
                self._jobs -= 1
                self._turn.notify_all()

    def _read(self, files: LoraSet) -> list[Lora]:
        return read_loras(files, self._pipeline, self._parts, self._words)

    def _change(self, files: LoraSet) -> None:
        loras = self._read(files)
        self._restore()
        try:
            for part, name in dict.fromkeys(place for lora in loras for place in lora.parameters()):
                self._plain[part, name] = self._parts[part].get_parameter(name).detach().to("cpu", copy=True)
            merge(loras, self._parts)
        except BaseException:
            self._restore()
            raise
        self._merged = files

    def _restore(self) -> None:
        import torch

        with torch.no_grad():
            for (part, name), values in self._plain.items():
                self._parts[part].get_parameter(name).copy_(values)
        self._plain.clear()
        self._merged = ()
