"""One engine at several budgets: each is the network whose weights are those of the operating point."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from manidp.engine.engine import Engine
from manidp.errors import CheckpointError, ManiDPError
from manidp.formats.checkpoint import Checkpoint, OperatingPoint
from manidp.gating.place import with_gates
from manidp.graph import Activation, BatchNorm, Conv, GlobalPool, Graph, Input, Linear
from manidp.result import probabilities
from networks import checkpoint_of, random_weights, with_thresholds

IMAGES = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)


def pointed() -> Checkpoint:
    """Points of 16 keep rates, small since each is compiled; every second one has batch statistics of its own."""
    nodes = (
        Input(name="image", dims=(3, 8, 8)),
        Conv(name="conv_1", inputs=("image",), channels=16),
        BatchNorm(name="bn_1", inputs=("conv_1",)),
        Activation(name="relu_1", inputs=("bn_1",), kind="relu"),
        Conv(name="conv_2", inputs=("relu_1",), channels=16),
        GlobalPool(name="pool", inputs=("conv_2",)),
        Linear(name="classifier", inputs=("pool",), features=4),
    )
    graph = with_gates(Graph(nodes, "classifier"), ["conv_1", "conv_2"])
    weights = random_weights(graph)
    points = []
    for index, share in enumerate(np.linspace(0.05, 1, 16)):
        chosen = with_thresholds(graph, weights, IMAGES, {gate.name: float(share) for gate in graph.gates})
        values = {name: np.maximum(chosen[name], 0) for name in graph.thresholds}
        if index % 2:
            values["bn_1.moving_mean"] = np.full(16, index / 10, np.float32)
        points.append(OperatingPoint(f"p{index}", values))
    return replace(checkpoint_of(graph, weights), points=tuple(points))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(pointed())


def test_each_budget_is_the_network_of_its_point_from_16_threads_at_once() -> None:
    checkpoint = pointed()
    names = ["default", *(point.name for point in checkpoint.points)]
    wanted = {name: Engine(checkpoint.at(name)).run(IMAGES) for name in names}
    assert len({result.logits.tobytes() for result in wanted.values()}) == len(names)
    with Engine(checkpoint, threads=2) as engine, ThreadPoolExecutor(16) as pool:
        asked = [names[index % len(names)] for index in range(160)]
        for name, result in zip(asked, pool.map(lambda name: engine.run(IMAGES, budget=name), asked), strict=True):
            np.testing.assert_array_equal(result.logits, wanted[name].logits, err_msg=name)
            np.testing.assert_array_equal(result.gate_values, wanted[name].gate_values, err_msg=name)


def test_a_cascade_runs_the_dear_point_on_what_the_cheap_one_is_unsure_of_and_counts_both(engine: Engine) -> None:
    cheap, dear = (engine.run(IMAGES, budget=name) for name in ("p1", "p14"))
    least = float(np.sort(cheap.confidence)[5])
    both = engine.run(IMAGES, cascade=("p1", "p14"), confidence=least)
    none, all_ = (engine.run(IMAGES, cascade=("p1", "p14"), confidence=c) for c in (0.0, 1.0))
    on = both.went_on
    assert on is not None
    assert on.sum() == 5
    np.testing.assert_array_equal(on, cheap.confidence < least)
    np.testing.assert_array_equal(both.logits, np.where(on[:, None], dear.logits, cheap.logits))
    np.testing.assert_array_equal(both.gate_values, np.where(on[:, None], dear.gate_values, cheap.gate_values))
    np.testing.assert_array_equal(both.macs, cheap.macs + np.where(on, dear.macs, 0))
    np.testing.assert_array_equal(none.macs, cheap.macs)
    np.testing.assert_array_equal(all_.macs, cheap.macs + dear.macs)
    np.testing.assert_array_equal(cheap.confidence, probabilities(cheap.logits).max(1))
    assert cheap.went_on is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"cascade": ("p1", "p2")},
        {"confidence": 0.5},
        {"cascade": ("p1",), "confidence": 0.5},
        {"cascade": ("p1", "p2"), "confidence": 1.5},
        {"cascade": ("p1", "p2"), "confidence": float("nan")},
        {"cascade": ("p1", "p2"), "confidence": 0.5, "budget": "p3"},
    ],
    ids=str,
)
def test_a_cascade_is_two_points_and_a_confidence(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(ManiDPError, match="a cascade is two operating points and a confidence of"):
        engine.run(IMAGES, **wrong)
    with pytest.raises(CheckpointError, match="'p99'"):
        engine.run(IMAGES, cascade=("p1", "p99"), confidence=0.5)


def test_an_unknown_budget_names_the_known_ones_and_the_engine_goes_on() -> None:
    engine = Engine(pointed())
    before = engine.memory
    with pytest.raises(
        CheckpointError, match="no operating point fits the budget 'p99'; this model has 'default', 'p0'"
    ):
        engine.run(IMAGES, budget="p99")
    assert engine.memory == before
    engine.run(IMAGES, budget="p1")
    assert engine.memory > before  # a point's own weights are told


def test_other_weights_in_the_same_code_give_what_compiling_them_gives(engine: Engine) -> None:
    chance = np.random.default_rng(1)
    given = engine.checkpoint.weights
    others = {name: (value + 0.1 * chance.random(value.shape)).astype(np.float32) for name, value in given.items()}
    before = engine.run(IMAGES)
    with engine.reweighted(others) as again:
        found = again.run(IMAGES)
    wanted = Engine(replace(engine.checkpoint, weights=others)).run(IMAGES)
    assert not np.array_equal(found.logits, before.logits)
    np.testing.assert_array_equal(found.logits, wanted.logits)
    np.testing.assert_array_equal(found.gate_values, wanted.gate_values)
    np.testing.assert_array_equal(engine.run(IMAGES).logits, before.logits)
    with pytest.raises(CheckpointError, match="conv_9"):
        engine.reweighted({"conv_9.weight": np.zeros(3, np.float32)})


def test_a_closed_engine_holds_no_code_and_gives_none_on() -> None:
    engine = Engine(replace(pointed(), points=()))
    assert engine._runner is not None
    program = weakref.ref(engine._runner.program)
    engine.close()
    gc.collect()
    assert program() is None
    with pytest.raises(ManiDPError, match="this engine is closed"):
        engine.reweighted({})
