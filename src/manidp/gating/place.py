"""Where gates go: a rewrite of any graph, apart from what a gate is made of.

A gate may close channels wherever what it multiplies by 0 need not be computed. It stands at the end of a chain: a
convolution and what follows it channel by channel, each node the only reader of the one before (batch norm, activation,
depthwise convolution, pooling, shuffled channels). One gate serves the whole chain, and stops before a squeeze, whose
pooling is a second reader, and before channels are split or joined with others: behind that, each closed channel is
followed on its own (``Graph.zeroed``). It reads what the convolution reads, so that it is known before anything of the
chain runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_
from typing import Generic, TypeVar

import numpy as np

from manidp.errors import GraphError
from manidp.gating.manidp import head, hidden_width
from manidp.graph import Add, Conv, Graph, Multiply, Node, Shuffle
from manidp.graph.channels import zeroed_through

WORTH = 1 / 16  # most that deciding may take of the time that closing everything would save
READ = 8  # multiply-adds that take as long as reading a weight: a gate's are read for one each, by measurement
LEAST_HIDDEN = 4  # a narrower hidden layer tells too little of an image

N = TypeVar("N")


@dataclass(frozen=True)
class Gated(Generic[N]):
    """A network with gates, which convolutions each gate skips channels of, and why the others have none.

    gates: name of each gate -> names of convolutions, in order. ungated: (name of a convolution, reason).
    """

    network: N
    gates: Mapping[str, tuple[str, ...]]
    ungated: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Chain:
    """A convolution and what follows it channel by channel; ``hidden``: width of its gate's hidden layer."""

    nodes: tuple[Node, ...]
    hidden: int

    @property
    def convs(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if isinstance(node, Conv))


def gate(graph: Graph) -> Gated[Graph]:
    """The same network with a gate wherever one is exact and pays.

    Convolutions that get none: those that read the image (nothing is known yet), those on a shortcut or whose result is
    one (what follows needs all of it), those of constants, those that make one channel or the logits, and those that a
    gate would not pay for: its two linear layers, narrowed as need be, may take a sixteenth of the time that closing
    all channels would save. Time is counted in multiply-adds, at least eight for each weight: where a map is small,
    reading weights is what takes it. Of parallel operands of an addition those with most convolutions are branches, all
    others shortcuts.
    """
    convs = [node.name for node in graph.nodes if isinstance(node, Conv)]
    branches, shortcuts = _branches(graph)
    stems = _of_the_image(graph)
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    ungated: dict[str, str] = {}
    chosen: dict[str, _Chain] = {}
    followed: set[str] = set()
    for name in convs:
        if name in followed:
            continue
        chain = _chain(graph, name)
        end = chain[-1]
        readers = graph.readers[end.name]
        added = [reader for reader in readers if isinstance(reader, Add)]
        hidden, cost, saved = _hidden(graph, chain, place)
        if any(graph.select_of(reader) for reader in readers):
            reason = "it has a gate already"
        elif name in stems:
            reason = "it reads the image, of which nothing is known yet"
        elif not graph.by_name[name].trainable:
            reason = "its weights are constants: there is nothing to learn to leave out"
        elif graph.shapes[name][0] == 1:
            reason = "it makes one channel"
        elif _makes_logits(graph, end):
            reason = "its channels are the logits"
        elif name in shortcuts and name not in branches:
            reason = "it is on a shortcut, which what follows needs whole"
        elif added and name not in branches:
            reason = f"what it makes is the shortcut of '{added[0].name}', needed whole"
        elif hidden < min(LEAST_HIDDEN, graph.shapes[name][0]):
            reason = f"a gate would not pay: deciding takes as long as {cost:,} multiply-adds and can save {saved:,}"
        else:
            chosen[name] = _Chain(chain, hidden)
            followed |= {node.name for node in chain}
            continue
        ungated[name] = reason
    return _rewritten(graph, chosen, ungated)


def with_gates(graph: Graph, convs: Collection[str] | None = None) -> Graph:
    """The network of ``gate``, or one with a gate for each of these convolutions, whether it pays or not.

    A gate is called ``mb<k>``, k counting the gates below the same prefix from 1. Raises GraphError for a name that is
    no convolution, or that has a gate.
    """
    if convs is None:
        return gate(graph).network
    chosen: dict[str, _Chain] = {}
    for name in dict.fromkeys(convs):
        if not isinstance(graph.by_name.get(name), Conv):
            raise GraphError(f"'{name}' is not a convolution of this graph and cannot be gated")
        chain = _chain(graph, name, convs)
        if any(graph.select_of(reader) for reader in graph.readers[chain[-1].name]):
            raise GraphError(f"convolution '{name}' has a gate already")
        chosen[name] = _Chain(chain, hidden_width(graph.shapes[name][0]))
    return _rewritten(graph, chosen, {}).network


def residual_convs(graph: Graph) -> tuple[str, ...]:
    """Names of the convolutions on the residual branches of all additions, in order."""
    branches, _ = _branches(graph)
    return tuple(node.name for node in graph.nodes if node.name in branches)


def _rewritten(graph: Graph, chosen: Mapping[str, _Chain], ungated: Mapping[str, str]) -> Gated[Graph]:
    ends = {chain.nodes[-1].name: name for name, chain in chosen.items()}
    renamed: dict[str, str] = {}  # value -> the gated value that later nodes read in its place
    counts: dict[str, int] = {}
    nodes: list[Node] = []
    gates: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(source, source) for source in node.inputs))
        if node.name in chosen:
            gates[node.name] = name = _fresh_name(graph, node.name, counts)
            nodes += head(name, node.inputs[0], graph.shapes[node.name][0], chosen[node.name].hidden)
        nodes.append(node)
        if node.name in ends:
            name = gates[ends[node.name]]
            renamed[node.name] = f"{name}.gated"
            nodes.append(Multiply(name=renamed[node.name], inputs=(node.name, name)))
    network = Graph(tuple(nodes), renamed.get(graph.output, graph.output))
    return Gated(network, {gates[name]: chain.convs for name, chain in chosen.items()}, tuple(ungated.items()))


def _fresh_name(graph: Graph, conv: str, counts: dict[str, int]) -> str:
    prefix = conv.rpartition(".")[0]
    while True:
        counts[prefix] = counts.get(prefix, 0) + 1
        name = f"{prefix}.mb{counts[prefix]}" if prefix else f"mb{counts[prefix]}"
        if not {f"{name}.gated", *(part.name for part in head(name, "", 1, 1))} & graph.by_name.keys():
            return name


def _chain(graph: Graph, conv: str, others: Collection[str] = ()) -> tuple[Node, ...]:
    """The convolution, and maps that are made of it channel by channel, as far as nothing else reads them.

    It ends before ``others``, which are chains of their own, and at the last node that is more than another order.
    """
    chain = [graph.by_name[conv]]
    while len(readers := graph.readers[chain[-1].name]) == 1 and chain[-1].name != graph.output:
        (reader,) = readers
        own = isinstance(reader, Shuffle) or (len(reader.inputs) == 1 and _flow(graph, reader) == "own")
        if not own or len(graph.shapes[reader.name]) != 3 or reader.name in others:
            break
        chain.append(reader)
    while isinstance(chain[-1], Shuffle):
        chain.pop()
    return tuple(chain)


def _makes_logits(graph: Graph, node: Node) -> bool:
    """Whether each channel of what the node makes becomes one of the logits."""
    while node.name != graph.output:
        readers = graph.readers[node.name]
        if len(readers) != 1 or len(readers[0].inputs) != 1 or _flow(graph, readers[0]) != "own":
            return False
        (node,) = readers
    return True


def _flow(graph: Graph, node: Node) -> str:
    return node.channel_flow(*graph.input_shapes(node))


def _hidden(graph: Graph, chain: tuple[Node, ...], place: Mapping[str, int]) -> tuple[int, int, int]:
    """Width of the hidden layer that pays, the time of a gate of the usual width, and the time that it can save."""
    made, read = graph.shapes[chain[0].name][0], graph.shapes[chain[0].inputs[0]][0]
    saved = sum(_time(graph, node) for node in chain)
    found = {chain[-1].name: np.arange(made)}  # as if no other gate closed anything
    waiting = [place[reader.name] for reader in graph.readers[chain[-1].name]]
    seen: set[int] = set()
    while waiting:  # in the order of the graph, and only what reads a closed channel: networks may have many gates
        at = heapq.heappop(waiting)
        if at in seen:
            continue
        seen.add(at)
        node = graph.nodes[at]
        if isinstance(node, Conv):
            saved += round(_time(graph, node) * float((found[node.inputs[0]] >= 0).mean()))
        through = None if isinstance(node, Add) else zeroed_through(graph, node, found)
        if through is not None and (through >= 0).any():
            found[node.name] = through
            for reader in graph.readers[node.name]:
                heapq.heappush(waiting, place[reader.name])
    usual = hidden_width(made)
    each = READ * (read + made)  # of a hidden channel
    return min(usual, int(saved * WORTH / each)), usual * each, saved


def _time(graph: Graph, node: Node) -> int:
    """Multiply-adds of a node, or those that take as long as reading its weights."""
    shapes = graph.input_shapes(node)
    return max(node.macs(*shapes), READ * sum(map(math.prod, node.parameters(*shapes).values())))


def _of_the_image(graph: Graph) -> set[str]:
    """The convolutions that read the image, or what was made of it channel by channel."""
    image = {graph.input.name}
    stems = set()
    for node in graph.nodes:
        if node.inputs and image.issuperset(node.inputs):
            if isinstance(node, Conv):
                stems.add(node.name)
            if _flow(graph, node) in ("own", "moved"):
                image.add(node.name)
    return stems


def _branches(graph: Graph) -> tuple[set[str], set[str]]:
    """The convolutions on the residual branches of additions, and those on shortcuts.

    Of the operands of an addition, a branch is one with most convolutions since they last were one value.
    """
    convs = [node.name for node in graph.nodes if isinstance(node, Conv)]
    bits = {name: 1 << index for index, name in enumerate(convs)}
    behind: dict[str, int] = {}  # value -> the convolutions that it is made of, a bit each
    branches = shortcuts = 0
    for node in graph.nodes:
        operands = [behind[source] for source in node.inputs]
        behind[node.name] = reduce(or_, operands, bits.get(node.name, 0))
        if isinstance(node, Add):
            common = reduce(and_, operands)
            own = [operand & ~common for operand in operands]
            most = max(map(int.bit_count, own))
            branches |= reduce(or_, (operand for operand in own if operand.bit_count() == most))
            shortcuts |= reduce(or_, (operand for operand in own if operand.bit_count() < most), 0)
    return {name for name in convs if branches & bits[name]}, {name for name in convs if shortcuts & bits[name]}
