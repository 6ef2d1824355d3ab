"""Whatever stands for images, arrays, tensors, paths, pictures or lists of them, made into one batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manidp.errors import ImageError

Dims = tuple[int, int, int]
if TYPE_CHECKING:
    from PIL import Image

    Picture = str | os.PathLike[str] | Image.Image
Images: TypeAlias = "ArrayLike | Picture | Iterable[ArrayLike | Picture]"


def batch_of(images: Images, dims: Dims) -> NDArray[Any]:
    """A contiguous batch, uint8 (B, H, W, C) or float32 (B, C, H, W), of what ``Engine.run`` takes; dims: (C, H, W).

    Raises ImageError that says what to pass.
    """
    try:
        return _batch(images, dims)
    except MemoryError as error:
        raise ImageError(f"there is no memory for so many images; pass fewer at a time ({error})") from error


def _batch(images: Any, dims: Dims) -> NDArray[Any]:
    if type(images) is np.ndarray and images.ndim == 4:  # by far the most frequent
        return _checked(images, dims)
    channels, height, width = dims
    if isinstance(images, (str, os.PathLike)) or _is_picture(images):
        images = [images]
    if not isinstance(images, (list, tuple, Iterator)):
        array = _array(images, "images", dims)
        if array.ndim != 1 or array.dtype.kind not in "OU":
            return _checked(array, dims)
        images = array.tolist()  # of paths, or of pictures of different sizes
    items = [_one(item, number, dims) for number, item in enumerate(images)]
    for number, item in enumerate(items):
        if item.dtype != items[0].dtype:
            kinds = f"image 0 is {items[0].dtype}, image {number} is {item.dtype}"
            raise ImageError(f"a list holds images of one kind, uint8 (paths and pictures are) or float; {kinds}")
    return np.stack(items) if items else np.empty((0, height, width, channels), np.uint8)


def _one(image: object, number: int, dims: Dims) -> NDArray[Any]:
    if isinstance(image, (str, os.PathLike)):
        from manidp.data.pictures import load_picture

        return load_picture(Path(image), dims[1:])
    if _is_picture(image):
        from manidp.data.pictures import fit_picture

        try:
            return fit_picture(image, dims[1:])
        except Exception as error:  # a broken file may be found out only now
            raise ImageError(f"image {number}: {error}") from error
    try:
        batch = _checked(_array(image, "an image", dims)[None], dims)
    except ImageError as error:
        raise ImageError(f"image {number} of the list, with an axis before it: {error}") from error
    return batch.reshape(batch.shape[1:])


def _is_picture(value: object) -> TypeGuard[Image.Image]:
    pil = sys.modules.get("PIL.Image")  # whoever has a picture has loaded it; an engine of arrays need not
    return pil is not None and isinstance(value, pil.Image)


def _array(value: object, what: str, dims: Dims) -> NDArray[Any]:
    try:
        if hasattr(value, "detach"):  # a tensor of torch that wants its gradient is no array until then
            value = value.detach()
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        if np.ma.is_masked(value):
            raise ImageError("a masked array")
        return np.asarray(value)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(
            f"{what} of type {type(value).__name__} cannot be read as an array: {reason}; pass {_expected(dims)}"
        ) from error


def _checked(array: NDArray[Any], dims: Dims) -> NDArray[Any]:
    channels, height, width = dims
    if array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f" and array.shape[1:] == (channels, height, width):
        with np.errstate(over="ignore"):  # such numbers are found and named later
            return np.ascontiguousarray(array, dtype=np.float32)
    advice = _advice(array.dtype, array.shape, dims)
    raise ImageError(f"images are {_expected(dims)}; got {array.dtype} {array.shape}" + (advice and f": {advice}"))


def _expected(dims: Dims) -> str:
    channels, height, width = dims
    return f"uint8 (B, {height}, {width}, {channels}) or float (B, {channels}, {height}, {width})"


def _advice(dtype: np.dtype[Any], shape: tuple[int, ...], dims: Dims) -> str:
    channels, height, width = dims
    last, first = (height, width, channels), (channels, height, width)
    if shape in (last, first):
        return "one image needs the axis of the batch, images[None]"
    if dtype.kind in "iub" and dtype != np.uint8:
        return "pixels from 0 to 255 are passed as images.astype(np.uint8)"
    if dtype == np.uint8 and shape[1:] == first:
        return "the channels of bytes come last, images.transpose(0, 2, 3, 1)"
    if dtype.kind == "f" and shape[1:] == last:
        return "the channels of floats come first, images.transpose(0, 3, 1, 2)"
    if shape[1:] in ((height, width), (height, width, 1), (1, height, width)):
        return f"a grey image is repeated in {channels} channels"
    if len(shape) == 4 and dtype.kind in "uf":
        return "arrays are taken as they are, paths and PIL pictures are resized"
    return ""
