"""Frames → files: MP4 (PyAV), GIF, PNG frames, a contact sheet, latents, and a JSON sidecar."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.files import write_errors
from overcrank.runtime.render.media import sound_of
from overcrank.runtime.render.results import (
    FRAME,
    Replace,
    described,
    place,
    require_free,
    result_paths,
    sidecar_path,
    staging,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SHEET_TILES, SHEET_WIDTH = 8, 256
RATE = 48000  # of the sound in an MP4
GIF_SHORTEST = 2  # hundredths of a second; viewers slow down what is shorter


@dataclass(frozen=True)
class Video:
    """What a render gave: uint8 frames [F, H, W, 3], and the latents after each step, fp32 [steps, B, S, C]."""

    frames: np.ndarray
    fps: float
    latents: np.ndarray
    sound: tuple[np.ndarray, int] | None = None  # the model's own: fp32 [channels, samples] in [-1, 1], and the rate


@dataclass(frozen=True)
class Writing:
    """What is written of a video, beside its frames."""

    formats: tuple[str, ...]
    about: Mapping[str, Any]  # the sidecar's content
    audio: Path | None = None
    metadata: bool = True  # whether the MP4 says what it was made of
    replace: Replace = "own"


def write_results(video: Video, stem: Path, writing: Writing) -> list[Path]:
    """Write the video in every format, then the sidecar; returns the paths.

    Raises StoreError when the folder cannot be written or is full, RequestError for what is in the way: nothing of
    this result is left then, and what was there before is as it was.
    """
    import numpy as np

    notes = _without_folders(writing.about) if writing.metadata else {}
    writers: dict[str, Callable[[Path], None]] = {
        "mp4": lambda p: write_mp4(video, p, notes, writing.audio),
        "gif": lambda p: write_gif(video, p),
        "png": lambda p: _write_frames(video.frames, p),
        "sheet": lambda p: contact_sheet(video.frames).save(p),
        "latents": lambda p: _write_latents(video.latents, p),
    }
    final = result_paths(stem, writing.formats)
    require_free(stem, writing.formats, writing.replace)
    with write_errors(stem.parent, "--out"), staging(stem) as work:
        entries = []
        for name, path in final.items():
            writers[name](work / path.name)
            entries.append({"format": name, "name": path.name} | described(work / path.name))
        digest = hashlib.sha256(np.ascontiguousarray(video.frames).data).hexdigest()
        about = _relative(writing.about, stem.parent) | {"frames_sha256": digest, "files": entries}
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        (work / sidecar_path(stem).name).write_text(text, "utf-8", errors="backslashreplace")
        place(work, stem, writing.formats, writing.replace)
    return [*final.values(), sidecar_path(stem)]


def _relative(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Files named from the sidecar's folder, so that both can be moved together."""

    def from_folder(path: str) -> str:
        try:
            return Path(os.path.relpath(path, folder)).as_posix()
        except ValueError:  # on another drive of Windows
            return path

    return _with_paths(about, from_folder)


def _without_folders(about: Mapping[str, Any]) -> dict[str, Any]:
    """Files by their names alone: a video that is passed on tells nothing of its maker's folders."""
    return _with_paths(about, lambda path: Path(path).name)


def _with_paths(about: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A sidecar's content with each absolute path changed; prompts stay as they are."""

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _with_paths(value, change)
        if isinstance(value, list | tuple):
            return [changed(v) for v in value]
        return change(value) if isinstance(value, str) and os.path.isabs(value) else value

    return {k: v if k in TEXTS else changed(v) for k, v in about.items()}


TEXTS = ("prompt", "negative_prompt", "output", "fallbacks")


def write_mp4(result: Video, path: Path, about: Mapping[str, Any], audio: Path | None) -> None:
    """H.264 in yuv420p, BT.709 and tagged so, with `about` as metadata ({}: none), and AAC sound."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    frames, rate = result.frames, Fraction(result.fps).limit_denominator(1001)
    options = {"movflags": "use_metadata_tags+faststart"}
    with av.open(str(path), "w", format="mp4", options=options, metadata_errors="backslashreplace") as container:
        container.metadata.update(_notes(about) if about else {})
        video = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        coder: Any = video.codec_context
        coder.colorspace, coder.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
        coder.color_primaries, coder.color_trc = int(ColorPrimaries.BT709), int(ColorTrc.BT709)
        heard = sound_of(audio) if audio else _drawn(*result.sound) if result.sound else None
        sound = container.add_stream("aac", rate=RATE) if heard else None
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            planes = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(video.encode(planes))
        container.mux(video.encode(None))
        if heard is not None and sound is not None:
            _mux_sound(container, sound, heard, len(frames) / float(rate))


def _notes(about: Mapping[str, Any]) -> dict[str, str]:
    request = about.get("request", {})
    notes = {"title": str(request.get("prompt", "")), "encoder": "overcrank"}
    notes |= {k: str(request[k]) for k in ("prompt", "seed") if k in request}
    return notes | {"model": str(about.get("model", "")), "comment": json.dumps(about)}


def _drawn(samples: np.ndarray, rate: int) -> Iterator[Any]:
    import av
    import numpy as np

    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:2], np.float32), format="fltp", layout=layout)
    frame.sample_rate = rate
    yield frame


def _mux_sound(container: Any, sound: Any, heard: Iterator[Any], seconds: float) -> None:
    """The sound's first `seconds`, resampled to what the AAC encoder takes; the rest is not decoded."""
    import av

    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE, frame_size=1024)

    def resampled() -> Iterator[Any]:
        for decoded in heard:
            yield from resampler.resample(decoded)
        yield from resampler.resample(None)

    position = 0
    for frame in resampled():
        if position >= seconds * RATE:
            break
        frame.pts = position
        position += frame.samples
        container.mux(sound.encode(frame))
    container.mux(sound.encode(None))


def write_gif(video: Video, path: Path) -> None:
    """Each frame at its time, in the hundredths of a second that a GIF counts in; of more than 50 a second, some."""
    from PIL import Image

    times = [round(100 * i / video.fps) for i in range(len(video.frames) + 1)]
    indices, ends = [0], []
    for i in range(1, len(video.frames)):
        if times[i] - times[indices[-1]] >= GIF_SHORTEST:
            ends.append(times[i])
            indices.append(i)
    ends.append(max(times[-1], times[indices[-1]] + GIF_SHORTEST))
    durations = [10 * (end - times[i]) for i, end in zip(indices, ends, strict=True)]
    first, *rest = [Image.fromarray(video.frames[i]) for i in indices]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _write_frames(frames: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / FRAME.format(i))


def _write_latents(latents: np.ndarray, path: Path) -> None:
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors makes files that only their owner reads
    save_file({"latents": latents}, path)
    path.chmod(mode)


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Up to eight frames, evenly spaced, first and last among them, four in a row."""
    import numpy as np
    from PIL import Image, ImageDraw

    count = min(SHEET_TILES, len(frames))
    indices = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, width = frames.shape[1:3]
    tile = (SHEET_WIDTH, max(1, round(SHEET_WIDTH * height / width)))
    columns, margin, label = min(4, count), 4, 14
    rows = -(-count // columns)
    cell = (tile[0] + margin, tile[1] + label + margin)
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    for i, index in enumerate(indices):
        left, top = margin + i % columns * cell[0], margin + i // columns * cell[1]
        sheet.paste(Image.fromarray(frames[index]).resize(tile, Image.Resampling.LANCZOS), (left, top + label))
        draw.text((left + 2, top + 1), f"frame {index}", fill=(220, 220, 220))
    return sheet
