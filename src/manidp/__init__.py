"""Dynamic channel pruning: a CNN that decides, image by image, which of its channels to compute.

    engine = manidp.load("manidp-res20")
    result = engine.run(images)  # uint8 (B, 32, 32, 3); logits, kept channels and multiply-adds of each image

Importing this package loads no framework; ``manidp.torch`` trains, ``manidp.mindspore`` serves MindSpore users.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manidp.runtime.engine import Engine

__version__ = "0.1.0"


def load(name: str | Path, *, precision: str = "float32", threads: int = 1, isa: str | None = None) -> Engine:
    """A network ready to run, by bundled name or path of a checkpoint; options are those of ``Engine``.

    Raises CheckpointError if there is no such model or its file is broken.
    """
    from manidp.checkpoint import checkpoint_path, load_checkpoint
    from manidp.runtime.engine import Engine

    checkpoint = load_checkpoint(checkpoint_path(name))
    return Engine(checkpoint, precision=precision, threads=threads, isa=isa)
