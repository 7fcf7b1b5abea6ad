"""A picture file as a viewer shows it: upright, in sRGB, every depth in its own range, transparency on white."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import RequestError
from overcrank.units import human_bytes

if TYPE_CHECKING:
    from PIL import Image

FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "AVIF",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "JPEG2000",
    "PPM",
    "TGA",
    "ICO",
    "DDS",
    "QOI",
)
"""What Pillow reads by itself; others start programs (EPS) or open other files."""
LARGEST = 1_000_000_000
"""Bytes of a picture file; none that Pillow would decode has more."""
WHITE_TAG, INVERTED = 262, 0  # TIFF's PhotometricInterpretation, where 0 is white
log = logging.getLogger("overcrank")


def picture_of(path: Path) -> Image.Image:
    """The picture as RGB; raises RequestError for a file that is none, or larger than pictures are."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RequestError(f"image {path} has {human_bytes(size)}; pictures have at most {human_bytes(LARGEST)}.")
        # Not by its path: of mapped files Pillow 13 reads rows of turned TIFFs at the wrong places.
        with path.open("rb") as stream, Image.open(stream, formats=[f for f in FORMATS if f in _known()]) as source:
            source.load()
            return on_white(_in_srgb(_eight_bit(ImageOps.exif_transpose(source), source, path), path))
    except RequestError:
        raise
    except Exception as error:  # whatever Pillow's parsers make of damage
        reason = str(error).rstrip(".") or f"it is damaged ({type(error).__name__})"
        if isinstance(error, UnidentifiedImageError):
            reason = "it is none of " + ", ".join(FORMATS)
        if isinstance(error, MemoryError):
            reason = "there is too little memory for its pixels; give a smaller one"
        raise RequestError(f"image {path} cannot be read as a picture: {reason}.") from error


def on_white(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white, not the colour that lies hidden under it."""
    from PIL import Image

    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return picture.convert("RGB")


def _known() -> set[str]:
    from PIL import Image

    Image.init()
    return set(Image.OPEN)


def _eight_bit(picture: Image.Image, source: Image.Image, path: Path) -> Image.Image:
    """A picture of one deep channel in 8 bits; others as they are."""
    import numpy as np
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise RequestError(f"image {path} has pixels that are no numbers; save it without NaN and infinity.")
    white = 65535.0 if picture.mode.startswith("I;16") else _white(values, picture.mode, path)
    grey = (values / white).clip(0, 1)
    tags: Any = getattr(source, "tag_v2", {})
    if tags.get(WHITE_TAG) == INVERTED:
        grey = 1 - grey
    channels = [Image.fromarray((grey * 255).round().astype(np.uint8))]
    hidden = picture.info.get("transparency")
    if isinstance(hidden, int):
        channels.append(Image.fromarray(((values != hidden) * 255).astype(np.uint8)))
    deep = Image.merge("LA", channels) if len(channels) == 2 else channels[0]
    if "icc_profile" in picture.info:
        deep.info["icc_profile"] = picture.info["icc_profile"]
    return deep


def _white(values: Any, mode: str, path: Path) -> float:
    """Of 32-bit samples, whose files do not say what is white: the end of the least range that holds them all."""
    largest = float(values.max())
    ranges = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1)
    white = next((end for end in ranges if largest <= end), largest)
    log.warning(
        "%s has 32-bit samples, and no word of what is white: %g to %g are read as black to white 0 to %.12g.",
        path.name, values.min(), largest, white,
    )  # fmt: skip
    return white


def _in_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """Colours of an embedded profile, such as Display P3 of phones, in sRGB; a profile that is broken is left out."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "L", "LA", "CMYK"):
        return picture
    alpha = picture.getchannel("A") if picture.mode.endswith("A") else None
    colours = picture.convert(picture.mode.removesuffix("A")) if alpha else picture
    try:
        result = ImageCms.profileToProfile(
            colours, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning("%s has a colour profile that cannot be used (%s); its colours are read as sRGB.", path.name, error)
        return picture
    if result is None:
        return picture
    if alpha is not None:
        result.putalpha(alpha)
    return result
