"""Training with MindSpore: the step, and batches drawn with NumPy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import mindspore
import numpy as np
from mindspore import Tensor, float32, nn, ops, value_and_grad
from numpy.typing import NDArray

from manidp.data.images import ImageSet
from manidp.data.labelled import Labelled
from manidp.errors import TrainingError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.graph import Graph
from manidp.hub.bundle import description
from manidp.mindspore.convert import from_checkpoint, weights
from manidp.mindspore.losses import complexity_weights, distillation_loss, similarity_loss, sparsity_loss
from manidp.mindspore.network import Network
from manidp.result import Result
from manidp.training.backend import PADDING, Step, Weights, below, drawn, undrawn
from manidp.training.importance import score_biases
from manidp.training.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """images: float32 (B, 3, H, W), normalised. labels: int32 (B,)."""

    images: Tensor
    labels: Tensor


class MindSpore:
    """MindSpore on the CPU; its number of threads is that of the environment, OMP_NUM_THREADS.

    Raises TrainingError for another device or for ``threads``.
    """

    name = "mindspore"
    version: str = mindspore.__version__
    device = "cpu"
    processes = 1
    rank = 0
    precision: Literal["float32"] = "float32"

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        mindspore.runtime.launch_blocking()  # else the threads that hand on operators spin while they wait
        if device != "cpu":
            raise TrainingError(f"with MindSpore device must be cpu; got {device}")
        if threads is not None:
            raise TrainingError(
                "MindSpore takes its number of threads from the environment; leave --threads out and set "
                f"OMP_NUM_THREADS={threads}"
            )

    @property
    def threads(self) -> int:
        """Threads of the CPU."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdecimal() else os.cpu_count() or 1

    def agree(self, content: bytes) -> bool:
        """One process agrees with itself."""
        return True

    def fresh(self, graph: Graph, seed: int) -> Weights:
        """Those of ``Network``; MindSpore's own seed is set."""
        mindspore.set_seed(seed)
        return weights(Network(description(graph), [0.0] * len(graph.thresholds)))

    def learner(
        self, start: Checkpoint, data: Labelled, recipe: Recipe, teachers: Sequence[Checkpoint] = ()
    ) -> MindSporeLearner:
        """Raises TrainingError for a recipe of ``precision`` bfloat16, or with ``points``."""
        if recipe.points:
            raise TrainingError("recipe: points can be trained with --backend torch only; leave them out")
        if recipe.precision != self.precision:
            raise TrainingError(f"recipe: with MindSpore precision must be {self.precision}; got {recipe.precision}")
        return MindSporeLearner(start, data, recipe, teachers)


class MindSporeLearner:
    """A MindSpore network in training; see ``manidp.training.backend.Learner``."""

    def __init__(self, start: Checkpoint, data: Labelled, recipe: Recipe, teachers: Sequence[Checkpoint]) -> None:
        self.start, self.data, self.recipe = start, data, recipe
        self.size = min(recipe.batch_size, len(data))
        self.network = from_checkpoint(start, adjustable=True)
        self.teachers = [_callable(from_checkpoint(teacher), recipe) for teacher in teachers]
        biases = score_biases(start.graph) if recipe.shares == "taylor" else {}
        self.training = TrainingStep(self.network, recipe, start.graph.heads, biases)
        self.trained = _callable(self.training, recipe)
        self.averages = weights(self.network) if recipe.ema else {}
        self.observer: Network | None = None

    @property
    def steps(self) -> int:
        return len(self.data) // self.size

    def batches(self, epoch: int) -> Iterator[Batch]:
        data, recipe = self.data, self.recipe
        batches = cropped(data, recipe, self.size, epoch) if isinstance(data, ImageSet) else drawn(data, recipe, epoch)
        for pixels, labels in batches:
            yield self._batch(pixels, labels)

    def plain(self, count: int) -> Iterator[Batch]:
        return itertools.starmap(self._batch, undrawn(self.data, self.recipe, count))

    def _batch(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Batch:
        return Batch(Tensor(self.start.preprocessing.apply(pixels)), Tensor(labels.astype(np.int32)))

    def use(self, point: str) -> None:
        assert point == DEFAULT  # a recipe with points is refused

    def step(
        self, batch: Batch, *, learning_rate: float, limit: float, points: Sequence[str] = (DEFAULT,)
    ) -> list[Step]:
        taught = [teacher(batch.images) for teacher in self.teachers]
        mean = sum(taught[1:], taught[0]) / len(taught) if taught else ops.zeros(1)
        self.training.set_train(True)
        losses, *parts = self.trained(
            batch.images, batch.labels, Tensor(limit, float32), mean, Tensor(learning_rate, float32)
        )
        gates = len(self.network.gate_names)
        return [Step(losses, self._named(parts[:gates]), self._named(parts[gates:]) if parts[gates:] else {})]

    def average(self, share: float) -> None:
        for name, value in weights(self.network).items():
            self.averages[name] += np.float32(share) * (value - self.averages[name])

    def take_average(self) -> None:
        _set(self.network, self.averages)

    def observe(self, batch: Batch, share: float) -> None:
        own = weights(self.network)
        if self.observer is None:
            self.observer = _observing(self.start)
        _set(self.observer, own)
        self.observer(batch.images)
        seen = weights(self.observer)
        _set(self.network, {
            name: own[name] + np.float32(share) * (seen[name] - own[name])
            for name in own if name.endswith((".moving_mean", ".moving_variance"))
        })  # fmt: skip

    def saliencies(self, batch: Batch) -> dict[str, Tensor]:
        self.network.set_train(False)
        return self._named([record[0] for record in self.network.records(batch.images)[1]])

    def thresholds(self) -> dict[str, float]:
        own = weights(self.network)
        return {name: float(own[f"{name}.threshold"]) for name in self.network.deciding}

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        _set(self.network, {f"{name}.threshold": np.array(value, np.float32) for name, value in thresholds.items()})

    def run(self, images: NDArray[np.float32]) -> Result:
        self.network.set_train(False)
        logits, records = self.network.records(Tensor(images))
        gates = self._named([record[1].asnumpy() for record in records])
        values = [gates[name] for name in self.start.graph.gate_channels]
        none = np.zeros((len(images), 0), np.float32)
        return Result(self.start.graph, logits.asnumpy(), np.concatenate([none, *values], axis=1))

    def state(self) -> Weights:
        parts = {"network": weights(self.network), "average": self.averages, "momentum": self.training.momenta()}
        return {f"{part}/{name}": value.copy() for part, values in parts.items() for name, value in values.items()}

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        _set(self.network, below(state, "network/"))
        self.averages = below(state, "average/")
        self.training.set_momenta(below(state, "momentum/"))

    def read(self, arrays: Sequence[Tensor]) -> NDArray[np.float32]:
        return np.concatenate([array.asnumpy() for array in arrays])

    def mean(self, arrays: Sequence[Tensor]) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = np.mean([array.asnumpy() for array in arrays], axis=0)
        return mean

    def _named(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.network.gate_names, values, strict=True))


class Loss(nn.Cell):
    """images (B, C, H, W), labels (B,), limit, taught -> the loss, the five losses of a Step, saliencies, mean factors.

    Saliencies (B, C) and mean factors (C,) are those of every gate.

    taught: the teachers' logits (B, classes); without distillation it is not looked at.
    loss = task + lambda_sparsity * sparsity + lambda_similarity * similarity (Tang et al. 2021, eq. 11).
    """

    def __init__(self, network: Network, recipe: Recipe) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.smoothing, self.distillation = recipe.label_smoothing, recipe.distillation
        self.temperature = recipe.temperature
        self.lambda_sparsity, self.lambda_similarity = recipe.lambda_sparsity, recipe.lambda_similarity

    def construct(self, images: Tensor, labels: Tensor, limit: Tensor, taught: Tensor) -> tuple[Tensor, ...]:
        logits, records = self.network.records(images)
        each = ops.cross_entropy(logits, labels, reduction="none")
        accuracy = (logits.argmax(1) == labels).astype(logits.dtype).mean()
        total = ops.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        if self.distillation > 0:
            follow = distillation_loss(logits, taught, self.temperature)
            total = (1 - self.distillation) * total + self.distillation * follow
        sparsity, similarity = ops.zeros_like(total), ops.zeros_like(total)
        saliencies = [record[0] for record in records]
        if len(saliencies) > 0:
            sparsity = sparsity_loss(saliencies, complexity_weights(each, limit))
            similarity = similarity_loss(saliencies, [record[2] for record in records])
        total = total + self.lambda_sparsity * sparsity + self.lambda_similarity * similarity
        factors = [record[1].mean(0) for record in records]
        return (total, ops.stack((total, each.mean(), accuracy, sparsity, similarity)), *saliencies, *factors)


class TrainingStep(nn.Cell):
    """What Loss takes, and a learning rate -> its losses and saliencies; the network has made a step down its gradient.

    SGD with Nesterov momentum, as torch.optim.SGD has it; weight decay spares the nodes ``heads``, the gates'. biases:
    of every gate, the parameter whose gradient tells its channels' importance (C,), which then follows the saliencies.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        heads: Collection[str],
        biases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(auto_prefix=False)
        self.loss = Loss(network, recipe)
        parameters = network.trainable_params()
        decay = recipe.weight_decay
        self.decays = tuple(0.0 if p.name.rpartition(".")[0] in heads else decay for p in parameters)
        names = [p.name for p in parameters]
        self.gates = len(network.gate_names)
        self.biases = tuple(names.index(biases[gate]) for gate in network.gate_names if gate in biases)
        self.momentum, self.clip_norm = recipe.momentum, recipe.clip_norm
        self.parameters = mindspore.ParameterTuple(parameters)
        self.velocities = self.parameters.clone(prefix="momentum", init="zeros")
        self.gradient = value_and_grad(self.loss, None, self.parameters, has_aux=True)

    def construct(
        self, images: Tensor, labels: Tensor, limit: Tensor, taught: Tensor, learning_rate: Tensor
    ) -> tuple[Tensor, ...]:
        values, gradients = self.gradient(images, labels, limit, taught)
        bounded = ops.clip_by_global_norm(gradients, self.clip_norm) if self.clip_norm > 0 else gradients
        for index in range(len(self.parameters)):
            parameter, velocity = self.parameters[index], self.velocities[index]
            gradient = bounded[index] + self.decays[index] * parameter
            moved = self.momentum * velocity + gradient
            ops.assign(velocity, moved)
            ops.assign(parameter, parameter - learning_rate * (gradient + self.momentum * moved))
        rest: tuple[Tensor, ...] = values[1 : 2 + self.gates]
        for gate in range(len(self.biases)):
            rest = (*rest, ops.square(gradients[self.biases[gate]] * values[2 + self.gates + gate]))
        return rest

    def momenta(self) -> Weights:
        """A copy of the momentum of every parameter, under its name; none where the recipe has none."""
        if not self.momentum:
            return {}
        pairs = zip(self.parameters, self.velocities, strict=True)
        return {parameter.name: velocity.asnumpy().copy() for parameter, velocity in pairs}

    def set_momenta(self, momenta: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on with these."""
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            if parameter.name in momenta:
                velocity.set_data(Tensor(momenta[parameter.name]))


def cropped(
    data: ImageSet, recipe: Recipe, size: int, epoch: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Pixels (size, H, W, 3) and labels (size,) of an epoch's batches; see ``Learner.batches``."""
    chance = np.random.default_rng((recipe.seed, epoch))
    order = chance.permutation(len(data))
    height, width = data.size
    for start in range(0, len(data) - size + 1, size):
        chosen = order[start : start + size]
        pixels = data.images[chosen]
        if recipe.augment:
            pixels = np.where(chance.integers(0, 2, (size, 1, 1, 1)), pixels[:, :, ::-1], pixels)
            pixels = np.pad(pixels, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)), recipe.padding_mode)
            corners = chance.integers(0, 2 * PADDING + 1, (size, 2))
            pixels = np.stack(
                [image[y : y + height, x : x + width] for image, (y, x) in zip(pixels, corners, strict=True)]
            )
        yield pixels, data.labels[chosen]


def _observing(start: Checkpoint) -> Network:
    """A network in which every batch norm leaves the statistics of the last batch as its moving ones.

    How much a batch counts is fixed when MindSpore's operator is made.
    """
    network = from_checkpoint(start, adjustable=True)
    for _, cell in network.cells_and_names():
        if isinstance(cell, (nn.BatchNorm1d, nn.BatchNorm2d)):
            cell.bn_train = ops.BatchNorm(is_training=True, epsilon=cell.eps, momentum=1.0)
    network.set_train(True)
    return network


def _set(network: Network, values: Mapping[str, NDArray[np.float32]]) -> None:
    for parameter in network.get_parameters():
        if parameter.name in values:
            parameter.set_data(Tensor(values[parameter.name]))


def _callable(cell: nn.Cell, recipe: Recipe) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = mindspore.jit(cell) if recipe.compiled else cell
    return compiled
