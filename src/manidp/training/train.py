"""A training in one call: what ``manidp.torch.train`` and ``manidp.mindspore.train`` do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from manidp.data.labelled import Labelled
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.training.backend import Backend
from manidp.training.loop import Training
from manidp.training.provenance import digest_of, provenance
from manidp.training.recipe import Recipe
from manidp.training.start import graph_for, in_order_of, start_of
from manidp.training.state import EpochRecord


def train(
    backend: Backend,
    start: Checkpoint | Graph,
    data: Labelled,
    recipe: Recipe,
    folder: str | Path,
    *,
    gates: bool = False,
    preprocessing: Preprocessing = CIFAR10_PREPROCESSING,
    teachers: Sequence[Checkpoint] = (),
    resume: bool = False,
    report: Callable[[EpochRecord], None] | None = None,
) -> Checkpoint:
    """See ``manidp.torch.train``."""
    if isinstance(start, Checkpoint):
        parent, network, origin = start, start.graph, digest_of(start)
        data, preprocessing = in_order_of(start, data), start.preprocessing
    else:
        parent, network, origin = None, start, None
    graph = graph_for(network, data.classes, gates=gates)
    recipe = recipe.resolved(graph)
    taught_by = [digest_of(teacher) for teacher in teachers]
    begin = start_of(backend, graph, parent, preprocessing, data.classes, recipe.seed)
    with Training(
        backend, begin, data, recipe, Path(folder), teachers=teachers, origin={"from": origin, "teachers": taught_by},
        resume=resume,
    ) as training:  # fmt: skip
        for record in training.epochs():
            if report is not None:
                report(record)
        weights, missed = training.finish(), training.missed()
        if missed:
            warnings.warn(missed, stacklevel=3)
        told = provenance(training, origin, taught_by, parent=parent)
        return Checkpoint(training.graph, weights, preprocessing, data.classes, told, training.finished_points())
