"""Training and inference with PyTorch; everything that imports torch is in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from manidp.data.images import ImageSet
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.errors import MissingExtraError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.training.recipe import Recipe
from manidp.training.state import EpochRecord
from manidp.training.train import train as train_with

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("this needs PyTorch; install it with: pip install 'manidp[torch]'") from error


def train(
    start: Checkpoint | Graph,
    data: ImageSet,
    recipe: Recipe,
    folder: str | Path,
    *,
    gates: bool = False,
    preprocessing: Preprocessing = CIFAR10_PREPROCESSING,
    teachers: Sequence[Checkpoint] = (),
    resume: bool = False,
    report: Callable[[EpochRecord], None] | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Checkpoint:
    """Train a model or a fresh network on labelled images; returns the model of the last epoch.

    start: a model to fine-tune, or a graph to begin with fresh weights and ``preprocessing``. data: its classes become
    the model's; where ``start`` tells others, the classifier begins anew. folder: made if need be; it gets
    ``state.safetensors``, to go on from with ``resume``, and ``log.jsonl``. gates: give the network ManiDP's gates, if
    it has none; the recipe then needs a target. teachers: models to distil from, for a recipe with ``distillation``.
    report: called with each epoch's record. device: cpu or cuda. threads: of the CPU, for the whole process.
    Warns (UserWarning) where the recipe's budget is missed by more than 1 % on the training images. Raises
    TrainingError for what does not fit, and where the loss is not finite; the state of the last good epoch then stays.
    """
    from manidp.torch.backend import Torch

    backend = Torch(device, threads)
    return train_with(
        backend, start, data, recipe, folder, gates=gates, preprocessing=preprocessing, teachers=teachers,
        resume=resume, report=report,
    )  # fmt: skip
