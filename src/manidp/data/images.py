"""Sets of labelled images, as arrays and as files; CIFAR-10 and the bundled sample of it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from reprlib import repr as brief

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from manidp.data.preprocessing import CIFAR10_CLASSES
from manidp.errors import ImageError, listed, quoted, reason, shown
from manidp.files import open_regular, replacing

_MAX_IMAGE_SET_BYTES = 2**30


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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.images.shape[1:3]
        return height, width

    def sha256(self) -> str:
        """Digest of pixels and labels, in lower-case hex."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def batches(self, places: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """uint8 (B, H, W, 3) for each array of places."""
        return (self.images[chosen] for chosen in places)

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at these places, in this order; they are the ``indices`` of what is returned."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes, indices)

    def relabelled(self, classes: Sequence[str], model: str) -> ImageSet:
        """The same images with labels into ``classes``, those of the model so called; classes are matched by name.

        Raises ImageError, naming the classes, where there are images of a class that the model does not know, or knows
        twice.
        """
        return replace(self, labels=labels_into(self.labels, self.classes, classes, model), classes=tuple(classes))


def labels_into(labels: NDArray[np.int64], own: Sequence[str], classes: Sequence[str], model: str) -> NDArray[np.int64]:
    """Labels into ``own`` as labels into ``classes``; see ``ImageSet.relabelled``."""
    present = np.unique(labels)
    names = [own[label] for label in present]
    unmatched = [name for name in names if list(classes).count(name) != 1]
    if unmatched:
        known = f"{model} knows {listed(classes)}"
        raise ImageError(f"images are matched with a model's classes by name: {known}; got {listed(unmatched)}")
    places = np.zeros(len(own), np.int64)
    places[present] = [list(classes).index(name) for name in names]
    return places[labels]


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
        raise ImageError(f"{shown(path)}: cannot be written: {reason(error)}") from error


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
        raise ImageError(f"{shown(path)}: {reason(error)}") from error
    except (ImageError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ImageError(f"{shown(path)}: not a readable image set: {reason(error)}") from error
