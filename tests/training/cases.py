"""A tiny network, and images of two classes that it can tell."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Activation, Add, BatchNorm, Conv, GlobalPool, Graph, Input, Linear
from manidp.models import resnet
from manidp.training.backend import Backend
from manidp.training.loop import Training
from manidp.training.recipe import Recipe
from manidp.training.start import start_of
from manidp.training.state import EpochRecord

PREPROCESSING = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
GRAPH = resnet(8, num_classes=2, width=8, image=(3, 8, 8))
GATED_GRAPH = with_gates(GRAPH)
SHORT = Graph(  # quick to compile
    (
        Input(name="image", dims=(3, 8, 8)),
        Conv(name="conv_1", inputs=("image",), channels=8),
        BatchNorm(name="bn_1", inputs=("conv_1",)),
        Activation(name="relu_1", inputs=("bn_1",), kind="relu"),
        Conv(name="conv_2", inputs=("relu_1",), channels=8),
        Add(name="sum", inputs=("conv_2", "relu_1")),
        GlobalPool(name="pool", inputs=("sum",)),
        Linear(name="classifier", inputs=("pool",), features=2),
    ),
    "classifier",
)
RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.05, ema=0.9, precision="float32", augment=False)  # not to flip
GATED = replace(RECIPE, keep_rate=0.6)  # with an average, momentum and thresholds to carry over


def backend_of(name: str) -> Backend:
    """A framework, or torch on a GPU ("cuda"), on one thread: the networks of these tests are too small to share."""
    if name == "mindspore":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that MindSpore itself gives rise to, while it is imported
            from manidp.mindspore.backend import MindSpore
        return MindSpore()
    from manidp.torch.backend import Torch

    if name == "torch":
        return Torch(threads=1)
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # sums in one order, as a CPU has them: runs that go on end the same
    return Torch(name, threads=1)


def image_set(count: int = 64, seed: int = 0) -> ImageSet:
    """Bright on the left, bright on the right."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 2
    images = generator.integers(0, 156, (count, 8, 8, 3), dtype=np.uint8)
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    return ImageSet(images, labels, ("left", "right"))


def fresh(backend: Backend, graph: Graph = GRAPH, seed: int = 0) -> Checkpoint:
    return start_of(backend, graph, None, PREPROCESSING, ("left", "right"), seed)


def training(backend: Backend, folder: Path, recipe: Recipe, **options: Any) -> Training:
    """Of the network with gates where the recipe has a target."""
    graph = GRAPH if recipe.keep_rate is recipe.macs_budget is None else GATED_GRAPH
    start, data = options.pop("start", None) or fresh(backend, graph, recipe.seed), options.pop("data", image_set())
    return Training(backend, start, data, recipe, folder, **options)


def trained(backend: Backend, folder: Path, recipe: Recipe, **options: Any) -> tuple[Training, list[EpochRecord]]:
    run = training(backend, folder, recipe, **options)
    return run, list(run.epochs())
