"""Operating points that are added without training: their budgets are met, and what cannot be met is refused."""

import numpy as np
import pytest

from manidp.engine.engine import Engine
from manidp.errors import GraphError, TrainingError
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.place import with_gates
from manidp.graph.macs import ungated_macs
from manidp.models import resnet
from manidp.training.calibrate import calibrate, confidence_for
from networks import Array, checkpoint_of, random_weights, with_thresholds

RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(40, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    graph = with_gates(resnet(8, image=(3, 16, 16)))
    weights: dict[str, Array] = random_weights(graph)
    for name in weights:
        if name.endswith("fc2.bias"):  # scores differ by channel, and none is 0
            weights[name] = RNG.uniform(0.5, 1.5, weights[name].shape)
    return checkpoint_of(graph, with_thresholds(graph, weights, IMAGES, dict.fromkeys(graph.gate_channels, 0.5)))


def test_a_point_takes_its_budget_and_leaves_the_others_as_they_are(checkpoint: Checkpoint) -> None:
    dense = ungated_macs(checkpoint.graph)
    made = calibrate(calibrate(checkpoint, IMAGES, 0.7), IMAGES, 0.4, name="cheap")
    assert [point.name for point in made.points] == ["cheap", "70%"]
    with Engine(made) as engine:
        for share, name in ((0.4, "cheap"), (0.7, "70%")):
            result = engine.run(IMAGES, budget=name)
            assert result.macs.mean() == pytest.approx(share * dense, rel=0.01)
            assert result.macs.mean() == pytest.approx(made.point(name).macs)
        np.testing.assert_array_equal(engine.run(IMAGES).logits, Engine(checkpoint).run(IMAGES).logits)
    again = calibrate(made, IMAGES, 0.5, name="cheap")
    assert [point.name for point in again.points] == ["cheap", "70%"]


def test_gates_that_keep_less_than_others_go_on_doing_so(checkpoint: Checkpoint) -> None:
    few, shares = "stage_2.0.mb1", dict.fromkeys(checkpoint.graph.gate_channels, 0.7)
    weights = with_thresholds(checkpoint.graph, dict(checkpoint.weights), IMAGES, shares | {few: 0.2})
    uneven = checkpoint_of(checkpoint.graph, weights)
    with Engine(calibrate(uneven, IMAGES, 0.4)) as engine:
        kept = {gate: own.mean() for gate, own in engine.run(IMAGES, budget="40%").kept.items()}
    others = [share for gate, share in kept.items() if gate != few]
    assert kept[few] < 0.5 * min(others)


@pytest.mark.parametrize(("budget", "message"), [(0.01, "all gates closed"), (3.0, "all open"), (0.4, "0 images")])
def test_a_budget_out_of_reach_is_refused(budget: float, message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(TrainingError, match=message):
        calibrate(checkpoint, IMAGES if "images" not in message else IMAGES[:0], budget)


def test_a_budget_that_thresholds_alone_cannot_meet_is_refused(checkpoint: Checkpoint) -> None:
    closed = {
        name: np.full_like(value, -9) if name.endswith("fc2.bias") else value
        for name, value in checkpoint.weights.items()
    }
    dead = Checkpoint(checkpoint.graph, closed, checkpoint.preprocessing, checkpoint.classes)
    with pytest.raises(TrainingError, match="cannot be met with thresholds alone: the closest is"):
        calibrate(dead, IMAGES, 0.8)


def test_a_network_without_gates_is_refused() -> None:
    graph = resnet(8, image=(3, 16, 16))
    with pytest.raises(GraphError, match="only gates with thresholds"):
        calibrate(checkpoint_of(graph, random_weights(graph)), IMAGES, 0.5)


def test_a_cascades_confidence_spends_its_budget_and_no_more(checkpoint: Checkpoint) -> None:
    dense, cascade = ungated_macs(checkpoint.graph), ("cheap", "default")
    made = calibrate(checkpoint, IMAGES, 0.3, name="cheap")
    spent = []
    with Engine(made) as engine:
        for budget in (0.4, 0.5, 0.6):
            least = confidence_for(made, IMAGES, cascade, budget)
            result = engine.run(IMAGES, cascade=cascade, confidence=least)
            spent.append(result.macs.mean() / dense)
            assert spent[-1] <= budget
            assert spent[-1] > budget - 1.2 / len(IMAGES)  # one image more would exceed it
    assert spent[0] < spent[1]
    assert confidence_for(made, IMAGES, cascade, 3.0) == 1.0
    with pytest.raises(TrainingError, match="its cheap point, cheap, does not exceed"):
        confidence_for(made, IMAGES, cascade, 0.2)
