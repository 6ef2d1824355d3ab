"""One training job from start to end: data, network, training, figures, checkpoint. What `manidp train` does."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manidp.checkpoint import Checkpoint, Found, save_checkpoint
from manidp.errors import TrainingError
from manidp.find import find_model
from manidp.graph import Graph, resnet, with_classes, with_gates
from manidp.images import (
    CIFAR10_PREPROCESSING,
    ImageSet,
    Preprocessing,
    Progress,
    holds_cifar10,
    load_cifar10,
    load_folder,
)
from manidp.macs import ungated_macs
from manidp.torch.convert import network_from, network_inheriting
from manidp.torch.network import Network
from manidp.torch.recipe import Recipe, checked_settings, parse_setting, read_recipe
from manidp.torch.train import EpochRecord, Training, evaluate

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
    """The end of a job: the checkpoint's file, and the figures measured with it (None without a test set)."""

    file: Path
    measured: dict[str, Any] | None


def run_job(job: Job, progress: Progress | None = None) -> Iterator[str | EpochRecord | Finished]:
    """Do the job; yields messages worth reading, one record an epoch, and at last what was made.

    Raises ManiDPError of a fitting kind before anything is written if the job cannot be done.
    """
    if job.device not in ("cpu", "cuda") or (job.device == "cuda" and not torch.cuda.is_available()):
        raise TrainingError(f"device must be cpu, or cuda where PyTorch finds a GPU; got {job.device}")
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    start = find_model(job.start) if job.start is not None else None
    parent = start.checkpoint if start else None
    preprocessing = parent.preprocessing if parent else CIFAR10_PREPROCESSING
    sets = _Sets(job, preprocessing)
    yield from sets.messages
    graph = _graph(job, parent, sets.train)
    recipe = _recipe(job, parent, graph)
    network = network_inheriting(graph, parent, seed=recipe.seed) if parent else Network(graph, seed=recipe.seed)
    teachers = [find_model(name) for name in job.teachers]
    for teacher in teachers:
        known = teacher.checkpoint.graph.num_classes
        if known != graph.num_classes:
            raise TrainingError(f"teacher {teacher.name} knows {known} classes; the data has {graph.num_classes}")
    training = Training(
        network, sets.train, preprocessing, recipe, job.out,
        teachers=[network_from(teacher.checkpoint) for teacher in teachers],
        device=job.device, resume=job.resume, progress=progress,
    )  # fmt: skip
    writer = _tensorboard(job)
    for record in training.epochs():
        if writer is not None:
            for name, value in asdict(record).items():
                writer.add_scalar(name, value, record.epoch)
        yield record
    if writer is not None:
        writer.close()
    weights = training.finish()
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
        "recipe": asdict(recipe),
        "from": _origin(start),
        "teacher": [_origin(teacher) for teacher in teachers] or None,
        "data": {"name": sets.train_name, "images": len(sets.train), "sha256": _digest(sets.train)},
        "training": {"device": job.device, "threads": torch.get_num_threads(), "epochs": len(training.records)},
        "measured": measured,
    }  # fmt: skip
    file = job.out / "model.safetensors"
    save_checkpoint(Checkpoint(graph, weights, preprocessing, sets.train.classes, provenance), file)
    yield Finished(file, measured)


class _Sets:
    """Training and test images of a job, and what to call them."""

    def __init__(self, job: Job, preprocessing: Preprocessing) -> None:
        self.messages: list[str] = []
        self.test: ImageSet | None = None
        self.test_name = ""
        if holds_cifar10(job.data):
            self.train, self.test = load_cifar10(job.data)
            self.train_name, self.test_name = "CIFAR-10 training images", "CIFAR-10 test images"
        else:
            self.train = self._folder(job.data, preprocessing, None)
            self.train_name = job.data.resolve().name
        if job.test is not None:
            self.test = self._folder(job.test, preprocessing, self.train.classes)
            self.test_name = job.test.resolve().name
        if job.holdout:
            if job.holdout >= len(self.train):
                raise TrainingError(f"cannot hold out {job.holdout} of {len(self.train)} images")
            order = np.random.default_rng(0).permutation(len(self.train))
            self.test = _subset(self.train, np.sort(order[: job.holdout]))
            self.train = _subset(self.train, np.sort(order[job.holdout :]))
            self.test_name = f"{job.holdout} held-out {self.train_name}"

    def _folder(self, folder: Path, preprocessing: Preprocessing, classes: tuple[str, ...] | None) -> ImageSet:
        images, pictures = load_folder(folder, preprocessing.size, classes)
        self.messages += [f"left out: {line}" for line in pictures.left_out]
        return images


def _subset(images: ImageSet, chosen: np.ndarray[Any, Any]) -> ImageSet:
    return ImageSet(images.images[chosen], images.labels[chosen], images.classes)


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


def _recipe(job: Job, parent: Checkpoint | None, graph: Graph) -> Recipe:
    """Defaults, the parent's target if it was gated already, the file, the single settings: later ones win."""
    inherited: dict[str, Any] = {}
    given = read_recipe(job.recipe) if job.recipe else {}
    for text in job.settings:
        given |= checked_settings(parse_setting(text), "--set")
    if parent is not None and parent.graph.gates and not {"keep_rate", "macs_budget"} & given.keys():
        before = parent.provenance.get("recipe")
        if isinstance(before, dict):
            inherited = {name: before.get(name) for name in ("keep_rate", "macs_budget")} | {"reach": 0.0}
    recipe = replace(Recipe(), **inherited | given)
    recipe.check(graph)
    return recipe


def _origin(model: Found | None) -> dict[str, str] | None:
    return {"name": model.name, "sha256": model.sha256} if model else None


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images.images).data)
    digest.update(images.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _tensorboard(job: Job) -> Any:
    if not job.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(job.out))
