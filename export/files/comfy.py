"""Names of files in a ComfyUI models tree, as its loaders show them: relative to the folder of their kind."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.errors import UserError
from overcrank.options import option

EXTRA = "extra_model_paths.yaml"
FOLDERS = {
    "diffusion_models": ("unet", "diffusion_models"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "checkpoints": ("checkpoints",),
    "clip_vision": ("clip_vision",),
    "loras": ("loras",),
}
"""ComfyUI's kinds of models: their folders, in the order in which it looks."""
ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class ComfyTree:
    """A models tree, with what its extra_model_paths.yaml adds."""

    root: Path
    folders: dict[str, tuple[Path, ...]]
    """Kind → folders, the first that has a file winning."""

    def file(self, name: str, kinds: Iterable[str], asked: str) -> Path:
        """The file that ComfyUI shows as `name`; raises UserError with near names. `asked`: the option, in words."""
        kinds = tuple(kinds)
        plain = name.replace("\\", "/")
        for folder in (folder for kind in kinds for folder in self.folders.get(kind, ())):
            if (folder / plain).is_file():
                return folder / plain
        names = sorted(set(self.names(kinds)))
        close = difflib.get_close_matches(plain, names, n=3, cutoff=0.4)
        same = [n for n in names if n.rpartition("/")[2] == plain.rpartition("/")[2]]
        near = " or ".join((same or close)[:3])
        hint = f"did you mean {near}?" if near else f"it holds {', '.join(names[:5]) or 'no such files'}."
        raise UserError(f"{asked}: {self.root} has no '{name}' in its {', '.join(kinds)}; {hint}")

    def names(self, kinds: Iterable[str]) -> Iterator[str]:
        for folder in (folder for kind in kinds for folder in self.folders.get(kind, ())):
            for base, _, files in os.walk(folder, followlinks=True):
                for file in files:
                    if file.lower().endswith(ENDINGS):
                        yield (Path(base) / file).relative_to(folder).as_posix()


def comfy_tree(folder: Path) -> ComfyTree:
    """`folder`: ComfyUI's own, or its models folder. Raises UserError for another, or a YAML file that is broken."""
    folder = folder.expanduser()
    models = next((f for f in (folder / "models", folder) if any((f / name).is_dir() for name in _names())), None)
    extra = next((f / EXTRA for f in (folder, folder.parent) if (f / EXTRA).is_file()), None)
    if models is None and extra is None:
        raise UserError(
            f"{option('comfy', folder)}: it has neither models nor {EXTRA}; give the folder of ComfyUI, or the one "
            f"that holds {', '.join(_names()[:3])} and the like."
        )
    folders: dict[str, list[Path]] = {
        kind: [models / name for name in own] if models else [] for kind, own in FOLDERS.items()
    }
    for kind, path, first in _added(extra) if extra else ():
        folders.setdefault(kind, []).insert(0 if first else len(folders.get(kind, [])), path)
    return ComfyTree(folder, {kind: tuple(dict.fromkeys(paths)) for kind, paths in folders.items()})


def kinds_of_part(part: str) -> tuple[str, ...]:
    """Where ComfyUI keeps a part of a diffusers pipeline; of "" any."""
    if not part:
        return "diffusion_models", "checkpoints", "vae", "text_encoders", "clip_vision"
    if part.startswith("text_encoder"):
        return "text_encoders", "checkpoints"
    if "vae" in part:
        return "vae", "checkpoints"
    return ("clip_vision",) if part.startswith("image_encoder") else ("diffusion_models", "checkpoints")


def _names() -> list[str]:
    return [name for own in FOLDERS.values() for name in own]


def _added(extra: Path) -> Iterator[tuple[str, Path, bool]]:
    """(kind, folder, whether it goes before ComfyUI's own) of extra_model_paths.yaml."""
    for section in _sections(extra):
        base = Path(os.path.expandvars(str(section.get("base_path") or ""))).expanduser()
        first = bool(section.get("is_default"))
        for name, lines in section.items():
            if name in ("base_path", "is_default") or not isinstance(lines, str):
                continue
            kind = next((kind for kind, own in FOLDERS.items() if name in own), name)
            for line in filter(None, map(str.strip, lines.splitlines())):
                yield kind, extra.parent / base / Path(os.path.expandvars(line)).expanduser(), first


def _sections(extra: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(extra.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{extra} cannot be read as YAML ({reason}); correct it.") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"{extra} is no table of folders; correct it as ComfyUI's example has it.")
    return [section for section in content.values() if isinstance(section, dict)]
