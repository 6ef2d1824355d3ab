"""Fine-tuning with MindSpore: the losses of the paper, thresholds as they are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, float32, nn, ops, value_and_grad
from numpy.typing import NDArray

from manidp.data.images import ImageSet, Preprocessing
from manidp.errors import TrainingError
from manidp.mindspore.losses import complexity_weights, similarity_loss, sparsity_loss
from manidp.mindspore.network import Network
from manidp.training.settings import check_settings

PADDING = 4  # pixels around an image for the random crop


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to fine-tune; the learning rate falls along half a cosine, step by step. Weight decay spares the gates."""

    epochs: int = 1
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lambda_sparsity: float = 5e-3
    lambda_similarity: float = 1.0
    augment: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch did: means over its images; losses in nats, accuracy 0..1."""

    epoch: int
    loss: float
    cross_entropy: float
    accuracy: float
    sparsity: float
    similarity: float
    seconds: float


class Loss(nn.Cell):
    """images (B, C, H, W), labels (B,), limit -> total, cross entropy, accuracy, sparsity, similarity; scalars.

    total = mean CE + lambda_sparsity * sparsity + lambda_similarity * similarity (Tang et al. 2021, eq. 11).
    """

    def __init__(self, network: Network, lambda_sparsity: float, lambda_similarity: float) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.lambda_sparsity = lambda_sparsity
        self.lambda_similarity = lambda_similarity

    def construct(self, images: Tensor, labels: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        logits, records = self.network.records(images)
        each = ops.cross_entropy(logits, labels, reduction="none")
        accuracy = (logits.argmax(1) == labels).astype(logits.dtype).mean()
        saliencies = [record[0] for record in records]
        sparsity = sparsity_loss(saliencies, complexity_weights(each, limit))
        similarity = similarity_loss(saliencies, [record[2] for record in records])
        total = each.mean() + self.lambda_sparsity * sparsity + self.lambda_similarity * similarity
        return total, each.mean(), accuracy, sparsity, similarity


class TrainingStep(nn.Cell):
    """What Loss gives, after which the network has made one step down its gradient."""

    def __init__(self, loss: Loss, optimizer: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.optimizer = optimizer
        self.gradient = value_and_grad(loss, None, optimizer.parameters, has_aux=True)

    def construct(self, images: Tensor, labels: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        losses: tuple[Tensor, ...]
        losses, gradients = self.gradient(images, labels, limit)
        self.optimizer(gradients)
        return losses


def training_step(network: Network, recipe: Recipe, steps: int) -> TrainingStep:
    """One step of SGD with Nesterov momentum, to be called ``steps`` times in all."""
    gates = tuple(f"{name}." for name in network.gate_names)
    free = [p for p in network.trainable_params() if p.name.startswith(gates)]
    decayed = [p for p in network.trainable_params() if not p.name.startswith(gates)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    rate = nn.CosineDecayLR(0.0, recipe.learning_rate, steps)
    optimizer = nn.SGD([g for g in groups if g["params"]], rate, recipe.momentum, nesterov=recipe.momentum > 0)
    return TrainingStep(Loss(network, recipe.lambda_sparsity, recipe.lambda_similarity), optimizer)


def fine_tune(network: Network, data: ImageSet, preprocessing: Preprocessing, recipe: Recipe) -> Iterator[EpochRecord]:
    """Train on ``data`` in place, one record an epoch; leaves the network in evaluation mode.

    An epoch drops a last batch that is not full. In the first one no image pays for its saliency, as the mean cross
    entropy is unknown. Raises TrainingError for a recipe or data that cannot be, and when a loss or a weight is
    not finite.
    Departs: thresholds stay as they are, which suits a network that was pruned already.
    """
    check_settings(vars(recipe), Recipe, "recipe")
    if len(data) < 2 or data.labels.max() >= network.num_classes:
        raise TrainingError(f"two or more images of at most {network.num_classes} classes needed; got {len(data)} "
                            f"of {data.labels.max(initial=-1) + 1}")  # fmt: skip
    size = min(recipe.batch_size, len(data))
    step = training_step(network, recipe, recipe.epochs * (len(data) // size))
    step.set_train(True)
    limit = 0.0
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        losses = []
        for images, labels in _batches(data, preprocessing, recipe, size, epoch):
            parts = step(Tensor(images), Tensor(labels), Tensor(limit, float32))
            losses.append([float(part) for part in parts])
            if not math.isfinite(losses[-1][0]):
                raise TrainingError(f"the loss is not finite at epoch {epoch}, step {len(losses) - 1}; start again "
                                    f"with a learning rate below {recipe.learning_rate}")  # fmt: skip
        if not all(np.isfinite(parameter.asnumpy()).all() for parameter in network.get_parameters()):
            raise TrainingError(f"a weight is not finite after epoch {epoch}; start again with a learning rate below "
                                f"{recipe.learning_rate}")  # fmt: skip
        loss, cross_entropy, accuracy, sparsity, similarity = np.mean(losses, axis=0).tolist()
        limit = 0.5 * cross_entropy
        yield EpochRecord(
            epoch=epoch, loss=loss, cross_entropy=cross_entropy, accuracy=accuracy, sparsity=sparsity,
            similarity=similarity, seconds=round(time.perf_counter() - started, 2),
        )  # fmt: skip
    step.set_train(False)


def _batches(
    data: ImageSet, preprocessing: Preprocessing, recipe: Recipe, size: int, epoch: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Shuffled and, with ``augment``, flipped and cropped at random; all chance comes from (seed, epoch)."""
    chance = np.random.default_rng((recipe.seed, epoch))
    order = chance.permutation(len(data))
    height, width = data.images.shape[1:3]
    for start in range(0, len(data) - size + 1, size):
        chosen = order[start : start + size]
        pixels = data.images[chosen]
        if recipe.augment:
            pixels = np.where(chance.integers(0, 2, (size, 1, 1, 1)), pixels[:, :, ::-1], pixels)
            pixels = np.pad(pixels, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
            corners = chance.integers(0, 2 * PADDING + 1, (size, 2))
            pixels = np.stack(
                [image[y : y + height, x : x + width] for image, (y, x) in zip(pixels, corners, strict=True)]
            )
        yield preprocessing.apply(pixels), data.labels[chosen].astype(np.int32)
