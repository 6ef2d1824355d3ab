"""Which gate governs a value: what its closed channels let us skip, derived from how each op passes channels on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from manidp.graph.ops import Input, Linear, Multiply, Node, Select

if TYPE_CHECKING:
    from manidp.graph.graph import Graph


def zeroed_by(graph: Graph) -> Mapping[str, str]:
    """value -> the gate whose closed channels are exactly 0 in it: reading those channels can be skipped."""
    zeroed: dict[str, str] = {}
    for node in graph.nodes:
        gate = graph.select_of(node)
        if gate is None and isinstance(node, Multiply):  # zero times anything
            gate = zeroed.get(node.inputs[0]) or zeroed.get(node.inputs[1])
        if gate is None and _follows(graph, node) and node.keeps_zero:
            gate = zeroed.get(node.inputs[0])
        if gate is not None:
            zeroed[node.name] = gate
    return zeroed


def wanted_by(graph: Graph) -> Mapping[str, str]:
    """value -> the gate that scales all that is computed from it: channels that it closes need not be computed."""
    wanted: dict[str, str] = {}
    for node in reversed(graph.nodes):
        gates = {_wanted_through(graph, reader, node.name, wanted) for reader in graph.readers[node.name]}
        gate = gates.pop() if len(gates) == 1 and node.name != graph.output else None
        if gate is not None:
            wanted[node.name] = gate
    return wanted


def heads(graph: Graph) -> frozenset[str]:
    """The nodes that serve gates alone: everything made of them goes into a Select, and nowhere else."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        readers = graph.readers[node.name]
        serves = all(isinstance(reader, Select) or reader.name in found for reader in readers)
        if readers and serves and node.name != graph.output and not isinstance(node, (Input, Select)):
            found.add(node.name)
    return frozenset(found)


def scorers(graph: Graph) -> frozenset[str]:
    """The last Linear node before each Select, elementwise nodes between them passed over."""
    found: set[str] = set()
    for gate in graph.gates:
        node = graph.by_name[gate.inputs[0]]
        while not isinstance(node, Linear) and len(node.inputs) == 1 and node.name in graph.heads:
            node = graph.by_name[node.inputs[0]]
        if isinstance(node, Linear) and node.name in graph.heads:
            found.add(node.name)
    return frozenset(found)


def _wanted_through(graph: Graph, reader: Node, value: str, wanted: Mapping[str, str]) -> str | None:
    if isinstance(reader, Multiply) and reader.inputs[0] == value != reader.inputs[1]:
        return graph.select_of(reader)
    return wanted.get(reader.name) if _follows(graph, reader) else None


def _follows(graph: Graph, node: Node) -> bool:
    """Whether channel c of what the node makes depends on channel c of its one input alone."""
    return len(node.inputs) == 1 and node.channel_flow(*graph.input_shapes(node)) == "own"
