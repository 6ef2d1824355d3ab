"""Images as arrays: data sets, folders and single pictures; the constants of preprocessing live here only.

Everywhere an image is ``uint8 (H, W, 3)`` RGB and a batch is ``uint8 (N, H, W, 3)``; only :meth:`Preprocessing.apply`
makes the ``float32 (N, 3, H, W)`` that networks read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manidp.errors import ImageError


@dataclass(frozen=True)
class Preprocessing:
    """What turns pixels into a network's input; ``mean`` and ``std`` per channel of pixels in 0..1, ``size`` (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or len(self.size) != 2:
            raise ImageError(f"preprocessing needs three means, three stds and a size (H, W); got {self}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            raise ImageError(f"preprocessing needs finite means and positive stds; got {self.mean} and {self.std}")
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
    """Labelled images of one size: ``images`` uint8 (N, H, W, 3), ``labels`` int64 (N,) into ``classes``."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ImageError(f"expected images of uint8 (N, H, W, 3); got {self.images.dtype} {self.images.shape}")
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.images),):
            came = f"{self.labels.dtype} {self.labels.shape}"
            raise ImageError(f"expected labels of int64 ({len(self.images)},), one for each image; got {came}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            span = f"{self.labels.min()} to {self.labels.max()}"
            raise ImageError(f"expected labels from 0 to {len(self.classes) - 1}, the classes given; got {span}")

    def __len__(self) -> int:
        return len(self.images)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))

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


def load_cifar10(folder: str | Path) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, (train, test), from a folder of the six official ``.bin`` files.

    Every batch is compared with its published digest; raises ImageError when one is missing or differs.
    """
    batches = []
    for name, sha1 in CIFAR10_SHA1.items():
        path = Path(folder) / name
        try:
            with path.open("rb") as file:
                records = file.read(CIFAR10_BATCH_BYTES + 1)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}; `manidp data cifar10` brings CIFAR-10") from error
        came = hashlib.sha1(records, usedforsecurity=False).hexdigest()
        if came != sha1:
            raise ImageError(f"{path}: expected SHA-1 {sha1}, got {came}; remove it, `manidp data cifar10` brings it")
        batches.append(np.frombuffer(records, np.uint8).reshape(10_000, 3_073))
    return _cifar10_set(*batches[:5]), _cifar10_set(batches[5])


def _cifar10_set(*batches: NDArray[np.uint8]) -> ImageSet:
    records = np.concatenate(batches)
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageSet(images, records[:, 0].astype(np.int64), CIFAR10_CLASSES)
