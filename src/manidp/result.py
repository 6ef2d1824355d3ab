"""The result of running a network, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Graph
from manidp.graph.macs import macs_per_image

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Result:
    """What a network says about a batch of B images, and what it spent on each.

    logits: (B, classes). gate_values: (B, channels of all gates), gate after gate, 0 where a channel is closed.
    """

    graph: Graph
    logits: Array
    gate_values: Array

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
        """(B,) multiply-adds of each image, gates included."""
        return np.broadcast_to(macs_per_image(self.graph, self.kept), len(self.logits)).copy()
