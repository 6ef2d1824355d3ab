"""What checkpoints of version 1 called a Gate, as the ops that it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from manidp.errors import GraphError
from manidp.gating.manidp import SALIENCY_MAX, head
from manidp.graph import OPS, Graph, Node
from manidp.graph.json import nodes_from_json


@dataclass(frozen=True, kw_only=True)
class Gate(Node):
    """Pool, two linear layers, clip and threshold in one node."""

    channels: int
    hidden: int
    saliency_max: float = SALIENCY_MAX


def graph_of_version_1(data: object) -> Graph:
    """The graph that version 1 described, gates written out; everything is checked, GraphError says what is wrong."""
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or not isinstance(data.get("output"), str):
        raise GraphError("a graph is an object with a list 'nodes' and the name of a node, 'output'")
    nodes = nodes_from_json(data["nodes"], {**OPS, "Gate": Gate})
    return Graph(tuple(_written_out(nodes)), data["output"])


def _written_out(nodes: tuple[Node, ...]) -> Iterable[Node]:
    taken = {node.name for node in nodes}
    for node in nodes:
        if not isinstance(node, Gate):
            yield node
            continue
        if len(node.inputs) != 1 or min(node.channels, node.hidden) < 1 or node.saliency_max <= 0:
            raise GraphError(f"gate '{node.name}' needs one input and positive sizes")
        names: dict[str, str] = {}
        for part in head(node.name, node.inputs[0], node.channels, node.hidden, node.saliency_max):
            name = part.name
            while name in taken and name != node.name:
                name += "_"  # parameters are called as before only where the name was free; a clash is refused below
            names[part.name] = name
            taken.add(name)
            yield replace(part, name=name, inputs=tuple(names.get(source, source) for source in part.inputs))
