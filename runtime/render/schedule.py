"""A job's schedule: what the model's publisher lays down and what the user asks for, and the scheduler that runs it."""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from overcrank.errors import RequestError
from overcrank.models._schedulers import FLOW, SCHEDULERS, kind_of, limit, usable
from overcrank.models.base import Rendering, Variant

if TYPE_CHECKING:
    from overcrank.runtime.render.request import RenderRequest

SHIFTS = ("shift", "flow_shift")
LISTS = ("sigmas", "timesteps")
_TRAINED = 1000  # timesteps of the flow models' clock

# ── what is asked for ────────────────────────────────────────────────────────────────


def scheduled(request: RenderRequest, variant: Variant, rendering: Rendering) -> dict[str, Any]:
    """Values of the request's fields `steps`, `scheduler`, `shift`, `sigmas` and `timesteps`, the model's where unset.

    A list of the model's gives way to steps, a shift or a scheduler of the user's. Raises RequestError for what
    contradicts itself, or what this model's pipeline cannot take.
    """
    config = variant.configs.get("scheduler")
    if config is None:
        field = next((f for f in ("scheduler", "shift", *LISTS) if getattr(request, f) is not None), None)
        if field is not None:
            raise RequestError(f"{field}: {variant.name} takes no steps ({rendering.pipeline}); leave it out.")
        if request.steps not in (None, rendering.steps):
            raise RequestError(
                f"steps {request.steps}: {variant.name} takes none ({rendering.pipeline}); leave it out."
            )
        return {"steps": rendering.steps}
    own = config | dict(rendering.scheduler)
    name = request.scheduler or str(own.get("_class_name", ""))
    if request.scheduler is not None:
        _check_class(request.scheduler, variant, rendering, own)
    values = _listed(request, rendering, name, own)
    if request.shift is not None:
        _check_shift(name, values, own)
    fields: dict[str, Any] = {"steps": request.steps or rendering.steps} | values
    if request.shift is None and not values:
        fields["shift"] = next((float(rendering.scheduler[k]) for k in SHIFTS if k in rendering.scheduler), None)
    if request.scheduler is None:
        fields["scheduler"] = rendering.scheduler.get("_class_name")
    return fields


def _check_class(name: str, variant: Variant, rendering: Rendering, config: Mapping[str, Any]) -> None:
    able = usable(rendering.pipeline, config)
    if name in able:
        return
    if name in SCHEDULERS:
        raise RequestError(
            f"scheduler {name}: {rendering.pipeline} of {variant.name} cannot run it; use {', '.join(able)}."
        )
    close = difflib.get_close_matches(name, SCHEDULERS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(able)}."
    raise RequestError(f"scheduler {name}: no such video scheduler of diffusers; {hint}")


def _check_shift(name: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    scheduler = SCHEDULERS.get(name)
    if scheduler is not None and not (scheduler.shift and kind_of(config) == FLOW):
        raise RequestError(f"shift: {name} of this model has none; leave it out.")
    if values:
        raise RequestError("shift: the sigmas or timesteps that are listed are final, nothing shifts them; give one.")
    if config.get("use_dynamic_shifting"):
        raise RequestError(f"shift: {name} of this model shifts by the number of tokens; leave it out.")
    if config.get("use_karras_sigmas"):
        raise RequestError(f"shift: {name} of this model spaces its steps after Karras, unshifted; leave it out.")


def _listed(request: RenderRequest, rendering: Rendering, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`steps` and the list, where there is one."""
    lists = [f for f in LISTS if getattr(request, f) is not None]
    if len(lists) == 2:
        raise RequestError("sigmas and timesteps both list the steps; give one of them.")
    if not lists:
        mine = {f: getattr(rendering, f) for f in LISTS if getattr(rendering, f)}
        stays = request.shift is None and request.scheduler in (None, config.get("_class_name"))
        if not (mine and stays and request.steps in (None, len(rendering.listed))):
            return {}
        return {"steps": len(rendering.listed), **mine}
    (field,) = lists
    return _checked(field, _without_end(getattr(request, field)), request.steps, name, config)


def _without_end(values: Sequence[float]) -> tuple[float, ...]:
    """Where every schedule ends may be listed too."""
    return tuple(values[:-1] if len(values) > 1 and values[-1] == 0 else values)


def _checked(
    field: str, values: tuple[float, ...], steps: int | None, name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    largest = limit(config)
    scheduler = SCHEDULERS.get(name)
    if (scheduler is not None and not scheduler.listed) or (field == "timesteps" and largest is None):
        raise RequestError(f"{field}: {name} of this model takes no list of them; give steps.")
    if not values:
        raise RequestError(f"{field}: the list is empty; give one number a step.")
    top = largest and largest * (_TRAINED if field == "timesteps" else 1)
    for value in values:
        if not (value > 0 and (top is None or value <= top)):
            span = f"above 0 and at most {top:g}" if top is not None else "above 0"
            raise RequestError(f"{field}: {value:g} is out of range; each must be {span}.")
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise RequestError(f"{field}: {after:g} follows {before:g}; they must fall from step to step.")
    if steps is not None and steps != len(values):
        raise RequestError(f"steps {steps} and a list of {len(values)} {field} disagree; leave steps out.")
    return {"steps": len(values), field: values}


# ── the scheduler of a job ───────────────────────────────────────────────────────────


def scheduler_of(own: Any, rendering: Rendering, request: RenderRequest | None) -> Any:
    """A scheduler for one job: the checkpoint's `own`, what the publisher lays over it, what the request asks for.

    Schedulers keep state between steps, so jobs that run at the same time need one each. A listed schedule is what
    its `set_timesteps` makes, whatever the pipeline asks it for.
    """
    import diffusers

    config = copy.deepcopy(dict(own.config))
    overlay = {k: v for k, v in rendering.scheduler.items() if k != "_class_name"}
    name = (request.scheduler if request else None) or rendering.scheduler.get("_class_name")
    cls = getattr(diffusers, name) if name else type(own)
    shift = next((overlay.pop(k) for k in SHIFTS if k in overlay), None)
    if request is not None:  # completed, so that it holds the publisher's
        shift = request.shift
    if cls is not type(own):
        overlay = _translated(config, cls.__name__) | overlay
    if shift is not None:
        overlay[_shift_of(cls)] = shift
    schedule = _list_of(request)
    if schedule is not None:
        overlay |= _unshifted(cls)
        cls = _exact(cls, *schedule)
    return cls.from_config(config, **overlay)


def _shift_of(cls: Any) -> str:
    scheduler = SCHEDULERS.get(cls.__name__)
    return (scheduler and scheduler.shift) or next(k for k in SHIFTS if k in _fields(cls))


def _fields(cls: Any) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(cls.__init__).parameters


def _translated(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A flow model's settings as another class calls them."""
    if kind_of(config) != FLOW or name not in SCHEDULERS:
        return {}
    settings = {SCHEDULERS[name].shift: next((config[k] for k in SHIFTS if k in config), 1.0)}
    if SCHEDULERS[name].shift == "flow_shift":
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return settings


def _list_of(request: RenderRequest | None) -> tuple[tuple[float, ...], tuple[float, ...] | None] | None:
    """(sigmas, timesteps that the network is to see or None) of a request that lists its steps."""
    if request is not None and request.timesteps is not None:
        return tuple(t / _TRAINED for t in request.timesteps), request.timesteps
    return (request.sigmas, None) if request is not None and request.sigmas is not None else None


def _unshifted(cls: Any) -> dict[str, Any]:
    """Settings that would bend a list."""
    off = {"shift": 1.0, "flow_shift": 1.0, "shift_terminal": None}
    off |= dict.fromkeys(("use_dynamic_shifting", "use_karras_sigmas"), False)
    off |= dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), False)
    return {k: v for k, v in off.items() if k in _fields(cls)}


def _exact(cls: Any, sigmas: tuple[float, ...], timesteps: tuple[float, ...] | None) -> Any:
    """The class with a schedule of its own; a subclass, for pipelines copy their scheduler and ask for its class."""
    import inspect

    stock = cls.set_timesteps
    parameters = inspect.signature(stock).parameters
    values = [*sigmas, 0.0] if cls.__name__ == "EulerDiscreteScheduler" else list(sigmas)

    @functools.wraps(stock)
    def set_timesteps(
        self: Any, num_inference_steps: int | None = None, device: Any = None, *_: Any, **others: Any
    ) -> None:
        import numpy as np

        more = {"timesteps": list(timesteps)} if timesteps is not None and "timesteps" in parameters else {}
        stock(self, device=device, sigmas=np.array(values), **more)

    return type(cls.__name__, (cls,), {"set_timesteps": set_timesteps, "__module__": cls.__module__})
