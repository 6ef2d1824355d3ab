"""Training and inference with PyTorch; everything that imports torch is in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from manidp.data.labelled import Labelled
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.errors import MissingExtraError, TrainingError, some
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.training.recipe import PRUNING, Recipe, budget_of
from manidp.training.state import EpochRecord
from manidp.training.train import train as train_with

if TYPE_CHECKING:
    from manidp.torch.inference import TorchEngine

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("this needs PyTorch; install it with: pip install 'manidp[torch]'") from error


def load(
    name: str | Path, *, device: str = "cpu", precision: str = "float32", threads: int | None = None
) -> TorchEngine:
    """As ``manidp.load``, to run with PyTorch on a device; options are those of ``TorchEngine``."""
    from manidp.hub.find import find_model
    from manidp.torch.inference import TorchEngine

    return TorchEngine(find_model(name).checkpoint, device=device, precision=precision, threads=threads)


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


def prune(
    dense: Checkpoint,
    data: Labelled,
    budget: float | str,
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    report: Callable[[EpochRecord], None] | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Checkpoint:
    """Give a trained network gates and train them to a budget, the network as it was its teacher.

    dense: a network without gates, such as one of ``manidp.from_torch``. data: labelled images of its size and of its
    classes. budget: multiply-adds that an image may take on average: 0.5 or "50%" of the network's, or "18.6M". recipe:
    by default ``Recipe(**PRUNING)``; its own target is not used. All else is as in ``train``, which this calls; raises
    TrainingError also for data of other classes.
    """
    if sorted(dense.classes) != sorted(data.classes):
        raise TrainingError(
            f"the network knows the classes {some(dense.classes)}, the data has {some(data.classes)}; from_torch takes "
            "classes=, in the order of the logits"
        )
    recipe = replace(recipe or Recipe(**PRUNING), macs_budget=budget_of(budget), keep_rate=None)
    teachers = [dense] if recipe.distillation else []
    return train(
        dense, data, recipe, folder, gates=True, teachers=teachers, resume=resume, report=report, device=device,
        threads=threads,
    )  # fmt: skip
