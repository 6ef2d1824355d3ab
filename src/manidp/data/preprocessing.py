"""What turns pixels into a network's input; its constants live here only.

Everywhere an image is ``uint8 (H, W, 3)`` RGB and a batch is ``uint8 (N, H, W, 3)``; only :meth:`Preprocessing.apply`
makes the ``float32 (N, 3, H, W)`` that networks read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manidp.errors import ImageError
from manidp.limits import FLOAT32_MAX, FLOAT32_TINY


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
        for channel, table in enumerate(self.tables()):
            planes[:, channel] = table[images[..., channel]]
        return planes

    def tables(self) -> NDArray[np.float32]:
        """What each value of a pixel becomes, (3, 256)."""
        mean, std = np.array(self.mean)[:, None], np.array(self.std)[:, None]
        tables: NDArray[np.float32] = ((np.arange(256) / 255 - mean) / std).astype(np.float32)
        return tables


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32))
MINDSPORE_PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), size=(32, 32))
"""The original's MindSpore code rounds the red deviation up, its PyTorch code down."""
