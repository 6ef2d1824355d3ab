"""What is planned so far: steps, constants, vectors, pooled sums and lists, and what steps ask of a graph's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manidp.engine.kernels.pointwise import ResetPooled
from manidp.engine.kernels.select import ListChannels
from manidp.engine.memory import Constants
from manidp.engine.steps import Channels, MapKey, Step, VectorKey, lengthened
from manidp.graph import BatchNorm, GlobalPool, Graph, Node, PoolKind

Array = NDArray[Any]


@dataclass(eq=False, repr=False)
class Draft:
    """A plan being made, for vectors of ``lanes`` elements."""

    graph: Graph
    weights: Mapping[str, Array]
    lanes: int
    steps: list[Step] = field(default_factory=list)
    constants: Constants = field(default_factory=Constants)
    vectors: dict[VectorKey, int] = field(default_factory=dict)  # sizes in floats
    pooled: dict[VectorKey, VectorKey] = field(default_factory=dict)  # partial sums of a value -> what holds them
    listed: dict[bytes, VectorKey] = field(default_factory=dict)  # numbers of what governs channels -> those kept

    def vector(self, key: VectorKey, size: int) -> VectorKey:
        """The vector, which now has a place of ``size`` floats."""
        self.vectors[key] = size
        return key

    def partial_sums(self, name: str, kind: PoolKind) -> None:
        """Give the pooled sums of a map a vector for each of its channels."""
        sums = VectorKey(name, kind)
        self.pooled[sums] = self.vector(sums, self.graph.shapes[name][0] * self.lanes)

    def reset_sums(self, frame: MapKey, kind: PoolKind, channels: Channels, left: Channels | None = None) -> None:
        """Begin anew with the pooled sums of these channels of a map; see ``ResetPooled``."""
        self.steps.append(ResetPooled(self.pooled[VectorKey(frame.node, kind)], frame, channels, left))

    def pool_anew(self, frame: MapKey) -> None:
        """Vectors for all pooled sums of a map, begun anew in every channel."""
        for kind in self.pooled_kinds(frame.node):
            self.partial_sums(frame.node, kind)
            self.reset_sums(frame, kind, Channels(self.graph.shapes[frame.node][0]))

    def pooled_kinds(self, name: str) -> list[PoolKind]:
        """How the map is pooled by its readers."""
        return sorted({reader.kind for reader in self.graph.readers[name] if isinstance(reader, GlobalPool)})

    def pooled_sums(self, name: str) -> tuple[VectorKey, ...]:
        """What holds the pooled sums of the map, one for each kind."""
        return tuple(self.pooled[VectorKey(name, kind)] for kind in self.pooled_kinds(name))

    def channels(self, value: str, part: Literal["read", "made"]) -> Channels:
        """The channels of a value that need be read, or made: all but those that gates close."""
        count = self.graph.shapes[value][0]
        numbers = (self.graph.zeroed if part == "read" else self.graph.wanted).get(value)
        if numbers is None:
            return Channels(count)
        key = self.listed.get(numbers.tobytes())
        if key is None:
            key = self.listed[numbers.tobytes()] = self.vector(VectorKey(value, part), 2 * count + 1)
            self.steps.append(ListChannels(key, count, self.constants.add(numbers.astype(np.int32))))
        return Channels(count, key)

    def parameter(self, node: Node, array: Array) -> int:
        """Offset of numbers of a node among the constants."""
        return self.constants.add(array, owner=f"node '{node.name}'")

    def row(self, node: Node, array: Array) -> int:
        """The same with whole vectors of them."""
        return self.parameter(node, lengthened(array, self.lanes))

    def weight(self, node: Node, name: str) -> Array:
        """A parameter of a node."""
        return np.asarray(self.weights[f"{node.name}.{name}"])

    def affine(self, node: BatchNorm) -> tuple[Array, Array]:
        """Scale and shift (C,) of a batch norm."""
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        gamma, beta, mean, variance = (self.weight(node, name).astype(np.float64) for name in names)
        scale = gamma / np.sqrt(variance + node.eps)
        return scale, beta - mean * scale
