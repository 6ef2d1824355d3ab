"""Gates that can be opened again, so that one network serves budgets above the one it was trained for.

A ReLU'd score of 0 closes its channel at any threshold, gets no gradient, and leaves the channel's weights to decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from manidp.formats.checkpoint import Checkpoint
from manidp.graph import BatchNorm, Clip, Graph, Linear, Node, Squareplus
from manidp.training.importance import own_scorer

SMOOTHNESS = 0.04  # b of the Squareplus: a score of 0 becomes 0.1, one of 0.5 becomes 0.52
_SPREAD = 0.02  # of the scores that channels begin anew with: thresholds cannot tell equal ones apart

Weights = Mapping[str, NDArray[np.float32]]


def reopenable(checkpoint: Checkpoint) -> Checkpoint:
    """The same network whose scores are all above 0: a Squareplus before each Clip that ends a gate's score.

    It rises everywhere, and thresholds go through it too, so every decision stays; an open channel's factor grows a
    little. Departs: with the paper's ReLU (Tang et al. 2021, eq. 2) no threshold opens a channel of score 0.
    """
    graph, weights = checkpoint.graph, dict(checkpoint.weights)
    scores = {gate.inputs[0]: gate.name for gate in graph.gates if gate.rule == "threshold"}
    nodes: list[Node] = []
    for node in graph.nodes:
        source = graph.by_name[node.inputs[0]] if node.inputs else None
        if node.name in scores and isinstance(node, Clip) and isinstance(source, Linear):
            soft, name = f"{scores[node.name]}.squareplus", f"{scores[node.name]}.threshold"
            while soft in graph.by_name:
                soft += "_"
            nodes.append(Squareplus(name=soft, inputs=node.inputs, b=SMOOTHNESS))
            node = replace(node, inputs=(soft,))
            limit = np.float64(weights[name])
            weights[name] = np.array((limit + np.sqrt(limit**2 + SMOOTHNESS)) / 2, np.float32)
        nodes.append(node)
    return replace(checkpoint, graph=Graph(tuple(nodes), graph.output), weights=weights, points=())


def begun_anew(
    graph: Graph, weights: Weights, fresh: Weights, saliencies: Weights, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """The weights with fresh ones for all channels that their gates close for every image; others stay as they are.

    fresh: all weights of an untrained network. saliencies: gate -> (images, C). What makes such a channel starts as in
    ``fresh``, its batch norms as the mean of those beside it, and its score about 0, whatever the image.
    """
    changed = {name: value.copy() for name, value in weights.items()}
    chance = np.random.default_rng(seed)
    closed = {name: ~(value > weights[f"{name}.threshold"]).any(0) for name, value in saliencies.items()}
    closed = {name: value for name, value in closed.items() if value.any() and not value.all()}
    for node in graph.nodes:
        gone = closed.get(graph.wanted_by.get(node.name, ""))
        if gone is None or (isinstance(node, BatchNorm) and node.use_global_stats):  # a factor closes no channel
            continue
        for name in node.parameters(*graph.input_shapes(node)):
            own, new = changed[f"{node.name}.{name}"], fresh[f"{node.name}.{name}"]
            if own.shape[:1] == gone.shape:
                as_others = isinstance(node, BatchNorm) and name == "gamma"
                own[gone] = np.abs(own[~gone]).mean() if as_others else new[gone]
    for gate in graph.gates:
        if gate.name in closed:
            gone = closed[gate.name]
            if scorer := own_scorer(graph, gate.name):
                changed[f"{scorer}.bias"][gone] = chance.uniform(-_SPREAD, _SPREAD, int(gone.sum()))
                changed[f"{scorer}.weight"][gone] = 0
    return changed
