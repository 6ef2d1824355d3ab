"""Add an operating point to a gated checkpoint without training.

Its thresholds are those under which the network takes another budget. With a framework, its batch statistics are what
they become under these thresholds: other channels are open, and maps have other means and variances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.engine import Engine
from manidp.errors import GraphError, TrainingError
from manidp.formats.checkpoint import Checkpoint, OperatingPoint
from manidp.graph import Concat, Graph, Node
from manidp.graph.macs import least_and_most_macs, ungated_macs
from manidp.training.backend import Backend, Weights
from manidp.training.recipe import point_name
from manidp.training.schedule import shares_of, thresholds_for_budget
from manidp.training.statistics import estimated

TOLERANCE = 0.002  # of the budget
MISSED = 0.01  # of the budget: more is an error
SETTLED = 5, 0.005  # rounds of thresholds and batch statistics, which move each other; of the budget
ROUNDS = 12  # thresholds of early gates move the scores of later ones: repeated on fresh scores
BATCH = 500  # images a call
_WIDEST = 64  # values that one Concat joins


def calibrate(
    checkpoint: Checkpoint,
    images: NDArray[Any],
    budget: float,
    name: str | None = None,
    backend: Backend | None = None,
) -> Checkpoint:
    """The checkpoint with one operating point more, in the order of their multiply-adds.

    images: as ``Engine.run`` takes them; they should be pictures to train with, not to test with. budget: share of the
    dense network's multiply-adds that an image may take on average, 0..1. name: of the point, by default the budget in
    percent; a point of this name is replaced. The keep rates of all gates move in proportion from what they are: one
    rate for all where they were trained so (Tang et al. 2021, made continuous). backend: what estimates the point's
    batch statistics on the images, then uint8 (N, H, W, C); without one they stay as they are, which costs much
    accuracy far from the default budget.
    Raises GraphError without gates that have thresholds, TrainingError for a budget that the network cannot take.
    """
    graph = checkpoint.graph
    if not graph.gates or len(graph.thresholds) < len(graph.gates):
        raise GraphError("only gates with thresholds can be calibrated; this network has none, or others beside them")
    dense = ungated_macs(graph)
    least, most = least_and_most_macs(graph)
    if not least <= budget * dense <= most or not len(images):
        raise TrainingError(
            f"a budget is a share of the dense multiply-adds, for this network {least / dense:.1%} (all gates closed) "
            f"to {most / dense:.1%} (all open), and images to calibrate on; got {budget:.1%} and {len(images)} images"
        )
    values, macs = _values(checkpoint, images, budget * dense, backend)
    if abs(macs - budget * dense) > MISSED * budget * dense:
        raise TrainingError(
            f"a budget of {budget:.1%} of the dense multiply-adds cannot be met with thresholds alone: the closest is "
            f"{macs / dense:.1%}, since a channel whose score is 0 stays closed whatever the threshold"
        )
    point = OperatingPoint(name or point_name(graph, budget * dense), values, macs)
    others = [other for other in checkpoint.points if other.name != point.name]
    return replace(checkpoint, points=tuple(sorted([*others, point], key=lambda one: (one.macs or 0, one.name))))


def confidence_for(
    checkpoint: Checkpoint, images: NDArray[Any], cascade: tuple[str | float, str | float], budget: float
) -> float:
    """The confidence below which images go on from the cheap point of a cascade to the dear one, for a mean budget.

    images: as ``Engine.run`` takes them; pictures that the model was not trained on, of which a model is less sure, and
    none to test with. budget: share of the dense network's multiply-adds that an image may take on average in both
    passes, 0..1; the confidence is the greatest that keeps to it on these images. Raises TrainingError for a budget
    that the cheap point alone exceeds.
    """
    cheap, dear = cascade
    first, second = [], []
    with Engine(checkpoint) as engine:
        for start in range(0, len(images), BATCH):
            first.append(engine.run(images[start : start + BATCH], budget=cheap))
            second.append(engine.run(images[start : start + BATCH], budget=dear).macs)
    spent = float(np.concatenate([result.macs for result in first]).sum()) if first else 0.0
    left = budget * ungated_macs(checkpoint.graph) * len(images) - spent
    if not first or left < 0:
        raise TrainingError(
            f"a cascade's budget is a share of the dense multiply-adds that its cheap point, {cheap}, does not exceed, "
            f"and needs images to choose on; got {budget:.1%} and {len(images)} images"
        )
    sure = np.concatenate([result.confidence for result in first])
    order = np.argsort(sure, kind="stable")
    count = int(np.searchsorted(np.cumsum(np.concatenate(second)[order]), left, side="right"))
    return float(sure[order[count]]) if count < len(order) else 1.0


def _values(
    checkpoint: Checkpoint, images: NDArray[Any], target: float, backend: Backend | None
) -> tuple[Weights, float]:
    """Values under which the images take ``target`` multiply-adds on average, and what they do take."""
    values = {name: checkpoint.weights[name] for name in checkpoint.graph.thresholds}
    with _probe(checkpoint) as probe:
        chosen, macs = _thresholds(probe, checkpoint.graph, values, images, target)
        values = values | chosen
        if backend is None:
            return values, macs
        for made in range(SETTLED[0]):
            there = replace(checkpoint, weights={**checkpoint.weights, **values}, points=())
            fresh = estimated(backend, there, images)
            if made:  # else thresholds and statistics may swing for ever, each too far for the other
                fresh = {name: np.float32(0.5) * (value + values[name]) for name, value in fresh.items()}
            values = values | fresh
            _, macs = _run(probe, values, images)
            if abs(macs - target) <= SETTLED[1] * target:
                break
            chosen, macs = _thresholds(probe, checkpoint.graph, values, images, target)
            values = values | chosen
    return values, macs


def _thresholds(
    probe: Engine, graph: Graph, values: Weights, images: NDArray[Any], target: float
) -> tuple[Weights, float]:
    """Thresholds with which, the other values as given, the images come closest to ``target``, and what they take."""
    sizes = graph.gate_channels
    chosen = {name: values[name] for name in graph.thresholds}
    best: tuple[float, Weights, float] | None = None
    shares: Mapping[str, float] = {}
    for _ in range(ROUNDS):
        scores, macs = _run(probe, values | chosen, images)
        if best is None or abs(macs - target) < best[0]:
            best = abs(macs - target), chosen, macs
        if best[0] <= TOLERANCE * target:
            break
        of_gates = dict(zip(sizes, np.split(scores, np.cumsum(list(sizes.values()))[:-1], axis=1), strict=True))
        shares = shares or shares_of(of_gates, {gate: float(values[f"{gate}.threshold"]) for gate in of_gates})
        limits = thresholds_for_budget(graph, of_gates, target, shares)
        chosen = {f"{gate}.threshold": np.array(limit, np.float32) for gate, limit in limits.items()}
    assert best is not None
    return best[1], best[2]


def _probe(checkpoint: Checkpoint) -> Engine:
    """An engine of the same network, its logits the scores of all gates, closed channels' too, one after the other."""
    graph = _with_scores(checkpoint.graph)
    weights = {name: checkpoint.weights[name] for name in graph.parameters}
    classes = tuple(f"score {i}" for i in range(graph.num_classes))
    return Engine(replace(checkpoint, graph=graph, weights=weights, classes=classes, points=()))


def _run(probe: Engine, values: Weights, images: NDArray[Any]) -> tuple[NDArray[np.float32], float]:
    """Scores (N, channels of all gates) of the images under these values, and mean multiply-adds."""
    with probe.reweighted(values) as engine:
        results = [engine.run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    scores = np.concatenate([result.logits for result in results])
    macs = np.concatenate([result.macs for result in results])
    return scores, float(macs.mean())


def _with_scores(graph: Graph) -> Graph:
    """The same network, its output the scores of all gates one after the other."""
    taken, names = set(graph.by_name), [gate.inputs[0] for gate in graph.gates]
    nodes: list[Node] = list(graph.nodes)
    while len(names) > 1:
        joined: list[str] = []
        for first in range(0, len(names), _WIDEST):
            name = next(f"scores {i}" for i in range(len(taken) + 1) if f"scores {i}" not in taken)
            taken.add(name)
            part = tuple(names[first : first + _WIDEST])
            if len(part) == 1:
                joined += part
            else:
                nodes.append(Concat(name=name, inputs=part))
                joined.append(name)
        names = joined
    return Graph(tuple(nodes), names[0])
