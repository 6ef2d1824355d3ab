"""One training job from start to end: data, network, training, figures, checkpoint. What `manidp train` does."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from manidp.data.images import holds_cifar10, load_cifar10
from manidp.data.labelled import Labelled, load_labelled, parts
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.errors import TrainingError, shown
from manidp.formats.checkpoint import DEFAULT, Checkpoint, Found, OperatingPoint, save_checkpoint
from manidp.graph import Graph
from manidp.graph.macs import ungated_macs
from manidp.hub.find import find_model
from manidp.models import resnet
from manidp.progress import Progress
from manidp.training.backend import Backend
from manidp.training.evaluate import evaluate
from manidp.training.events import events
from manidp.training.folder import MODEL, check_folder
from manidp.training.loop import Training
from manidp.training.provenance import origin_of, provenance
from manidp.training.recipe import Recipe, parse_setting, read_recipe
from manidp.training.start import graph_for, in_order_of, start_of
from manidp.training.state import EpochRecord


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, from what; the fields are the options of `manidp train`.

    start, teachers: names of models, or models themselves. before: also measure what training starts from. defaults:
    settings that hold where neither ``recipe`` nor ``settings`` say otherwise.
    """

    data: Path
    out: Path
    recipe: Path | None = None
    settings: tuple[str, ...] = ()
    start: str | Found | None = None
    network: str = "resnet-20"
    gates: bool = False
    teachers: tuple[str | Found, ...] = ()
    test: Path | None = None
    holdout: int = 0
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    tensorboard: bool = False
    before: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The end of a job: the checkpoint's file, and the figures measured with it (None without a test set).

    ``missed``: a line if the multiply-adds are more than 1 % beside the recipe's budget. ``before``: the same figures
    of what training started from, for a job that asks for them.
    """

    file: Path
    measured: dict[str, Any] | None
    missed: str | None = None
    before: dict[str, Any] | None = None


def run_job(
    job: Job, make: Callable[[str, int | None], Backend], progress: Progress | None = None
) -> Iterator[str | EpochRecord | Finished]:
    """Do the job; yields messages worth reading, one record an epoch, and at last what was made.

    make: device, threads -> the backend that trains, e.g. ``manidp.torch.backend.Torch``.
    Raises ManiDPError of a fitting kind before anything is written if the job cannot be done. What goes wrong later,
    a full disk for example, is one too, and the state of the last good epoch stays. Where several processes train
    together, each does the job, and the first one alone writes and tells of it.
    """
    _check(job)
    backend = make(job.device, job.threads)
    if backend.rank == 0:
        check_folder(job.out, job.resume)
        yield from _events(job, backend, progress)
    else:
        deque(_events(job, backend, None), 0)


def _events(job: Job, backend: Backend, progress: Progress | None) -> Iterator[str | EpochRecord | Finished]:
    settings = _settings(job)
    start = _model(job.start) if job.start is not None else None
    teachers = [_model(teacher) for teacher in job.teachers]
    parent = start.checkpoint if start else None
    preprocessing = parent.preprocessing if parent else CIFAR10_PREPROCESSING
    sets = _Sets(job, preprocessing, start)
    yield from sets.messages
    classes = sets.train.classes
    graph = graph_for(parent.graph if parent else _named(job.network, len(classes)), classes, gates=job.gates)
    recipe = _recipe(settings, parent).resolved(graph)
    with Training(
        backend, start_of(backend, graph, parent, preprocessing, classes, recipe.seed), sets.train, recipe, job.out,
        teachers=[teacher.checkpoint for teacher in teachers],
        origin={"from": start and start.sha256, "teachers": [teacher.sha256 for teacher in teachers]},
        resume=job.resume, progress=progress,
    ) as training:  # fmt: skip
        if recipe.precision == "auto":
            yield f"precision {training.recipe.precision}: {_why(training.recipe.precision, backend)}"
        if backend.processes > 1:
            yield f"{backend.processes} processes train together, each on its share of every batch"
        before = _before(sets, start, backend) if job.before and start and backend.rank == 0 else None
        if before is not None and start is not None:
            right = f"{before['correct']} of {before['total']} right ({before['correct'] / before['total']:.2%})"
            yield f"{start.name} as it is: {right} on {before['data']}"
        with events(job.out) if job.tensorboard and backend.rank == 0 else nullcontext() as write:
            for record in training.epochs():
                if write is not None:
                    write(record)
                yield record
        yield _finished(job, training, sets, start, teachers, before)


def _model(model: str | Found) -> Found:
    return model if isinstance(model, Found) else find_model(model)


def _why(precision: str, backend: Backend) -> str:
    if precision != backend.precision:
        return "that of the epochs already trained"
    return f"what {backend.name} computes fastest on this {'GPU' if backend.device == 'cuda' else 'processor'}"


def _before(sets: _Sets, start: Found, backend: Backend) -> dict[str, Any] | None:
    """The figures of what training starts from, if there is a test set."""
    if sets.test is None:
        return None
    from manidp.engine.engine import Engine

    with Engine(start.checkpoint, threads=backend.threads) as engine:
        return evaluate(engine.run, sets.test, sets.preprocessing).to_json(sets.test_name)


def _finished(
    job: Job,
    training: Training,
    sets: _Sets,
    start: Found | None,
    teachers: list[Found],
    before: dict[str, Any] | None,
) -> Finished:
    """Measure and save what was trained; of several processes the first one does."""
    graph, preprocessing = training.graph, sets.preprocessing
    weights, missed = training.finish(), training.missed()
    points, file, measured = training.finished_points(), job.out / MODEL, None
    if training.backend.rank:
        return Finished(file, measured, missed)
    if sets.test is not None:
        figures = evaluate(training.learner.run, sets.test, preprocessing).to_json(sets.test_name)
        measured = figures | {"dense_macs": ungated_macs(graph)}
        points = tuple(_measured(training, point, sets.test) for point in points)
    told = provenance(
        training, origin_of(start) if start else None, list(map(origin_of, teachers)), data=sets.train_name,
        measured=measured, parent=start.checkpoint if start else None,
    )  # fmt: skip
    save_checkpoint(Checkpoint(graph, weights, preprocessing, sets.train.classes, told, points), file)
    return Finished(file, measured, missed, before)


def _measured(training: Training, point: OperatingPoint, test: Labelled) -> OperatingPoint:
    """The point with its accuracy and mean multiply-adds on the test set."""
    training.learner.use(point.name)
    figures = evaluate(training.learner.run, test, training.start.preprocessing)
    training.learner.use(DEFAULT)
    return replace(point, macs=float(figures.macs.mean()), accuracy=figures.accuracy)


def _check(job: Job) -> None:
    """Refuse options that cannot be, before anything is read."""
    if job.holdout < 0:
        raise TrainingError(f"holdout is a number of training images; got {job.holdout}")
    if job.holdout and job.test is not None:
        raise TrainingError("--test and --holdout both say what the final figures are of; give one of them")


class _Sets:
    """Training and test images of a job, and what to call them."""

    def __init__(self, job: Job, preprocessing: Preprocessing, start: Found | None) -> None:
        self.preprocessing = preprocessing
        self.messages: list[str] = []
        self.test: Labelled | None = None
        self.train: Labelled
        self.test_name = ""
        beside: Path | None = None
        if holds_cifar10(job.data):
            self.train, self.test = load_cifar10(job.data)
            self.train_name, self.test_name = "CIFAR-10 training images", "CIFAR-10 test images"
        else:
            pictures, beside = parts(job.data)
            self.train = self._folder(pictures, None)
            self.train_name = shown(job.data.resolve().name)
        if start is not None:
            self.train = in_order_of(start.checkpoint, self.train)
            if self.train.classes != start.checkpoint.classes:
                self.messages.append(f"the classifier starts anew: {start.name} knows other classes than the data")
        if job.holdout:
            self.train, self.test = split(self.train, job.holdout)
            self.test_name = f"{job.holdout} held-out {self.train_name}"
        elif job.test is not None and holds_cifar10(job.test):
            self._test(load_cifar10(job.test)[1], "CIFAR-10 test images")
        elif job.test is not None:
            self._test(self._folder(parts(job.test)[1] or job.test, self.train.classes), job.test.resolve().name)
        elif beside is not None:
            self._test(self._folder(beside, self.train.classes), f"{self.train_name}/{beside.name}")

    def _folder(self, folder: Path, classes: tuple[str, ...] | None) -> Labelled:
        images, left_out = load_labelled(folder, self.preprocessing.size, classes)
        self.messages += [f"left out: {line}" for line in left_out]
        return images

    def _test(self, images: Labelled, name: str) -> None:
        self.test, self.test_name = images.relabelled(self.train.classes, "the training data"), shown(name)


def split(images: Labelled, count: int) -> tuple[Labelled, Labelled]:
    """All images but ``count``, and these: of each class in proportion, drawn at random but always the same ones.

    Every class keeps one image or more; raises TrainingError if that cannot be.
    """
    chance = np.random.default_rng(0)
    of_class = [chance.permutation(np.flatnonzero(images.labels == label)) for label in range(len(images.classes))]
    sizes = np.array([len(places) for places in of_class])
    spare = np.maximum(sizes - 1, 0)
    if count > spare.sum():
        raise TrainingError(
            f"cannot hold out {count} of {len(images)} images: at least one of each of the {len(of_class)} classes "
            f"stays for training; at most {spare.sum()} can be held out"
        )
    exact = count * sizes / len(images)
    shares = np.minimum(exact.astype(int), spare)
    while (missing := count - shares.sum()) > 0:  # one more for each class that is furthest below its part
        open_ = np.flatnonzero(shares < spare)
        shares[open_[np.argsort(shares[open_] - exact[open_], kind="stable")[:missing]]] += 1
    held = np.sort(np.concatenate([places[:share] for places, share in zip(of_class, shares, strict=True)]))
    stay = np.setdiff1d(np.arange(len(images)), held)
    return images.take(stay), images.take(held)


def _named(network: str, classes: int) -> Graph:
    named = re.fullmatch(r"resnet-([0-9]{1,4})(?:x([1-9][0-9]?))?", network)
    if named is None:
        raise TrainingError(
            f"known networks are resnet-20, resnet-32, ... resnet-<6n+2>, and twice as wide resnet-20x2; got {network}"
        )
    return resnet(int(named[1]), num_classes=classes, width=16 * int(named[2] or 1))


def _settings(job: Job) -> dict[str, Any]:
    """Defaults, the file's settings, then the single ones: later ones win."""
    given = dict(job.defaults) | (read_recipe(job.recipe) if job.recipe else {})
    for text in job.settings:
        given |= parse_setting(text)
    return given


def _recipe(settings: dict[str, Any], parent: Checkpoint | None) -> Recipe:
    """Defaults; of a parent that was gated already its target, if none is given, and its shares; the settings."""
    before = parent.provenance.get("recipe") if parent is not None and parent.graph.gates else None
    inherited: dict[str, Any] = {}
    if isinstance(before, dict):
        if not {"keep_rate", "macs_budget"} & settings.keys():
            inherited = {name: before.get(name) for name in ("keep_rate", "macs_budget")} | {"reach": 0.0}
        if (settings.get("macs_budget") or inherited.get("macs_budget")) and not settings.get("points"):
            inherited["shares"] = before.get("shares", "even")
    return Recipe(**inherited | settings)
