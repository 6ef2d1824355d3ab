"""A small gated network, images for it, and what float32 may differ by."""

import math

import numpy as np
from numpy.typing import NDArray

from manidp.data.preprocessing import Preprocessing
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.models import resnet

TOLERANCE = 1e-4  # of the greatest value: float32, many layers


def checkpoint_of(graph: Graph, seed: int = 0) -> Checkpoint:
    """Random weights under which gates are open here and closed there."""
    chance = np.random.default_rng(seed)
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in graph.parameters.items():
        last = name.rpartition(".")[2]
        if last in ("gamma", "moving_variance"):
            value = chance.uniform(0.5, 1.5, shape)
        elif last == "threshold":
            value = chance.uniform(0.2, 0.6, shape)
        else:
            value = chance.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))
        values[name] = value.astype(np.float32)
    _, height, width = graph.input.dims
    preprocessing = Preprocessing((0.5,) * 3, (0.2,) * 3, (height, width))
    return Checkpoint(graph, values, preprocessing, tuple(map(str, range(graph.num_classes))))


def gated_resnet() -> Graph:
    return with_gates(resnet(8, num_classes=5, width=6, image=(3, 16, 16)))


def images_for(graph: Graph, count: int = 4) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, *graph.input.dims)).astype(np.float32)


def assert_close(came: NDArray[np.float32], expected: NDArray[np.floating]) -> None:
    np.testing.assert_allclose(came, expected, rtol=0, atol=TOLERANCE * abs(expected).max())
