"""The result of running a network, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Graph

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Result:
    """What a network says about a batch of B images, and what it spent on each.

    logits: (B, classes). gate_values: (B, channels of all gates), gate after gate, 0 where a channel is closed.
    Of a cascade both are those of the last pass that an image had; ``went_on`` (B,) bool: which images had two, and
    ``macs_before`` (B,): the multiply-adds of their first, 0 for the others. Both are None for a single pass.
    """

    graph: Graph
    logits: Array
    gate_values: Array
    went_on: NDArray[np.bool_] | None = None
    macs_before: NDArray[np.int64] | None = None

    @cached_property
    def gates(self) -> dict[str, Array]:
        """Gate name -> (B, C)."""
        channels = self.graph.gate_channels
        parts = np.split(self.gate_values, np.cumsum(list(channels.values()))[:-1], axis=1)
        return dict(zip(channels, parts, strict=False))

    @cached_property
    def kept(self) -> dict[str, NDArray[np.bool_]]:
        """Gate name -> (B, C) bool, gate > 0."""
        return {name: gate > 0 for name, gate in self.gates.items()}

    @cached_property
    def macs(self) -> NDArray[np.int64]:
        """(B,) multiply-adds of each image, gates included, of both passes of a cascade."""
        open_ = np.ones((len(self.logits), self.gate_values.shape[1] + 1), bool)
        np.greater(self.gate_values, 0, out=open_[:, :-1])
        last = self.graph.counters.total(open_)
        return last if self.macs_before is None else last + self.macs_before

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """(B,) probability of the most probable class, 0..1."""
        most: NDArray[np.float64] = probabilities(self.logits).max(axis=1)
        return most


def probabilities(logits: Array) -> NDArray[np.float64]:
    """Softmax over the classes: (B, classes) -> (B, classes), rows add up to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return shares
