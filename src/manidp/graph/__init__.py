"""A network as data: ops that know their own rules (``ops``), and the graph that they make (``graph``)."""

from manidp.graph.graph import Graph, graph_from_json, with_classes
from manidp.graph.ops import (
    OPS,
    Activation,
    ActivationKind,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Input,
    Linear,
    Multiply,
    Node,
    Pool,
    PoolKind,
    Scatter,
    Select,
    Shape,
    Shuffle,
    Slice,
    pair,
    sides,
)

__all__ = [
    "OPS", "Activation", "ActivationKind", "Add", "BatchNorm", "Clip", "Concat", "Conv", "Flatten", "GlobalPool",
    "Graph", "Input", "Linear", "Multiply", "Node", "Pool", "PoolKind", "Scatter", "Select", "Shape",
    "Shuffle", "Slice", "graph_from_json", "pair", "sides", "with_classes",
]  # fmt: skip
