"""Single pictures, from files or from PIL, as arrays of a network's size."""

from __future__ import annotations

import math
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from manidp.errors import ImageError, reason, shown

# The only decoders a file from outside ever meets.
_DECODERS = tuple(
    plugin.format for plugin in (JpegImageFile, PngImageFile, WebPImageFile, BmpImageFile, GifImageFile, TiffImageFile)
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What a folder's pictures are known by, upper or lower case."""
MAX_PICTURE_PIXELS = 2**26
MAX_PICTURE_BYTES = 2**28


def load_picture(path: str | Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A JPEG, PNG, WebP, BMP, GIF or TIFF picture as uint8 (H, W, 3) of the given ``size`` (H, W).

    Made as :func:`fit_picture` makes it. Raises ImageError of one line that names the file: missing, not a regular
    file (which is not even opened), empty, too large (``MAX_PICTURE_BYTES``, ``MAX_PICTURE_PIXELS``, checked before
    decoding), not a picture, broken.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("a folder, not a picture" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size == 0:
            raise ImageError("an empty file")
        if status.st_size > MAX_PICTURE_BYTES:
            raise ImageError(f"expected at most {MAX_PICTURE_BYTES:,} bytes, got {status.st_size:,}")
        with warnings.catch_warnings():
            # What Pillow warns of is refused below or does no harm; a batch should not be stopped by it.
            warnings.filterwarnings("ignore", module="PIL")
            with Image.open(path, formats=_DECODERS) as picture:
                return fit_picture(picture, size)
    except ImageError as error:
        raise ImageError(f"{shown(path)}: {error}") from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{shown(path)}: not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{shown(path)}: expected at most {MAX_PICTURE_PIXELS:,} pixels, got far more") from error
    except OSError as error:
        raise ImageError(f"{shown(path)}: {reason(error)}") from error
    except Exception as error:  # decoders meet broken files with errors of any kind
        raise ImageError(f"{shown(path)}: broken picture: {reason(error)}") from error


def fit_picture(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A PIL picture as uint8 (H, W, 3) of the given ``size`` (H, W).

    Turned upright as its EXIF orientation says; transparency lies on white; 16-bit grey keeps its high byte; of an
    animation, the first frame. Scaled with antialiasing until it just covers ``size``, then the centre is cut out: a
    picture of exactly that size keeps every pixel. Raises ImageError for more than ``MAX_PICTURE_PIXELS`` and for
    pixels that are no colours (numbers of 32 bits), and whatever Pillow raises where it decodes a broken file.
    """
    _check_pixels(picture)
    picture.load()  # first: a TIFF is turned by this, and its EXIF orientation is then gone
    return np.array(ImageOps.fit(_rgb(_upright(picture)), (size[1], size[0]), Image.Resampling.BICUBIC))


def _check_pixels(picture: Image.Image) -> None:
    if picture.width * picture.height > MAX_PICTURE_PIXELS:
        raise ImageError(f"expected at most {MAX_PICTURE_PIXELS:,} pixels, got {picture.width} x {picture.height}")
    if isinstance(picture, TiffImageFile):
        tags = picture.tag_v2
        tile = [tags.get(ExifTags.Base[side], 1) for side in ("TileWidth", "TileLength")]
        if math.prod(tile) > MAX_PICTURE_PIXELS:
            raise ImageError(f"expected tiles of at most {MAX_PICTURE_PIXELS:,} pixels, got {tile[0]} x {tile[1]}")
        bits = max(tags.get(ExifTags.Base.BitsPerSample, (1,)))
        white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        if bits > 8 and (bits != 16 or white_is_zero):  # Pillow would not scale the one, nor invert the other
            raise ImageError(
                f"a TIFF of {bits} bits a channel{', 0 for white' if white_is_zero else ''} cannot be read"
            )
    if picture.mode in ("I", "F"):
        raise ImageError("expected 8 or 16 bits a channel, got numbers of 32 bits")


def _upright(picture: Image.Image) -> Image.Image:
    flips = Image.Transpose
    turns = {
        2: flips.FLIP_LEFT_RIGHT, 3: flips.ROTATE_180, 4: flips.FLIP_TOP_BOTTOM, 5: flips.TRANSPOSE,
        6: flips.ROTATE_270, 7: flips.TRANSVERSE, 8: flips.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # garbage in the EXIF block spoils no pixel: shown as it is stored
        return picture
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture.convert("RGBA"))
        return page.convert("RGB")
    return picture.convert("RGB")
