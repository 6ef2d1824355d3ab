"""Data sets as torchvision users have them: a subfolder of pictures for each class, perhaps below train/ and val/.

Small pictures are read into one array. Larger ones stay in their files, and are decoded when they are needed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manidp.data.folders import class_files, class_folders, left_out, load_folder, load_pictures
from manidp.data.images import ImageSet, holds_cifar10, labels_into
from manidp.data.pictures import load_picture, read_picture, rgb_picture
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.errors import ImageError, reason, shown
from manidp.files import sha256_of
from manidp.progress import Progress

SMALL = 64  # pixels high and wide: networks that read more have their pictures decoded from the files
LARGE_SIZE = (224, 224)  # what networks for larger pictures read, where nothing else is said
LOOKED_AT = 64  # pictures of a folder, to know whether all have one size
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the picture, width over height
AHEAD = 256  # pictures that are decoded before they are asked for, and one batch
_TRAIN, _TEST = "train", ("val", "valid", "validation", "test")

Place = tuple[float, float, float, float, bool]
T = TypeVar("T")
U = TypeVar("U")


def parts(folder: Path) -> tuple[Path, Path | None]:
    """Where training and test pictures are: in ``train`` and the first of ``val``, ``valid``, ``validation``, ``test``.

    A folder that has other subfolders, or no ``train``, holds the classes itself: (folder, None).
    """
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")} if (
        folder.is_dir()) else set()  # fmt: skip
    if _TRAIN not in found or not found <= {_TRAIN, *_TEST}:
        return folder, None
    test = next((name for name in _TEST if name in found), None)
    return folder / _TRAIN, folder / test if test else None


def classes_of(folder: Path) -> tuple[str, ...]:
    """The classes of a data set, in the order of its labels; nothing of its pictures is read. Raises ImageError."""
    return CIFAR10_CLASSES if holds_cifar10(folder) else tuple(class_folders(parts(folder)[0]))


def size_of(folder: Path) -> tuple[int, int]:
    """What a network for this data set reads (H, W), where nothing else is said.

    Of pictures of one size, at most 64 x 64, that size; for all others 224 x 224. Some pictures are looked at, evenly
    spaced over all.
    """
    if holds_cifar10(folder):
        return CIFAR10_PREPROCESSING.size
    train = parts(folder)[0]
    files = list(class_files(train).label_of)
    sizes = set()
    for file in files[:: len(files) // LOOKED_AT + 1]:
        with suppress(ImageError):  # told when the pictures are read
            sizes.add(read_picture(file, lambda picture: (picture.height, picture.width)))
    size = sizes.pop() if len(sizes) == 1 else LARGE_SIZE
    return size if max(size) <= SMALL else LARGE_SIZE


@dataclass(frozen=True)
class PictureFiles:
    """Labelled pictures in their files; what training asks of an ``ImageSet``, each picture decoded when it is read.

    paths: N files. digests: sha256 of each, when it was found. labels: int64 (N,) into ``classes``. size: (H, W) of
    what is read of each. Memory is that of a few batches, whatever N is.
    """

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[np.int64]) -> PictureFiles:
        """The pictures at these places, in this order."""
        paths, digests = (tuple(of[i] for i in indices) for of in (self.paths, self.digests))
        return replace(self, paths=paths, digests=digests, labels=self.labels[indices])

    def relabelled(self, classes: Sequence[str], model: str) -> PictureFiles:
        """As ``ImageSet.relabelled``."""
        return replace(self, labels=labels_into(self.labels, self.classes, classes, model), classes=tuple(classes))

    def sha256(self) -> str:
        """Digest of files, labels and size, in lower-case hex."""
        digest = hashlib.sha256(repr((self.size, self.digests)).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def batches(self, places: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """uint8 (B, H, W, 3) for each array of places, as ``load_picture`` makes them. Raises ImageError."""
        return _ahead(
            ([partial(load_picture, self.paths[i], self.size) for i in chosen] for chosen in places), np.stack
        )

    def crops(self, places: Iterable[tuple[NDArray[np.int64], Sequence[Place]]]) -> Iterator[NDArray[np.uint8]]:
        """As ``batches``, of each picture the crop that is said for it; see ``crop``."""
        calls = (
            [
                partial(read_picture, self.paths[i], partial(crop, size=self.size, place=place))
                for i, place in zip(chosen, crops, strict=True)
            ]
            for chosen, crops in places
        )
        return _ahead(calls, np.stack)


Labelled = ImageSet | PictureFiles
"""What can be trained on."""


def load_labelled(
    folder: Path, size: tuple[int, int], classes: Sequence[str] | None = None, progress: Progress | None = None
) -> tuple[Labelled, tuple[str, ...]]:
    """The pictures of a folder of classes, and lines that tell what was left out; see ``load_folder``.

    Up to 64 x 64 pixels they are one array. Larger ones stay in their files; each is decoded once now, so that broken
    ones are found before the work. Raises ImageError.
    """
    if max(size) <= SMALL:
        images, pictures = load_folder(folder, size, classes, progress)
        return images, pictures.left_out
    found = class_files(folder, classes)
    read: dict[Path, str] = {}
    errors = list(found.errors)
    checks = ([partial(_checked, file, size)] for file in found.label_of)
    for number, (file, [came]) in enumerate(zip(found.label_of, _ahead(checks, list), strict=True), 1):
        if isinstance(came, ImageError):
            errors.append(came)
        else:
            read[file] = came
        if progress is not None:
            progress(number, len(found.label_of))
    labels = found.labels(list(read), errors)
    return PictureFiles(tuple(read), tuple(read.values()), labels, found.names, size), left_out(errors, found.skipped)


def _checked(file: Path, size: tuple[int, int]) -> str | ImageError:
    """The digest of a picture that can be decoded, or what is wrong with it."""
    try:
        load_picture(file, size)
        return sha256_of(file)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(f"{shown(file)}: {reason(error)}")


def _ahead(batches: Iterable[Sequence[Callable[[], T]]], joined: Callable[[list[T]], U]) -> Iterator[U]:
    """What the calls of each batch return, joined, in order; made ahead by as many threads as there are cores."""
    waiting: deque[list[Future[T]]] = deque()
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        for batch in batches:
            waiting.append([threads.submit(call) for call in batch])
            if sum(map(len, waiting)) > AHEAD:
                yield joined([future.result() for future in waiting.popleft()])
        while waiting:
            yield joined([future.result() for future in waiting.popleft()])
    finally:
        threads.shutdown(cancel_futures=True)


def drawn_from(folder: Path, like: ImageSet, count: int) -> NDArray[np.uint8]:
    """At most ``count`` pictures of a folder of classes, drawn at random but always the same: uint8 (N, H, W, 3).

    Their size and classes are those of ``like``; pictures that cannot be read are left out. Raises ImageError.
    """
    files = list(class_files(folder, like.classes).label_of)
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:count]]
    return load_pictures(chosen, like.size).images


def random_places(chance: np.random.Generator, count: int) -> list[Place]:
    """Where to crop so many pictures; see ``crop``."""
    area = chance.uniform(*AREA, count)
    ratio = np.exp(chance.uniform(math.log(RATIO[0]), math.log(RATIO[1]), count))
    down, across = chance.random((2, count))
    flip = chance.random(count) < 0.5
    return list(zip(area.tolist(), ratio.tolist(), down.tolist(), across.tolist(), flip.tolist(), strict=True))


def crop(picture: Image.Image, size: tuple[int, int], place: Place) -> NDArray[np.uint8]:
    """A part of a picture, scaled to ``size`` (H, W): uint8 (H, W, 3).

    place: the share of the picture's area that the part has; its width over its height; where it lies between the top
    and the bottom, and between left and right, 0..1; whether it is mirrored. Source: Szegedy et al. 2015 (Inception's
    crops). Departs: a part that is too wide or too high is cut at the picture's border, not drawn again.
    """
    picture = rgb_picture(picture)
    area, ratio, down, across, mirrored = place
    whole = picture.width * picture.height * area
    width, height = min(picture.width, math.sqrt(whole * ratio)), min(picture.height, math.sqrt(whole / ratio))
    left, top = across * (picture.width - width), down * (picture.height - height)
    part = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    pixels = np.array(part)
    return pixels[:, ::-1] if mirrored else pixels
