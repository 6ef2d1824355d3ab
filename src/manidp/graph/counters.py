"""How the channels that gates leave open make the multiply-adds of a graph: a sum over pairs of counts.

A node that skips closed channels costs, in each of its groups, kept inputs x kept outputs x a constant. All counts of a
batch are one sum over segments, all nodes one product: what a server computes for every batch must be cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from manidp.graph.graph import Graph

Numbers = NDArray[np.intp]
_PIECE = 2**20  # numbers held at a time


@dataclass(frozen=True, eq=False)
class Counters:
    """Which channels are counted together, and which counts are multiplied. Of a batch they want ``macs.opened``.

    numbers: channels of gates by number (-1: always open), the segments of one count after another from ``starts`` on.
    ``read``, ``made`` and ``each``: the two counts of a pair, and multiply-adds for one of each. ``nodes``: those whose
    cost depends on gates; the pairs of each begin at ``first``. ``always``: multiply-adds of all other nodes.
    """

    nodes: tuple[str, ...]
    first: Numbers
    numbers: Numbers
    starts: Numbers
    read: Numbers
    made: Numbers
    each: NDArray[np.int64]
    always: int

    def by_node(self, open_: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(B, nodes) multiply-adds."""
        found = [np.add.reduceat(pairs, self.first, axis=1) for pairs in self._pairs(open_)] if self.nodes else []
        return np.concatenate(found) if found else np.zeros((len(open_), 0), np.int64)

    def total(self, open_: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(B,) multiply-adds of all nodes."""
        found = [pairs.sum(axis=1) for pairs in self._pairs(open_)] if self.nodes else [np.zeros(len(open_), np.int64)]
        return np.concatenate([np.zeros(0, np.int64), *found]) + self.always

    def saved(self, open_: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each channel what closing it saves where all are open for these shares of images, (channels + 1,)."""
        counts = np.add.reduceat(open_[self.numbers], self.starts)
        of_counts, of_channels = np.zeros(len(counts)), np.zeros(len(open_))
        np.add.at(of_counts, self.read, self.each * counts[self.made])
        np.add.at(of_counts, self.made, self.each * counts[self.read])
        sizes = np.diff(self.starts, append=len(self.numbers))
        np.add.at(of_channels, self.numbers, np.repeat(of_counts, sizes))
        return of_channels

    def _pairs(self, open_: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
        images = max(1, _PIECE // max(len(self.numbers), len(self.each)))
        for at in range(0, len(open_), images):
            counts = np.add.reduceat(open_[at : at + images, self.numbers], self.starts, axis=1, dtype=np.int64)
            yield counts[:, self.read] * counts[:, self.made] * self.each


def counters(graph: Graph) -> Counters:
    """Those of a graph."""
    places: dict[tuple[bytes, int], int] = {}  # a value's governing numbers and groups -> its first count
    segments: list[Numbers] = []
    nodes: list[str] = []
    first: list[int] = []
    read: list[int] = []
    made: list[int] = []
    each: list[int] = []
    always = 0

    def place(by: Numbers, groups: int) -> int:
        key = by.tobytes(), groups
        if key not in places:
            places[key] = len(segments)
            segments.extend(by.reshape(groups, -1))
        return places[key]

    for node, shapes, count in graph.computing:
        pair = node.pair_macs(*shapes)
        by = graph.zeroed.get(node.inputs[0]), graph.wanted.get(node.name)
        if pair is None or (by[0] is None and by[1] is None):
            always += count
            continue
        groups, cost = pair
        channels = shapes[0][0], graph.shapes[node.name][0]
        full = [np.full(size, -1) if numbers is None else numbers for numbers, size in zip(by, channels, strict=True)]
        nodes.append(node.name)
        first.append(len(each))
        for counted, numbers in zip((read, made), full, strict=True):
            at = place(numbers, groups)
            counted.extend(range(at, at + groups))
        each.extend([cost] * groups)
    starts = np.cumsum([0, *map(len, segments)])[:-1]
    return Counters(
        tuple(nodes), _numbers(first), np.concatenate([_numbers([]), *segments]), starts, _numbers(read),
        _numbers(made), np.asarray(each, np.int64), always,
    )  # fmt: skip


def _numbers(of: list[int]) -> Numbers:
    return np.asarray(of, np.intp)
