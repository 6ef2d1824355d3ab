"""Multiply-adds of a graph: dense, and for each image given the channels that its gates kept.

One multiply-add counts 1. Each op says what it costs (``Node.macs``): convolutions, in each of their groups, kept
outputs x kept inputs x kernel area x output positions; linear layers, those of the gates too, always their full size.
Batch norm (folded), activations, additions, pooling and the scaling by a gate are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from manidp.errors import GraphError, some
from manidp.graph import Graph

Kept = Mapping[str, NDArray[np.bool_]]


@overload
def node_macs(graph: Graph) -> dict[str, int]: ...
@overload
def node_macs(graph: Graph, kept: Kept) -> dict[str, NDArray[np.int64]]: ...
def node_macs(graph: Graph, kept: Kept | None = None) -> dict[str, int] | dict[str, NDArray[np.int64]]:
    """Multiply-adds of every node that does any.

    Without ``kept``, everything is computed: one number a node. With ``kept`` (gate name -> (B, C) bool, all gates),
    a (B,) int64 array a node. Raises GraphError if a gate is missing or a shape is not (B, channels of the gate).
    """
    if kept is None:
        return {node.name: count for node, _, count in graph.computing}
    open_, counters = opened(graph, kept, _batch(graph, kept)), graph.counters
    own = dict(zip(counters.nodes, counters.by_node(open_).T, strict=True))
    full = {node.name: np.full(len(open_), count, np.int64) for node, _, count in graph.computing}
    return full | own


def dense_macs(graph: Graph) -> int:
    """Multiply-adds of one image with every channel kept, gates included."""
    return sum(node_macs(graph).values())


def ungated_macs(graph: Graph) -> int:
    """Multiply-adds of one image in the same network without its gates: what pruning is compared with."""
    return dense_macs(graph) - gate_macs(graph)


def gate_macs(graph: Graph) -> int:
    """Multiply-adds that one image spends on deciding: those of the gates' own layers."""
    return sum(macs for name, macs in node_macs(graph).items() if name in graph.heads)


def macs_per_image(graph: Graph, kept: Kept) -> NDArray[np.int64]:
    """(B,) multiply-adds of each image, given ``kept``: gate name -> (B, C) bool, for every gate of the graph.

    A graph without gates costs every image the same; its batch is unknown, so the answer is one number, shape (1,).
    """
    return graph.counters.total(opened(graph, kept, _batch(graph, kept)))


def layers(graph: Graph) -> list[dict[str, Any]]:
    """The nodes in order, as JSON data: name, op, shape of the value and multiply-adds of one image."""
    macs = node_macs(graph)
    return [
        {"name": node.name, "op": type(node).__name__, "shape": list(graph.shapes[node.name]),
         "macs": macs.get(node.name, 0)}
        for node in graph.nodes
    ]  # fmt: skip


def least_and_most_macs(graph: Graph) -> tuple[int, int]:
    """Multiply-adds of an image for which all gates close every channel, and of one for which none closes any."""
    kept = {gate: np.repeat([[False], [True]], count, axis=1) for gate, count in graph.gate_channels.items()}
    macs = macs_per_image(graph, kept)
    return int(macs[0]), int(macs[-1])


def _batch(graph: Graph, kept: Kept) -> int:
    batches = set()
    for gate, channels in graph.gate_channels.items():
        if gate not in kept:
            raise GraphError(f"the kept channels of gate '{gate}' are needed; got {some(kept) or 'none'}")
        shape = kept[gate].shape
        if len(shape) != 2 or shape[1] != channels:
            raise GraphError(f"kept channels of gate '{gate}' have shape (B, {channels}); got {shape}")
        batches.add(shape[0])
    if len(batches) > 1:
        raise GraphError(f"kept channels come from batches of different sizes: {sorted(batches)}")
    return batches.pop() if batches else 1


def opened(graph: Graph, kept: Kept, batch: int = 1) -> NDArray[np.bool_]:
    """(B, channels of all gates + 1) what is open, by its number (``Graph.zeroed``): number -1, the last, always is."""
    return np.concatenate([*(kept[gate] for gate in graph.gate_channels), np.ones((batch, 1), bool)], axis=1)
