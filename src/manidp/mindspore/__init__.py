"""Training and inference with MindSpore; everything that imports MindSpore is in here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from manidp.data.labelled import Labelled
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.errors import MissingExtraError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.training.recipe import Recipe
from manidp.training.state import EpochRecord
from manidp.training.train import train as train_with

# With AVX-512, MindSpore 2.10's oneDNN has no fast convolution for its layout: AVX2 is some 30 times as fast.
_ours = "ONEDNN_MAX_CPU_ISA" not in os.environ
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
try:
    import mindspore as _mindspore  # noqa: F401
except ImportError as error:
    if _ours:  # processes that are started later inherit it, and torch heeds it, too
        del os.environ["ONEDNN_MAX_CPU_ISA"]
    raise MissingExtraError(
        "this needs MindSpore, and MindSpore needs numpy < 2; in an environment of its own (python -m venv), install "
        "them with: pip install 'manidp[mindspore]' 'numpy<2'"
    ) from error


def train(
    start: Checkpoint | Graph,
    data: Labelled,
    recipe: Recipe,
    folder: str | Path,
    *,
    gates: bool = False,
    preprocessing: Preprocessing = CIFAR10_PREPROCESSING,
    teachers: Sequence[Checkpoint] = (),
    resume: bool = False,
    report: Callable[[EpochRecord], None] | None = None,
) -> Checkpoint:
    """As ``manidp.torch.train``, with MindSpore on the CPU, in float32.

    Its number of threads is that of the environment, OMP_NUM_THREADS. ``compiled`` needs seconds to minutes at the
    start and takes a third of the time for a step.
    """
    from manidp.mindspore.backend import MindSpore

    return train_with(
        MindSpore(), start, data, recipe, folder, gates=gates, preprocessing=preprocessing, teachers=teachers,
        resume=resume, report=report,
    )  # fmt: skip
