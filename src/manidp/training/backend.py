"""What a framework brings to a training: a network and its step. All else is in ``manidp.training``, once for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from manidp.data.labelled import SMALL, Labelled, PictureFiles, random_places
from manidp.errors import TrainingError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.graph import Graph
from manidp.result import Result
from manidp.training.recipe import Recipe

Array = Any
"""An array of the framework, wherever it keeps it; only ``Learner.read`` and ``mean`` bring it to NumPy."""
Batch = Any
"""Images and labels, as the learner that made them takes them."""
Weights = dict[str, NDArray[np.float32]]
PADDING = 4  # pixels around an image for the random crop
SHORT = 0.01  # length of an image's saliencies or pooled features below which they have no direction to be trained
A = TypeVar("A")


@dataclass(frozen=True)
class Step:
    """What one step saw, before it changed the weights.

    losses: (5,), float32: the total and, as means over the batch, cross entropy, accuracy 0..1, sparsity and
    similarity. saliencies: gate -> (B, C), float32, before the threshold. importance: gate -> (C,), float32, the
    channels' Taylor importance in this batch, if the recipe's ``shares`` ask for it.
    """

    losses: Array
    saliencies: Mapping[str, Array]
    importance: Mapping[str, Array] = field(default_factory=dict)


class Learner(Protocol):
    """A network in training on one set of images.

    Where several processes train together, a batch is this process's share, and what a step or a network says of it is
    of the whole batch.
    """

    @property
    def steps(self) -> int:
        """Batches in an epoch, at least 1: a last one that is not full is left out."""
        ...

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The training images of an epoch, shuffled and, with ``augment``, flipped and cropped at random.

        Batches are all of one size; all chance comes from (seed, epoch).
        """
        ...

    def plain(self, count: int) -> Iterator[Batch]:
        """The first ``count`` images of a fixed shuffle, unchanged, in batches of any size."""
        ...

    def use(self, point: str) -> None:
        """From now on the thresholds and batch statistics of an operating point of the recipe, or "default".

        All of them begin with those of the model that training starts from.
        """
        ...

    def step(
        self, batch: Batch, *, learning_rate: float, limit: float, points: Sequence[str] = (DEFAULT,)
    ) -> list[Step]:
        """One step of SGD down the gradient of the recipe's loss; ``limit`` is that of ``complexity_weights``.

        What it saw at each of the points. The first follows labels and teachers, the others the mean logits of the
        first and the teachers; the loss is the mean of theirs. The learner is left at the default point.
        """
        ...

    def average(self, share: float) -> None:
        """Move the average of weights and statistics by ``share`` towards the network's."""
        ...

    def take_average(self) -> None:
        """The average becomes the network."""
        ...

    def observe(self, batch: Batch, share: float) -> None:
        """Move the moving statistics by ``share`` towards those of the batch; no weight changes."""
        ...

    def saliencies(self, batch: Batch) -> Mapping[str, Array]:
        """gate -> (B, C), float32, before the threshold, of the network in evaluation mode."""
        ...

    def thresholds(self) -> dict[str, float]:
        """Every gate's threshold, by the gate's name."""
        ...

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Other thresholds for these gates, from now on."""
        ...

    def run(self, images: NDArray[np.float32]) -> Result:
        """Normalised images (B, C, H, W) through the network in evaluation mode, in float32."""
        ...

    def state(self) -> Weights:
        """A copy of all that steps change: ``network/NAME`` and, where the recipe has them, ``average/NAME``,
        ``momentum/NAME`` (zeros before the first step); NAME as in ``graph.parameters``, momentum of what is trained.
        ``points/K/NAME`` is what takes the place of ``network/NAME`` at the K-th of the recipe's points.
        """
        ...

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from a state of the same names; momentum may be left out."""
        ...

    def read(self, arrays: Sequence[Array]) -> NDArray[np.float32]:
        """Arrays joined along their first axis."""
        ...

    def mean(self, arrays: Sequence[Array]) -> NDArray[np.float32]:
        """The mean of arrays of one shape."""
        ...


class Backend(Protocol):
    """A framework on one device."""

    @property
    def name(self) -> str:
        """As in ``manidp train --backend``, and in the state of a run, which goes on with the same one only."""
        ...

    @property
    def version(self) -> str:
        """The framework's version."""
        ...

    @property
    def device(self) -> str:
        """Where it computes: cpu or cuda."""
        ...

    @property
    def threads(self) -> int:
        """Threads of the CPU."""
        ...

    @property
    def processes(self) -> int:
        """How many processes train together, each on its share of a batch; all hold the same network."""
        ...

    @property
    def rank(self) -> int:
        """Which of them this is; 0 alone writes and tells."""
        ...

    def agree(self, content: bytes) -> bool:
        """Whether all processes hold the same bytes here; each waits for the others."""
        ...

    @property
    def precision(self) -> Literal["bfloat16", "float32"]:
        """What ``precision="auto"`` is here."""
        ...

    def fresh(self, graph: Graph, seed: int) -> Weights:
        """Weights to start from: convolutions at random, gates the identity, so that they change no logit."""
        ...

    def learner(
        self, start: Checkpoint, data: Labelled, recipe: Recipe, teachers: Sequence[Checkpoint] = ()
    ) -> Learner:
        """A learner that starts from a model's weights.

        data: its pictures have the size and its classes the order of ``start``. recipe: resolved, with a precision.
        teachers: run without gradient on the same batches; the mean of their logits is followed.
        Raises TrainingError for what this framework cannot do of the recipe, before anything is computed.
        """
        ...


def pass_size(size: tuple[int, int]) -> int:
    """Images in a batch where no gradient is taken, for images of this size (H, W)."""
    return 500 if max(size) <= SMALL else 50


def drawn(
    data: PictureFiles, recipe: Recipe, epoch: int, own: slice = slice(None)
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Pixels (B, H, W, 3) and labels (B,) of an epoch's batches of pictures in files; see ``Learner.batches``.

    own: which of each batch, those alone are read.

    With ``augment``, random parts of the pictures (Inception's crops) and their mirror images, else their centres.
    """
    chance = np.random.default_rng((recipe.seed, epoch))
    order = chance.permutation(len(data))
    size = min(recipe.batch_size, len(data))
    chosen = [order[start : start + size][own] for start in range(0, len(data) - size + 1, size)]
    crops = ((places, random_places(chance, size)[own]) for places in chosen)
    pixels = data.crops(crops) if recipe.augment else data.batches(chosen)
    for places, batch in zip(chosen, pixels, strict=True):
        yield batch, data.labels[places]


def undrawn(
    data: Labelled, recipe: Recipe, count: int, own: slice = slice(None)
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Pixels and labels of the first ``count`` pictures of a fixed shuffle, ``own`` of them; see ``Learner.plain``."""
    order, size = np.random.default_rng(recipe.seed).permutation(len(data))[:count][own], pass_size(data.size)
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    for places, pixels in zip(chosen, data.batches(chosen), strict=True):
        yield pixels, data.labels[places]


def estimate_statistics(learner: Learner, epoch: int, images: int, size: int) -> None:
    """Moving mean and variance = the plain average over the first batches, of ``size``, that hold so many images.

    They are augmented as in training. On images without augmentation statistics would be others: black borders of the
    crops raise the variance of the stem by half, and a network that never saw its maps scaled otherwise loses three
    points.
    """
    for index, batch in enumerate(learner.batches(epoch)):
        if index * size >= images:
            break
        learner.observe(batch, 1 / (index + 1))


def check_threads(threads: int) -> None:
    """Raises TrainingError for a number of threads that cannot be meant."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 1 <= threads <= most:
        raise TrainingError(f"threads must lie between 1 and {most} on this machine; got {threads}")


def below(arrays: Mapping[str, A], prefix: str) -> dict[str, A]:
    """Those whose names begin with the prefix ("network/", "average/", "momentum/"), by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
