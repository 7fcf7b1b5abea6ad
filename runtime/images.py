"""Conditioning images: opened, and fitted to the video's size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.errors import RequestError
from overcrank.models.base import VideoShape

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("overcrank")


def fitted_image(path: Path, shape: VideoShape) -> Image.Image:
    """The picture as RGB of the video's size; one of another aspect ratio loses its edges, and a line says so.

    Raises RequestError for a file that is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise RequestError(f"image {path} cannot be read as a picture: {error}.") from error
    size = (shape.width, shape.height)
    width, height = picture.size
    scale = min(width / size[0], height / size[1])
    kept = (round(size[0] * scale), round(size[1] * scale))
    if max(width - kept[0], height - kept[1]) > 1:
        log.warning(
            "%s is %dx%d and the video %dx%d: its middle %dx%d is used, the rest is cut off.",
            path.name, width, height, *size, *kept,
        )  # fmt: skip
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
