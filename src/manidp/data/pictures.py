"""Single pictures, from files or from PIL, as arrays of a network's size."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
T = TypeVar("T")
MAX_PICTURE_PIXELS = 2**26
MAX_PICTURE_BYTES = 2**28
SCANS = 16  # of a JPEG of as many pixels as may be, more of a smaller one; encoders make about 10
SEGMENTS = 20_000  # of a JPEG
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def load_picture(path: str | Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A JPEG, PNG, WebP, BMP, GIF or TIFF picture as uint8 (H, W, 3) of the given ``size`` (H, W).

    Made as :func:`fit_picture` makes it. Raises ImageError as :func:`read_picture` does.
    """
    return read_picture(path, lambda picture: fit_picture(picture, size))


def read_picture(path: str | Path, make: Callable[[Image.Image], T]) -> T:
    """What ``make`` makes of the PIL picture in a file.

    Raises ImageError of one line that names the file: missing, not a regular file (which is not even opened), empty,
    too large (``MAX_PICTURE_BYTES``, ``MAX_PICTURE_PIXELS``, checked before decoding), not a picture, broken.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("a folder, not a picture" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        return _decoded(path, status.st_size, MAX_PICTURE_PIXELS, make)
    except ImageError as error:
        raise ImageError(f"{shown(path)}: {error}") from error.__cause__
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise ImageError(f"{shown(path)}: {reason(error)}") from error


def fit_images(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3) -> uint8 (N, *size, 3), each as :func:`fit_picture` makes it."""
    return np.stack([fit_picture(Image.fromarray(image), size) for image in images])


def decode_picture(content: bytes, size: tuple[int, int], pixels: int = MAX_PICTURE_PIXELS) -> NDArray[np.uint8]:
    """The content of a picture file, as :func:`load_picture` reads it; the message of an ImageError names no file.

    pixels: the most that it may have.
    """
    return _decoded(io.BytesIO(content), len(content), pixels, lambda picture: fit_picture(picture, size, pixels))


def pixels_of(content: bytes) -> int:
    """How many pixels the content of a picture file says it has; nothing is decoded. Raises ImageError."""
    return _decoded(
        io.BytesIO(content), len(content), MAX_PICTURE_PIXELS, lambda picture: picture.width * picture.height
    )


def _decoded(file: str | Path | io.BytesIO, length: int, pixels: int, make: Callable[[Image.Image], T]) -> T:
    """What is made of a file of ``length`` bytes; whatever Pillow raises becomes an ImageError."""
    if length == 0:
        raise ImageError("an empty file")
    if length > MAX_PICTURE_BYTES:
        raise ImageError(f"expected at most {MAX_PICTURE_BYTES:,} bytes, got {length:,}")
    try:
        with _QUIET, Image.open(file, formats=_DECODERS) as picture:
            return make(picture)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"expected at most {pixels:,} pixels, got far more") from error
    except OSError as error:
        raise ImageError(reason(error)) from error
    except Exception as error:  # decoders meet broken files with errors of any kind
        raise ImageError(f"broken picture: {reason(error)}") from error


class _Quiet:
    """Pillow's warnings are passed over: what it warns of is refused or does no harm, and must not stop a batch.

    Filters of warnings are the whole process's: where several threads decode, the first one in sets them and the last
    one out puts back what was there.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module="PIL")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()
if hasattr(os, "register_at_fork"):  # a thread that a child does not have may have held the lock
    os.register_at_fork(after_in_child=_QUIET.__init__)  # type: ignore[misc]


def fit_picture(picture: Image.Image, size: tuple[int, int], pixels: int = MAX_PICTURE_PIXELS) -> NDArray[np.uint8]:
    """A PIL picture of at most so many ``pixels`` as uint8 (H, W, 3) of the given ``size`` (H, W).

    Made RGB as :func:`rgb_picture` does, raising what that raises. Scaled with antialiasing until it just covers
    ``size``, then the centre is cut out: a picture of exactly that size keeps every pixel.
    """
    return np.array(ImageOps.fit(rgb_picture(picture, pixels), (size[1], size[0]), Image.Resampling.BICUBIC))


def rgb_picture(picture: Image.Image, pixels: int = MAX_PICTURE_PIXELS) -> Image.Image:
    """A PIL picture of at most so many ``pixels`` in RGB, 8 bits a channel.

    Turned upright as its EXIF orientation says; transparency lies on white; 16-bit grey keeps its high byte; of an
    animation, the first frame. Raises ImageError for more ``pixels`` and for those that are no colours (numbers of 32
    bits), and whatever Pillow raises where it decodes a broken file.
    """
    _check_pixels(picture, pixels)
    picture.load()  # first: a TIFF is turned by this, and its EXIF orientation is then gone
    return _rgb(_upright(picture))


def _check_pixels(picture: Image.Image, pixels: int) -> None:
    if picture.width * picture.height > pixels:
        raise ImageError(f"expected at most {pixels:,} pixels, got {picture.width} x {picture.height}")
    if isinstance(picture, JpegImageFile) and picture.fp is not None:
        place = picture.fp.tell()
        picture.fp.seek(0)
        _check_scans(picture.fp.read(MAX_PICTURE_BYTES), picture.width * picture.height, pixels)
        picture.fp.seek(place)
    if isinstance(picture, TiffImageFile):
        tags = picture.tag_v2
        tile = [tags.get(ExifTags.Base[side], 1) for side in ("TileWidth", "TileLength")]
        if math.prod(tile) > pixels:
            raise ImageError(f"expected tiles of at most {pixels:,} pixels, got {tile[0]} x {tile[1]}")
        bits = max(tags.get(ExifTags.Base.BitsPerSample, (1,)))
        white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        if bits > 8 and (bits != 16 or white_is_zero):  # Pillow would not scale the one, nor invert the other
            raise ImageError(
                f"a TIFF of {bits} bits a channel{', 0 for white' if white_is_zero else ''} cannot be read"
            )
    if picture.mode in ("I", "F"):
        raise ImageError("expected 8 or 16 bits a channel, got numbers of 32 bits")


def _check_scans(content: bytes, size: int, pixels: int) -> None:
    """A JPEG of many scans has all of its ``size`` pixels in each, and may be small and take minutes nevertheless.

    Raises ImageError where all scans have more than SCANS times ``pixels``, and for more than SEGMENTS segments.
    """
    place, scans = 0, 0
    for _ in range(SEGMENTS):
        found = _MARKER.search(content, place)
        if found is None or found[0] == b"\xff\xd9":  # nothing is read behind the end of the picture
            return
        place = found.end()
        if found[0] != b"\xff\xd8":
            place += int.from_bytes(content[place : place + 2])
        scans += found[0] == b"\xff\xda"
        if scans * size > SCANS * pixels:
            break
    raise ImageError(f"expected a JPEG of at most {SCANS} scans of {pixels:,} pixels, got more")


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
