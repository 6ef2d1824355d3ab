"""Multiply-adds of a graph: dense, and for each image given the channels that its gates kept.

One multiply-add counts 1. Counted are convolutions, linear layers and the two linear layers inside every gate; batch
norm (folded), activations, additions, pooling and the scaling by a gate are not. A convolution costs, in each of its
groups, kept outputs x kept inputs x kernel^2 x output positions; linear layers and gates always cost their full size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import overload

import numpy as np
from numpy.typing import NDArray

from manidp.errors import GraphError, some
from manidp.graph import Conv, Gate, Graph, Linear

Kept = Mapping[str, NDArray[np.bool_]]
COUNTED = (Conv, Linear, Gate)


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
        return {node.name: node.macs(*graph.input_shapes(node)) for node in graph.nodes if isinstance(node, COUNTED)}
    return _per_image(graph, kept, _batch(graph, kept))


def dense_macs(graph: Graph) -> int:
    """Multiply-adds of one image with every channel kept, gates included."""
    return sum(node_macs(graph).values())


def ungated_macs(graph: Graph) -> int:
    """Multiply-adds of one image in the same network without its gates: what pruning is compared with."""
    macs = node_macs(graph)
    return sum(macs.values()) - sum(macs[gate.name] for gate in graph.gates)


def macs_per_image(graph: Graph, kept: Kept) -> NDArray[np.int64]:
    """(B,) multiply-adds of each image, given ``kept``: gate name -> (B, C) bool, for every gate of the graph.

    A graph without gates costs every image the same; its batch is unknown, so the answer is one number, shape (1,).
    """
    batch = _batch(graph, kept)
    return sum(_per_image(graph, kept, batch).values(), start=np.zeros(batch, dtype=np.int64))


def _batch(graph: Graph, kept: Kept) -> int:
    batches = set()
    for gate in graph.gates:
        if gate.name not in kept:
            raise GraphError(f"the kept channels of gate '{gate.name}' are needed; got {some(kept) or 'none'}")
        shape = kept[gate.name].shape
        if len(shape) != 2 or shape[1] != gate.channels:
            raise GraphError(f"kept channels of gate '{gate.name}' have shape (B, {gate.channels}); got {shape}")
        batches.add(shape[0])
    if len(batches) > 1:
        raise GraphError(f"kept channels come from batches of different sizes: {sorted(batches)}")
    return batches.pop() if batches else 1


def _per_image(graph: Graph, kept: Kept, batch: int) -> dict[str, NDArray[np.int64]]:
    macs = {}
    for node in graph.nodes:
        if isinstance(node, Conv):
            macs[node.name] = _conv(graph, node, kept, batch)
        elif isinstance(node, COUNTED):
            macs[node.name] = np.full(batch, node.macs(*graph.input_shapes(node)), dtype=np.int64)
    return macs


def _conv(graph: Graph, node: Conv, kept: Kept, batch: int) -> NDArray[np.int64]:
    source = node.inputs[0]
    counts = []  # per image and group: how many inputs are read, how many outputs are made
    for value, gate in ((source, graph.zeroed_by.get(source)), (node.name, graph.wanted_by.get(node.name))):
        channels = graph.shapes[value][0]
        mask = np.ones((batch, channels), dtype=bool) if gate is None else kept[gate]
        counts.append(mask.reshape(batch, node.groups, channels // node.groups).sum(axis=2, dtype=np.int64))
    _, *positions = graph.shapes[node.name]
    pairs: NDArray[np.int64] = (counts[0] * counts[1]).sum(axis=1)
    return pairs * node.kernel**2 * math.prod(positions)
