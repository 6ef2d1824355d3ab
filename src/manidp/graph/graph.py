"""A graph of ops that checks itself when it is made, size included; every backend walks the same one.

Everything here takes time in proportion to nodes and edges.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from reprlib import repr as brief
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.errors import GraphError, some
from manidp.graph import channels, json
from manidp.graph.counters import Counters, counters
from manidp.graph.ops import OPS, Input, Linear, Multiply, Node, Select, Shape
from manidp.limits import NAME_LENGTH, Limits


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed; the last one in ``output`` makes the logits.

    Raises GraphError naming the nodes for: no or several inputs, names used twice, an edge to nowhere, a cycle, a
    shape that does not fit, an output that is not a vector.
    """

    nodes: tuple[Node, ...]
    output: str

    def __post_init__(self) -> None:
        limits = Limits.from_environment()
        limits.check("nodes", len(self.nodes), "the graph")
        for node in self.nodes:
            name = node.name
            if not (0 < len(name) <= NAME_LENGTH and name.isprintable() and name == name.strip()):
                raise GraphError(
                    f"a node's name is 1 to {NAME_LENGTH} printable characters, "
                    f"the first and the last no space; got {brief(name)}"
                )
        named = self.by_name
        if len(named) != len(self.nodes):
            twice = sorted(name for name, count in Counter(node.name for node in self.nodes).items() if count > 1)
            raise GraphError(f"every node needs a name of its own; used more than once: {some(twice)}")
        for node in self.nodes:
            low, high = node.arity
            if not low <= len(node.inputs) <= high:
                wanted = str(low) if low == high else f"{low} to {high}"
                raise GraphError(f"{node} takes {wanted} inputs; got {len(node.inputs)}")
            for source in node.inputs:
                if source not in named:
                    raise GraphError(f"node '{node.name}' reads {brief(source)}, which does not exist")
        if self.output not in named:
            raise GraphError(f"the output {brief(self.output)} does not exist")
        inputs = [node.name for node in self.nodes if isinstance(node, Input)]
        if len(inputs) != 1:
            raise GraphError(f"a graph has exactly one Input node; got {len(inputs)}: {some(inputs) or 'none'}")
        object.__setattr__(self, "nodes", _in_order(self.nodes))
        if len(self.shapes[self.output]) != 1:
            raise GraphError(f"the output '{self.output}' must be a vector; it has shape {self.shapes[self.output]}")
        limits.check("weights", sum(map(math.prod, self.parameters.values())), "the graph")
        limits.check("macs", sum(node.macs(*self.input_shapes(node)) for node in self.nodes), "the graph")
        limits.check("map_bytes", sum(4 * math.prod(shape) for shape in self.shapes.values()), "the graph")
        limits.check("live_bytes", self._live_bytes(), "the graph")

    def _live_bytes(self) -> int:
        """The most bytes of values that are still to be read at one time, if each is float32 and freed when it can."""
        last = {source: node.name for node in self.nodes for source in node.inputs}
        live = most = 0
        for node in self.nodes:
            live += 4 * math.prod(self.shapes[node.name])
            most = max(most, live)
            for value in {*node.inputs, node.name}:
                if last.get(value, value) == node.name:
                    live -= 4 * math.prod(self.shapes[value])
        return most

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Every node under its name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every node's value, batch axis left out."""
        limits = Limits.from_environment()
        shapes: dict[str, Shape] = {}
        for node in self.nodes:
            limits.check("window", node.reach, node)
            shapes[node.name] = shape = node.shape(*(shapes[source] for source in node.inputs))
            if len(shape) == 3:
                limits.check("side", max(shape[1:]), node)
            if len(shape) == 3 or isinstance(node, Linear):
                limits.check("channels", shape[0], node)
            limits.check("elements", math.prod(shape), node)
        return shapes

    @cached_property
    def parameters(self) -> Mapping[str, Shape]:
        """Shape of every parameter, thresholds and batch statistics included, under its full name."""
        return {
            f"{node.name}.{name}": shape
            for node in self.nodes
            for name, shape in node.parameters(*self.input_shapes(node)).items()
        }

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value, in order."""
        readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for source in dict.fromkeys(node.inputs):
                readers[source].append(node)
        return {name: tuple(nodes) for name, nodes in readers.items()}

    @cached_property
    def input(self) -> Input:
        """The image node."""
        return next(node for node in self.nodes if isinstance(node, Input))

    @cached_property
    def gates(self) -> tuple[Select, ...]:
        """The Selects in the order in which they are computed (the order of the original's threshold file)."""
        return tuple(node for node in self.nodes if isinstance(node, Select))

    @cached_property
    def thresholds(self) -> tuple[str, ...]:
        """Full names of the thresholds, in the order of the gates."""
        return tuple(f"{gate.name}.threshold" for gate in self.gates if gate.rule == "threshold")

    @cached_property
    def gate_channels(self) -> Mapping[str, int]:
        """How many channels each gate decides on."""
        return {gate.name: self.shapes[gate.name][0] for gate in self.gates}

    @cached_property
    def heads(self) -> frozenset[str]:
        """The nodes that serve gates alone: what makes their scores of the maps that they read."""
        return channels.heads(self)

    @cached_property
    def deciding(self) -> frozenset[str]:
        """The gates, and the nodes that serve them alone."""
        return self.heads | self._gate_names

    @cached_property
    def scorer_of(self) -> Mapping[str, str]:
        """Gate -> the last Linear node before it: what that adds and weighs becomes the gate's scores."""
        return channels.scorers(self)

    @cached_property
    def scorers(self) -> frozenset[str]:
        """The nodes of ``scorer_of``."""
        return frozenset(self.scorer_of.values())

    @cached_property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.shapes[self.output][0]

    @cached_property
    def gate_numbers(self) -> Mapping[str, NDArray[np.intp]]:
        """The channels of all gates are numbered through: the numbers of each gate's own."""
        return channels.numbered(self)

    @cached_property
    def _gate_starts(self) -> Mapping[int, str]:
        return {int(numbers[0]): name for name, numbers in self.gate_numbers.items()}

    @cached_property
    def zeroed(self) -> Mapping[str, NDArray[np.intp]]:
        """value -> (C,) numbers of what closes its channels, -1: nothing. A closed one is 0: it need not be read."""
        return channels.zeroed(self)

    @cached_property
    def wanted(self) -> Mapping[str, NDArray[np.intp]]:
        """value -> (C,) numbers of what scales all that is made of its channels, -1: nothing does.

        Where it is closed, the channel need not be computed.
        """
        return channels.wanted(self)

    @cached_property
    def zeroed_by(self) -> Mapping[str, str]:
        """Of ``zeroed``, the values that one gate governs as a whole, channel by channel -> that gate."""
        return self._governed(self.zeroed)

    @cached_property
    def wanted_by(self) -> Mapping[str, str]:
        """Of ``wanted``, the values that one gate governs as a whole, channel by channel -> that gate."""
        return self._governed(self.wanted)

    def _governed(self, by: Mapping[str, NDArray[np.intp]]) -> dict[str, str]:
        return {value: gate for value, own in by.items() if (gate := self.governor(own)) is not None}

    def governor(self, by: NDArray[np.intp]) -> str | None:
        """The gate that governs a value channel by channel, None if that is not the whole of what governs it.

        by: (C,) numbers of what governs its channels.
        """
        gate = self._gate_starts.get(int(by[0]))
        return gate if gate is not None and np.array_equal(by, self.gate_numbers[gate]) else None

    def select_of(self, node: Node) -> str | None:
        """The gate whose closed channels are zero in what this node makes: it multiplies by that gate."""
        return node.inputs[1] if isinstance(node, Multiply) and node.inputs[1] in self._gate_names else None

    @cached_property
    def _gate_names(self) -> frozenset[str]:
        return frozenset(gate.name for gate in self.gates)

    @cached_property
    def computing(self) -> tuple[tuple[Node, tuple[Shape, ...], int], ...]:
        """The nodes that do multiply-adds, each with the shapes of its inputs and how many it does for one image."""
        found = ((node, self.input_shapes(node)) for node in self.nodes)
        counted = ((node, shapes, node.macs(*shapes)) for node, shapes in found)
        return tuple(entry for entry in counted if entry[2])

    @cached_property
    def counters(self) -> Counters:
        """How the channels that gates leave open make the multiply-adds."""
        return counters(self)

    def input_shapes(self, node: Node) -> tuple[Shape, ...]:
        """Shapes of the values that a node reads."""
        return tuple(self.shapes[source] for source in node.inputs)

    def gated_value(self, gate: Select) -> str:
        """Name of the value that a gate scales: the feature map just before the multiplication."""
        for reader in self.readers[gate.name]:
            if self.select_of(reader) == gate.name:
                return reader.inputs[0]
        raise GraphError(f"gate '{gate.name}' scales nothing: no Multiply has it as its second input")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; ``graph_from_json`` gives the same graph back."""
        return {"nodes": [json.node_to_json(node) for node in self.nodes], "output": self.output}


def _in_order(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Each node after those it reads, else as given; a cycle is an error that names its nodes."""
    place = {node.name: index for index, node in enumerate(nodes)}
    sorter = TopologicalSorter({place[node.name]: [place[source] for source in node.inputs] for node in nodes})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = [nodes[index].name for index in sorted(set(error.args[1]))]
        raise GraphError(f"these nodes wait for one another in a cycle: {some(cycle)}") from error
    ready: list[int] = []
    ordered = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, index)
        ordered.append(heapq.heappop(ready))
        sorter.done(ordered[-1])
    return tuple(nodes[index] for index in ordered)


def with_classes(graph: Graph, num_classes: int) -> Graph:
    """The same network with another number of classes; its output must be a Linear node."""
    head = graph.by_name[graph.output]
    if not isinstance(head, Linear):
        raise GraphError(f"the output '{head.name}' is a {type(head).__name__}; only a Linear head can be replaced")
    nodes = tuple(replace(head, features=num_classes) if node is head else node for node in graph.nodes)
    return Graph(nodes, graph.output)


def graph_from_json(data: object, known_ops: Mapping[str, type[Node]] = OPS) -> Graph:
    """The graph that ``Graph.to_json`` described; everything is checked, GraphError says what is wrong and where."""
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or "output" not in data:
        raise GraphError("a graph is an object with a list 'nodes' and a name 'output'")
    if not isinstance(data["output"], str):
        raise GraphError(f"the output must be a node's name; got {brief(data['output'])}")
    return Graph(json.nodes_from_json(data["nodes"], known_ops), data["output"])
