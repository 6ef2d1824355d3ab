"""ManiDP's gate as ordinary ops that end in one Select. Source: Tang et al. 2021, eq. 2.

    saliency = min(relu(W2 relu(W1 GAP(input)) + b2), saliency_max)      one number for each image and channel
    gate     = saliency where it exceeds the threshold, else 0           scales the channel, or closes it

The losses that make saliencies sparse and alike for images that look alike are beside the networks that they train
(``torch/losses.py``, ``mindspore/losses.py``); thresholds and their schedule are in ``training/schedule.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from manidp.graph import Activation, Clip, GlobalPool, Graph, Linear, Node, Select

SALIENCY_MAX = 1000.0


def hidden_width(channels: int) -> int:
    """Width of the hidden layer of a gate for so many channels, as in the reference."""
    return channels if channels < 80 else channels // 2


def head(name: str, source: str, channels: int, hidden: int, saliency_max: float = SALIENCY_MAX) -> tuple[Node, ...]:
    """The nodes of a gate called ``name`` that reads the map ``source``; the last one is the Select, ``name`` itself.

    Parameters: NAME.fc1.weight (hidden, in), NAME.fc2.weight (channels, hidden), NAME.fc2.bias, NAME.threshold.
    """
    return (
        GlobalPool(name=f"{name}.pool", inputs=(source,)),
        Linear(name=f"{name}.fc1", inputs=(f"{name}.pool",), features=hidden, bias=False),
        Activation(name=f"{name}.relu", inputs=(f"{name}.fc1",)),
        Linear(name=f"{name}.fc2", inputs=(f"{name}.relu",), features=channels),
        Clip(name=f"{name}.saliency", inputs=(f"{name}.fc2",), high=saliency_max),
        Select(name=name, inputs=(f"{name}.saliency",)),
    )


def fresh_gates(graph: Graph, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Parameters of all gates of a graph at the start of training: every score is 1, every channel open.

    The network's logits are those of the ungated one to the last bit: W2 is 0, b2 is 1, the threshold 0; W1 is
    N(0, sqrt(2 / in)). Departs: the reference starts gates at random, which makes the activations of a net explode.
    """
    chance = np.random.default_rng(seed)
    fresh: dict[str, NDArray[np.float32]] = {}
    for node in graph.nodes:
        if not (isinstance(node, Select) or node.name in graph.heads):
            continue
        for name, shape in node.parameters(*graph.input_shapes(node)).items():
            value = np.zeros(shape, np.float32)
            if name == "mask" or (node.name in graph.scorers and name == "bias"):
                value += 1
            elif name == "weight" and node.name not in graph.scorers:
                value = chance.normal(0, np.sqrt(2 / shape[-1]), shape).astype(np.float32)
            fresh[f"{node.name}.{name}"] = value
    return fresh
