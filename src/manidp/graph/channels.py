"""Which gate governs which channel: what closed channels let us skip, derived from how each op passes channels on.

The channels of all gates are numbered through, those of the first gate first. What governs the channels of a value is
an array of such numbers, -1 where a channel is governed by none.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manidp.graph.ops import Add, Input, Linear, Multiply, Node, Select

if TYPE_CHECKING:
    from manidp.graph.graph import Graph

Numbers = NDArray[np.intp]
_NONE, _UNREAD = -1, -2


def numbered(graph: Graph) -> Mapping[str, Numbers]:
    """The numbers of each gate's channels."""
    sizes = graph.gate_channels
    ends = itertools.accumulate(sizes.values())
    return {name: np.arange(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


def zeroed(graph: Graph) -> Mapping[str, Numbers]:
    """value -> (C,) what closes each channel, which is then exactly 0: reading it can be skipped."""
    found: dict[str, Numbers] = {}
    for node in graph.nodes:
        gate = graph.select_of(node)
        made = graph.gate_numbers[gate] if gate is not None else zeroed_through(graph, node, found)
        if made is not None and (made >= 0).any():
            found[node.name] = made
    return found


def zeroed_through(graph: Graph, node: Node, found: Mapping[str, Numbers]) -> Numbers | None:
    """(C,) what closes the channels of what a node makes, given that of its inputs; None if nothing can."""
    given = [found.get(source) for source in node.inputs]
    if all(numbers is None for numbers in given):
        return None
    shapes = graph.input_shapes(node)
    read = [np.full(x[0], _NONE) if by is None else by for x, by in zip(shapes, given, strict=True)]
    flow = node.channel_flow(*shapes)
    if flow == "moved":
        origin = node.origin(*shapes)
        return np.where(origin < 0, _NONE, np.concatenate(read)[origin])
    if isinstance(node, Multiply):  # zero times anything
        return np.where(read[0] >= 0, read[0], read[1])
    if isinstance(node, Add):
        return np.where(np.all([by == read[0] for by in read], axis=0), read[0], _NONE)
    return read[0] if flow == "own" and len(read) == 1 and node.keeps_zero else None


def wanted(graph: Graph, without: Collection[str] = ()) -> Mapping[str, Numbers]:
    """value -> (C,) what scales all that is computed from each channel: where it is closed, the channel need not be.

    A value of which some channels may help to decide on others is computed whole. without: nodes that are left out;
    the gates among them are decided before anything is computed.
    """
    found: dict[str, Numbers] = {}
    place = {node.name: -1 if node.name in without else index for index, node in enumerate(graph.nodes)}
    gates = np.repeat([place[name] for name in graph.gate_channels], list(graph.gate_channels.values()))
    for node in reversed(graph.nodes):
        if node.name == graph.output:
            continue
        by = np.full(graph.shapes[node.name][0], _UNREAD)
        for reader in graph.readers[node.name]:
            if reader.name in without:
                continue
            through = _wanted_through(graph, reader, node.name, found)
            if through is None:
                by[:] = _NONE
                break
            by = np.where(by == _UNREAD, through, np.where((through == _UNREAD) | (through == by), by, _NONE))
        by[by == _UNREAD] = _NONE
        if (by >= 0).any() and graph.governor(by) is None:
            by[(by >= 0) & (gates[by] > place[node.name])] = _NONE
        if (by >= 0).any():
            found[node.name] = by
    return found


def _wanted_through(graph: Graph, reader: Node, value: str, found: Mapping[str, Numbers]) -> Numbers | None:
    if isinstance(reader, Multiply) and reader.inputs[0] == value != reader.inputs[1]:
        gate = graph.select_of(reader)
        return None if gate is None else graph.gate_numbers[gate]
    by, shapes = found.get(reader.name), graph.input_shapes(reader)
    flow = reader.channel_flow(*shapes)
    if flow == "own" and len(reader.inputs) == 1:
        return by
    if flow != "moved":
        return None
    origin, first = reader.origin(*shapes), 0
    made = np.full(graph.shapes[value][0], _UNREAD)
    for source, shape in zip(reader.inputs, shapes, strict=True):
        if source == value:
            for c in np.flatnonzero((origin >= first) & (origin < first + shape[0])):
                new, old = (_NONE if by is None else by[c]), made[origin[c] - first]
                made[origin[c] - first] = new if old in (_UNREAD, new) else _NONE
        first += shape[0]
    return made


def heads(graph: Graph) -> frozenset[str]:
    """The nodes that serve gates alone: everything made of them goes into a Select, and nowhere else."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        readers = graph.readers[node.name]
        serves = all(isinstance(reader, Select) or reader.name in found for reader in readers)
        if readers and serves and node.name != graph.output and not isinstance(node, (Input, Select)):
            found.add(node.name)
    return frozenset(found)


def scorers(graph: Graph) -> dict[str, str]:
    """Select -> the last Linear node before it, elementwise nodes passed over, if that serves gates alone."""
    found: dict[str, str] = {}
    for gate in graph.gates:
        node = graph.by_name[gate.inputs[0]]
        while not isinstance(node, Linear) and len(node.inputs) == 1 and node.name in graph.heads:
            node = graph.by_name[node.inputs[0]]
        if isinstance(node, Linear) and node.name in graph.heads:
            found[gate.name] = node.name
    return found
