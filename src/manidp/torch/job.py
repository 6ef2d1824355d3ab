"""One training job from start to end: data, network, training, figures, checkpoint. What `manidp train` does."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manidp.data.images import (
    CIFAR10_PREPROCESSING,
    ImageSet,
    Preprocessing,
    holds_cifar10,
    load_cifar10,
    load_folder,
    shown,
)
from manidp.errors import MissingExtraError, TrainingError
from manidp.formats.checkpoint import Checkpoint, Found, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Graph, with_classes
from manidp.graph.macs import ungated_macs
from manidp.hub.find import find_model
from manidp.models import resnet
from manidp.progress import Progress
from manidp.torch.convert import network_from, network_inheriting
from manidp.torch.network import Network
from manidp.torch.state import EpochRecord
from manidp.torch.train import Training, check_folder, digest_of, evaluate, native_precision
from manidp.training.recipe import Recipe, parse_setting, read_recipe
from manidp.training.settings import brief

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, from what; the fields are the options of `manidp train`."""

    data: Path
    out: Path
    recipe: Path | None = None
    settings: tuple[str, ...] = ()
    start: str | None = None
    network: str = "resnet-20"
    gates: bool = False
    teachers: tuple[str, ...] = ()
    test: Path | None = None
    holdout: int = 0
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of a job: the checkpoint's file, and the figures measured with it (None without a test set).

    ``missed``: a line if the multiply-adds are more than 1 % beside the recipe's budget.
    """

    file: Path
    measured: dict[str, Any] | None
    missed: str | None = None


def run_job(job: Job, progress: Progress | None = None) -> Iterator[str | EpochRecord | Finished]:
    """Do the job; yields messages worth reading, one record an epoch, and at last what was made.

    Raises ManiDPError of a fitting kind before anything is written if the job cannot be done. What goes wrong later,
    a full disk for example, is one too, and the state of the last good epoch stays.
    """
    _check(job)
    check_folder(job.out, job.resume)
    settings = _settings(job)
    start = find_model(job.start) if job.start is not None else None
    teachers = [find_model(name) for name in job.teachers]
    parent = start.checkpoint if start else None
    preprocessing = parent.preprocessing if parent else CIFAR10_PREPROCESSING
    sets = _Sets(job, preprocessing, start)
    yield from sets.messages
    graph = _graph(job, parent, sets.train)
    recipe = _recipe(settings, parent).resolved(graph)
    for teacher in teachers:
        _check_teacher(teacher, graph, sets.train, preprocessing)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if parent:
        network = network_inheriting(graph, parent, classes=sets.train.classes, seed=recipe.seed)
    else:
        network = Network(graph, seed=recipe.seed)
    with Training(
        network, sets.train, preprocessing, recipe, job.out,
        teachers=[network_from(teacher.checkpoint) for teacher in teachers],
        origin={"from": start and start.sha256, "teachers": [teacher.sha256 for teacher in teachers]},
        device=job.device, resume=job.resume, progress=progress,
    ) as training:  # fmt: skip
        if recipe.precision == "auto":
            yield f"precision {training.recipe.precision}: {_why(training.recipe.precision, job.device)}"
        with _events(job) as write:
            for record in training.epochs():
                write(record)
                yield record
        yield _finished(job, training, sets, start, teachers)


def _why(precision: str, device: str) -> str:
    if precision != native_precision(device):
        return "that of the epochs already trained"
    computes = "computes" if precision == "bfloat16" else "does not compute"
    return f"{'the GPU' if device == 'cuda' else 'this processor'} {computes} bfloat16"


def _finished(job: Job, training: Training, sets: _Sets, start: Found | None, teachers: list[Found]) -> Finished:
    """Measure and save what was trained."""
    graph, preprocessing = training.network.graph, sets.preprocessing
    weights, missed = training.finish(), training.missed()
    measured = None
    if sets.test is not None:
        evaluation = evaluate(training.network, sets.test, preprocessing)
        measured = {
            "data": sets.test_name,
            "correct": evaluation.correct,
            "total": evaluation.total,
            "mean_macs": float(evaluation.macs.mean()),
            "macs_percentiles": {
                str(q): float(value)
                for q, value in zip(PERCENTILES, np.percentile(evaluation.macs, PERCENTILES), strict=True)
            },
            "dense_macs": ungated_macs(graph),
        }
    provenance = {
        "made_with": {
            "manidp": version("manidp"), "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "recipe": asdict(training.recipe),
        "from": _origin(start),
        "teacher": [_origin(teacher) for teacher in teachers] or None,
        "data": {"name": sets.train_name, "images": len(sets.train), "sha256": digest_of(sets.train)},
        "training": {"device": job.device, "threads": torch.get_num_threads(), "epochs": len(training.records)},
        "measured": measured,
    }  # fmt: skip
    file = job.out / "model.safetensors"
    save_checkpoint(Checkpoint(graph, weights, preprocessing, sets.train.classes, provenance), file)
    return Finished(file, measured, missed)


def _check(job: Job) -> None:
    """Refuse options that cannot be, before anything is read."""
    if job.device not in ("cpu", "cuda") or (job.device == "cuda" and not torch.cuda.is_available()):
        raise TrainingError(f"device must be cpu, or cuda where PyTorch finds a GPU; got {job.device}")
    most = max(64, 4 * (os.cpu_count() or 1))
    if job.threads is not None and not 1 <= job.threads <= most:
        raise TrainingError(f"threads must lie between 1 and {most} on this machine; got {job.threads}")
    if job.holdout < 0:
        raise TrainingError(f"holdout is a number of training images; got {job.holdout}")
    if job.holdout and job.test is not None:
        raise TrainingError("--test and --holdout both say what the final figures are of; give one of them")


class _Sets:
    """Training and test images of a job, and what to call them."""

    def __init__(self, job: Job, preprocessing: Preprocessing, start: Found | None) -> None:
        self.preprocessing = preprocessing
        self.messages: list[str] = []
        self.test: ImageSet | None = None
        self.test_name = ""
        if holds_cifar10(job.data):
            self.train, self.test = load_cifar10(job.data)
            self.train_name, self.test_name = "CIFAR-10 training images", "CIFAR-10 test images"
        else:
            self.train = self._folder(job.data, None)
            self.train_name = shown(job.data.resolve().name)
        if start is not None:
            self._meet(start)
        if job.test is not None:
            cifar10 = holds_cifar10(job.test)
            test = load_cifar10(job.test)[1] if cifar10 else self._folder(job.test, self.train.classes)
            self.test = test.relabelled(self.train.classes, "the training data")
            self.test_name = "CIFAR-10 test images" if cifar10 else shown(job.test.resolve().name)
        if job.holdout:
            self.train, self.test = split(self.train, job.holdout)
            self.test_name = f"{job.holdout} held-out {self.train_name}"

    def _folder(self, folder: Path, classes: tuple[str, ...] | None) -> ImageSet:
        images, pictures = load_folder(folder, self.preprocessing.size, classes)
        self.messages += [f"left out: {line}" for line in pictures.left_out]
        return images

    def _meet(self, start: Found) -> None:
        """The order of the start's classes where they are the data's, so that its classifier can stay."""
        known = start.checkpoint.classes
        if sorted(known) == sorted(self.train.classes):
            self.train = self.train.relabelled(known, start.name)
        else:
            self.messages.append(f"the classifier starts anew: {start.name} knows other classes than the data")


def split(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
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
    return _subset(images, stay), _subset(images, held)


def _subset(images: ImageSet, chosen: NDArray[np.int64]) -> ImageSet:
    return ImageSet(images.images[chosen], images.labels[chosen], images.classes)


def _check_teacher(teacher: Found, graph: Graph, data: ImageSet, preprocessing: Preprocessing) -> None:
    """A teacher sees the images that the network sees, and speaks of the same classes."""
    model = teacher.checkpoint
    if model.classes != data.classes:
        raise TrainingError(
            f"teacher {teacher.name} must know the data's classes, in this order: {brief(list(data.classes))}; "
            f"it knows {brief(list(model.classes))}"
        )
    if model.graph.input.dims != graph.input.dims or not np.allclose(
        (model.preprocessing.mean, model.preprocessing.std), (preprocessing.mean, preprocessing.std), atol=0.01
    ):
        raise TrainingError(
            f"teacher {teacher.name} must read images as the network does, by {preprocessing}; "
            f"it reads them by {model.preprocessing}"
        )


def _graph(job: Job, parent: Checkpoint | None, data: ImageSet) -> Graph:
    if parent is not None:
        graph = with_classes(parent.graph, len(data.classes))
    else:
        named = re.fullmatch(r"resnet-([0-9]{1,4})(?:x([1-9][0-9]?))?", job.network)
        if named is None:
            raise TrainingError(
                f"known networks are resnet-20, resnet-32, ... resnet-<6n+2>, and twice as wide resnet-20x2; "
                f"got {job.network}"
            )
        graph = resnet(int(named[1]), num_classes=len(data.classes), width=16 * int(named[2] or 1))
    return with_gates(graph) if job.gates and not graph.gates else graph


def _settings(job: Job) -> dict[str, Any]:
    """The file's settings, then the single ones: later ones win."""
    given = read_recipe(job.recipe) if job.recipe else {}
    for text in job.settings:
        given |= parse_setting(text)
    return given


def _recipe(settings: dict[str, Any], parent: Checkpoint | None) -> Recipe:
    """Defaults, the parent's target if it was gated already and none is given, the settings."""
    inherited: dict[str, Any] = {}
    if parent is not None and parent.graph.gates and not {"keep_rate", "macs_budget"} & settings.keys():
        before = parent.provenance.get("recipe")
        if isinstance(before, dict):
            inherited = {name: before.get(name) for name in ("keep_rate", "macs_budget")} | {"reach": 0.0}
    return Recipe(**inherited | settings)


def _origin(model: Found | None) -> dict[str, str] | None:
    return {"name": shown(model.name), "sha256": model.sha256} if model else None


@contextlib.contextmanager
def _events(job: Job) -> Iterator[Callable[[EpochRecord], None]]:
    """What writes a record as TensorBoard events, or nothing."""
    if not job.tensorboard:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("--tensorboard needs TensorBoard: pip install 'manidp[torch]'") from error
    writer = SummaryWriter(str(job.out))

    def write(record: EpochRecord) -> None:
        try:
            for name, value in asdict(record).items():
                writer.add_scalar(name, value, record.epoch)
            writer.flush()
        except OSError as error:
            raise TrainingError(f"{job.out}: TensorBoard's events cannot be written: {error.strerror}") from error

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            writer.close()
