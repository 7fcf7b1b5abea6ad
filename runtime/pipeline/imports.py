"""What is imported before a pipeline can be: some four thousand modules, which is most of a small render."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected(forever: bool = False) -> Iterator[None]:
    """For imports: modules are no garbage, and looking for some among them is a fifth of importing them.

    `forever`: nor is what there is by then looked through later, in a process that is for rendering alone.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if forever:
            gc.freeze()
        if before:
            gc.enable()


def pipeline_class(name: str) -> Any:
    """diffusers' class of this name, with what it imports: PyTorch, transformers and the parts of its pipeline.

    The libraries draw no progress bars from then on. Raises what their imports raise.
    """
    with uncollected():
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        return getattr(diffusers, name)
