"""Does a part's checkpoint hold what its module is loaded from? Told by names, shapes and types, before any is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError
from overcrank.export.headers import Entry, tensors_in, weight_files
from overcrank.export.module import construct
from overcrank.export.weights import require_values
from overcrank.models.base import Component, Config

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("overcrank")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_DEPTH = re.compile(r"num_(hidden_|single_)?layers")


def require_part(folder: Path, library: str, cls: str, config: Config, tensors: Mapping[str, Entry]) -> None:
    """Compare a part's tensors, by their own names, with the module that its library makes of `config`.

    Nothing is compared where the class is no module. Raises ModelError for a configuration that the class is not built
    from, CheckpointError as `require_module`.
    """
    owner = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    try:
        library_class: Any = getattr(import_module(owner), cls)
    except (ImportError, AttributeError):
        return  # what is wrong with it is said when it is loaded
    if not hasattr(library_class, "named_parameters"):
        return
    deep = [k for k, v in config.items() if _DEPTH.fullmatch(k) and isinstance(v, int) and v > max(len(tensors), 1)]
    if deep:
        raise CheckpointError(
            f"{folder}/config.json: {deep[0]} is {config[deep[0]]:,}, and its files hold {len(tensors):,} tensors; "
            f"download both again."
        )
    from accelerate import init_empty_weights

    name = cls if owner == library else f"pipelines.{library}.{cls}"
    with init_empty_weights(include_buffers=False):
        module = construct(name, config, str(folder / "config.json"))
    require_module(module, folder, tensors)


def component_files(component: Component, folder: Path) -> tuple[Path, ...]:
    """The files of `weight_files`, which hold what the component's module is loaded from.

    Raises CheckpointError as it and `require_module`.
    """
    from accelerate import init_empty_weights

    files = weight_files(folder)
    with init_empty_weights(include_buffers=False):
        module = construct(component.cls, component.config, str(folder / "config.json"))
    require_module(module, folder, tensors_in(files))
    return files


def require_module(module: nn.Module, folder: Path, tensors: Mapping[str, Entry]) -> None:
    """Raise CheckpointError where the tensors are not what the module needs, naming one; warn of those left out.

    What has no place in the module, such as an EMA's, is left out by the libraries too; blocks beyond those that a
    diffusers configuration asks for are not: it is another model's.
    """
    names = _library_names(module, tensors)
    if names is None:  # put together anew when it is read
        return
    here = {name: tensors[own] for own, name in names.items()}
    unread, random = (_pattern(module, kind) for kind in ("unexpected", "missing"))
    values = {n: v for n, v in module.named_parameters(remove_duplicate=False) if v.is_floating_point()}
    shapes = {
        name: tuple(value.shape)
        for name, value in values.items()
        if name in here or (not (random and random.search(name)) and not (_tied(module, name) & here.keys()))
    }
    stored = module.state_dict().keys() | values.keys()
    unused = {own: n for own, n in names.items() if n not in stored and not (unread and unread.search(n))}
    if shapes.keys() <= here.keys():
        _require_no_block(module, folder, unused)
    require_values(folder, shapes, here)
    if unused:
        log.warning(
            "%s holds tensors that %s has no place for: %s; they are left out.",
            folder, type(module).__name__, _listed(sorted(unused)),
        )  # fmt: skip


def _require_no_block(module: nn.Module, folder: Path, unused: Mapping[str, str]) -> None:
    from torch import nn

    for own, name in unused.items():
        for number in _NUMBER.finditer(name):
            try:
                chain = module.get_submodule(name[: number.start() - 1])
            except AttributeError:
                break
            beyond = isinstance(chain, nn.ModuleList) and int(number[0]) >= len(list(chain.children()))
            if beyond and hasattr(module, "load_config"):  # of diffusers; text encoders are cut short on purpose
                raise CheckpointError(
                    f"{folder}: its files hold '{own}', and its config.json asks for {len(list(chain.children()))} of "
                    f"{name[: number.start() - 1]}: it is another model's; download both again."
                )


def _library_names(module: nn.Module, tensors: Iterable[str]) -> dict[str, str] | None:
    """Name in the files → name in the module, as its library renames when it loads; None if it joins some into one."""
    rename: Any = getattr(module, "_fix_state_dict_keys_on_load", None)
    if rename is not None:  # diffusers
        renamed = {name: name for name in tensors}
        rename(renamed)
        return {own: name for name, own in renamed.items()}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(module)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
    state: Any = module.state_dict()
    names = {own: rename_source_key(own, renamings, converters, module.base_model_prefix, state) for own in tensors}
    return None if any(converter for _, converter in names.values()) else {own: n for own, (n, _) in names.items()}


def _pattern(module: nn.Module, kind: str) -> re.Pattern[str] | None:
    """Names that the library does not speak of: "unexpected" or "missing" ones."""
    patterns = list(getattr(module, f"_keys_to_ignore_on_load_{kind}", None) or ())
    if kind == "unexpected" and not hasattr(module, "load_config"):
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # buffers that were stored once
    return re.compile("|".join(f"({p})" for p in patterns)) if patterns else None


def _tied(module: nn.Module, name: str) -> set[str]:
    """Other names of the same parameter."""
    pairs: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    source = pairs.get(name, name)
    return ({source} | {target for target, of in pairs.items() if of == source}) - {name}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
