"""What a family of models is to everything above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.models.base import Arguments, Component, Latents, Media, Preset, Variant, VideoShape

if TYPE_CHECKING:
    from torch import Tensor

Grid = dict[str, tuple[int, int]]
"""Axis of a video → (step, offset): its valid sizes are offset, offset + step, …"""


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """Models that share a denoiser's architecture: each family file derives a class and makes `FAMILY` of it.

    `default` is the variant that the family's name means. `denoiser_classes` are the diffusers classes it is known
    by. `presets` are published ways to render in few steps. `part_words` are what people call the parts of the
    pipeline that share one architecture, and write in the names of files. `guides_apart` tells whether the pipelines
    call the denoiser once more for guidance, at each step in which it is on. `cache_levels` are the step cache's
    thresholds by name; the default ones are measured with no family. `preview(pipe, latents, grid)`, with `grid` the
    latent (frames, height, width), gives the middle latent frame as RGB [3, H, W] in [0, 1].
    """

    title: str
    default: str
    denoiser_classes: tuple[str, ...]
    variants: tuple[Variant, ...]
    presets: tuple[Preset, ...] = ()
    part_words: Mapping[str, str] = field(default_factory=dict)
    guides_apart: bool = False
    cache_levels: Mapping[str, float] = field(default_factory=lambda: {"safe": 0.05, "fast": 0.1})
    preview: Callable[[Any, Tensor, Latents], Tensor] | None = None

    # ── networks and shapes ──────────────────────────────────────────────────────────

    @abstractmethod
    def components(self, variant: Variant) -> tuple[Component, ...]:
        """The networks of the variant that become engines, the denoiser first."""

    def strides(self, variant: Variant) -> tuple[int, int]:
        """(spatial, temporal) compression of the VAE, by the names that most classes have for it."""
        vae = variant.configs["vae"]
        if "scale_factor_spatial" in vae:
            return vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        return vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]

    def grid(self, variant: Variant) -> Grid:
        """Valid sizes of height, width and frames: whole patches of the transformer."""
        spatial, temporal = self.strides(variant)
        patch = variant.configs["transformer"]["patch_size"]
        step = spatial * (patch if isinstance(patch, int) else patch[1])
        return {"height": (step, 0), "width": (step, 0), "frames": (temporal, 1)}

    def latent(self, variant: Variant, shape: VideoShape) -> Latents:
        """Latent (frames, height, width) of a video shape."""
        spatial, temporal = self.strides(variant)
        return (shape.frames - 1) // temporal + 1, shape.height // spatial, shape.width // spatial

    # ── a checkpoint ─────────────────────────────────────────────────────────────────

    def join(self, folder: Path) -> None:  # noqa: B027
        """Called when a checkpoint was put together of several repositories: a folder of links to their parts."""

    def prepare(self, pipe: Any, variant: Variant) -> None:  # noqa: B027
        """Called once when a checkpoint is loaded."""

    # ── a render ─────────────────────────────────────────────────────────────────────

    def size_of(self, variant: Variant, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the video made of a picture, where its pipeline takes no other (Rendering.sized)."""
        return height, width

    def clip_of(self, variant: Variant, shape: VideoShape) -> tuple[int, bool]:
        """How many frames of a given video are used, and whether its last ones in place of its first."""
        return shape.frames, False

    def encode(self, pipe: Any, variant: Variant, prompt: str, negative_prompt: str, guided: bool) -> Arguments:
        """Text arguments of the pipelines' calls: the pipeline encodes them itself."""
        return {"prompt": prompt, "negative_prompt": negative_prompt}

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """Arguments of the pipelines' calls; `arguments` are those that all share.

        Raises RequestError for what the pipeline cannot do with them.
        """
        return arguments | ({"image": media.images[0]} if media.images else {})

    def results(self, pipe: Any, result: Any) -> tuple[Any, tuple[Any, int] | None]:
        """Frames [F, H, W, 3] in [0, 1], and the sound [channels, samples] with its rate, if there is one."""
        return result.frames[0], None

    def rounds(self, variant: Variant, shape: VideoShape) -> int:
        """How often the pipeline runs through its steps for one video."""
        return 1
