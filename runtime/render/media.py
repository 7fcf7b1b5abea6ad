"""Conditioning pictures and videos: opened, looked at as a viewer shows them, and fitted to the video's size."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from overcrank.errors import RequestError, present
from overcrank.models import family
from overcrank.models.base import Media, Variant, VideoShape
from overcrank.options import option
from overcrank.runtime.render.pictures import on_white, picture_of

if TYPE_CHECKING:
    from overcrank.runtime.render.request import RenderRequest
    from PIL import Image

log = logging.getLogger("overcrank")
CONTAINERS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif", "apng", "webp"),
    *(
        "ivf",
        "nut",
        "mxf",
        "yuv4mpegpipe",
        "h264",
        "hevc",
        "av1",
        "obu",
        "mpegvideo",
        "m4v",
        "dv",
        "wav",
        "w64",
        "rf64",
    ),
    *("aiff", "au", "caf", "mp3", "flac", "aac", "ac3", "eac3", "amr", "wv", "tta", "ape", "aa"),
)
"""Formats that hold what they show. Others are lists of files (concat, hls, dash, image2), and those would be read."""
HDR, WIDE = (16, 18), (9, 11, 12)  # of H.273: PQ and HLG; primaries of BT.2020 and P3
HD_LINES, UNTAGGED, BT709 = 720, 2, 1  # from here on, a video that does not say is BT.709


def media_of(request: RenderRequest, variant: Variant) -> Media:
    """Pictures and videos of a completed request, opened and fitted."""
    paths = ((0, request.image), (request.shape.frames - 1, request.last_image))
    kept = request.kept
    images = {i: _padded(fitted_image(path, kept), request.shape) for i, path in paths if path is not None}
    video: list[Image.Image] = []
    if request.video is not None:
        count, last = family(variant.family).clip_of(variant, request.shape)
        clip = fitted_video(request.video, kept, count, last, pad=request.crop is not None)
        video = [_padded(picture, request.shape) for picture in clip]
    return Media(images, video, request.strength, present(request.fps, "fps of the request"))


def cropped(frames: Any, kept: VideoShape) -> Any:
    """The middle of frames [F, H, W, 3], and the first of them: as large and long as `kept`."""
    top, left = (frames.shape[1] - kept.height) // 2, (frames.shape[2] - kept.width) // 2
    return frames[: kept.frames, top : top + kept.height, left : left + kept.width]


def _padded(picture: Image.Image, shape: VideoShape) -> Image.Image:
    """The picture in the middle of the size that is computed, its edges repeated around it."""
    import numpy as np
    from PIL import Image

    rows, columns = shape.height - picture.height, shape.width - picture.width
    if not rows and not columns:
        return picture
    margins = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), margins, "edge"))


# ── videos and sound ─────────────────────────────────────────────────────────────────


@contextmanager
def opened_media(path: Path, what: Literal["video", "audio"]) -> Iterator[Any]:
    """A container of PyAV that reads no other file.

    Raises RequestError for whatever PyAV cannot read, while it is opened or later.
    """
    import av

    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            yield container
    except (av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or f"it holds no {what}"
        kind = "a video" if what == "video" else "sound"
        raise RequestError(f"{what} {path} cannot be read as {kind}: {reason}.") from error


def rate_of(path: Path) -> float:
    """Frames a second of a video; raises RequestError for a file that is none."""
    with opened_media(path, "video") as container:
        return float(container.streams.video[0].average_rate or 0)


def length_of(path: Path, most: int) -> int:
    """How many frames a video has, counted up to `most`; raises RequestError for a file that is none."""
    with opened_media(path, "video") as container:
        return sum(1 for _ in zip(range(most), container.decode(video=0), strict=False))


def fitted_video(path: Path, shape: VideoShape, count: int, last: bool, pad: bool = False) -> list[Image.Image]:
    """The video's first, or last, `count` frames as RGB of the size asked for.

    `pad`: one of fewer frames goes on with its last. Raises RequestError for a file that is no video, or has too few.
    """
    from PIL import Image, ImageOps

    frames: deque[Any] = deque(maxlen=count)
    size = (shape.width, shape.height)
    with opened_media(path, "video") as container:
        aspect = float(container.streams.video[0].sample_aspect_ratio or 1)
        for frame in container.decode(video=0):
            frames.append(frame if last else ImageOps.fit(_shown(frame, aspect), size, Image.Resampling.LANCZOS))
            if len(frames) == count and not last:
                break
        if last:
            frames = deque(ImageOps.fit(_shown(frame, aspect), size, Image.Resampling.LANCZOS) for frame in frames)
    if not frames or (len(frames) < count and not pad):
        further = f"lower {option('frames')}, or add {option('fit', True)} to go on with its last frame"
        fix = "give a longer one" if last else further
        raise RequestError(f"video {path} has {len(frames)} frames and {count} are used; {fix}.")
    return [*frames, *[frames[-1]] * (count - len(frames))]


def _shown(frame: Any, aspect: float) -> Image.Image:
    """A decoded frame as a player shows it: colours as tagged, on white, turned, and with square pixels."""
    from PIL import Image

    clear = any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8"
    settings: dict[str, Any] = {"format": "rgba" if clear else "rgb24", "width": max(1, round(frame.width * aspect))}
    if frame.colorspace == UNTAGGED and frame.height >= HD_LINES:
        settings["src_colorspace"] = BT709
    if frame.color_trc in HDR or (frame.color_primaries in WIDE and frame.color_trc != UNTAGGED):
        settings |= {"dst_color_trc": BT709, "dst_color_primaries": BT709}
    return on_white(Image.fromarray(_turned(frame.to_ndarray(**settings), frame)))


def _turned(pixels: Any, frame: Any) -> Any:
    """Turned and mirrored by right angles as the display matrix [a b u; c d v; x y w] says.

    It takes a point to x' = ax + cy, y' = bx + dy.
    """
    import numpy as np
    from av.sidedata.sidedata import Type

    matrices = [data for data in frame.side_data if data.type == Type.DISPLAYMATRIX]
    if not matrices:
        return pixels
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrices[0]), np.int32)
    if abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d)):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def require_sound(path: Path) -> None:
    """Raise RequestError for a file that holds no sound."""
    with opened_media(path, "audio") as source:
        if not source.streams.audio:
            raise RequestError(f"audio {path} holds no sound.")


def sound_of(path: Path) -> Iterator[Any]:
    """Decoded audio frames; raises RequestError for what is none."""
    with opened_media(path, "audio") as source:
        yield from source.decode(audio=0)


# ── pictures ─────────────────────────────────────────────────────────────────────────


def size_of_picture(path: Path) -> tuple[int, int]:
    """(height, width) as it is looked at; raises RequestError for a file that is no picture."""
    picture = picture_of(path)
    return picture.height, picture.width


def fitted_image(path: Path, shape: VideoShape) -> Image.Image:
    """The picture as RGB of the video's size; one of another aspect ratio loses its edges, and a line says so.

    Raises RequestError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    picture = picture_of(path)
    size = (shape.width, shape.height)
    width, height = picture.size
    scale = min(width / size[0], height / size[1])
    middle = (round(size[0] * scale), round(size[1] * scale))
    if max(width - middle[0], height - middle[1]) > 1:
        log.warning(
            "%s is %dx%d and the video %dx%d: its middle %dx%d is used, the rest is cut off.",
            path.name, width, height, *size, *middle,
        )  # fmt: skip
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
