"""Dense training and ManiDP training: one loop, one record an epoch, resumable to the last bit, in any framework.

Every random number comes from (seed, epoch): a run killed at any moment starts its epoch again from
``state.safetensors`` and ends the same.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.labelled import Labelled
from manidp.errors import TrainingError
from manidp.files import replacing, sweep
from manidp.formats.checkpoint import Checkpoint
from manidp.progress import Progress
from manidp.training.backend import Array, Backend, Learner, Weights, below
from manidp.training.folder import LOG, MODEL, STATE, hold, holds_run
from manidp.training.recipe import Recipe
from manidp.training.schedule import learning_rate
from manidp.training.settings import brief
from manidp.training.state import EpochRecord, State, not_finite, read_state, read_tensors, write_state
from manidp.training.target import Target, mean_macs

SAMPLE = 10_000  # images whose saliencies set the thresholds: the last ones of an epoch, so that they are not stale
FOLLOW = 20  # steps after which the thresholds follow the saliencies, where a budget is to be met
CHECK = 50  # steps after which the losses are looked at


class Training:
    """One training run in a folder; iterate over ``epochs()``, then ``finish()`` gives the network's weights.

    start: the model to begin with: graph, weights, preprocessing, and the data's classes in their order. folder: holds
    ``state.safetensors`` (to resume from) and ``log.jsonl`` (a record a line); one process at a time has it, until
    ``close()`` or the end of a ``with``. teachers: run without gradient on the same batches; the network follows the
    mean of their logits. origin: JSON data that tells where start and teachers come from, e.g. their files' digests; a
    run goes on only from the same backend, graph, recipe, data, classes, preprocessing and origin. progress: called
    with steps done and steps in all.
    Raises TrainingError if recipe, data or teachers do not fit, if the folder holds another run's state and ``resume``
    is set, or any and it is not, if another process has it, or if it cannot be used.
    """

    def __init__(
        self,
        backend: Backend,
        start: Checkpoint,
        data: Labelled,
        recipe: Recipe,
        folder: Path,
        *,
        teachers: Sequence[Checkpoint] = (),
        origin: Mapping[str, Any] | None = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        recipe = recipe.resolved(start.graph)
        check_data(start, data)
        if (recipe.distillation > 0) != bool(teachers):
            raise TrainingError("distillation needs a teacher checkpoint and a weight above 0; only one was given")
        for number, teacher in enumerate(teachers, 1):
            _check_teacher(number, teacher, start)
        self.backend, self.start, self.data, self.folder, self.progress = backend, start, data, folder, progress
        self.graph = start.graph
        self.lock = hold(folder)
        try:
            state = self._earlier(resume)
            if recipe.precision == "auto":  # decided once: another processor goes on in the precision of the first
                recorded = state.run.get("recipe") if state else None
                chosen = recorded.get("precision") if isinstance(recorded, dict) else None
                recipe = replace(recipe, precision=chosen if chosen in ("bfloat16", "float32") else backend.precision)
            self.recipe = recipe
            self.target = Target(self.graph, recipe)
            self.learner: Learner = backend.learner(start, data, recipe, teachers)
            self.records: list[EpochRecord] = []
            self.mean_cross_entropy = 0.0  # unknown before the first epoch: no image pays then
            self.data_sha256 = data.sha256()
            self.run = {
                "backend": backend.name,
                "graph": self.graph.to_json(),
                "recipe": asdict(recipe),
                "data": {"images": len(data), "classes": list(data.classes), "sha256": self.data_sha256},
                "preprocessing": asdict(start.preprocessing),
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
        return self.folder / LOG

    def epochs(self) -> Iterator[EpochRecord]:
        """Train the epochs that remain; yields each one's record after its state is safe on disk.

        Raises TrainingError where the loss or a weight is not finite or the state cannot be written; the state of the
        last good epoch then stays.
        """
        while len(self.records) < self.recipe.epochs:
            record, saliencies = self._epoch(len(self.records))
            if saliencies:
                macs = mean_macs(self.graph, saliencies, self.learner.thresholds())
                record = replace(record, macs=macs)
                self.learner.set_thresholds(self.target.after_epoch(record.epoch, saliencies))
            self.records.append(record)
            self._save()
            yield record

    def finish(self) -> Weights:
        """The weights to keep: the average if there is one, thresholds set to the target, batch statistics anew.

        Thresholds are set on training images without augmentation, statistics estimated on augmented ones. The learner
        is left with these weights.
        """
        averaged = self.recipe.ema > 0
        if averaged:
            self.learner.take_average()
        for _ in range(4 if self.graph.gates else 1 if averaged else 0):
            if self.target.budget is not None:
                self.learner.set_thresholds(self.target.at_last(self._saliencies()))
            self._estimate_statistics()
        return below(self.learner.state(), "network/")

    def missed(self) -> str | None:
        """After ``finish()``: a line if the budget is missed by more than 1 % on training images, else None."""
        if self.target.budget is None:
            return None
        return self.target.missed(mean_macs(self.graph, self._saliencies(), self.learner.thresholds()))

    def _epoch(self, epoch: int) -> tuple[EpochRecord, dict[str, NDArray[np.float32]]]:
        recipe, learner, started = self.recipe, self.learner, time.perf_counter()
        steps = learner.steps
        losses: list[Array] = []
        sample: list[Mapping[str, Array]] = []
        recent: list[Mapping[str, Array]] = []
        rate = 0.0
        for step, batch in enumerate(learner.batches(epoch)):
            done = epoch * steps + step
            warmup = round(recipe.warmup_epochs * steps)
            rate = learning_rate(done, recipe.epochs * steps, peak=recipe.learning_rate, warmup=warmup)
            seen = learner.step(batch, learning_rate=rate, limit=0.5 * self.mean_cross_entropy)
            losses.append(seen.losses)
            if step % CHECK == CHECK - 1 or step == steps - 1:
                self._check_losses(epoch, losses, rate)
            if recipe.ema:
                learner.average(1 - min(recipe.ema, (1 + done) / (10 + done)))
            if self.progress is not None:
                self.progress(done + 1, recipe.epochs * steps)
            recent.append(seen.saliencies)
            if (steps - step) * recipe.batch_size <= SAMPLE + recipe.batch_size:
                sample.append(seen.saliencies)
            if len(recent) == FOLLOW:
                if self.target.rate is not None:
                    learner.set_thresholds(self.target.follow(self._joined(recent)))
                recent = []
        loss, cross_entropy, accuracy, sparsity, similarity = learner.mean(losses).tolist()
        self.mean_cross_entropy = cross_entropy
        record = EpochRecord(
            epoch=epoch, learning_rate=rate, loss=loss, cross_entropy=cross_entropy, accuracy=accuracy,
            sparsity=sparsity, similarity=similarity, seconds=round(time.perf_counter() - started, 2),
        )  # fmt: skip
        return record, self._joined(sample)

    def _check_losses(self, epoch: int, losses: list[Array], rate: float) -> None:
        """Raises TrainingError if one of the last steps' losses is not finite."""
        first = max(0, len(losses) - CHECK)
        finite = np.isfinite(self.learner.read(losses[first:])).reshape(len(losses) - first, -1).all(1)
        if not finite.all():
            raise TrainingError(
                f"the loss is not finite at epoch {epoch}, step {first + int(finite.argmin())} (learning rate "
                f"{rate:.3g}); {self._last_good()}: lower the learning rate and start again"
            )

    def _joined(self, parts: Sequence[Mapping[str, Array]]) -> dict[str, NDArray[np.float32]]:
        names = parts[0] if parts else {}
        return {name: self.learner.read([part[name] for part in parts]) for name in names}

    def _saliencies(self) -> dict[str, NDArray[np.float32]]:
        return self._joined([self.learner.saliencies(batch) for batch in self.learner.plain(SAMPLE)])

    def _estimate_statistics(self) -> None:
        """Moving mean and variance = the plain average over batches of training images, augmented as in training.

        On images without augmentation they would be others: black borders of the crops raise the variance of the
        stem by half, and a network that never saw its maps scaled otherwise loses three points.
        """
        size = min(self.recipe.batch_size, len(self.data))
        for index, batch in enumerate(self.learner.batches(self.recipe.epochs)):
            if index * size >= 2 * SAMPLE:
                break
            self.learner.observe(batch, 1 / (index + 1))

    def _earlier(self, resume: bool) -> State | None:
        """The state that lies in the folder; what killed saves left there is removed."""
        for name in (STATE, LOG, MODEL):
            sweep(self.folder / name)
        return read_state(self.state_path) if holds_run(self.folder, resume) else None

    def _go_on(self, state: State) -> None:
        there = {"backend": "torch"} | state.run  # the only one of old, when runs did not name it
        if found := _differences(there, json.loads(json.dumps(self.run))):
            raise TrainingError(f"{self.state_path} is of another run: {'; '.join(found)}")
        if len(state.records) > self.recipe.epochs:
            raise TrainingError(
                f"{self.state_path}: damaged: it has {len(state.records)} epochs of {self.recipe.epochs}"
            )
        self.records = list(state.records)
        self.target.rate = state.rate
        self.mean_cross_entropy = self.records[-1].cross_entropy if self.records else 0.0
        self.learner.load(read_tensors(self.state_path, self._tensors()))
        self._write_log()

    def _tensors(self) -> Weights:
        """All that a state holds, by its names in the file: momentum from the first epoch on."""
        return {
            name: value
            for name, value in self.learner.state().items()
            if self.records or not name.startswith("momentum/")
        }

    def _save(self) -> None:
        tensors = self._tensors()
        if bad := not_finite(tensors):
            raise TrainingError(
                f"'{bad}' is not finite after epoch {len(self.records) - 1}; {self._last_good()}: lower the learning "
                f"rate and start again"
            )
        with self._writing(self.state_path):
            write_state(self.state_path, State(self.run, self.target.rate, tuple(self.records)), tensors)
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


def check_data(start: Checkpoint, data: Labelled) -> None:
    """Raises TrainingError unless there are two images or more, of the model's size and classes."""
    if len(data) < 2:
        raise TrainingError(f"training needs at least two images; got {len(data)}")
    if data.classes != start.classes:
        raise TrainingError(
            f"the network tells the classes {brief(list(start.classes))}, in this order; the data has "
            f"{brief(list(data.classes))}"
        )
    if start.preprocessing.size != data.size:
        raise TrainingError(
            f"the network reads images of {start.preprocessing.size} pixels (height, width); the data's have "
            f"{data.size}"
        )


def _check_teacher(number: int, teacher: Checkpoint, start: Checkpoint) -> None:
    """A teacher sees the images that the network sees, and speaks of the same classes."""
    if teacher.classes != start.classes:
        raise TrainingError(
            f"teacher {number} must know the data's classes, in this order: {brief(list(start.classes))}; "
            f"it knows {brief(list(teacher.classes))}"
        )
    one, two = teacher.preprocessing, start.preprocessing
    if one.size != two.size or not np.allclose((one.mean, one.std), (two.mean, two.std), atol=0.01):
        raise TrainingError(f"teacher {number} must read images as the network does, by {two}; it reads them by {one}")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What tells two runs apart, a few words for each thing: "recipe epochs 4 there, 5 here"."""
    found = []
    for key, mine in here.items():
        other = there.get(key)
        if key == "backend" and other != mine:
            found.append(f"backend {brief(other)} there, {brief(mine)} here")
        elif key == "graph" or not isinstance(other, dict):
            found += [] if other == mine else [f"another {key}"]
        else:
            for name in mine | other:
                if (values := [one.get(name) for one in (other, mine)])[0] != values[1]:
                    found.append(f"{key} {name} {brief(values[0])} there, {brief(values[1])} here")
    return found if len(found) <= 6 else [*found[:6], f"{len(found) - 6} more"]
