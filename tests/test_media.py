"""Pictures, videos and sound as viewers show them; references are tifffile, FFmpeg filters, and arithmetic."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tifffile
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overcrank.errors import RequestError
from overcrank.models.base import VideoShape
from overcrank.runtime.render import media, output
from overcrank.runtime.render.output import Video, write_mp4
from overcrank.runtime.render.pictures import picture_of
from overcrank.runtime.render.request import RenderRequest
from PIL import Image, ImageCms

HEIGHT, WIDTH = 48, 80
RAMP = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)


def shown(path: Path) -> np.ndarray:
    return np.asarray(picture_of(path)).astype(int)


# ── depths ───────────────────────────────────────────────────────────────────────────


def test_a_16_bit_png_is_as_ffmpeg_shows_it(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    with av.open(str(tmp_path / "grey.png")) as container:
        (frame,) = container.decode(video=0)
        assert frame.format.name == "gray16be"
        reference = frame.to_ndarray(format="rgb24").astype(int)
    assert reference.std() > 50
    assert np.abs(shown(tmp_path / "grey.png") - reference).max() <= 1


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "float32"])
def test_deep_tiffs_of_tifffile(dtype: str, tmp_path: Path) -> None:
    values = RAMP.astype(dtype) / np.float32(65535) if dtype == "float32" else RAMP.astype(dtype)
    tifffile.imwrite(tmp_path / "deep.tiff", values, photometric="minisblack")
    assert np.abs(shown(tmp_path / "deep.tiff")[..., 1] - RAMP / 257).max() <= 1


def test_of_32_bit_samples_it_is_said_what_is_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tifffile.imwrite(tmp_path / "deep.tiff", RAMP.astype("int32") // 2, photometric="minisblack")
    assert np.abs(shown(tmp_path / "deep.tiff")[..., 1] - RAMP / 514).max() <= 1
    assert "deep.tiff has 32-bit samples, and no word of what is white: 0 to 32767 are read" in caplog.text


def test_a_tiff_whose_zero_is_white(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.tiff", RAMP, photometric="miniswhite")
    assert np.abs(shown(tmp_path / "deep.tiff")[..., 1] - (255 - RAMP / 257)).max() <= 1


def test_a_tiff_of_nan_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "nan.tiff", np.full((8, 8), np.nan, np.float32))
    with pytest.raises(RequestError, match=r"nan\.tiff has pixels that are no numbers"):
        picture_of(tmp_path / "nan.tiff")


# ── transparency, profiles, orientation ──────────────────────────────────────────────


def halves(mode: str) -> Image.Image:
    """Left transparent with a colour under it, right opaque."""
    if mode == "RGBA":
        picture = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
        picture.paste((0, 0, 255, 255), (8, 0, 16, 8))
        return picture
    if mode == "LA":
        picture = Image.new("LA", (16, 8), (0, 0))
        picture.paste((29, 255), (8, 0, 16, 8))
        return picture
    picture = Image.new("P" if mode == "P" else mode, (16, 8), 0)
    if mode == "P":
        picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste({"RGB": (0, 0, 255), "P": 1, "L": 29, "I;16": 29 * 257}[mode], (8, 0, 16, 8))
    picture.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    picture = halves(mode)
    picture.save(tmp_path / "clear.png", transparency=picture.info.get("transparency"))
    pixels = shown(tmp_path / "clear.png")
    assert pixels[4, 2].tolist() == [255, 255, 255]
    assert pixels[4, 12].tolist() == ([0, 0, 255] if mode in ("RGBA", "P", "RGB") else [29, 29, 29])


def test_what_is_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    assert np.abs(shown(tmp_path / "half.webp")[0, 0] - [227, 127, 127]).max() <= 1


def test_colours_of_a_profile(tmp_path: Path) -> None:
    """Of one that calls red blue: sRGB's, with the entries of both exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = profile[blue : blue + 4], profile[red : red + 4]
    for mode, colour in {"RGB": (255, 0, 0), "RGBA": (255, 0, 0, 255)}.items():
        Image.new(mode, (4, 4), colour).save(tmp_path / "p.png", icc_profile=bytes(profile))
        assert np.abs(shown(tmp_path / "p.png")[0, 0] - [0, 0, 255]).max() <= 2, mode
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "p.png", icc_profile=b"no profile")
    assert shown(tmp_path / "p.png")[0, 0].tolist() == [255, 0, 0]


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF 2.3, where the file's 0th row and column are
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda p: p.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_pictures_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    pixels = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"p.{suffix}", exif=exif)
    assert np.abs(shown(tmp_path / f"p.{suffix}")[..., 0] - UPRIGHT[orientation](pixels)).max() <= 8


def test_deep_pictures_are_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "p.png", exif=exif)
    assert np.abs(shown(tmp_path / "p.png")[..., 0] - UPRIGHT[6](RAMP) / 257).max() <= 1


# ── files that are none ──────────────────────────────────────────────────────────────


def test_a_huge_picture_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("RGB", (8, 8)).save(path)
    with path.open("r+b") as file:
        file.truncate(20 * 10**9)
    with pytest.raises(RequestError, match=r"huge\.png has 20\.0 GB; pictures have at most 1\.0 GB"):
        picture_of(path)


def test_files_are_digested_piece_by_piece(tmp_path: Path) -> None:
    with (tmp_path / "long.mp4").open("wb") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    first = RenderRequest(video=tmp_path / "long.mp4").digest("m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    with (tmp_path / "long.mp4").open("r+b") as file:
        file.seek(299_999_999)
        file.write(b"!")
    assert RenderRequest(video=tmp_path / "long.mp4").digest("m") != first


def test_programs_and_other_formats_are_no_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "p.eps")
    with pytest.raises(RequestError, match="cannot be read as a picture: it is none of PNG, JPEG"):
        picture_of(tmp_path / "p.eps")


def _seeds() -> list[bytes]:
    contents = []
    for form, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "F"), ("BMP", "L")):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new(mode, (9, 7)).save(stream, form, **({"exif": exif} if form in ("PNG", "JPEG", "TIFF") else {}))
        contents.append(stream.getvalue())
    return contents


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pictures_are_shown_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(_seeds())))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "p").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(RequestError):
        assert picture_of(tmp_path / "p").mode == "RGB"


# ── videos ───────────────────────────────────────────────────────────────────────────


def clip(path: Path, pixels: np.ndarray, pix_fmt: str = "yuv444p", codec: str = "libx264", **tags: Any) -> Path:
    """Frames [F, H, W, 3 or 4] as PyAV writes them, tagged."""
    space, span = tags.get("space", Colorspace.ITU709), tags.get("span", ColorRange.MPEG)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"crf": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], pix_fmt
        stream.codec_context.sample_aspect_ratio = tags.get("aspect", Fraction(1))
        if "tag" in tags:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags["tag"], int(span)
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            if codec == "libx264":
                picture = picture.reformat(format=pix_fmt, dst_colorspace=space, dst_color_range=span)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path, height: int, width: int, count: int = 1) -> np.ndarray:
    return np.stack([np.asarray(p) for p in media.fitted_video(path, VideoShape(height, width, count), count, False)])


PATCHES = np.kron(np.random.default_rng(0).integers(0, 256, (1, 3, 5, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
ONE = 65536
MATRICES = {  # a, b, c, d of the container, and the filters that FFmpeg's own programs show it with
    "90": ((0, ONE, -ONE, 0), ["transpose=clock"]),
    "180": ((-ONE, 0, 0, -ONE), ["hflip", "vflip"]),
    "270": ((0, -ONE, ONE, 0), ["transpose=cclock"]),
    "mirrored": ((-ONE, 0, 0, ONE), ["hflip"]),
    "upside down": ((ONE, 0, 0, -ONE), ["vflip"]),
    "90 and mirrored": ((0, ONE, ONE, 0), ["transpose=cclock_flip"]),
    "270 and mirrored": ((0, -ONE, -ONE, 0), ["transpose=clock_flip"]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_videos_are_turned_as_ffmpeg_turns_them(name: str, tmp_path: Path) -> None:
    (a, b, c, d), filters = MATRICES[name]
    path = clip(tmp_path / "v.mp4", PATCHES)
    content = bytearray(path.read_bytes())
    start = content.index(struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    graph = av.filter.Graph()
    with av.open(str(path)) as container:
        (frame,) = container.decode(video=0)
        nodes = [graph.add_buffer(template=container.streams.video[0])]
    nodes += [graph.add(*words.split("=")) for words in filters] + [graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    reference = graph.pull().to_ndarray(format="rgb24").astype(int)
    assert reference.shape[:2] == ((80, 48) if b else (48, 80))
    pixels = frames_of(path, *reference.shape[:2])[0]
    assert np.abs(pixels - reference).mean() < 1


@pytest.mark.parametrize("span", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize(
    ("space", "tag", "height"),
    [
        (Colorspace.ITU709, 1, 48),
        (Colorspace.ITU601, 6, 48),
        (Colorspace.BT2020, 9, 48),
        (Colorspace.ITU601, 2, 48),  # not told: that of standard definition
        (Colorspace.ITU709, 2, 720),  # not told: that of high definition
    ],
)
def test_colours_are_those_that_were_encoded(
    space: Colorspace, tag: int, height: int, span: ColorRange, tmp_path: Path
) -> None:
    pixels = PATCHES.repeat(height // 48, 1).repeat(height // 48, 2)
    path = clip(tmp_path / "v.mp4", pixels, space=space, span=span, tag=tag)
    shown = frames_of(path, *pixels.shape[1:3]).astype(int)
    assert np.abs(shown - pixels).max() <= 6


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """Twice as wide: the rows at top and bottom would be cut off were they square."""
    pixels = np.full((1, 64, 64, 3), 128, np.uint8)
    pixels[:, :8] = pixels[:, -8:] = (255, 0, 0)
    path = clip(tmp_path / "v.mp4", pixels, aspect=Fraction(2))
    assert frames_of(path, 64, 128)[0, 3, 60].tolist()[0] > 200
    square = clip(tmp_path / "w.mp4", pixels)
    assert frames_of(square, 64, 128)[0, 3, 60].tolist()[0] < 200


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [("v.mov", "png", "rgba"), ("v.mkv", "ffv1", "bgra")])
def test_transparent_videos_are_on_white(name: str, codec: str, pix_fmt: str, tmp_path: Path) -> None:
    pixels = np.zeros((2, 32, 32, 4), np.uint8)
    pixels[..., :] = (255, 0, 0, 0)
    pixels[:, :, 16:] = (0, 0, 255, 255)
    shown = frames_of(clip(tmp_path / name, pixels, pix_fmt, codec), 32, 32)[0]
    assert shown[4, 4].tolist() == [255, 255, 255]
    assert shown[4, 28].tolist() == [0, 0, 255]


def test_lists_of_other_files_are_no_video(tmp_path: Path) -> None:
    clip(tmp_path / "v.ts", PATCHES, "yuv420p")
    texts = {
        "concat.mp4": "ffconcat version 1.0\nfile v.ts\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n",
    }
    assert frames_of(tmp_path / "v.ts", 48, 80).shape
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for read in (media.rate_of, media.require_sound, lambda p: frames_of(p, 48, 80)):
            with pytest.raises(RequestError, match=f"{name} cannot be read as"):
                read(tmp_path / name)


def test_a_video_that_is_cut_off_or_only_heard(tmp_path: Path) -> None:
    whole = clip(tmp_path / "v.mp4", PATCHES.repeat(6, 0)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"video .*cut\.mp4 cannot be read as a video"):
        frames_of(tmp_path / "cut.mp4", 48, 80)
    silence(tmp_path / "s.wav", 1)
    with pytest.raises(RequestError, match="it holds no video"):
        media.rate_of(tmp_path / "s.wav")
    with pytest.raises(RequestError, match="holds no sound"):
        media.require_sound(tmp_path / "v.mp4")


@pytest.mark.parametrize("last", [False, True])
def test_videos_that_are_too_short_go_on_with_their_last_frame_where_asked(last: bool, tmp_path: Path) -> None:
    path = clip(tmp_path / "v.mp4", np.stack([np.full((48, 80, 3), 40 * i, np.uint8) for i in range(5)]))
    shape = VideoShape(48, 80, 8)
    with pytest.raises(RequestError, match="has 5 frames and 8 are used"):
        media.fitted_video(path, shape, 8, last)
    grey = [np.asarray(p).mean() for p in media.fitted_video(path, shape, 8, last, pad=True)]
    assert np.abs(np.subtract(grey, [0, 40, 80, 120, 160, 160, 160, 160])).max() < 4
    ends = [np.asarray(p).mean() for p in media.fitted_video(path, shape, 2, last)]
    assert np.abs(np.subtract(ends, [120, 160] if last else [0, 40])).max() < 4


# ── sound and what is written ────────────────────────────────────────────────────────


def silence(path: Path, seconds: int) -> Path:
    """A sparse file: its samples take no room on the disk."""
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"")
    size = seconds * 16000
    with path.open("r+b") as file:
        file.truncate(44 + size)
        file.seek(4)
        file.write(struct.pack("<I", 36 + size))
        file.seek(40)
        file.write(struct.pack("<I", size))
    return path


def test_of_five_hours_of_sound_a_second_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silence(tmp_path / "long.wav", 5 * 3600)
    decoded = []
    decode = output.sound_of

    def counted(path: Path) -> Any:
        for frame in decode(path):
            decoded.append(frame.samples)
            yield frame

    monkeypatch.setattr(output, "sound_of", counted)
    video = Video(np.zeros((8, 48, 80, 3), np.uint8), 8, np.empty(0))
    write_mp4(video, tmp_path / "v.mp4", {}, tmp_path / "long.wav")
    assert 7000 < sum(decoded) < 24000
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert abs(sum(f.samples for f in container.decode(audio=0)) / 48000 - 1) < 0.05


def test_short_sound_is_written_to_its_end(tmp_path: Path) -> None:
    samples = np.zeros((1, 4100), np.float32)
    samples[:, 4000:] = 0.8
    video = Video(np.zeros((8, 48, 80, 3), np.uint8), 8, np.empty(0), (samples, 48000))
    write_mp4(video, tmp_path / "v.mp4", {}, None)
    with av.open(str(tmp_path / "v.mp4")) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert np.abs(heard[3900:4500]).max() > 0.4


@pytest.mark.parametrize("fps", [0.5, 8, 24, 30, 60, 240])
def test_gifs_last_as_long_as_their_video(fps: float, tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 97).round().astype(np.uint8)[:, None, None, None]
    video = Video(np.broadcast_to(grey, (97, 16, 16, 3)).copy(), fps, np.empty(0))
    output.write_gif(video, tmp_path / "v.gif")
    durations = []
    with Image.open(tmp_path / "v.gif") as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert abs(sum(durations) / 1000 - 97 / fps) < 0.03
    assert min(durations) >= 20
    assert len(durations) == (97 if fps <= 50 else len(durations))
