"""Frames → files: MP4 (PyAV), GIF, PNG frames, a contact sheet, and a JSON sidecar.

Everything is written under a temporary name in the target folder and renamed when whole;
the sidecar comes last, so a result that has one is complete.
"""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.manifest import file_entry
from overcrank.errors import RequestError
from overcrank.files import write_errors

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SHEET_TILES, SHEET_WIDTH = 8, 256


def prepare_folder(folder: Path) -> None:
    """Make the folder; raises StoreError when nothing can be written into it."""
    with write_errors(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def result_paths(stem: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """Format → its file (PNG frames: a folder) beside `stem`."""
    names = {"mp4": ".mp4", "gif": ".gif", "png": "-frames", "sheet": ".sheet.png", "latents": ".latents.safetensors"}
    return {f: stem.with_name(stem.name + names[f]) for f in formats}


def sidecar_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


@dataclass(frozen=True)
class Video:
    """What a render gave: uint8 frames [F, H, W, 3], and the latents after each step, fp32 [steps, B, S, C]."""

    frames: np.ndarray
    fps: float
    latents: np.ndarray
    sound: tuple[np.ndarray, int] | None = None  # the model's own: fp32 [channels, samples] in [-1, 1], and the rate


def write_results(
    video: Video, stem: Path, formats: tuple[str, ...], about: Mapping[str, Any], audio: Path | None = None
) -> list[Path]:
    """Write the video in every format, then the sidecar `about`; returns the paths.

    Raises StoreError when the folder cannot be
    written or is full; nothing of this result is left then.
    """
    writers: dict[str, Callable[[Path], None]] = {
        "mp4": lambda p: write_mp4(video, p, about, audio),
        "gif": lambda p: _write_gif(video, p),
        "png": lambda p: _write_frames(video.frames, p),
        "sheet": lambda p: contact_sheet(video.frames).save(p),
        "latents": lambda p: _write_latents(video.latents, p),
    }
    final = result_paths(stem, formats)
    with write_errors(stem.parent, "--out"):
        work = Path(tempfile.mkdtemp(prefix=f".{stem.name}.", suffix=".part", dir=stem.parent))
        try:
            listed = []
            for name, path in final.items():
                writers[name](work / path.name)
                listed.append({"format": name, "name": path.name} | _described(work / path.name))
            sidecar = work / sidecar_path(stem).name
            sidecar.write_text(json.dumps({**about, "files": listed}, indent=1, ensure_ascii=False) + "\n", "utf-8")
            sidecar_path(stem).unlink(missing_ok=True)
            for path in (*final.values(), sidecar_path(stem)):
                if path.is_dir():
                    shutil.rmtree(path)
                (work / path.name).replace(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return [*final.values(), sidecar_path(stem)]


def preview_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.preview.png")


def write_preview(image: np.ndarray, stem: Path) -> None:
    """Replace the preview picture; `image`: [H, W, 3] in [0, 1]."""
    import numpy as np
    from PIL import Image

    part = stem.with_name(f".{stem.name}.preview.part")
    with write_errors(stem.parent, "--out"):
        Image.fromarray((image * 255).round().astype(np.uint8)).save(part, format="PNG")
        part.replace(preview_path(stem))


def remove_partial_results(stem: Path) -> None:
    """What an interrupted write of this result left behind."""
    for path in [preview_path(stem), *stem.parent.glob(f".{glob.escape(stem.name)}.*part")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_complete(stem: Path, digest: str) -> bool:
    """Whether a result of this request lies there whole, by its sidecar and its files' sizes."""
    try:
        about = json.loads(sidecar_path(stem).read_text("utf-8"))
        files = [(stem.with_name(f["name"]), f.get("bytes")) for f in about["files"]]
        whole = all(p.is_dir() if size is None else p.stat().st_size == size for p, size in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return whole and about.get("request_sha256") == digest


def _described(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"count": len(list(path.iterdir()))}
    entry = file_entry(path)
    return {"bytes": entry.bytes, "sha256": entry.sha256}


def write_mp4(result: Video, path: Path, about: Mapping[str, Any], audio: Path | None) -> None:
    """H.264 in yuv420p, BT.709 and tagged so, with the sidecar's content as metadata, and AAC sound."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    frames, rate = result.frames, Fraction(result.fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as container:
        request = about.get("request", {})
        container.metadata.update({"title": str(request.get("prompt", "")), "encoder": "overcrank"})
        container.metadata.update({k: str(request[k]) for k in ("prompt", "seed") if k in request})
        container.metadata.update({"model": str(about.get("model", "")), "comment": json.dumps(about)})
        video = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        coder: Any = video.codec_context
        coder.colorspace, coder.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
        coder.color_primaries, coder.color_trc = int(ColorPrimaries.BT709), int(ColorTrc.BT709)
        heard = _decoded(audio) if audio else _drawn(*result.sound) if result.sound else None
        sound = container.add_stream("aac", rate=48000) if heard else None
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            planes = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(video.encode(planes))
        container.mux(video.encode(None))
        if heard is not None and sound is not None:
            _mux_sound(container, sound, heard, len(frames) / float(rate))


def _decoded(audio: Path) -> Iterator[Any]:
    import av

    with av.open(str(audio)) as source:
        yield from source.decode(audio=0)


def _drawn(samples: np.ndarray, rate: int) -> Iterator[Any]:
    import av
    import numpy as np

    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:2], np.float32), format="fltp", layout=layout)
    frame.sample_rate = rate
    yield frame


def _mux_sound(container: Any, sound: Any, heard: Iterator[Any], seconds: float) -> None:
    """The sound's first `seconds`, resampled to what the AAC encoder takes."""
    import av

    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=48000, frame_size=1024)
    written = 0
    for decoded in heard:
        for frame in resampler.resample(decoded):
            if written >= seconds * 48000:
                break
            frame.pts = written
            written += frame.samples
            container.mux(sound.encode(frame))
    container.mux(sound.encode(None))


def check_audio(path: Path) -> None:
    """Raise RequestError for a file that holds no sound."""
    import av

    try:
        with av.open(str(path)) as source:
            if not source.streams.audio:
                raise RequestError(f"audio {path} holds no sound.")
    except av.FFmpegError as error:
        raise RequestError(f"audio {path} cannot be read as sound: {error.strerror}.") from error


def _write_gif(video: Video, path: Path) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(f) for f in video.frames]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=1000 / video.fps, loop=0)


def _write_frames(frames: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i:05}.png")


def _write_latents(latents: np.ndarray, path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"latents": latents}, path)


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Up to eight frames, evenly spaced, first and last among them, four in a row."""
    import numpy as np
    from PIL import Image, ImageDraw

    count = min(SHEET_TILES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, width = frames.shape[1:3]
    tile = (SHEET_WIDTH, max(1, round(SHEET_WIDTH * height / width)))
    columns, margin, label = min(4, count), 4, 14
    rows = -(-count // columns)
    cell = (tile[0] + margin, tile[1] + label + margin)
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    for i, index in enumerate(chosen):
        left, top = margin + i % columns * cell[0], margin + i // columns * cell[1]
        sheet.paste(Image.fromarray(frames[index]).resize(tile, Image.Resampling.LANCZOS), (left, top + label))
        draw.text((left + 2, top + 1), f"frame {index}", fill=(220, 220, 220))
    return sheet
