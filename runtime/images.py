"""Conditioning images: opened, and fitted to the video's size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.errors import RequestError
from overcrank.models.base import Media, VideoShape

if TYPE_CHECKING:
    from overcrank.runtime.request import RenderRequest
    from PIL import Image

log = logging.getLogger("overcrank")


def media_of(request: RenderRequest) -> Media:
    """Pictures and videos of a completed request, opened and fitted."""
    paths = ((0, request.image), (request.shape.frames - 1, request.last_image))
    images = {index: fitted_image(path, request.shape) for index, path in paths if path is not None}
    video = fitted_video(request.video, request.shape) if request.video is not None else ()
    assert request.fps is not None
    return Media(images, video, request.strength, request.fps)


def fitted_video(path: Path, shape: VideoShape) -> list[Image.Image]:
    """The video's first frames as RGB of the size asked for.

    Raises RequestError for a file that is no video, or one of fewer frames than asked for.
    """
    import av
    from PIL import Image, ImageOps

    frames: list[Image.Image] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if len(frames) == shape.frames:
                    break
                picture = frame.to_image()
                frames.append(ImageOps.fit(picture, (shape.width, shape.height), Image.Resampling.LANCZOS))
    except (av.FFmpegError, IndexError) as error:
        raise RequestError(f"video {path} cannot be read as a video: {error}.") from error
    if len(frames) < shape.frames:
        raise RequestError(f"video {path} has {len(frames)} frames and {shape.frames} are asked for; lower --frames.")
    return frames


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
