"""Steps on vectors: layers on pooled values, what a gate decides, and elementwise operations."""

from __future__ import annotations

import math

import numpy as np

from manidp.engine.draft import Array, Draft
from manidp.engine.kernels import linear
from manidp.engine.kernels.norm import NormaliseVector
from manidp.engine.kernels.pointwise import Reduce
from manidp.engine.kernels.select import Decide
from manidp.engine.kernels.vector import VectorOp
from manidp.engine.steps import MapKey, VectorKey, applied
from manidp.errors import UnsupportedError
from manidp.graph import (
    Add,
    BatchNorm,
    Concat,
    LayerNorm,
    Multiply,
    Node,
    PoolKind,
    PReLU,
    Scatter,
    Select,
    Shuffle,
    Slice,
)


def reduce_pooled(draft: Draft, frame: MapKey, kind: PoolKind, target: VectorKey) -> None:
    """The average or the maximum of a map, from its pooled sums."""
    channels, *size = draft.graph.shapes[frame.node]
    factor = 1 / math.prod(size) if kind == "average" else 1.0
    sums = draft.pooled[VectorKey(frame.node, kind)]
    draft.steps.append(Reduce(sums, frame, draft.vector(target, channels), channels, factor))


def select(draft: Draft, node: Select) -> None:
    """What a gate decides, and the list of the channels that it keeps."""
    (channels,) = draft.graph.shapes[node.name]
    draft.vector(VectorKey(node.name), channels)
    kept = draft.vector(VectorKey(node.name, "list"), 2 * channels + 1)
    draft.listed[draft.graph.gate_numbers[node.name].tobytes()] = kept
    limit = draft.constants.add(draft.weight(node, "threshold") if node.rule == "threshold" else np.zeros(1))
    mask = None if node.rule == "threshold" else draft.constants.add(draft.weight(node, "mask"))
    draft.steps.append(Decide(node, VectorKey(node.inputs[0]), channels, limit, mask))


def multiply(draft: Draft, node: Node, weight: Array, bias: Array) -> None:
    """A matrix (outputs, inputs) times what the node reads, and a bias (outputs,)."""
    source, target = VectorKey(node.inputs[0]), draft.vector(VectorKey(node.name), len(weight))
    outputs, inputs = weight.shape
    at = [draft.constants.add(part, owner=f"node '{node.name}'") for part in linear.pack(weight, bias, draft.lanes)]
    draft.steps.append(linear.MatVec(source, target, inputs, outputs, *at))


def elementwise(draft: Draft, node: Node) -> None:
    """Any other node that makes a vector. Raises UnsupportedError for one that the engine cannot run."""
    (size,) = draft.graph.shapes[node.name]
    target, first, *others = draft.vector(VectorKey(node.name), size), *map(VectorKey, node.inputs)
    if (function := applied(node)) is not None:
        draft.steps.append(VectorOp("apply", first, target, size, function=function))
    elif isinstance(node, PReLU):
        slopes = draft.row(node, draft.weight(node, "slope"))
        draft.steps.append(VectorOp("prelu", first, target, size, slopes))
    elif isinstance(node, BatchNorm):
        scale, shift = (draft.row(node, part) for part in draft.affine(node))
        draft.steps.append(VectorOp("multiply", first, target, size, scale))
        draft.steps.append(VectorOp("add", target, target, size, shift))
    elif isinstance(node, LayerNorm):
        gamma, beta = (draft.row(node, draft.weight(node, part)) for part in ("gamma", "beta"))
        draft.steps.append(NormaliseVector(first, target, size, node.eps, gamma, beta))
    elif isinstance(node, Concat):
        offset = 0
        for source in (first, *others):
            (part,) = draft.graph.shapes[source.node]
            draft.steps.append(VectorOp("copy", source, target, part, offset=offset))
            offset += part
    elif isinstance(node, (Slice, Shuffle, Scatter)):  # as a product with a matrix of zeros and ones
        origin = node.origin(*draft.graph.input_shapes(node))
        chosen = origin[:, None] == np.arange(draft.graph.shapes[node.inputs[0]][0])
        multiply(draft, node, chosen.astype(np.float64), np.zeros(size))
    elif isinstance(node, (Add, Multiply)):
        for other in others:
            draft.steps.append(VectorOp("add" if isinstance(node, Add) else "multiply", first, target, size, other))
            first = target
    else:
        raise UnsupportedError(f"{node}: the engine does not run it on vectors")
