"""Dense training and ManiDP training: one loop, one record an epoch, resumable to the last bit.

The data set is one tensor, augmentation is a few indexed reads for the whole batch, and every random number comes from
(seed, epoch): a run killed at any moment starts its epoch again from ``state.safetensors`` and ends the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from manidp.data.images import ImageSet, Preprocessing
from manidp.errors import TrainingError
from manidp.files import replacing, sweep
from manidp.graph import Graph
from manidp.graph.macs import macs_per_image
from manidp.progress import Progress
from manidp.torch.losses import complexity_weights, distillation_loss, similarity_loss, sparsity_loss
from manidp.torch.network import Network, Output
from manidp.torch.state import EpochRecord, State, not_finite, read_state, read_tensors, write_state
from manidp.training.recipe import Recipe
from manidp.training.schedule import (
    continuous_thresholds,
    keep_rate,
    learning_rate,
    rate_for_budget,
    thresholds_for_rate,
)
from manidp.training.settings import brief

SAMPLE = 10_000  # images whose saliencies set the thresholds: the last ones of an epoch, so that they are not stale
FOLLOW = 20  # steps after which the thresholds follow the saliencies, where a budget is to be met
STATE = "state.safetensors"
PADDING = 4  # pixels around an image for the random crop


@dataclass(frozen=True)
class Evaluation:
    """Counts over a whole image set: ``correct`` of ``total``, and ``macs`` (N,) of every image."""

    correct: int
    total: int
    macs: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Top-1, 0..1."""
        return self.correct / self.total


class Training:
    """One training run in a folder; iterate over ``epochs()``, then ``finish()`` gives the network's weights.

    network: as made from the graph and perhaps loaded with weights. folder: holds ``state.safetensors`` (to resume
    from) and ``log.jsonl`` (a record a line); one process at a time has it, until ``close()`` or the end of a ``with``.
    teachers: run without gradient on the same crops; the network follows the mean of their logits. origin: JSON data
    that tells where network and teachers come from, e.g. their files' digests; a run goes on only from the same graph,
    recipe, data, classes, preprocessing and origin. progress: called with steps done and steps in all.
    Raises TrainingError if the folder holds another run's state and ``resume`` is set, or any and it is not, if another
    process has it, or if it cannot be used.
    """

    def __init__(
        self,
        network: Network,
        data: ImageSet,
        preprocessing: Preprocessing,
        recipe: Recipe,
        folder: Path,
        *,
        teachers: Sequence[Network] = (),
        origin: Mapping[str, Any] | None = None,
        device: str = "cpu",
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        recipe = recipe.resolved(network.graph)
        _check_data(network.graph, data, preprocessing)
        if (recipe.distillation > 0) != bool(teachers):
            raise TrainingError("distillation needs a teacher checkpoint and a weight above 0; only one was given")
        self.folder, self.device, self.progress = folder, device, progress
        self.lock = hold(folder)
        try:
            state = self._earlier(resume)
            if recipe.precision == "auto":  # decided once: another processor goes on in the precision of the first
                recorded = state.run.get("recipe") if state else None
                chosen = recorded.get("precision") if isinstance(recorded, dict) else None
                precision = chosen if chosen in ("bfloat16", "float32") else native_precision(device)
                recipe = replace(recipe, precision=precision)
            self.recipe = recipe
            self.keep_rate = None if recipe.keep_rate is None else float(recipe.keep_rate)
            self.budget = None if recipe.macs_budget is None else float(recipe.macs_budget)
            self.network = _placed(network, device)
            self.forward = _callable(network, recipe)
            self.teachers = [_callable(_placed(teacher, device).eval(), recipe) for teacher in teachers]
            self.images = _Batches(data, preprocessing, recipe, device)
            self.optimizer = torch.optim.SGD(
                _groups(network, recipe), lr=0.0, momentum=recipe.momentum, nesterov=recipe.momentum > 0, foreach=True
            )
            self.average = {name: value.clone() for name, value in network.state_dict().items()} if recipe.ema else {}
            self.records: list[EpochRecord] = []
            self.rate: float | None = None  # the keep rate that the budget asks for, found after each epoch
            self.mean_cross_entropy = 0.0  # unknown before the first epoch: no image pays then
            self.run = {
                "graph": network.graph.to_json(),
                "recipe": asdict(recipe),
                "data": {"images": len(data), "classes": list(data.classes), "sha256": digest_of(data)},
                "preprocessing": asdict(preprocessing),
                "origin": dict(origin or {}),
            }
            if state is None:
                self._save()
            else:
                self._go_on(state)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self.lock.release()

    @property
    def state_path(self) -> Path:
        """Everything needed to go on, rewritten after every epoch."""
        return self.folder / STATE

    @property
    def log_path(self) -> Path:
        """The run and its records as text, a JSON object a line."""
        return self.folder / "log.jsonl"

    def epochs(self) -> Iterator[EpochRecord]:
        """Train the epochs that remain; yields each one's record after its state is safe on disk.

        Raises TrainingError where the loss or a weight is not finite or the state cannot be written; the state of the
        last good epoch then stays.
        """
        while len(self.records) < self.recipe.epochs:
            record, saliencies = self._epoch(len(self.records))
            if saliencies:
                record = replace(record, macs=self._retarget(record.epoch, saliencies))
            self.records.append(record)
            self._save()
            yield record

    def finish(self) -> dict[str, NDArray[np.float32]]:
        """The weights to keep: the average if there is one, thresholds set to the target, batch statistics anew.

        Thresholds are set on training images without augmentation, statistics estimated on augmented ones. The network
        is left in evaluation mode with these weights.
        """
        if self.average:
            self.network.load_state_dict(self.average)
        for _ in range(4 if self.network.graph.gates else 1 if self.average else 0):
            if self.budget is not None:
                saliencies = self._saliencies()
                rate = rate_for_budget(self.network.graph, saliencies, self.budget)
                means = {name: value.mean(0) for name, value in saliencies.items()}
                self._set_thresholds(continuous_thresholds(means, rate))
            self._estimate_statistics()
        self.network.eval()
        return self.network.weights()

    def missed(self) -> str | None:
        """After ``finish()``: a line if the budget is missed by more than 1 % on training images, else None."""
        if self.budget is None:
            return None
        macs = self._mean_macs(self._saliencies())
        if abs(macs / self.budget - 1) <= 0.01:
            return None
        return (
            f"the budget of {self.budget / 1e6:.4g}M multiply-adds is missed by {macs / self.budget - 1:+.1%}: "
            f"training images take {macs / 1e6:.4g}M on average; train longer, or give another budget"
        )

    def _epoch(self, epoch: int) -> tuple[EpochRecord, dict[str, NDArray[np.float32]]]:
        recipe, started = self.recipe, time.perf_counter()
        steps = len(self.images)
        self.network.train()
        seen: list[Tensor] = []
        sample: list[dict[str, Tensor]] = []
        recent: list[dict[str, Tensor]] = []
        rate = 0.0
        for step, (images, labels) in enumerate(self.images.epoch(epoch)):
            done = epoch * steps + step
            warmup = round(recipe.warmup_epochs * steps)
            rate = learning_rate(done, recipe.epochs * steps, peak=recipe.learning_rate, warmup=warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with self._autocast():
                output = self.forward(images)
            loss, parts = self._loss(output, images, labels)
            seen.append(torch.cat([torch.stack([loss.detach(), *parts]), labels.new_tensor([len(labels)])]))
            if (step % 50 == 49 or step == steps - 1) and not torch.stack(seen[-50:]).isfinite().all():
                bad = next(i for i, values in enumerate(seen) if not values.isfinite().all())
                raise TrainingError(
                    f"the loss is not finite at epoch {epoch}, step {bad} (learning rate {rate:.3g}); "
                    f"{self._last_good()}: lower the learning rate and start again"
                )
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self._update_average(done)
            if self.progress is not None:
                self.progress(done + 1, recipe.epochs * steps)
            recent.append({name: record.saliency.detach() for name, record in output.records.items()})
            if (steps - step) * recipe.batch_size <= SAMPLE + recipe.batch_size:
                sample.append(recent[-1])
            if len(recent) == FOLLOW:
                self._follow(recent)
                recent = []
        table = torch.stack(seen)
        weight = table[:, -1:] / table[:, -1].sum()
        loss_mean, ce, correct, sparsity, similarity = (table[:, :-1] * weight).sum(0).tolist()
        self.mean_cross_entropy = ce
        record = EpochRecord(
            epoch=epoch, learning_rate=rate, loss=loss_mean, cross_entropy=ce, accuracy=correct, sparsity=sparsity,
            similarity=similarity, seconds=round(time.perf_counter() - started, 2),
        )  # fmt: skip
        return record, _joined(sample)

    def _loss(self, output: Output, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The total, and [mean cross entropy, accuracy, sparsity, similarity] to record."""
        recipe, logits = self.recipe, output.logits.float()
        each = F.cross_entropy(logits, labels, reduction="none")
        task = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if self.teachers:
            with torch.no_grad(), self._autocast():
                taught = torch.stack([teacher(images).logits.float() for teacher in self.teachers]).mean(0)
            follow = distillation_loss(logits, taught, recipe.temperature)
            task = (1 - recipe.distillation) * task + recipe.distillation * follow
        sparsity = similarity = torch.zeros((), device=logits.device)
        if output.records:
            records = output.records.values()
            saliencies = [record.saliency for record in records]
            weights = complexity_weights(each, 0.5 * self.mean_cross_entropy)
            sparsity = sparsity_loss(saliencies, weights)
            similarity = similarity_loss(saliencies, [record.feature for record in records])
        total = task + recipe.lambda_sparsity * sparsity + recipe.lambda_similarity * similarity
        correct = (logits.argmax(1) == labels).float().mean()
        return total, [each.mean().detach(), correct, sparsity.detach(), similarity.detach()]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _update_average(self, step: int) -> None:
        if not self.average:
            return
        decay = min(self.recipe.ema, (1 + step) / (10 + step))
        state = self.network.state_dict()
        torch._foreach_lerp_(list(self.average.values()), list(state.values()), 1 - decay)

    def _retarget(self, epoch: int, saliencies: dict[str, NDArray[np.float32]]) -> float:
        """Set next epoch's thresholds; returns the mean MACs under this epoch's."""
        graph, recipe = self.network.graph, self.recipe
        macs = self._mean_macs(saliencies)
        if epoch > 0:  # in the first epoch the gates are still nearly constant and say nothing
            reach = max(1, round(recipe.reach * recipe.epochs))
            if self.keep_rate is not None:
                rate = keep_rate(epoch, reach, self.keep_rate)
                self._set_thresholds(thresholds_for_rate(saliencies, rate))
            elif self.budget is not None:
                everything = {name: np.ones_like(value[:1], dtype=bool) for name, value in saliencies.items()}
                full = float(macs_per_image(graph, everything)[0])
                budget = full * keep_rate(epoch, reach, min(1.0, self.budget / full))
                self.rate = rate_for_budget(graph, saliencies, budget)
                self._set_thresholds(continuous_thresholds({n: v.mean(0) for n, v in saliencies.items()}, self.rate))
        return macs

    def _mean_macs(self, saliencies: Mapping[str, NDArray[np.float32]]) -> float:
        """Mean multiply-adds of images with these saliencies, under the thresholds as they are."""
        state = self.network.state_dict()
        kept = {name: value > state[f"{name}.threshold"].item() for name, value in saliencies.items()}
        return float(macs_per_image(self.network.graph, kept).mean())

    def _follow(self, recent: list[dict[str, Tensor]]) -> None:
        """Set the thresholds for the rate in force anew, on the saliencies of the last steps.

        Departs: the reference sets thresholds once an epoch. Saliencies drift meanwhile, and while gates are nearly
        constant a small drift closes twice the channels that the budget asks for.
        """
        if self.rate is not None:
            means = {name: value.mean(0) for name, value in _joined(recent).items()}
            self._set_thresholds(continuous_thresholds(means, self.rate))

    def _set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        state = self.network.state_dict()
        for name, value in thresholds.items():
            state[f"{name}.threshold"].fill_(value)

    @torch.no_grad()
    def _saliencies(self) -> dict[str, NDArray[np.float32]]:
        self.network.eval()
        sample = [
            {name: record.saliency for name, record in self.network(images).records.items()}
            for images, _ in self.images.plain(SAMPLE)
        ]
        return _joined(sample)

    @torch.no_grad()
    def _estimate_statistics(self) -> None:
        """Moving mean and variance = the plain average over batches of training images, augmented as in training.

        On images without augmentation they would be others: black borders of the crops raise the variance of the
        stem by half, and a network that never saw its maps scaled otherwise loses three points.
        """
        self.network.train()
        for index, (images, _) in enumerate(self.images.epoch(self.recipe.epochs)):
            if index * len(images) >= 2 * SAMPLE:
                break
            self.network.momentum = 1 / (index + 1)
            self.network(images)
        self.network.momentum = 0.1

    def _earlier(self, resume: bool) -> State | None:
        """The state that lies in the folder; what killed saves left there is removed."""
        for path in (self.state_path, self.log_path, self.folder / "model.safetensors"):
            sweep(path)
        return read_state(self.state_path) if _holds_run(self.folder, resume) else None

    def _go_on(self, state: State) -> None:
        if found := _differences(state.run, json.loads(json.dumps(self.run))):
            raise TrainingError(f"{self.state_path} is of another run: {'; '.join(found)}")
        if len(state.records) > self.recipe.epochs:
            raise TrainingError(
                f"{self.state_path}: damaged: it has {len(state.records)} epochs of {self.recipe.epochs}"
            )
        self.records = list(state.records)
        self.rate = state.rate
        self.mean_cross_entropy = self.records[-1].cross_entropy if self.records else 0.0
        tensors = read_tensors(self.state_path, self._tensors())
        self.network.load_state_dict(_below(tensors, "network/"))
        for name, value in _below(tensors, "average/").items():
            self.average[name].copy_(value)
        momenta = _below(tensors, "momentum/")
        for name, parameter in self.network.named_parameters():
            if name in momenta:
                buffer = torch.empty_like(parameter).copy_(momenta[name])  # laid out like the parameter
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self._write_log()

    def _tensors(self) -> dict[str, Tensor]:
        """All that a state holds, by its names in the file."""
        tensors = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        if self.recipe.momentum > 0 and self.records:
            for name, parameter in self.network.named_parameters():
                buffer = self.optimizer.state[parameter].get("momentum_buffer")
                tensors[f"momentum/{name}"] = torch.zeros_like(parameter) if buffer is None else buffer
        return tensors

    def _save(self) -> None:
        tensors = self._tensors()
        if bad := not_finite(tensors):
            raise TrainingError(
                f"'{bad}' is not finite after epoch {len(self.records) - 1}; {self._last_good()}: lower the learning "
                f"rate and start again"
            )
        with self._writing(self.state_path):
            write_state(self.state_path, State(self.run, self.rate, tuple(self.records)), tensors)
        self._write_log()

    def _write_log(self) -> None:
        lines = [json.dumps({"run": self.run})] + [json.dumps(asdict(record)) for record in self.records]
        with self._writing(self.log_path), replacing(self.log_path) as file:
            file.write(("\n".join(lines) + "\n").encode())

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error.strerror or error}; {self._last_good()}") from error

    def _last_good(self) -> str:
        return f"{self.state_path} holds the last good epoch" if self.state_path.exists() else "nothing was trained yet"


def hold(folder: Path) -> FileLock:
    """Have the folder of a run, made if need be, for this process alone; the system frees it when the process ends.

    Raises TrainingError if another has it or if it cannot be one.
    """
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise TrainingError(
            f"{folder}: another process trains there now; wait for its end or choose another folder"
        ) from None
    except FileExistsError as error:
        raise _no_folder(folder) from error
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return lock


def check_folder(folder: Path, resume: bool) -> None:
    """What Training would refuse this folder for, as far as it can be told before data are read; nothing is written."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise _no_folder(folder)
    if _holds_run(folder, resume):
        hold(folder).release()


def _holds_run(folder: Path, resume: bool) -> bool:
    there = os.path.lexists(folder / STATE)
    if there and not resume:
        raise TrainingError(f"{folder} holds a run already; go on with --resume or choose another folder")
    return there


def _no_folder(folder: Path) -> TrainingError:
    came = "a file" if folder.exists() else "a symbolic link that leads nowhere"
    return TrainingError(f"{folder}: expected a folder for the run, or none yet; got {came}")


def native_precision(device: str) -> Literal["bfloat16", "float32"]:
    """bfloat16 where the device computes it; where it does not, bfloat16 takes twice the time of float32."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is Arm's
    return "bfloat16" if native else "float32"


def digest_of(data: ImageSet) -> str:
    """sha256 of pixels and labels, in lower-case hex."""
    digest = hashlib.sha256(np.ascontiguousarray(data.images).data)
    digest.update(data.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _check_data(graph: Graph, data: ImageSet, preprocessing: Preprocessing) -> None:
    if len(data) < 2:
        raise TrainingError(f"training needs at least two images; got {len(data)}")
    if len(data.classes) != graph.num_classes:
        raise TrainingError(f"the network tells {graph.num_classes} classes; the data has {len(data.classes)}")
    if not graph.input.dims[1:] == preprocessing.size == data.images.shape[1:3]:
        raise TrainingError(
            f"the network reads images of {graph.input.dims[1:]} pixels (height, width) and its preprocessing makes "
            f"{preprocessing.size}; the data's have {data.images.shape[1:3]}"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What tells two runs apart, a few words for each thing: "recipe epochs 4 there, 5 here"."""
    found = []
    for key, mine in here.items():
        other = there.get(key)
        if key == "graph" or not isinstance(other, dict):
            found += [] if other == mine else [f"another {key}"]
            continue
        for name in mine | other:
            if (values := [one.get(name) for one in (other, mine)])[0] != values[1]:
                found.append(f"{key} {name} {brief(values[0])} there, {brief(values[1])} here")
    return found if len(found) <= 6 else [*found[:6], f"{len(found) - 6} more"]


class _Batches:
    """The whole data set on the device, and how to draw batches from it."""

    def __init__(self, data: ImageSet, preprocessing: Preprocessing, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self.data = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.mean = torch.tensor(preprocessing.mean, device=device)
        self.std = torch.tensor(preprocessing.std, device=device)
        self.padded = self.data
        if recipe.augment:
            border = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
            self.padded = torch.from_numpy(np.pad(data.images, border, recipe.padding_mode)).to(device)

    def __len__(self) -> int:
        return max(1, len(self.data) // self.recipe.batch_size)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
        return ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, randomly flipped and cropped; a last batch that is not full is left out."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        size = min(self.recipe.batch_size, len(self.data))
        order = torch.randperm(len(self.data), generator=generator)
        height, width = self.data.shape[1:3]
        for start in range(0, len(self) * size, size):
            chosen = order[start : start + size].to(self.device)
            if not self.recipe.augment:
                yield self._normalise(self.data[chosen]), self.labels[chosen]
                continue
            corner = torch.randint(0, 2 * PADDING + 1, (2, size, 1), generator=generator).to(self.device)
            flip = torch.randint(0, 2, (size, 1), generator=generator).to(self.device)
            rows = corner[0] + torch.arange(height, device=self.device)
            across = torch.arange(width, device=self.device).expand(size, width)
            columns = corner[1] + torch.where(flip == 1, width - 1 - across, across)
            pixels = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self._normalise(pixels), self.labels[chosen]

    def plain(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` images of a fixed shuffle, unchanged, in batches of 500."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.recipe.seed))[:count]
        for chosen in torch.split(order.to(self.device), 500):
            yield self._normalise(self.data[chosen]), self.labels[chosen]


def _placed(network: Network, device: str) -> Network:
    """On the device, weights channels last: the fast layout on CPUs and on tensor cores."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


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


def _groups(network: Network, recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay for every parameter but the gates'."""
    heads = network.graph.heads
    free = [p for name, p in network.named_parameters() if name.rpartition(".")[0] in heads]
    decayed = [p for name, p in network.named_parameters() if name.rpartition(".")[0] not in heads]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _joined(sample: list[dict[str, Tensor]]) -> dict[str, NDArray[np.float32]]:
    names = sample[0] if sample else {}
    return {name: torch.cat([record[name] for record in sample]).float().cpu().numpy() for name in names}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def evaluate(network: Network, data: ImageSet, preprocessing: Preprocessing, *, batch_size: int = 500) -> Evaluation:
    """Run every image of the set once, in float32, gates as they are; nothing is left out."""
    network.eval()
    device = next(network.parameters()).device
    correct, macs = 0, []
    for start in range(0, len(data), batch_size):
        pixels = data.images[start : start + batch_size]
        images = torch.from_numpy(preprocessing.apply(pixels)).to(device)
        output = network(images.contiguous(memory_format=torch.channels_last))
        labels = torch.from_numpy(data.labels[start : start + batch_size]).to(device)
        correct += int((output.logits.argmax(1) == labels).sum())
        kept = {name: (record.gate > 0).cpu().numpy() for name, record in output.records.items()}
        macs.append(np.broadcast_to(macs_per_image(network.graph, kept), (len(pixels),)))
    return Evaluation(correct, len(data), np.concatenate(macs))
