"""The zoo in MindSpore: layer by layer, and every op in one network that GRAPH mode compiles."""

from __future__ import annotations

from dataclasses import replace

import mindspore
import numpy as np
import pytest

from conformance.backends import runs
from conformance.support import written
from manidp.graph import OPS, Concat, Graph, Node
from manidp.mindspore.convert import from_checkpoint
from manidp.reference import run
from networks import IMAGE, ZOO, checkpoint_of, images_for, some_open

COMPILED = dict.fromkeys(
    next(name for name in ZOO if name.startswith(start))
    for start in [
        *(f"{op}, " for op in OPS),
        "BatchNorm, use",
        "Select, constant",
        "Pool, average",
        "Pool, average, count",
        "Pool, max, padding",
    ]
)
"""A row of every op, and more where MindSpore has a cell of its own for them."""


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_the_reference_or_is_refused_as_the_page_says(name: str) -> None:
    assert runs("MindSpore", name) == written()[name, "MindSpore"]


def together(graphs: list[Graph]) -> Graph:
    """Networks of one image as one, their logits one after the other."""
    nodes: list[Node] = [IMAGE]
    for index, graph in enumerate(graphs):
        names = {name: name if name == IMAGE.name else f"{index}.{name}" for name in graph.shapes}
        nodes += [
            replace(node, name=names[node.name], inputs=tuple(names[source] for source in node.inputs))
            for node in graph.nodes
            if node != IMAGE
        ]
    logits = tuple(f"{index}.{graph.output}" for index, graph in enumerate(graphs))
    return Graph((*nodes, Concat(name="logits", inputs=logits)), "logits")


@pytest.mark.parametrize("mode", ["GRAPH"], indirect=True)
def test_compiled_every_op_gives_the_references_logits(mode: str) -> None:
    graph = together([ZOO[name] for name in COMPILED])
    weights, images = some_open(graph), images_for(graph)
    logits = from_checkpoint(checkpoint_of(graph, weights))(mindspore.Tensor(images)).asnumpy()
    np.testing.assert_allclose(logits, run(graph, weights, images).logits, rtol=0, atol=1e-4)
