"""What changes over a training: learning rate, keep rate, budget, thresholds. Pure functions, no torch state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Graph
from manidp.graph.macs import macs_per_image

OPEN = 2.0  # the keep rate, with continuous thresholds, of a gate that closes nothing of a positive saliency
EVEN: Mapping[str, float] = MappingProxyType({})  # every gate keeps the same share of its channels


def learning_rate(step: int, steps: int, *, peak: float, warmup: int = 0) -> float:
    """Linear rise over ``warmup`` steps, then half a cosine down to 0 at ``steps``; step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def keep_rate(epoch: int, epochs: int, target: float) -> float:
    """r(e) = (1 - t) / 2 * cos(pi * (e + 1) / E) + (1 + t) / 2: from 1 down to t, reached in the last of E epochs."""
    return (1 - target) / 2 * math.cos(math.pi * min(epoch + 1, epochs) / epochs) + (1 + target) / 2


def threshold(mean_saliency: NDArray[np.floating], rate: float) -> float:
    """The k-th largest of the channels' mean saliencies (C,), k = ceil(rate * C), at least 1.

    Departs: rate * C is freed of rounding first; else 0.6 * 5 = 3.0000000000000004 would count as 4.
    """
    ordered = np.sort(np.asarray(mean_saliency, dtype=np.float64))[::-1]
    k = math.ceil(rate * len(ordered) - 1e-9)
    return float(ordered[min(max(k, 1), len(ordered)) - 1])


def continuous_threshold(mean_saliency: NDArray[np.floating], rate: float) -> float:
    """``threshold`` made continuous, so that a budget can be met exactly.

    Equal to it wherever rate * C is whole, linear between; from rate 1 on it falls to 0, reached at rate 2: the least
    mean saliency still closes its channel for half of the images, 0 keeps whatever is positive.
    """
    return float(np.interp(rate, *_curve(mean_saliency)))


def rate_of_threshold(mean_saliency: NDArray[np.floating], threshold: float) -> float:
    """The rate 0..2 of a ``continuous_threshold``; of one above all mean saliencies that of the greatest of them."""
    if threshold <= 0:
        return OPEN
    rates, thresholds = _curve(mean_saliency)
    return float(np.interp(threshold, thresholds[::-1], rates[::-1]))


def _curve(mean_saliency: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates, rising, and their continuous thresholds: linear between them."""
    ordered = np.sort(np.asarray(mean_saliency, dtype=np.float64))[::-1]
    ranks = np.arange(1, len(ordered) + 1) / len(ordered)
    return np.append(ranks, OPEN), np.append(ordered, 0.0)


def shares_of(saliencies: Mapping[str, NDArray[np.floating]], thresholds: Mapping[str, float]) -> dict[str, float]:
    """What every gate keeps with these thresholds, as ``continuous_thresholds`` takes it; saliencies (images, C_l)."""
    return {gate: rate_of_threshold(value.mean(0), thresholds[gate]) for gate, value in saliencies.items()}


def kept_by(
    saliencies: Mapping[str, NDArray[np.floating]], thresholds: Mapping[str, float]
) -> dict[str, NDArray[np.bool_]]:
    """Which channels of which images these thresholds leave open; saliencies (images, C_l) under the gates' names."""
    return {name: value > np.float32(thresholds[name]) for name, value in saliencies.items()}


def thresholds_for_rate(saliencies: Mapping[str, NDArray[np.floating]], rate: float) -> dict[str, float]:
    """Every gate's threshold for one keep rate; saliencies (images, C_l) under the gates' names."""
    return {name: threshold(value.mean(0), rate) for name, value in saliencies.items()}


def rate_for_budget(
    graph: Graph, saliencies: Mapping[str, NDArray[np.floating]], budget: float, shares: Mapping[str, float] = EVEN
) -> float:
    """The one keep rate under whose continuous thresholds these images take ``budget`` MACs on average; by bisection.

    saliencies (images, C_l) under the gates' names; shares: see ``continuous_thresholds``. Exact as far as saliencies
    do not change with the thresholds of earlier gates; repeat on fresh ones to converge.
    """
    means = {name: value.mean(0) for name, value in saliencies.items()}
    low, high = 0.0, OPEN
    for _ in range(24):
        rate = (low + high) / 2
        chosen = continuous_thresholds(means, rate, shares)
        if macs_per_image(graph, kept_by(saliencies, chosen)).mean() > budget:
            high = rate
        else:
            low = rate
    return low


def thresholds_for_budget(
    graph: Graph, saliencies: Mapping[str, NDArray[np.floating]], budget: float, shares: Mapping[str, float] = EVEN
) -> dict[str, float]:
    """Every gate's continuous threshold for the keep rate under which these images take ``budget`` MACs on average."""
    means = {name: value.mean(0) for name, value in saliencies.items()}
    return continuous_thresholds(means, rate_for_budget(graph, saliencies, budget, shares), shares)


def continuous_thresholds(
    means: Mapping[str, NDArray[np.floating]], rate: float, shares: Mapping[str, float] = EVEN
) -> dict[str, float]:
    """Every gate's continuous threshold for one keep rate 0..2; means (C_l,) under the gates' names.

    shares: each gate's own keep rate where ``rate`` is 1; below and above, all move to 0 and 2 in proportion. Those
    that are not given are 1, so that without them all gates have the one rate.
    """
    return {name: continuous_threshold(mean, _own_rate(shares.get(name, 1.0), rate)) for name, mean in means.items()}


def _own_rate(share: float, rate: float) -> float:
    return share * rate if rate <= 1 else share + (OPEN - share) * (rate - 1)
