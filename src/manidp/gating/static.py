"""The static twin of a gated network: one mask for all images in each gate, as an ordinary dense network.

What a gate closes for every image need not be stored: closed channels leave the weights of what makes them and of what
reads them. The twin has no gates and no Select; every backend runs it, and its file is smaller. Where only some gates
are frozen, those that hardly decide, the rest of the network stays gated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.errors import GraphError, some
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import FACTOR, BatchNorm, Concat, Graph, Node, Scatter, Slice
from manidp.graph.channels import wanted
from manidp.graph.macs import Kept, macs_per_image, node_macs, opened

Indices = NDArray[np.intp]
BATCH = 500  # images a call


def freeze(checkpoint: Checkpoint, images: NDArray[Any], gates: Collection[str] | None = None) -> Checkpoint:
    """The static twin of a gated checkpoint, its masks and gains those of ``images`` (as ``Engine.run`` takes them).

    gates: names of the gates to freeze; the others go on deciding. None freezes all. Channels are opened in the order
    of how often they are open for these images, those open most often first, as far as the twin costs no more
    multiply-adds than the gated network takes on average, its gates' own counted. An open channel is scaled by its mean
    factor over the images that open it. Operating points of the checkpoint are left out. Raises GraphError for a
    network without gates, and for gates that it does not have.
    """
    from manidp.engine.engine import Engine

    known = checkpoint.graph.gate_channels
    if not known:
        raise GraphError("a network without gates has no static twin: it is one")
    chosen = list(known) if gates is None else [name for name in known if name in gates]
    strange = set(gates or ()) - known.keys()
    if strange or not chosen:
        raise GraphError(f"gates to freeze are some of {some(known)}; got {some(sorted(strange)) or 'none'}")
    engine = Engine(checkpoint)
    results = [engine.run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    factors = {name: np.concatenate([result.gates[name] for result in results]) for name in results[0].gates}
    budget = float(np.concatenate([result.macs for result in results]).mean())
    masks, gains = constant_masks(checkpoint.graph, factors, budget, chosen)
    graph, weights = without_gates(checkpoint.graph, checkpoint.weights, masks, gains)
    told = {name: value for name, value in checkpoint.provenance.items() if name != "measured"}
    frozen: dict[str, Any] = {"images": len(images), "macs_before": budget}
    if len(chosen) < len(known):
        frozen["gates"] = chosen
    return replace(checkpoint, graph=graph, weights=weights, points=(), provenance=told | {"frozen": frozen})


def constant_masks(
    graph: Graph, factors: Mapping[str, NDArray[np.floating[Any]]], budget: float, gates: Collection[str]
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, NDArray[np.float32]]]:
    """Mask (C,) and gain (C,) of each of ``gates``, such that the twin takes ``budget`` on average at most.

    factors: those of every gate, (N, C). budget: multiply-adds. Equally often open channels are opened in the order of
    their gains. A gate keeps at least its first channel. Where the twin of the fewest channels takes more, because what
    an image skips cannot be cut off, as in convolutions in groups: as many as would take ``budget`` if it could.
    """
    kept = {name: value > 0 for name, value in factors.items()}
    open_share = {name: kept[name].mean(0) for name in gates}
    gains = {name: (factors[name].sum(0) / np.maximum(kept[name].sum(0), 1)).astype(np.float32) for name in gates}
    order = sorted(
        (
            (share, float(gains[name][c]), name, c)
            for name, shares in open_share.items()
            for c, share in enumerate(shares)
        ),
        key=lambda entry: (-entry[0], -entry[1]),
    )

    def first(count: int) -> dict[str, NDArray[np.bool_]]:
        masks = {name: np.zeros(len(shares), dtype=bool) for name, shares in open_share.items()}
        for share, _, name, c in order[:count]:
            masks[name][c] = share > 0
        for name, mask in masks.items():
            mask[int(open_share[name].argmax())] |= not mask.any()
        return masks

    cost = static_macs if static_macs(graph, first(0), kept) <= budget else skipping_macs
    low, high = 0, len(order)  # opening more channels never costs less: bisect how many of them fit
    while low < high:
        count = (low + high + 1) // 2
        if cost(graph, first(count), kept) <= budget:
            low = count
        else:
            high = count - 1
    return first(low), gains


def static_macs(graph: Graph, masks: Mapping[str, NDArray[np.bool_]], kept: Kept) -> float:
    """Mean multiply-adds of the twin with these masks (C,): their gates cost nothing any more.

    kept: (N, C) what each of the other gates keeps, for N images; those of ``masks`` are not looked at.
    """
    none = np.zeros((), np.float32)
    weights = {name: np.broadcast_to(none, shape) for name, shape in graph.parameters.items()}
    twin, _ = without_gates(graph, weights, masks, {name: np.ones(len(mask)) for name, mask in masks.items()})
    return float(macs_per_image(twin, {name: kept[name] for name in twin.gate_channels}).mean())


def skipping_macs(graph: Graph, masks: Mapping[str, NDArray[np.bool_]], kept: Kept) -> float:
    """As ``static_macs``, had the twin all its channels and skipped the closed ones."""
    live = {name: value for name, value in kept.items() if name not in masks}
    images = len(next(iter(live.values()), np.empty(1)))
    same = {name: np.broadcast_to(mask, (images, len(mask))) for name, mask in masks.items()}
    needless, macs = _needless(graph, masks), node_macs(graph)
    return float(macs_per_image(graph, live | same).mean()) - sum(macs.get(name, 0) for name in needless)


def without_gates(
    graph: Graph,
    weights: Mapping[str, NDArray[np.floating[Any]]],
    masks: Mapping[str, NDArray[np.bool_]],
    gains: Mapping[str, NDArray[np.floating[Any]]],
) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
    """The network with the Selects of ``masks`` replaced by their mask (C,) and gain (C,), closed channels dropped."""
    return _Rewrite(graph, weights, masks, gains).run()


def _needless(graph: Graph, frozen: Collection[str]) -> set[str]:
    """The gates that are frozen, and the nodes that serve them alone."""
    found = set(frozen)
    for node in reversed(graph.nodes):
        if node.name in graph.heads and all(reader.name in found for reader in graph.readers[node.name]):
            found.add(node.name)
    return found


@dataclass(frozen=True)
class _Left:
    """The channels that a value of the twin still has; the others are ``zero``, or else read by no node."""

    channels: Indices
    zero: bool


@dataclass
class _Rewrite:
    graph: Graph
    given: Mapping[str, NDArray[np.floating[Any]]]
    masks: Mapping[str, NDArray[np.bool_]]
    gains: Mapping[str, NDArray[np.floating[Any]]]
    nodes: dict[str, Node] = field(default_factory=dict)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    left: dict[str, _Left] = field(default_factory=dict)  # value -> what it still has, if not all
    alias: dict[str, str] = field(default_factory=dict)  # value -> the node of the twin that makes it

    def run(self) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
        for node in self.graph.nodes:
            if node.name in self._needless:
                continue
            gate = self.graph.select_of(node)
            if gate is not None and gate in self.masks:
                self._scaled(node, gate)
            else:
                self._ordinary(node)
        return Graph(tuple(self.nodes.values()), self._whole(self.graph.output)), self.weights

    @cached_property
    def _needless(self) -> set[str]:
        return _needless(self.graph, self.masks)

    @cached_property
    def _wanted(self) -> Mapping[str, Indices]:
        return wanted(self.graph, self._needless)

    @cached_property
    def _opened(self) -> NDArray[np.bool_]:
        ever = {
            gate: self.masks.get(gate, np.ones(count, bool))[None] for gate, count in self.graph.gate_channels.items()
        }
        found: NDArray[np.bool_] = opened(self.graph, ever)[0]
        return found

    def _ordinary(self, node: Node) -> None:
        shapes = self.graph.input_shapes(node)
        own = {name: np.asarray(self.given[f"{node.name}.{name}"]) for name in node.parameters(*shapes)}
        flow = node.channel_flow(*shapes)
        left = self.left.get(node.inputs[0]) if len(node.inputs) == 1 else None
        if left is not None and flow == "own" and (node.keeps_zero or not left.zero):
            own = {name: value[left.channels] for name, value in own.items()}
            self._emit(node.narrowed(len(left.channels)), own, left)
            return
        if left is not None and flow == "summed":  # what it reads of the dropped channels is zero
            own["weight"] = own["weight"][:, left.channels]
        if isinstance(node, (Concat, Slice)) and any(source in self.left for source in node.inputs):
            narrow = self._moved(node)
            if narrow is not None:
                self._emit(*narrow)
                return
        whole = () if left is not None and flow == "summed" else node.inputs
        node = replace(node, inputs=tuple(self._whole(s) if s in whole else self._made(s) for s in node.inputs))
        governed = self._wanted.get(node.name)
        if governed is not None and flow == "summed":
            open_ = self._opened[governed]
            open_[0] |= not open_.any()
            if not open_.all():
                left = _Left(np.flatnonzero(open_), zero=False)
                own = {name: value[left.channels] for name, value in own.items()}
                self._emit(node.narrowed(len(left.channels)), own, left)
                return
        self._emit(node, own, None)

    def _moved(self, node: Concat | Slice) -> tuple[Node, dict[str, NDArray[np.float32]], _Left] | None:
        """The node on what its inputs still have, None where nothing is left of a slice."""
        counts = [shape[0] for shape in self.graph.input_shapes(node)]
        every = [self.left.get(s, _Left(np.arange(n), False)) for s, n in zip(node.inputs, counts, strict=True)]
        zero = any(left.zero for left in every)
        if isinstance(node, Concat):
            first = np.cumsum([0, *counts])
            channels = np.concatenate([left.channels + start for left, start in zip(every, first, strict=False)])
            return node, {}, _Left(channels, zero)
        start, stop = np.searchsorted(every[0].channels, [node.start, node.stop]).tolist()
        left = _Left(every[0].channels[start:stop] - node.start, zero)
        return (replace(node, start=start, stop=stop), {}, left) if start < stop else None

    def _scaled(self, node: Node, gate: str) -> None:
        """A multiplication by a gate, folded into the batch norm before it where that is exact."""
        source = node.inputs[0]
        channels = self.graph.shapes[source][0]
        left = self.left.get(source, _Left(np.arange(channels), zero=False))
        gain = np.where(self.masks[gate], self.gains[gate], 0).astype(np.float32)[left.channels]
        after = None if len(left.channels) == channels else _Left(left.channels, zero=True)
        norm = self._norm_before(source)
        if norm is None:
            norm = node.name
            zeros, rest, ones = (np.full(len(gain), number, np.float32) for number in (0, 1 - FACTOR["eps"], 1))
            statistics = {"moving_mean": zeros, "moving_variance": rest, "gamma": ones, "beta": zeros}
            self._emit(BatchNorm(name=norm, inputs=(source,), **FACTOR), statistics, after)
        else:
            self.alias[node.name] = self._made(source)
            if after is not None:
                self.left[node.name] = after
        for name in (f"{norm}.gamma", f"{norm}.beta"):
            self.weights[name] = self.weights[name] * gain

    def _norm_before(self, source: str) -> str | None:
        """The batch norm whose scaling by a gain >= 0 is a scaling of ``source``."""
        node = self.graph.by_name[source]
        if node.keeps_gain and len(self.graph.readers[source]) == 1:
            node = self.graph.by_name[node.inputs[0]]
        return node.name if isinstance(node, BatchNorm) and len(self.graph.readers[node.name]) == 1 else None

    def _emit(self, node: Node, own: Mapping[str, NDArray[np.float32]], left: _Left | None) -> None:
        node = replace(node, inputs=tuple(map(self._made, node.inputs)))
        self.nodes[node.name] = node
        self.weights |= {f"{node.name}.{name}": np.asarray(value, order="C") for name, value in own.items()}
        if left is not None:
            self.left[node.name] = left

    def _made(self, value: str) -> str:
        return self.alias.get(value, value)

    def _whole(self, value: str) -> str:
        """The node that makes a value with all its channels."""
        left = self.left.get(value)
        if left is None:
            return self._made(value)
        name = f"{self._made(value)}.whole"
        while name in self.graph.by_name:
            name += "_"
        channels = self.graph.shapes[value][0]
        at = tuple(int(c) for c in left.channels)
        self.nodes.setdefault(name, Scatter(name=name, inputs=(self._made(value),), channels=channels, at=at))
        return name
