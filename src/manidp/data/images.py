"""Images as arrays: data sets, folders and single pictures; the constants of preprocessing live here only.

Everywhere an image is ``uint8 (H, W, 3)`` RGB and a batch is ``uint8 (N, H, W, 3)``; only :meth:`Preprocessing.apply`
makes the ``float32 (N, 3, H, W)`` that networks read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import stat
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from reprlib import repr as brief

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from manidp.errors import ImageError, quoted
from manidp.files import filling, open_regular, replacing
from manidp.limits import FLOAT32_MAX, FLOAT32_TINY
from manidp.progress import Progress

# The only decoders a file from outside ever meets.
_DECODERS = tuple(
    plugin.format for plugin in (JpegImageFile, PngImageFile, WebPImageFile, BmpImageFile, GifImageFile, TiffImageFile)
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What a folder's pictures are known by, upper or lower case."""
MAX_PICTURE_PIXELS = 2**26
MAX_PICTURE_BYTES = 2**28
_MAX_IMAGE_SET_BYTES = 2**30


@dataclass(frozen=True)
class Preprocessing:
    """What turns pixels into a network's input; ``mean`` and ``std`` per channel of pixels in 0..1, ``size`` (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or len(self.size) != 2:
            raise ImageError(f"preprocessing needs three means, three stds and a size (H, W); got {self}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) >= FLOAT32_TINY):
            raise ImageError(f"preprocessing needs finite means and positive stds; got {self.mean} and {self.std}")
        largest = max((1 + abs(mean)) / std for mean, std in zip(self.mean, self.std, strict=True))
        if largest > FLOAT32_MAX:
            raise ImageError(f"preprocessing would make pixels of up to {largest:.3g}, more than a float32 holds")
        if min(self.size) < 1:
            raise ImageError(f"preprocessing needs a positive size; got {self.size}")

    def apply(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(pixel / 255 - mean) / std``, rounded to float32 once: uint8 (N, H, W, 3) -> float32 (N, 3, H, W).

        Raises ImageError unless the images are uint8, RGB and of this size.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*self.size, 3):
            expected = f"uint8 (N, {self.size[0]}, {self.size[1]}, 3)"
            raise ImageError(f"expected images of {expected}; got {images.dtype} {images.shape}")
        planes = np.empty((len(images), 3, *self.size), np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            table = ((np.arange(256) / 255 - mean) / std).astype(np.float32)
            planes[:, channel] = table[images[..., channel]]
        return planes


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size: ``images`` uint8 (N, H, W, 3), ``labels`` int64 (N,) into ``classes``.

    ``indices`` int64 (N,), where these images were taken from a larger set, are their places in it.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    indices: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ImageError(f"expected images of uint8 (N, H, W, 3); got {self.images.dtype} {self.images.shape}")
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.images),):
            came = f"{self.labels.dtype} {self.labels.shape}"
            raise ImageError(f"expected labels of int64 ({len(self.images)},), one for each image; got {came}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            span = f"{self.labels.min()} to {self.labels.max()}"
            raise ImageError(f"expected labels from 0 to {len(self.classes) - 1}, the classes given; got {span}")
        if self.indices is not None and (self.indices.dtype != np.int64 or self.indices.shape != self.labels.shape):
            came = f"{self.indices.dtype} {self.indices.shape}"
            raise ImageError(f"expected indices of int64 ({len(self.images)},), one for each image; got {came}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at these places, in this order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes, indices)

    def relabelled(self, classes: Sequence[str], model: str) -> ImageSet:
        """The same images with labels into ``classes``, those of the model so called; classes are matched by name.

        Raises ImageError, naming the classes, where there are images of a class that the model does not know, or knows
        twice.
        """
        present = np.unique(self.labels)
        names = [self.classes[label] for label in present]
        unmatched = [name for name in names if list(classes).count(name) != 1]
        if unmatched:
            known = f"{model} knows {_some(classes)}"
            raise ImageError(f"images are matched with a model's classes by name: {known}; got {_some(unmatched)}")
        places = np.zeros(len(self.classes), np.int64)
        places[present] = [classes.index(name) for name in names]
        return replace(self, labels=places[self.labels], classes=tuple(classes))


def _some(names: Sequence[str]) -> str:
    return ", ".join(quoted(name, 60) for name in names[:12]) + (
        f", ... ({len(names)} in all)" if len(names) > 12 else ""
    )


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))
MINDSPORE_PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), size=(32, 32))
"""The original's MindSpore code rounds the red deviation up, its PyTorch code down."""

# Published SHA-1 of the official binary batches: 10,000 records of a label byte and 3,072 bytes (channel, row, column).
CIFAR10_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
CIFAR10_BATCH_BYTES = 10_000 * 3_073


def holds_cifar10(folder: str | Path) -> bool:
    """Whether a folder holds any of CIFAR-10's six ``.bin`` files: then :func:`load_cifar10` is to read it.

    Raises ImageError for a folder of CIFAR-10's Python version, saying how to convert it.
    """
    if any(os.path.exists(os.path.join(folder, name)) for name in CIFAR10_SHA1):
        return True
    for place in (folder, os.path.join(folder, "cifar-10-batches-py")):
        if any(os.path.isfile(os.path.join(place, name.removesuffix(".bin"))) for name in CIFAR10_SHA1):
            raise ImageError(
                f"{shown(folder)}: the Python version of CIFAR-10, pickles that are not read as they are; convert it: "
                f"manidp data cifar10 --source {shlex.quote(str(place))} --to cifar10, then --data cifar10"
            )
    return False


def load_cifar10(folder: str | Path) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, (train, test), from a folder of the six official ``.bin`` files.

    Every batch is compared with its published digest; raises ImageError when one is missing or differs.
    """
    batches = []
    for name, sha1 in CIFAR10_SHA1.items():
        path = Path(folder) / name
        try:
            with open_regular(path) as file:
                records = file.read(CIFAR10_BATCH_BYTES + 1)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}; `manidp data cifar10` brings CIFAR-10") from error
        came = hashlib.sha1(records, usedforsecurity=False).hexdigest()
        if came != sha1:
            raise ImageError(f"{path}: expected SHA-1 {sha1}, got {came}; remove it, `manidp data cifar10` brings it")
        batches.append(np.frombuffer(records, np.uint8).reshape(-1, 3_073))
    return _cifar10_set(*batches[:5]), _cifar10_set(batches[5])


def _cifar10_set(*batches: NDArray[np.uint8]) -> ImageSet:
    pixels = [np.stack(np.split(batch[:, 1:], 3, axis=1), axis=-1) for batch in batches]
    labels = [batch[:, 0].astype(np.int64) for batch in batches]
    return ImageSet(np.concatenate(pixels).reshape(-1, 32, 32, 3), np.concatenate(labels), CIFAR10_CLASSES)


def draw_sample(image_set: ImageSet, per_class: int, seed: int) -> NDArray[np.int64]:
    """Places of ``per_class`` images of each class, drawn without replacement by ``default_rng(seed)``, ascending."""
    generator = np.random.default_rng(seed)
    drawn = []
    for label, name in enumerate(image_set.classes):
        places = np.flatnonzero(image_set.labels == label)
        if len(places) < per_class:
            raise ImageError(f"cannot draw {per_class} images of class {quoted(name, 60)}: there are {len(places)}")
        drawn.append(generator.choice(places, per_class, replace=False))
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def load_sample(count: int | None = None) -> ImageSet:
    """The bundled 200 CIFAR-10 test images, 20 of each class; ``indices`` are their places in the test set.

    ``count``: only so many of them, at least 1, evenly spaced.
    """
    with resources.as_file(resources.files("manidp") / "data" / "cifar10-sample.safetensors") as path:
        whole = load_image_set(path)
    if count is None or count >= len(whole):
        return whole
    assert whole.indices is not None
    chosen = np.array([round(i * (len(whole) - 1) / max(1, count - 1)) for i in range(count)])
    return replace(whole.take(chosen), indices=whole.indices[chosen])


def save_image_set(image_set: ImageSet, path: str | Path) -> None:
    """Write an image set as one safetensors file: tensors ``images``, ``labels`` and, if there, ``indices``.

    The same set gives the same bytes; the file appears whole or not at all. Raises ImageError.
    """
    tensors = {"images": image_set.images, "labels": image_set.labels}
    if image_set.indices is not None:
        tensors["indices"] = image_set.indices
    # One metadata entry: the order of several is not fixed, and the bytes should be.
    description = json.dumps({"format": "image set", "version": 1, "classes": image_set.classes})
    data = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"manidp": description})
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise ImageError(f"{shown(path)}: cannot be written: {_reason(error)}") from error


def load_image_set(path: str | Path) -> ImageSet:
    """Read what :func:`save_image_set` wrote; raises ImageError, naming the file, for anything else."""
    try:
        size = os.stat(path).st_size
        if size > _MAX_IMAGE_SET_BYTES:
            raise ImageError(f"expected at most {_MAX_IMAGE_SET_BYTES:,} bytes, got {size:,}")
        with safetensors.safe_open(path, "numpy") as file:
            description = json.loads((file.metadata() or {}).get("manidp", "null"))
            if not isinstance(description, dict) or description.get("format") != "image set":
                raise ImageError("not an image set")
            if description.get("version") != 1:
                raise ImageError(f"expected an image set of version 1, got {brief(description.get('version'))}")
            classes = description.get("classes")
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise ImageError(f"expected a list of class names, got {brief(classes)}")
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
            expected = {"images": "U8", "labels": "I64", "indices": "I64"}
            if dtypes not in (expected, {name: expected[name] for name in ("images", "labels")}):
                raise ImageError(f"expected the tensors {expected} (indices may be absent), got {brief(dtypes)}")
            tensors = {name: file.get_tensor(name) for name in dtypes}
        return ImageSet(classes=tuple(classes), **tensors)
    except OSError as error:
        raise ImageError(f"{shown(path)}: {_reason(error)}") from error
    except (ImageError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ImageError(f"{shown(path)}: not a readable image set: {_reason(error)}") from error


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
        raise ImageError(f"{shown(path)}: {_reason(error)}") from error
    except Exception as error:  # decoders meet broken files with errors of any kind
        raise ImageError(f"{shown(path)}: broken picture: {_reason(error)}") from error


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


@dataclass(frozen=True)
class Pictures:
    """What came of many files: ``images`` uint8 (N, H, W, 3), their N ``paths``, and an error for each other picture.

    ``skipped``: how many other files lay in the folders, no pictures by their suffixes.
    """

    images: NDArray[np.uint8]
    paths: tuple[Path, ...]
    errors: tuple[ImageError, ...]
    skipped: int = 0

    @property
    def left_out(self) -> tuple[str, ...]:
        """What to tell of all that is not among the images: a line for each error, one for what was skipped."""
        skipped = f"{self.skipped:,} other files in the folders skipped: no pictures by their suffixes"
        return (*map(str, self.errors), *([skipped] if self.skipped else []))


def load_pictures(paths: Iterable[str | Path], size: tuple[int, int], progress: Progress | None = None) -> Pictures:
    """Load many pictures, each as :func:`load_picture` does; one that cannot be read becomes an error among others.

    A folder stands for the files with ``PICTURE_SUFFIXES`` in it and in the folders below, in sorted order, hidden ones
    left out. Links to folders are followed, each folder is read once; one that cannot be read becomes an error too.
    Memory is that of the result, ``H * W * 3`` bytes a file, and of one picture being decoded.
    """
    errors: list[ImageError] = []
    files: list[Path] = []
    skipped = 0
    for path in map(Path, paths):
        if not os.path.isdir(path):
            files.append(path)
            continue
        (pictures,), unread, others = _walk([path])
        if not pictures and not unread:
            unread = [ImageError(f"{shown(path)}: no pictures in this folder ({' '.join(PICTURE_SUFFIXES)})")]
        files += pictures
        errors += unread
        skipped += others
    return _load(files, errors, skipped, size, progress)


def load_folder(
    folder: str | Path,
    size: tuple[int, int],
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[ImageSet, Pictures]:
    """A folder with one subfolder of pictures per class, as an image set and as what came of its files.

    Classes are the subfolders in sorted order, two at least, each with a picture that can be read. Where ``classes``
    are given (those of a checkpoint), labels follow them: every subfolder must be one of them, some may be absent.
    Files beside the subfolders and hidden ones are left out; subfolders are read as :func:`load_pictures` does. Raises
    ImageError when the folder is not so.
    """
    root = Path(folder)
    try:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise ImageError(f"{shown(root)}: {_reason(error)}") from error
    for name in found:
        if name != name.encode("utf-8", "replace").decode():  # no checkpoint could hold it
            raise ImageError(f"{shown(root / name)}: the name of a class must be UTF-8; rename this folder")
    if classes is None and len(found) < 2:
        raise ImageError(
            f"{shown(root)}: expected subfolders of pictures for two classes or more, got [{_some(found)}]"
        )
    if classes is not None and not (found and set(found) <= set(classes)):
        raise ImageError(
            f"{shown(root)}: expected subfolders named after classes of [{_some(classes)}], got [{_some(found)}]"
        )
    names = tuple(found if classes is None else classes)
    of_class, unread, skipped = _walk([root / name for name in found], around=root)
    label_of = {file: names.index(name) for name, files in zip(found, of_class, strict=True) for file in files}
    pictures = _load(list(label_of), unread, skipped, size, progress)
    labels = np.array([label_of[path] for path in pictures.paths], np.int64)
    for name in found:
        if names.index(name) not in labels:
            place = shown(root / name)
            reasons = (f"; {error}" for error in pictures.errors if str(error).startswith(place))
            raise ImageError(
                f"{place}: expected pictures of class {quoted(name, 60)}, got none to read{next(reasons, '')}"
            )
    return ImageSet(pictures.images, labels, names), pictures


def _load(
    files: Sequence[Path], errors: Iterable[ImageError], skipped: int, size: tuple[int, int], progress: Progress | None
) -> Pictures:
    images = np.empty((len(files), *size, 3), np.uint8)
    read: list[Path] = []
    met = list(errors)
    for number, file in enumerate(files, 1):
        try:
            images[len(read)] = load_picture(file, size)
            read.append(file)
        except ImageError as error:
            met.append(error)
        if progress is not None:
            progress(number, len(files))
    return Pictures(images[: len(read)], tuple(read), tuple(met), skipped)


def _walk(folders: Sequence[Path], around: Path | None = None) -> tuple[list[list[Path]], list[ImageError], int]:
    """The pictures in each of these folders and below, sorted; what could not be read; how many other files there are.

    Links to folders are followed. Each folder is read once, where it lies rather than where a link leads to it, and the
    one ``around`` these never: links in circles come to an end, and one class does not take the pictures of another.
    """
    pictures: list[list[Path]] = [[] for _ in folders]
    errors: list[ImageError] = []
    skipped = 0
    seen = set() if around is None else {_identity(around)}
    waiting, linked = deque(enumerate(folders)), deque[tuple[int, Path]]()
    while waiting or linked:
        number, place = (waiting or linked).popleft()
        try:
            identity = _identity(place)
            if identity in seen:
                if place == folders[number]:
                    errors.append(ImageError(f"{shown(place)}: the same folder as another of these"))
                continue
            seen.add(identity)
            with os.scandir(place) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            errors.append(ImageError(f"{shown(place)}: {_reason(error)}"))
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append((number, path))
            elif entry.is_symlink() and os.path.isdir(path):
                linked.append((number, path))
            elif path.suffix.lower() in PICTURE_SUFFIXES:
                pictures[number].append(path)
            elif entry.is_symlink() and not os.path.exists(path):
                errors.append(ImageError(f"{shown(path)}: a link that leads nowhere"))
            else:
                skipped += 1
    return [sorted(files) for files in pictures], errors, skipped


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def save_folder(image_set: ImageSet, folder: str | Path) -> None:
    """Write an image set as PNG files, one subfolder for each class, into a new folder: what ``load_folder`` reads.

    The folder appears whole or not at all; raises ImageError if it exists or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists():
            raise ImageError(f"{shown(folder)}: exists already; a new folder is needed")
        with filling(folder) as temporary:
            for number, (pixels, label) in enumerate(zip(image_set.images, image_set.labels, strict=True)):
                of_class = temporary / image_set.classes[label]
                of_class.mkdir(exist_ok=True)
                Image.fromarray(pixels).save(of_class / f"{number:05d}.png")
    except OSError as error:
        raise ImageError(f"{shown(folder)}: cannot be written: {_reason(error)}") from error


def shown(path: str | Path) -> str:
    """The path as text for a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _reason(error: Exception) -> str:
    said = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(said.split())
