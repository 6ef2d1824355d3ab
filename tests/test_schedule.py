"""Schedules: their ends, their direction, and thresholds that keep what they promise."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manidp.gating.place import with_gates
from manidp.graph.macs import macs_per_image
from manidp.models import resnet
from manidp.training.schedule import (
    continuous_threshold,
    continuous_thresholds,
    keep_rate,
    learning_rate,
    rate_for_budget,
    threshold,
    thresholds_for_rate,
)


@given(st.integers(1, 500), st.floats(0.001, 1), st.integers(0, 50))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(steps: int, peak: float, warmup: int) -> None:
    warmup = min(warmup, steps - 1)
    rates = [learning_rate(step, steps, peak=peak, warmup=warmup) for step in range(steps)]
    assert max(rates) == pytest.approx(peak)
    slack = peak * 1e-12
    assert all(a <= b + slack for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b - slack for a, b in pairwise(rates[warmup:]))
    assert min(rates) > 0
    assert learning_rate(steps, steps, peak=peak, warmup=warmup) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 400), st.floats(0.05, 1))
def test_the_keep_rate_is_the_formula_and_ends_on_the_target(epochs: int, target: float) -> None:
    rates = [keep_rate(epoch, epochs, target) for epoch in range(epochs)]
    formula = [(1 - target) / 2 * math.cos(math.pi * (e + 1) / epochs) + (1 + target) / 2 for e in range(epochs)]
    assert rates == pytest.approx(formula)
    assert rates[-1] == pytest.approx(target)
    assert keep_rate(epochs + 7, epochs, target) == pytest.approx(target)


def test_the_threshold_is_the_kth_largest_mean() -> None:
    means = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    assert [threshold(means, rate) for rate in (0.2, 0.4, 0.41, 0.6, 1.0, 0.0)] == [0.9, 0.7, 0.5, 0.5, 0.1, 0.9]


@pytest.mark.parametrize(("channels", "rate", "k"), [(5, 0.6, 3), (10, 0.1 + 0.2, 3), (80, 0.35, 28), (16, 0.55, 9)])
def test_rounding_keeps_no_channel_too_many(channels: int, rate: float, k: int) -> None:
    means = np.arange(channels, 0, -1.0)
    assert threshold(means, rate) == means[k - 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.integers(0, 10_000))
def test_between_ranks_the_threshold_moves_continuously_and_meets_the_rule_on_them(channels: int, seed: int) -> None:
    means = np.random.default_rng(seed).random(channels)
    for k in range(1, channels + 1):
        assert continuous_threshold(means, k / channels) == pytest.approx(threshold(means, k / channels))
    values = [continuous_threshold(means, rate) for rate in np.linspace(0, 2, 50)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0


@settings(max_examples=20, deadline=None)
@given(st.floats(10e6, 40.8e6), st.integers(0, 50))
def test_a_budget_is_met_on_the_images_it_was_set_on(budget: float, seed: int) -> None:
    graph = with_gates(resnet(20))
    generator = np.random.default_rng(seed)
    saliencies = {
        gate: (generator.random((200, channels)) + generator.random(channels)).astype(np.float32)
        for gate, channels in graph.gate_channels.items()
    }
    means = {name: value.mean(0) for name, value in saliencies.items()}
    chosen = continuous_thresholds(means, rate_for_budget(graph, saliencies, budget))
    kept = {name: value > np.float32(chosen[name]) for name, value in saliencies.items()}
    assert macs_per_image(graph, kept).mean() == pytest.approx(budget, rel=2e-3)


def test_one_rate_keeps_its_share_of_every_gate() -> None:
    generator = np.random.default_rng(0)
    saliencies = {name: np.tile(generator.permutation(np.arange(1.0, c + 1)), (3, 1)) for name, c in GATES.items()}
    for name, value in thresholds_for_rate(saliencies, 0.5).items():
        # Constant saliencies: kept are the channels above the k-th largest, the k-th itself is not above itself.
        assert (saliencies[name] > value).sum(1).tolist() == [GATES[name] // 2 - 1] * 3


GATES = {"a": 16, "b": 32, "c": 64}
