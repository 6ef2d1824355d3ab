"""Where gates go: a rewrite of any graph, apart from what a gate is made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import reduce
from operator import and_, or_

from manidp.errors import GraphError
from manidp.gating.manidp import head, hidden_width
from manidp.graph import Add, BatchNorm, Conv, Elementwise, Graph, Multiply, Node


def with_gates(graph: Graph, convs: Collection[str] | None = None) -> Graph:
    """The same network with a gate for each of ``convs``: the method as a graph transformation.

    The gate reads what its convolution reads and scales what comes out after the batch norm and activation that
    follow it, so it is known before the convolution runs: channels it closes need not be computed.
    ``convs`` are names; by default the convolutions on the residual branch of every addition (``residual_convs``).
    A gate is called ``mb<k>``, k counting the gated convolutions below the same prefix from 1.
    """
    chosen = dict.fromkeys(residual_convs(graph) if convs is None else convs)
    ends = {_end_of_chain(graph, name): name for name in chosen}
    renamed: dict[str, str] = {}  # value -> the gated value that later nodes read in its place
    counts: dict[str, int] = {}
    nodes: list[Node] = []
    gate_of: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(source, source) for source in node.inputs))
        if node.name in chosen:
            assert isinstance(node, Conv)
            prefix = node.name.rpartition(".")[0]
            counts[prefix] = counts.get(prefix, 0) + 1
            name = f"{prefix}.mb{counts[prefix]}" if prefix else f"mb{counts[prefix]}"
            gate_of[node.name] = name
            nodes += head(name, node.inputs[0], node.channels, hidden_width(node.channels))
        nodes.append(node)
        if node.name in ends:
            gate = gate_of[ends[node.name]]
            renamed[node.name] = f"{gate}.gated"
            nodes.append(Multiply(name=renamed[node.name], inputs=(node.name, gate)))
    return Graph(tuple(nodes), renamed.get(graph.output, graph.output))


def _end_of_chain(graph: Graph, conv: str) -> str:
    """The last of conv -> batch norm -> activation, as far as each is the only reader of the one before."""
    if not isinstance(graph.by_name.get(conv), Conv):
        raise GraphError(f"'{conv}' is not a convolution of this graph and cannot be gated")
    end = conv
    for kind in (BatchNorm, Elementwise):
        readers = graph.readers[end]
        if len(readers) == 1 and isinstance(readers[0], kind):
            end = readers[0].name
    if any(graph.select_of(reader) for reader in graph.readers[end]):
        raise GraphError(f"convolution '{conv}' has a gate already")
    return end


def residual_convs(graph: Graph) -> tuple[str, ...]:
    """Names of the convolutions on the residual branch of every addition, in order.

    Of the operands of an addition, the residual branch is the one with most convolutions since they last were one
    value; shortcuts, the stem and whatever stands outside a residual block are left alone.
    """
    convs = [node.name for node in graph.nodes if isinstance(node, Conv)]
    bits = {name: 1 << index for index, name in enumerate(convs)}
    behind: dict[str, int] = {}  # value -> the convolutions that it is made of, a bit each
    chosen = 0
    for node in graph.nodes:
        operands = [behind[source] for source in node.inputs]
        behind[node.name] = reduce(or_, operands, bits.get(node.name, 0))
        if isinstance(node, Add):
            common = reduce(and_, operands)
            chosen |= max((operand & ~common for operand in operands), key=int.bit_count)
    return tuple(name for name in convs if chosen & bits[name])
