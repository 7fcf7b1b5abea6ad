"""`lora` of a job: the files that are merged for it, in the place of the command line's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.runtime.pipeline.lora import LoraFile
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from overcrank.runtime.render.request import RenderRequest


class JobLora(BaseModel):
    """As [PART=]FILE[:SCALE] on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    scale: float = Field(default=1.0, allow_inf_nan=False)
    part: str = ""


def lora_files(request: RenderRequest) -> list[LoraFile] | None:
    """Of a completed request; None where it has no set of its own."""
    return None if request.lora is None else [LoraFile(x.file, x.scale, x.part) for x in request.lora]


def by_loras(requests: Sequence[RenderRequest]) -> list[int]:
    """Numbers of the jobs with those of one set one after another, so that weights change once for each set."""
    first: dict[tuple[JobLora, ...] | None, int] = {}
    for number, request in enumerate(requests):
        first.setdefault(request.lora, number)
    return sorted(range(len(requests)), key=lambda number: first[requests[number].lora])
