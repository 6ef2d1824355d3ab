"""Training with PyTorch: the step, and batches drawn on the device.

A data set of small images is one tensor, and augmentation is a few indexed reads for the whole batch. Larger pictures
are decoded batch by batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from manidp.data.images import ImageSet
from manidp.data.labelled import Labelled, PictureFiles
from manidp.data.preprocessing import Preprocessing
from manidp.errors import TrainingError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.graph import Graph
from manidp.result import Result
from manidp.torch.convert import check_device, network_from, placed, use_threads
from manidp.torch.losses import complexity_weights, distillation_loss, similarity_loss, sparsity_loss
from manidp.torch.network import GateRecord, Network, Output
from manidp.torch.processes import AllRows, Processes, together
from manidp.training.backend import PADDING, Step, Weights, below, drawn, pass_size, undrawn
from manidp.training.importance import score_biases
from manidp.training.recipe import Recipe, point_name


class Torch:
    """PyTorch on one device. Raises TrainingError for a device or a number of threads that cannot be.

    device: cpu or cuda. threads: of the CPU, for the whole process; None: as many as PyTorch has. Processes that
    torchrun started train together.
    """

    name = "torch"
    version = torch.__version__

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        check_device(device, TrainingError)
        use_threads(threads)
        self.device = device
        self._processes = together(device)

    @property
    def processes(self) -> int:
        return self._processes.size

    @property
    def rank(self) -> int:
        return self._processes.rank

    def agree(self, content: bytes) -> bool:
        return self._processes.agree(content)

    @property
    def threads(self) -> int:
        """Threads of the CPU."""
        return torch.get_num_threads()

    @property
    def precision(self) -> Literal["bfloat16", "float32"]:
        """bfloat16 where the device computes it; where it does not, bfloat16 takes twice the time of float32."""
        if self.device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            able = torch.cpu.get_capabilities()
            native = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: Arm's
        return "bfloat16" if native else "float32"

    def fresh(self, graph: Graph, seed: int) -> Weights:
        """Those of ``Network``."""
        return Network(graph, seed=seed).weights()

    def learner(
        self, start: Checkpoint, data: Labelled, recipe: Recipe, teachers: Sequence[Checkpoint] = ()
    ) -> TorchLearner:
        """Any recipe can be followed; that of torch.compile needs a C++ compiler, and one process."""
        if self.processes > 1 and recipe.compiled:
            raise TrainingError("recipe: compiled must be false where several processes train; got true")
        size = min(recipe.batch_size, len(data))
        if size % self.processes:
            raise TrainingError(
                f"{self.processes} processes share a batch: its size must be a multiple of it; got {size}"
            )
        return TorchLearner(start, data, recipe, teachers, self.device, self._processes)


class TorchLearner:
    """A torch network in training; see ``manidp.training.backend.Learner``."""

    def __init__(
        self,
        start: Checkpoint,
        data: Labelled,
        recipe: Recipe,
        teachers: Sequence[Checkpoint],
        device: str,
        processes: Processes,
    ) -> None:
        self.recipe, self.device, self.processes = recipe, device, processes
        self.network = placed(network_from(start), device)
        self.network.processes = processes
        self.forward = _callable(self.network, recipe)
        self.teachers = [_callable(placed(network_from(teacher), device), recipe) for teacher in teachers]
        how = start.preprocessing, recipe, device, processes
        self.images = _Batches(data, *how) if isinstance(data, ImageSet) else _FileBatches(data, *how)
        self.trainable = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        groups = _groups(self.trainable, start.graph.heads, recipe.weight_decay)
        self.optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.momentum > 0, foreach=True
        )
        # what differs between operating points: that of the point in use lies in the network, the others' here
        self.own = {name: value for name, value in self.network.named_buffers() if recipe.points}
        biases = score_biases(start.graph) if recipe.shares == "taylor" else {}
        self.biases = {gate: self.trainable[bias] for gate, bias in biases.items()}
        names = [DEFAULT, *(point_name(start.graph, float(budget)) for budget in recipe.points)]
        self.points = {point: {name: value.clone() for name, value in self.own.items()} for point in names}
        self.point = DEFAULT
        self.averages = {name: value.clone() for name, value in self.network.state_dict().items()} if recipe.ema else {}

    @property
    def steps(self) -> int:
        return len(self.images)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.images.epoch(epoch)

    def plain(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.images.plain(count)

    def use(self, point: str) -> None:
        if point == self.point:
            return
        own = list(self.own.values())
        torch._foreach_copy_(list(self.points[self.point].values()), own)
        torch._foreach_copy_(own, list(self.points[point].values()))
        self.point = point

    def step(
        self, batch: tuple[Tensor, Tensor], *, learning_rate: float, limit: float, points: Sequence[str] = (DEFAULT,)
    ) -> list[Step]:
        images, labels = batch
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        taught = self.taught(images)
        seen: list[Step] = []
        for point in points:  # each backward before the next forward: they share the network's statistics
            self.use(point)
            with self._autocast():
                output = self._whole(self.forward(images))
            if not seen:
                loss, parts = self.loss(output, taught, labels, limit)
                taught = [*taught, output.logits.detach().float()]
            else:
                loss, parts = self.following(output, taught, labels)
            (loss / len(points)).backward()  # type: ignore[no-untyped-call]
            saliencies = {name: record.saliency.detach() for name, record in output.records.items()}
            seen.append(Step(self.processes.mean(torch.stack([loss.detach(), *parts])), saliencies))
        self.use(DEFAULT)
        self.processes.average(p.grad for p in self.network.parameters() if p.grad is not None)
        if self.biases:
            seen = [replace(one, importance=self._importance(output.records)) for one in seen]
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return seen

    @torch.no_grad()
    def _importance(self, records: Mapping[str, GateRecord]) -> dict[str, Tensor]:
        found = {}
        for gate, bias in self.biases.items():
            assert bias.grad is not None
            found[gate] = (bias.grad * records[gate].gate.mean(0)).square()
        return found

    def _whole(self, output: Output) -> Output:
        """This process's logits, with the records of the whole batch."""
        if self.processes.size == 1 or not output.records:
            return output
        own = [part for one in output.records.values() for part in (one.saliency, one.gate, one.feature)]
        rows: Tensor = AllRows.apply(torch.cat(own, 1), self.processes)  # type: ignore[no-untyped-call]
        parts = iter(torch.split(rows, [part.shape[1] for part in own], 1))
        return Output(output.logits, {name: GateRecord(*itertools.islice(parts, 3)) for name in output.records})

    @torch.no_grad()
    def taught(self, images: Tensor) -> list[Tensor]:
        """Each teacher's logits."""
        with self._autocast():
            return [teacher(images).logits.float() for teacher in self.teachers]

    def following(self, output: Output, taught: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As ``loss``, for the points that follow: distillation alone."""
        logits = output.logits.float()
        loss = distillation_loss(logits, torch.stack(list(taught)).mean(0), self.recipe.temperature)
        correct = (logits.argmax(1) == labels).float().mean()
        none = torch.zeros((), device=logits.device)
        return loss, [F.cross_entropy(logits, labels).detach(), correct, none, none]

    def loss(
        self, output: Output, taught: Sequence[Tensor], labels: Tensor, limit: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The total, and [mean cross entropy, accuracy, sparsity, similarity] to record."""
        recipe, logits = self.recipe, output.logits.float()
        each = F.cross_entropy(logits, labels, reduction="none")
        task = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if taught:
            follow = distillation_loss(logits, torch.stack(list(taught)).mean(0), recipe.temperature)
            task = (1 - recipe.distillation) * task + recipe.distillation * follow
        sparsity = similarity = torch.zeros((), device=logits.device)
        if output.records:
            records = output.records.values()  # of the images of all processes
            saliencies = [record.saliency for record in records]
            sparsity = sparsity_loss(saliencies, complexity_weights(self.processes.rows(each), limit))
            similarity = similarity_loss(saliencies, [record.feature for record in records])
        total = task + recipe.lambda_sparsity * sparsity + recipe.lambda_similarity * similarity
        correct = (logits.argmax(1) == labels).float().mean()
        return total, [each.mean().detach(), correct, sparsity.detach(), similarity.detach()]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def average(self, share: float) -> None:
        state = self.network.state_dict()
        torch._foreach_lerp_(list(self.averages.values()), list(state.values()), share)

    def take_average(self) -> None:
        self.network.load_state_dict(self.averages)

    @torch.no_grad()
    def observe(self, batch: tuple[Tensor, Tensor], share: float) -> None:
        self.network.train()
        before, self.network.momentum = self.network.momentum, share
        self.network(batch[0])
        self.network.momentum = before

    @torch.no_grad()
    def saliencies(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        self.network.eval()
        return {name: record.saliency for name, record in self._whole(self.network(batch[0])).records.items()}

    def thresholds(self) -> dict[str, float]:
        state = self.network.state_dict()
        return {name.removesuffix(".threshold"): state[name].item() for name in self.network.graph.thresholds}

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        state = self.network.state_dict()
        for name, value in thresholds.items():
            state[f"{name}.threshold"].fill_(value)

    def run(self, images: NDArray[np.float32]) -> Result:
        return self.network.run(images)

    def state(self) -> Weights:
        self.use(DEFAULT)
        tensors = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in self.averages.items()}
        for index, values in enumerate(list(self.points.values())[1:]):
            tensors |= {f"points/{index}/{name}": value for name, value in values.items()}
        if self.recipe.momentum > 0:
            for name, parameter in self.trainable.items():
                buffer = self.optimizer.state[parameter].get("momentum_buffer")
                tensors[f"momentum/{name}"] = torch.zeros_like(parameter) if buffer is None else buffer
        return {name: value.detach().cpu().contiguous().numpy().copy() for name, value in tensors.items()}

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        tensors = {name: torch.from_numpy(value) for name, value in state.items()}
        self.use(DEFAULT)
        self.network.load_state_dict(below(tensors, "network/"))
        for name, value in below(tensors, "average/").items():
            self.averages[name].copy_(value)
        for index, values in enumerate(list(self.points.values())[1:]):
            for name, value in below(tensors, f"points/{index}/").items():
                values[name].copy_(value)
        momenta = below(tensors, "momentum/")
        for name, parameter in self.trainable.items():
            if name in momenta:
                buffer = torch.empty_like(parameter).copy_(momenta[name])  # laid out like the parameter
                self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def read(self, arrays: Sequence[Tensor]) -> NDArray[np.float32]:
        joined: NDArray[np.float32] = torch.cat(list(arrays)).float().cpu().numpy()
        return joined

    def mean(self, arrays: Sequence[Tensor]) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = (torch.stack(list(arrays)) * (1 / len(arrays))).sum(0).cpu().numpy()
        return mean


class _Drawn:
    """Batches of a data set, normalised, on the device: of each, this process's share."""

    def __init__(
        self, data: Labelled, preprocessing: Preprocessing, recipe: Recipe, device: str, processes: Processes
    ) -> None:
        self.recipe, self.device, self.count, self.processes = recipe, device, len(data), processes
        self.size = min(recipe.batch_size, len(data))  # images of a batch, all processes together
        self.mean = torch.tensor(preprocessing.mean, device=device)
        self.std = torch.tensor(preprocessing.std, device=device)

    def __len__(self) -> int:
        return max(1, self.count // self.recipe.batch_size)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
        return ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class _FileBatches(_Drawn):
    """Of pictures in files: decoded by threads while the network computes."""

    def __init__(
        self, data: PictureFiles, preprocessing: Preprocessing, recipe: Recipe, device: str, processes: Processes
    ) -> None:
        super().__init__(data, preprocessing, recipe, device, processes)
        self.data = data

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.starmap(self._placed, drawn(self.data, self.recipe, epoch, self.processes.share(self.size)))

    def plain(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        own = self.processes.share(min(count, len(self.data)))  # all have as many
        return itertools.starmap(self._placed, undrawn(self.data, self.recipe, count, own))

    def _placed(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return self._normalise(torch.from_numpy(pixels).to(self.device)), torch.from_numpy(labels).to(self.device)


class _Batches(_Drawn):
    """The whole data set on the device, and how to draw batches from it."""

    def __init__(
        self, data: ImageSet, preprocessing: Preprocessing, recipe: Recipe, device: str, processes: Processes
    ) -> None:
        super().__init__(data, preprocessing, recipe, device, processes)
        self.data = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.padded, self.part = self.data, pass_size(data.size)
        if recipe.augment:
            border = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
            self.padded = torch.from_numpy(np.pad(data.images, border, recipe.padding_mode)).to(device)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, randomly flipped and cropped; a last batch that is not full is left out."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        size, own = self.size, self.processes.share(self.size)
        order = torch.randperm(len(self.data), generator=generator)
        height, width = self.data.shape[1:3]
        for start in range(0, len(self) * size, size):
            chosen = order[start : start + size][own].to(self.device)
            if not self.recipe.augment:
                yield self._normalise(self.data[chosen]), self.labels[chosen]
                continue
            corner = torch.randint(0, 2 * PADDING + 1, (2, size, 1), generator=generator)[:, own].to(self.device)
            flip = torch.randint(0, 2, (size, 1), generator=generator)[own].to(self.device)
            rows = corner[0] + torch.arange(height, device=self.device)
            across = torch.arange(width, device=self.device).expand(len(chosen), width)
            columns = corner[1] + torch.where(flip == 1, width - 1 - across, across)
            pixels = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self._normalise(pixels), self.labels[chosen]

    def plain(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` images of a fixed shuffle, unchanged."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.recipe.seed))[:count]
        order = order[self.processes.share(len(order))]  # all have as many
        for chosen in torch.split(order.to(self.device), self.part):
            yield self._normalise(self.data[chosen]), self.labels[chosen]


def _callable(network: Network, recipe: Recipe) -> Callable[[Tensor], Output]:
    if not recipe.compiled:
        return network
    compiled: Callable[[Tensor], Output] = torch.compile(network)

    def run(images: Tensor) -> Output:
        try:
            return compiled(images)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"torch.compile failed: {reason}; without it: --set compiled=false") from error

    return run


def _groups(
    parameters: Mapping[str, nn.Parameter], heads: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Weight decay for every parameter but the gates'."""
    free = [p for name, p in parameters.items() if name.rpartition(".")[0] in heads]
    decayed = [p for name, p in parameters.items() if name.rpartition(".")[0] not in heads]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
