"""What the thresholds of a training aim at: a keep rate, or a budget of multiply-adds that they follow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Graph
from manidp.graph.macs import least_and_most_macs, macs_per_image, ungated_macs
from manidp.training.importance import Channels, taylor_shares
from manidp.training.recipe import Recipe
from manidp.training.schedule import (
    continuous_thresholds,
    keep_rate,
    kept_by,
    rate_for_budget,
    shares_of,
    thresholds_for_budget,
    thresholds_for_rate,
)

Saliencies = Mapping[str, NDArray[np.float32]]  # gate -> (images, C)
Thresholds = dict[str, float]


class Target:
    """The target of a resolved recipe; every method gives thresholds to set, none where they stay as they are.

    ``rate``: the keep rate that the budget asks for, found anew after each epoch; None before, and without a budget.
    ``shares``: what each gate keeps where the rate is 1 (``schedule.continuous_thresholds``); none: all keep alike.
    """

    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        self.graph = graph
        self.keep_rate = None if recipe.keep_rate is None else float(recipe.keep_rate)
        self.budget = None if recipe.macs_budget is None else float(recipe.macs_budget)
        self.reach = max(1, round(recipe.reach * recipe.epochs))  # epochs
        self.rate: float | None = None
        self.shares: Mapping[str, float] = {}
        if self.budget is not None:
            self.full = float(least_and_most_macs(graph)[1])
            self.aim = self.full if self.budget >= ungated_macs(graph) else self.budget  # all of the network is all

    def at_first(self, saliencies: Saliencies, thresholds: Mapping[str, float]) -> Thresholds:
        """For the budget itself before the first epoch, on training images; none where scores are all alike.

        Gates go on with the shares that they keep with ``thresholds``, the start's.
        """
        if self.budget is None or not all(np.ptp(mean) > 0 for mean in _means(saliencies).values()):
            return {}
        self.shares = shares_of(saliencies, thresholds)
        return self._at(self.aim, saliencies)

    def after_epoch(self, epoch: int, saliencies: Saliencies, worth: Channels | None = None) -> Thresholds:
        """For the next epoch, on saliencies of the last images of this one, and what each channel was worth in it."""
        if epoch == 0 and worth is None:  # the gates are still nearly constant and say nothing
            return {}
        if self.keep_rate is not None:
            return thresholds_for_rate(saliencies, keep_rate(epoch, self.reach, self.keep_rate))
        if self.budget is None:
            return {}
        budget = self.full * keep_rate(epoch, self.reach, self.aim / self.full)
        if worth is not None and (epoch < self.reach or not self.shares):
            self.shares = taylor_shares(self.graph, worth, budget)
        return self._at(budget, saliencies)

    def _at(self, budget: float, saliencies: Saliencies) -> Thresholds:
        self.rate = rate_for_budget(self.graph, saliencies, budget, self.shares)
        return self.follow(saliencies)

    def follow(self, saliencies: Saliencies) -> Thresholds:
        """For the budget's rate in force, on the saliencies of the last steps.

        Departs: the reference sets thresholds once an epoch. Saliencies drift meanwhile, and while gates are nearly
        constant a small drift closes twice the channels that the budget asks for.
        """
        assert self.rate is not None
        return continuous_thresholds(_means(saliencies), self.rate, self.shares)

    def at_last(self, saliencies: Saliencies) -> Thresholds:
        """For the budget itself, on training images; a keep rate's thresholds stay those of the last epoch."""
        if self.budget is None:
            return {}
        return thresholds_for_budget(self.graph, saliencies, self.aim, self.shares)

    def met(self, macs: float) -> bool:
        """Whether so many multiply-adds are the budget within a fifth of a percent."""
        return self.budget is not None and abs(macs / self.aim - 1) <= 0.002

    def missed(self, macs: float) -> str | None:
        """A line if ``macs``, the mean multiply-adds of training images, are more than 1 % beside the budget."""
        if self.budget is None or abs(macs / self.budget - 1) <= 0.01:
            return None
        return (
            f"the budget of {self.budget / 1e6:.4g}M multiply-adds is missed by {macs / self.budget - 1:+.1%}: "
            f"training images take {macs / 1e6:.4g}M on average; train longer, or give another budget"
        )


def mean_macs(graph: Graph, saliencies: Saliencies, thresholds: Mapping[str, float]) -> float:
    """Mean multiply-adds of images with these saliencies under these thresholds."""
    return float(macs_per_image(graph, kept_by(saliencies, thresholds)).mean())


def _means(saliencies: Saliencies) -> dict[str, NDArray[np.float32]]:
    return {name: value.mean(0) for name, value in saliencies.items()}
