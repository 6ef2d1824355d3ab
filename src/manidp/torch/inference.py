"""A checkpoint through torch.compile, as fast as torch runs it on a CPU: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manidp.formats.checkpoint import Checkpoint
from manidp.torch.convert import network_from
from manidp.torch.network import Output


def compiled(checkpoint: Checkpoint, threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Normalised float32 images (B, C, H, W) -> logits (B, classes); weights frozen in, float32, channels last.

    Needs a C++ compiler. The number of threads is one for the whole process.
    """
    torch.set_num_threads(threads)
    network = network_from(checkpoint).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward: Callable[[Tensor], Output] = torch.compile(network, dynamic=False, options={"freezing": True})

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            logits: NDArray[np.float32] = forward(batch).logits.numpy()
        return logits

    return run
