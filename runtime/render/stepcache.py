"""Step caching: denoiser calls whose result is extrapolated from earlier ones in place of being computed.

What decides is EasyCache's transformation rate (arXiv 2507.02860): between the last two
computed steps the output moved by so much for so much movement of the input; the movement of
the input since then, times that rate, is how far the output must have moved, and is added up
until it passes the threshold. What stands in for the output is the last computed one moved on
by `SLOPE` of the line through the last two: the middle between repeating it and following the
line was the nearest of all that were tried (bench/results/step-cache.md).

A part computes the first two calls of each branch of a run through the steps, and all of its
last step. Inputs and outputs are all it looks at, so every kind of session can be behind it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from overcrank.errors import UserError
from overcrank.models import family
from overcrank.models.base import Variant
from overcrank.options import option
from overcrank.runtime.pipeline.accelerate import denoisers
from overcrank.runtime.sessions.session import Ledger

if TYPE_CHECKING:
    from torch import Tensor, nn

SLOPE = 0.5
BACKEND = "step-cache"


def threshold_of(word: str, variant: Variant) -> float:
    """`--cache`: off, a level of the variant's family, or how far an output may have moved (0.08 is 8 %).

    0 is off. Raises UserError.
    """
    levels = family(variant.family).cache_levels
    if word in ("off", *levels):
        return levels.get(word, 0.0)
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise UserError(f"{option('cache', word)}: use off, {', '.join(levels)}, or a number from 0 to 1 such as 0.08.")
    return number


@dataclass
class _Branch:
    """One of the calls that a step makes of a module, such as the guided one."""

    steps: list[int] = field(default_factory=list)  # of the computed calls, the last two
    inputs: list[Tensor] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def keep(self, step: int, x: Tensor, result: Any) -> None:
        if self.inputs and self.inputs[-1].shape != x.shape:
            self.steps, self.inputs, self.results = [], [], []
        self.steps = [*self.steps[-1:], step]
        self.inputs = [*self.inputs[-1:], x.detach().clone()]
        self.results = [*self.results[-1:], _mapped(lambda t: t.detach().clone(), result)]

    def follows(self, x: Tensor) -> bool:
        return len(self.steps) == 2 and self.inputs[-1].shape == x.shape

    def predicted(self, step: int) -> Any:
        """The result moved on along the line through the last two."""
        before, last = self.steps
        share = SLOPE * (step - last) / (last - before)
        return _mapped(lambda new, old: (new + share * (new.float() - old)).to(new.dtype), *reversed(self.results))

    def rate(self) -> Tensor:
        """Movement of the output, relative to it, for movement of the input."""
        old, new = (_tensors(r)[0].float() for r in self.results)
        moved = (self.inputs[1].float() - self.inputs[0]).abs().mean()
        return (new - old).abs().mean() / new.abs().mean() / moved


class _Part:
    """Stands before one denoiser's forward."""

    def __init__(self, cache: StepCache, module: nn.Module, name: str) -> None:
        self._cache, self._name = cache, name
        self._forward = module.forward
        self.__signature__ = inspect.signature(module.forward)
        self._first = next(iter(self.__signature__.parameters))
        self.begin()

    def begin(self) -> None:
        self._branches: dict[int, _Branch] = {}
        self._seen: Tensor | None = None
        self._error: Any = 0.0
        self.stepped()

    def stepped(self) -> None:
        self._calls, self._skipping = 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache
        if cache.ledger.forced_eager:
            return self._forward(*args, **kwargs)
        x = args[0] if args else kwargs[self._first]
        branch = self._branches.setdefault(self._calls, _Branch())
        self._calls += 1
        if self._calls == 1:
            self._skipping = not cache.last and self._within(branch, x)
        if self._skipping and branch.follows(x):
            cache.ledger.record.served[self._name, BACKEND] += 1
            return branch.predicted(cache.step)
        result = self._forward(*args, **kwargs)
        branch.keep(cache.step, x, result)
        return result

    def _within(self, branch: _Branch, x: Tensor) -> bool:
        """Whether the outputs of this step may be extrapolated; on a GPU waits for its input, once a step."""
        before, self._seen = self._seen, x.detach().clone()
        if before is None or not branch.follows(x):
            return False
        self._error = self._error + branch.rate() * (x.float() - before).abs().mean()
        if bool(self._error < self._cache.threshold):
            return True
        self._error = 0.0
        return False


class StepCache:
    """Steps of one render at a time: `over` a pipeline, told of each step's end by `stepped`."""

    def __init__(self, threshold: float, variant: Variant, ledger: Ledger) -> None:
        """`threshold` as of `threshold_of`."""
        self.threshold, self.variant, self.ledger = threshold, variant, ledger
        self.step, self.last = 0, False
        self._parts: list[_Part] = []

    def settings(self) -> dict[str, Any]:
        return {"cache": self.threshold} if self.threshold else {}

    @contextmanager
    def over(self, pipe: Any) -> Iterator[None]:
        """Stands before the pipeline's denoisers meanwhile."""
        with ExitStack() as stack:
            if self.threshold:
                for module, name in denoisers(pipe, self.variant):
                    self._parts.append(_Part(self, module, name))
                    stack.enter_context(_in_place_of_forward(module, self._parts[-1]))
            self.step, self.last = 0, False
            try:
                yield
            finally:
                self._parts.clear()

    def stepped(self, step: int, steps: int) -> None:
        """Step number `step` of `steps`, from 0, is done; after the last one another run may follow."""
        ended = step + 1 == steps
        self.step, self.last = (0, False) if ended else (step + 1, step + 2 == steps)
        for part in self._parts:
            part.begin() if ended else part.stepped()


@contextmanager
def _in_place_of_forward(module: nn.Module, part: _Part) -> Iterator[None]:
    before = vars(module).get("forward")  # an EngineModule, or an offload hook's
    module.forward = part
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's method shows again
        else:
            module.forward = before


def _mapped(function: Any, *results: Any) -> Any:
    """`function` of the floating tensors of results built alike: a tensor, a tuple, or a diffusers output."""
    import torch
    from torch.utils import _pytree as pytree

    def of(first: Any, *more: Any) -> Any:
        return function(first, *more) if torch.is_tensor(first) and first.is_floating_point() else first

    return pytree.tree_map(of, *results)


def _tensors(result: Any) -> list[Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(result) if torch.is_tensor(leaf) and leaf.is_floating_point()]
