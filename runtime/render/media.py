"""Conditioning images: opened, and fitted to the video's size."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import RequestError, present
from overcrank.models import family
from overcrank.models.base import Media, Variant, VideoShape

if TYPE_CHECKING:
    from overcrank.runtime.render.request import RenderRequest
    from PIL import Image

log = logging.getLogger("overcrank")


def media_of(request: RenderRequest, variant: Variant) -> Media:
    """Pictures and videos of a completed request, opened and fitted."""
    paths = ((0, request.image), (request.shape.frames - 1, request.last_image))
    images = {index: fitted_image(path, request.shape) for index, path in paths if path is not None}
    video: list[Image.Image] = []
    if request.video is not None:
        count, last = family(variant.family).clip_of(variant, request.shape)
        video = fitted_video(request.video, request.shape, count, last)
    return Media(images, video, request.strength, present(request.fps, "fps of the request"))


def rate_of(path: Path) -> float:
    """Frames a second of a video; raises RequestError for a file that is none."""
    import av

    try:
        with av.open(str(path)) as container:
            return float(container.streams.video[0].average_rate or 0)
    except (av.FFmpegError, IndexError) as error:
        raise RequestError(f"video {path} cannot be read as a video: {error}.") from error


def fitted_video(path: Path, shape: VideoShape, count: int, last: bool) -> list[Image.Image]:
    """The video's first, or last, `count` frames as RGB of the size asked for.

    Raises RequestError for a file that is no video, or one of fewer frames.
    """
    import av
    from PIL import Image, ImageOps

    kept: deque[Any] = deque(maxlen=count)
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                kept.append(frame)
                if len(kept) == count and not last:
                    break
        pictures = [frame.to_image() for frame in kept]
    except (av.FFmpegError, IndexError) as error:
        raise RequestError(f"video {path} cannot be read as a video: {error}.") from error
    if len(pictures) < count:
        fix = "give a longer one" if last else "lower --frames"
        raise RequestError(f"video {path} has {len(pictures)} frames and {count} are used; {fix}.")
    return [ImageOps.fit(p, (shape.width, shape.height), Image.Resampling.LANCZOS) for p in pictures]


def size_of_picture(path: Path) -> tuple[int, int]:
    """(height, width) as it is looked at; raises RequestError for a file that is no picture."""
    picture = _opened(path)
    return picture.height, picture.width


def fitted_image(path: Path, shape: VideoShape) -> Image.Image:
    """The picture as RGB of the video's size; one of another aspect ratio loses its edges, and a line says so.

    Raises RequestError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    picture = _opened(path)
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


def _opened(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise RequestError(f"image {path} cannot be read as a picture: {error}.") from error
