"""Which channels a budget of multiply-adds is best spent on: Taylor importance (Molchanov et al. 2019).

A channel's importance is what the loss would lose without it, to first order: the square of its factor times the loss's
gradient by that factor, here of a whole batch, so that the gradient of the scores' biases tells it. Divided by the
multiply-adds that closing the channel saves, channels of all gates stand in one order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Graph, Linear
from manidp.graph.macs import macs_per_image
from manidp.training.schedule import OPEN

SCORES = 0.8, 1.1  # mean scores of the least and the most important channel of a gate that begins

Channels = Mapping[str, NDArray[np.floating]]  # gate -> (C,)


def own_scorer(graph: Graph, gate: str) -> str | None:
    """The Linear node that makes a gate's scores, if it adds one number for each channel."""
    name = graph.scorer_of.get(gate)
    node = graph.by_name[name] if name is not None else None
    return name if isinstance(node, Linear) and node.bias else None


def score_biases(graph: Graph) -> dict[str, str]:
    """gate -> what is added to its scores, of every gate that has that and scales its channels: it tells importance."""
    scorers = {gate.name: own_scorer(graph, gate.name) for gate in graph.gates if gate.gain == "score"}
    return {gate: f"{scorer}.bias" for gate, scorer in scorers.items() if scorer is not None}


def undecided(graph: Graph, weights: Channels) -> bool:
    """Whether no gate's scores depend on the image yet, as they begin."""
    return not any(weights[f"{scorer}.weight"].any() for scorer in graph.scorers)


def worth(graph: Graph, importance: Channels, kept: Channels) -> dict[str, NDArray[np.floating]]:
    """gate -> (C,): importance of a multiply-add, where ``kept`` are the shares of images that open the channels."""
    numbers = graph.gate_numbers
    open_ = np.ones(sum(map(len, numbers.values())) + 1)
    for gate, share in kept.items():
        open_[numbers[gate]] = share
    saved = graph.counters.saved(open_)
    return {gate: importance[gate] / np.maximum(saved[numbers[gate]], 1) for gate in numbers}


def taylor_shares(graph: Graph, value: Channels, budget: float) -> dict[str, float]:
    """Every gate's keep rate if the channels of most worth are kept, as many as the budget allows, one of each gate.

    value: (C,) under the gates' names, see ``worth``. A gate that keeps all gets the rate ``OPEN``.
    """
    order = np.sort(np.concatenate(list(value.values())))[::-1]
    best = {gate: np.arange(len(own)) == int(own.argmax()) for gate, own in value.items()}

    def kept(count: int) -> dict[str, NDArray[np.bool_]]:
        least = order[count - 1] if count else np.inf
        return {gate: (own >= least) | best[gate] for gate, own in value.items()}

    low, high = 0, len(order)
    while low < high:
        count = (low + high + 1) // 2
        if macs_per_image(graph, {gate: own[None] for gate, own in kept(count).items()})[0] > budget:
            high = count - 1
        else:
            low = count
    return {gate: OPEN if own.all() else float(own.mean()) for gate, own in kept(low).items()}


def scores_in_order(value: NDArray[np.floating]) -> NDArray[np.float32]:
    """(C,) scores in the order of channels' worth, evenly spaced: what gates that know nothing yet begin with.

    A fresh gate's scores are all 1, and whatever moves them first would decide which channels are closed.
    """
    rank = np.argsort(np.argsort(value, kind="stable"), kind="stable")
    low, high = SCORES
    return (low + (high - low) * rank / max(1, len(rank) - 1)).astype(np.float32)
