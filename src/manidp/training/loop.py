"""Dense training and ManiDP training: one loop, one record an epoch, resumable to the last bit, in any framework.

Every random number comes from (seed, epoch): a run killed at any moment starts its epoch again from
``state.safetensors`` and ends the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
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
from manidp.formats.checkpoint import DEFAULT, Checkpoint, OperatingPoint
from manidp.progress import Progress
from manidp.training.backend import Array, Backend, Learner, Weights, below, estimate_statistics
from manidp.training.folder import LOG, MODEL, STATE, hold, holds_run
from manidp.training.importance import Channels, score_biases, scores_in_order, undecided, worth
from manidp.training.recipe import Recipe, point_name
from manidp.training.reopen import begun_anew, reopenable
from manidp.training.schedule import kept_by, learning_rate
from manidp.training.settings import brief
from manidp.training.state import EpochRecord, State, not_finite, read_state, read_tensors, write_state
from manidp.training.target import Saliencies, Target, mean_macs

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
        before = start.graph
        if recipe.points:
            start = reopenable(start)
        check_data(start, data)
        if (recipe.distillation > 0) != bool(teachers):
            raise TrainingError("distillation needs a teacher checkpoint and a weight above 0; only one was given")
        for number, teacher in enumerate(teachers, 1):
            _check_teacher(number, teacher, start)
        self.backend, self.start, self.data, self.folder, self.progress = backend, start, data, folder, progress
        self.graph = start.graph
        self.lock = hold(folder) if backend.rank == 0 else None
        try:
            state = self._earlier(resume)
            if recipe.precision == "auto":  # decided once: another processor goes on in the precision of the first
                recorded = state.run.get("recipe") if state else None
                chosen = recorded.get("precision") if isinstance(recorded, dict) else None
                recipe = replace(recipe, precision=chosen if chosen in ("bfloat16", "float32") else backend.precision)
            self.recipe = recipe
            self.points = {point_name(self.graph, float(budget)): float(budget) for budget in recipe.points}
            self.targets = {DEFAULT: Target(self.graph, recipe)} | {
                name: Target(self.graph, replace(recipe, macs_budget=budget)) for name, budget in self.points.items()
            }
            self.sample = SAMPLE // len(self.targets)  # images on which a point's thresholds are set
            self.learner: Learner = backend.learner(start, data, recipe, teachers)
            self.reached: dict[str, float] = {}  # a point's mean multiply-adds on training images, after ``finish()``
            self.records: list[EpochRecord] = []
            self.mean_cross_entropy = 0.0  # unknown before the first epoch: no image pays then
            self.data_sha256 = data.sha256()
            self.run = {
                "backend": backend.name,
                "processes": backend.processes,
                "graph": self.graph.to_json(),
                "recipe": asdict(recipe),
                "data": {"images": len(data), "classes": list(data.classes), "sha256": self.data_sha256},
                "preprocessing": asdict(start.preprocessing),
                "origin": dict(origin or {}),
            }
            self._agree("begin", [self.run, state and state.run, state and len(state.records)])
            if state is None:
                if recipe.points:
                    self._open_points(anew=self.graph != before)
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
        if self.lock is not None:
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
            record, saliencies, importance = self._epoch(len(self.records))
            for point, seen in saliencies.items():
                if not seen:
                    continue
                self.learner.use(point)
                thresholds = self.learner.thresholds()
                macs = mean_macs(self.graph, seen, thresholds)
                if point == DEFAULT:
                    record = replace(record, macs=macs)
                if point in record.points:
                    told = {**record.points[point], "macs": macs}
                    record = replace(record, points={**record.points, point: told})
                value = None
                if importance:
                    kept = {gate: opened.mean(0) for gate, opened in kept_by(seen, thresholds).items()}
                    value = worth(self.graph, importance, kept)
                    if record.epoch == 0 and undecided(self.graph, self.start.weights):
                        seen = self._order_scores(seen, value)
                self.learner.set_thresholds(self.targets[point].after_epoch(record.epoch, seen, value))
            self.learner.use(DEFAULT)
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
        for point, target in self.targets.items():
            self.learner.use(point)
            for round_ in range(4 if self.graph.gates else 1 if averaged else 0):
                if target.budget is not None:
                    seen = self._saliencies(self.sample)
                    if round_ and target.met(mean_macs(self.graph, seen, self.learner.thresholds())):
                        break
                    self.learner.set_thresholds(target.at_last(seen))
                self._estimate(2 * self.sample)
            if target.budget is not None:
                seen = self._saliencies(self.sample)
                self.reached[point] = mean_macs(self.graph, seen, self.learner.thresholds())
        self.learner.use(DEFAULT)
        return below(self.learner.state(), "network/")

    def finished_points(self) -> tuple[OperatingPoint, ...]:
        """After ``finish()``: the recipe's points by their multiply-adds, which are those of training images."""
        state, found = self.learner.state(), []
        for index, point in enumerate(self.points):
            found.append(OperatingPoint(point, below(state, f"points/{index}/"), self.reached[point]))
        return tuple(sorted(found, key=lambda one: one.macs or 0.0))

    def missed(self) -> str | None:
        """After ``finish()``: a line if a budget is missed by more than 1 % on training images, else None."""
        missed = [line for point, macs in self.reached.items() if (line := self.targets[point].missed(macs))]
        return "; ".join(missed) or None

    def _open_points(self, *, anew: bool) -> None:
        """Begin ``anew`` with channels that the start never opens; with ``reach`` 0 find every point's thresholds.

        Not anew where the start had points to train before: what its own budget closes others may open.
        """
        if anew:
            self._begin_closed_anew()
        if self.recipe.reach == 0:
            self._estimate(self.sample)
            seen, thresholds = self._saliencies(self.sample), self.learner.thresholds()
            for point, target in self.targets.items():
                self.learner.use(point)
                self.learner.set_thresholds(target.at_first(seen, thresholds))
            self.learner.use(DEFAULT)

    def _begin_closed_anew(self) -> None:
        state = self.learner.state()
        weights, averages = below(state, "network/"), below(state, "average/")
        fresh = self.backend.fresh(self.graph, self.recipe.seed)
        weights = begun_anew(self.graph, weights, fresh, self._saliencies(self.sample), self.recipe.seed)
        state |= {f"network/{name}": value for name, value in weights.items()}
        state |= {f"average/{name}": weights[name] for name in averages}
        for index in range(len(self.points)):
            state |= {f"points/{index}/{name}": weights[name] for name in below(state, f"points/{index}/")}
        self.learner.load(state)

    def _order_scores(self, seen: Saliencies, value: Channels) -> dict[str, NDArray[np.float32]]:
        """Move the mean of every channel's scores to where ``scores_in_order`` has it; returns the scores moved."""
        state, moved = self.learner.state(), {}
        for gate, bias in score_biases(self.graph).items():
            by = scores_in_order(value[gate]) - seen[gate].mean(0)
            moved[gate] = seen[gate] + by
            for part in ("network", "average") if self.recipe.ema else ("network",):
                state[f"{part}/{bias}"] += by
        self.learner.load(state)
        return moved

    def _sandwich(self, epoch: int) -> Iterator[tuple[str, ...]]:
        """For each step the points to train: largest, smallest, and one of those between, each as often."""
        chance = np.random.default_rng((self.recipe.seed, epoch))
        ordered = sorted(self.targets, key=lambda point: -(self.targets[point].budget or 0.0))
        ends = tuple(dict.fromkeys((ordered[0], ordered[-1])))
        between: list[tuple[str, ...]] = [(point,) for point in ordered[1:-1]] or [()]
        while True:
            for index in chance.permutation(len(between)):
                yield (*ends, *between[index])

    def _epoch(self, epoch: int) -> tuple[EpochRecord, dict[str, Saliencies], Channels]:
        """Its record, the saliencies of the last images that each point was trained with, and channels' importance."""
        recipe, learner, started = self.recipe, self.learner, time.perf_counter()
        steps = learner.steps
        losses: list[Array] = []
        importance: list[Mapping[str, Array]] = []
        taylor = recipe.shares == "taylor"
        sums = {gate: np.zeros(count) for gate, count in self.graph.gate_channels.items() if taylor}
        of_points: dict[str, list[Array]] = {point: [] for point in self.targets}
        count = min(SAMPLE // recipe.batch_size + 1, steps)
        sample = {point: deque[Mapping[str, Array]](maxlen=count) for point in self.targets}
        recent: dict[str, list[Mapping[str, Array]]] = {point: [] for point in self.targets}
        rate = 0.0
        sandwich = self._sandwich(epoch)
        for step, batch in enumerate(learner.batches(epoch)):
            done = epoch * steps + step
            warmup = round(recipe.warmup_epochs * steps)
            rate = learning_rate(done, recipe.epochs * steps, peak=recipe.learning_rate, warmup=warmup)
            points = next(sandwich)
            seen = learner.step(batch, learning_rate=rate, limit=0.5 * self.mean_cross_entropy, points=points)
            losses.append(seen[0].losses)
            importance.append(seen[0].importance)
            if step % CHECK == CHECK - 1 or step == steps - 1:
                self._check_losses(epoch, losses, rate)
                for gate in sums:
                    sums[gate] += len(importance) * learner.mean([one[gate] for one in importance])
                importance.clear()
            if recipe.ema:
                learner.average(1 - min(recipe.ema, (1 + done) / (10 + done)))
            if self.progress is not None:
                self.progress(done + 1, recipe.epochs * steps)
            for point, one in zip(points, seen, strict=True):
                of_points[point].append(one.losses)
                recent[point].append(one.saliencies)
                sample[point].append(one.saliencies)
            if step % FOLLOW == FOLLOW - 1:
                self._follow(recent)
        loss, cross_entropy, accuracy, sparsity, similarity = learner.mean(losses).tolist()
        self.mean_cross_entropy = cross_entropy
        record = EpochRecord(
            epoch=epoch, learning_rate=rate, loss=loss, cross_entropy=cross_entropy, accuracy=accuracy,
            sparsity=sparsity, similarity=similarity, seconds=round(time.perf_counter() - started, 2),
            points={
                point: dict(zip(("cross_entropy", "accuracy"), learner.mean(parts).tolist()[1:3], strict=True))
                for point, parts in of_points.items() if parts and self.points
            },
        )  # fmt: skip
        return record, {point: self._joined(list(parts)) for point, parts in sample.items()}, sums

    def _follow(self, recent: Mapping[str, list[Mapping[str, Array]]]) -> None:
        """Thresholds follow the saliencies of the last steps, which are then forgotten."""
        for point, parts in recent.items():
            if parts and self.targets[point].rate is not None:
                self.learner.use(point)
                self.learner.set_thresholds(self.targets[point].follow(self._joined(parts)))
            parts.clear()
        self.learner.use(DEFAULT)

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

    def _saliencies(self, count: int) -> dict[str, NDArray[np.float32]]:
        return self._joined([self.learner.saliencies(batch) for batch in self.learner.plain(count)])

    def _estimate(self, count: int) -> None:
        size = min(self.recipe.batch_size, len(self.data))
        estimate_statistics(self.learner, self.recipe.epochs, count, size)

    def _earlier(self, resume: bool) -> State | None:
        """The state that lies in the folder; what killed saves left there is removed."""
        for name in (STATE, LOG, MODEL) if self.backend.rank == 0 else ():
            sweep(self.folder / name)
        return read_state(self.state_path) if holds_run(self.folder, resume) else None

    def _go_on(self, state: State) -> None:
        there = {"backend": "torch", "processes": 1} | state.run  # of old, when runs did not name them
        recipe = there.get("recipe")
        if isinstance(recipe, dict):
            there["recipe"] = {"shares": "even", "clip_norm": 0.0} | recipe
        if found := _differences(there, json.loads(json.dumps(self.run))):
            raise TrainingError(f"{self.state_path} is of another run: {'; '.join(found)}")
        if len(state.records) > self.recipe.epochs:
            raise TrainingError(
                f"{self.state_path}: damaged: it has {len(state.records)} epochs of {self.recipe.epochs}"
            )
        self.records = list(state.records)
        if state.rates.keys() != self.targets.keys():
            raise TrainingError(f"{self.state_path}: damaged: it has rates of {brief(list(state.rates))}")
        if state.shares and state.shares.keys() != self.graph.gate_channels.keys():
            raise TrainingError(f"{self.state_path}: damaged: it has shares of {brief(list(state.shares))}")
        for point, target in self.targets.items():
            target.rate, target.shares = state.rates[point], state.shares
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
        rates = {point: target.rate for point, target in self.targets.items()}
        if self.backend.processes > 1:
            told = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items()}
            self._agree(f"are after {len(self.records)} epochs", [told, rates])
        if self.backend.rank:
            return
        with self._writing(self.state_path):
            shares = self.targets[DEFAULT].shares
            write_state(self.state_path, State(self.run, rates, tuple(self.records), shares), tensors)
        self._write_log()

    def _agree(self, doing: str, content: object) -> None:
        """Raises TrainingError unless all processes hold the same."""
        if not self.backend.agree(json.dumps(content, sort_keys=True).encode()):
            raise TrainingError(
                f"the {self.backend.processes} processes {doing} with different pictures, models, settings or weights; "
                f"all of them need the same files, the folder of the run too, and machines of one kind"
            )

    def _write_log(self) -> None:
        if self.backend.rank:
            return
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
        if key in ("backend", "processes"):
            found += [] if other == mine else [f"{key} {brief(other)} there, {brief(mine)} here"]
        elif key == "graph" or not isinstance(other, dict):
            found += [] if other == mine else [f"another {key}"]
        else:
            for name in mine | other:
                if (values := [one.get(name) for one in (other, mine)])[0] != values[1]:
                    found.append(f"{key} {name} {brief(values[0])} there, {brief(values[1])} here")
    return found if len(found) <= 6 else [*found[:6], f"{len(found) - 6} more"]
