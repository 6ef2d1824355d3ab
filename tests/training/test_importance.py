"""A budget is spent where it is worth most: importance, what it costs, and what a training makes of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.graph import Graph, Select
from manidp.graph.macs import macs_per_image, ungated_macs
from manidp.models import resnet
from manidp.training.backend import Backend
from manidp.training.importance import score_biases, scores_in_order, taylor_shares, undecided, worth
from manidp.training.recipe import Recipe
from manidp.training.schedule import OPEN, continuous_threshold, continuous_thresholds, rate_of_threshold, shares_of
from networks import random_weights, small_gated

from .cases import GATED_GRAPH, RECIPE, fresh, image_set, trained, training

TAYLOR = replace(RECIPE, macs_budget="60%", shares="taylor", learning_rate=0.02, reach=0.75)


def masks(graph: Graph, chance: np.random.Generator) -> dict[str, NDArray[np.bool_]]:
    return {gate: chance.random(count) < 0.6 for gate, count in graph.gate_channels.items()}


def cost(graph: Graph, kept: dict[str, NDArray[np.bool_]]) -> int:
    return int(macs_per_image(graph, {gate: own[None] for gate, own in kept.items()})[0])


def test_a_channels_worth_is_by_what_closing_it_saves() -> None:
    graph, chance = with_gates(resnet(14, width=4)), np.random.default_rng(0)
    kept = masks(graph, chance)
    ones = {gate: np.ones(len(own)) for gate, own in kept.items()}
    found = worth(graph, ones, {gate: own.astype(float) for gate, own in kept.items()})
    for gate, own in kept.items():
        for channel in range(len(own)):
            there, gone = own.copy(), own.copy()
            there[channel], gone[channel] = True, False
            saved = cost(graph, kept | {gate: there}) - cost(graph, kept | {gate: gone})
            assert found[gate][channel] == pytest.approx(1 / max(1, saved))


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_goes_to_the_channels_of_most_worth(seed: int) -> None:
    graph, chance = with_gates(resnet(14, width=4)), np.random.default_rng(seed)
    value = {gate: chance.random(count) * chance.random() for gate, count in graph.gate_channels.items()}
    budget = chance.uniform(0.3, 1.1) * ungated_macs(graph)
    shares = taylor_shares(graph, value, budget)
    counts = {gate: round(min(share, 1) * len(value[gate])) for gate, share in shares.items()}
    kept = {gate: own >= np.sort(own)[-counts[gate]] for gate, own in value.items()}
    assert all(count >= 1 for count in counts.values())
    assert all((shares[gate] == OPEN) == own.all() for gate, own in kept.items())
    assert cost(graph, kept) <= budget
    closed = [(own[~kept[gate]].max(), gate) for gate, own in value.items() if not kept[gate].all()]
    if not closed:
        assert budget >= cost(graph, kept)
        return
    most, gate = max(closed)
    alone = {other for other in value if counts[other] == 1}  # kept whatever they are worth
    assert all(own[kept[other]].min() >= most for other, own in value.items() if other not in alone)
    assert cost(graph, kept | {gate: kept[gate] | (value[gate] == most)}) > budget


def test_shares_move_together_and_alike_ones_are_the_one_rate() -> None:
    means = {"a": np.array([0.9, 0.7, 0.4, 0.2]), "b": np.array([0.8, 0.6, 0.3])}
    for rate in (0.0, 0.3, 0.9, 1.0, 1.2, 1.7, 2.0):
        alike = {gate: continuous_threshold(mean, rate) for gate, mean in means.items()}
        assert continuous_thresholds(means, rate) == alike
        assert continuous_thresholds(means, rate, {"a": 1.0, "b": 1.0}) == alike
    own = continuous_thresholds(means, 1.0, {"a": 0.5, "b": OPEN})
    assert own == {"a": 0.7, "b": 0.0}
    falling = [continuous_thresholds(means, rate, {"a": 0.5, "b": OPEN})["a"] for rate in np.linspace(0, 2, 21)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == 0


@pytest.mark.parametrize("rate", [0.25, 0.4, 0.75, 1.0, 1.5, 2.0])
def test_a_threshold_tells_its_rate(rate: float) -> None:
    mean = np.array([0.7, 0.2, 0.9, 0.4])
    assert rate_of_threshold(mean, continuous_threshold(mean, rate)) == pytest.approx(rate)
    assert rate_of_threshold(mean, 5.0) == 0.25
    assert shares_of({"a": mean[None]}, {"a": 0.0}) == {"a": OPEN}


def test_fresh_scores_stand_in_the_order_of_worth() -> None:
    value = np.array([3.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(scores_in_order(value), [1.1, 0.9, 1.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(scores_in_order(value[:1]), [0.8])


def test_importance_is_the_gradient_of_the_scores_bias_times_the_mean_factor_squared(backend: Backend) -> None:
    start, rate = fresh(backend, GATED_GRAPH), 0.01
    recipe = replace(TAYLOR, momentum=0.0, weight_decay=0.0, lambda_similarity=0.0).resolved(GATED_GRAPH)
    learner = backend.learner(start, image_set(), recipe)
    before = learner.state()
    (step,) = learner.step(next(learner.batches(0)), learning_rate=rate, limit=0.0)
    after = learner.state()
    assert step.importance.keys() == GATED_GRAPH.gate_channels.keys()
    for gate, bias in score_biases(GATED_GRAPH).items():
        gradient = (before[f"network/{bias}"] - after[f"network/{bias}"]) / rate  # fresh factors are 1
        found = learner.read([step.importance[gate]])
        np.testing.assert_allclose(found, gradient**2, rtol=0.02, atol=1e-3 * (gradient**2).max())
    assert (
        not backend.learner(start, image_set(), replace(recipe, shares="even"))
        .step(next(learner.batches(0)), learning_rate=rate, limit=0.0)[0]
        .importance
    )


def test_channels_that_nothing_needs_are_closed_first(backend: Backend, tmp_path: Path) -> None:
    start = fresh(backend, GATED_GRAPH)
    weights = {name: value.copy() for name, value in start.weights.items()}
    gate, reader = "stage_2.0.mb1", "stage_2.0.conv_b.weight"
    needless = np.arange(weights[reader].shape[1]) % 2 == 0
    weights[reader][:, needless] = 0
    recipe = replace(TAYLOR, epochs=2, reach=1.0, learning_rate=1e-4, ema=0.0, macs_budget="93%")
    run, _ = trained(backend, tmp_path, recipe, start=replace(start, weights=weights))
    scores = run.learner.read([run.learner.saliencies(batch)[gate] for batch in run.learner.plain(64)])
    kept = (scores > run.learner.thresholds()[gate]).mean(0)
    assert kept[needless].mean() < 0.5
    assert (kept[~needless] == 1).all()
    shares = run.targets["default"].shares
    assert shares[gate] == min(shares.values())
    assert OPEN in shares.values()


def test_the_budget_is_met_and_gates_keep_different_shares(backend: Backend, tmp_path: Path) -> None:
    run, records = trained(backend, tmp_path, TAYLOR)
    run.finish()
    assert run.missed() is None
    assert records[0].macs > 1.5 * records[-1].macs
    shares = list(run.targets["default"].shares.values())
    assert len(shares) == len(GATED_GRAPH.gates)
    assert max(shares) - min(shares) > 0.2
    assert records[-1].accuracy > 0.9


def test_interrupted_and_resumed_it_ends_with_the_same_bits(backend: Backend, tmp_path: Path) -> None:
    whole, _ = trained(backend, tmp_path / "whole", TAYLOR)
    with training(backend, tmp_path / "parts", TAYLOR) as first:
        next(first.epochs())  # whose scores were put in order
    with training(backend, tmp_path / "parts", TAYLOR, resume=True) as second:
        for _ in zip(range(2), second.epochs(), strict=False):
            pass
    last, _ = trained(backend, tmp_path / "parts", TAYLOR, resume=True)
    assert last.targets["default"].shares == whole.targets["default"].shares
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name


def test_gates_that_know_something_keep_the_order_of_their_scores(backend: Backend, tmp_path: Path) -> None:
    start = fresh(backend, GATED_GRAPH)
    weights, chance = dict(start.weights), np.random.default_rng(0)
    assert undecided(GATED_GRAPH, weights)
    biases = score_biases(GATED_GRAPH)
    for bias in biases.values():
        weights[bias] = chance.uniform(0.5, 1.5, weights[bias].shape).astype(np.float32)
        name = f"{bias.removesuffix('.bias')}.weight"
        weights[name] = np.full_like(weights[name], 1e-3)
    recipe = replace(TAYLOR, epochs=1, learning_rate=1e-6, ema=0.0)
    run, _ = trained(backend, tmp_path, recipe, start=replace(start, weights=weights))
    for bias in biases.values():
        np.testing.assert_allclose(run.learner.state()[f"network/{bias}"], weights[bias], atol=1e-3)


def test_shares_of_other_gates_are_refused(backend: Backend, tmp_path: Path) -> None:
    with training(backend, tmp_path, TAYLOR) as run:
        next(run.epochs())
    path = tmp_path / "state.safetensors"
    content = path.read_bytes()
    assert content.count(b'shares\\": {\\"stage_1.0.mb1') == 1
    path.write_bytes(content.replace(b'shares\\": {\\"stage_1.0.mb1', b'shares\\": {\\"stage_9.0.mb1'))
    with pytest.raises(TrainingError, match="damaged: it has shares of"):
        training(backend, tmp_path, TAYLOR, resume=True)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(TAYLOR, macs_budget=None, keep_rate=0.5), "shares 'taylor' are for one macs_budget"),
        (replace(TAYLOR, points=("40%",)), "shares 'taylor' are for one macs_budget"),
    ],
)
def test_what_shares_are_not_for_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        recipe.resolved(GATED_GRAPH)


def test_gates_that_do_not_scale_are_refused() -> None:
    graph = small_gated(width=4, classes=2)
    hard = Graph(
        tuple(replace(node, gain="one") if isinstance(node, Select) else node for node in graph.nodes), graph.output
    )
    assert random_weights(hard).keys() == random_weights(graph).keys()
    with pytest.raises(TrainingError, match=r"'stage_1\.0\.mb1' does not: set shares to 'even'"):
        TAYLOR.resolved(hard)
    assert replace(TAYLOR, shares="auto").resolved(hard).shares == "even"
    assert replace(TAYLOR, shares="auto").resolved(graph).shares == "taylor"
    assert replace(TAYLOR, shares="auto", points=("40%",)).resolved(graph).shares == "even"
    assert replace(TAYLOR, shares="auto", macs_budget=None, keep_rate=0.5).resolved(graph).shares == "even"
