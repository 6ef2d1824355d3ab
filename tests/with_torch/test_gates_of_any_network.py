"""Gates on the zoo: at first the same logits to the last bit; what is skipped cannot be told from what is masked."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

import manidp
from manidp.engine.engine import Engine
from manidp.errors import UnsupportedError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph.macs import gate_macs, macs_per_image, ungated_macs
from manidp.reference import node_values, run, value_of
from networks import Array, random_weights

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def half_closed(name: str) -> Checkpoint:
    """The gated network with gates that close some channels of each image."""
    gated = manidp.gate(zoo.imported(name)).network
    chance = random_weights(gated.graph, 3)
    new = {key: value for key, value in chance.items() if key not in zoo.imported(name).weights}
    for gate in gated.graph.gates:
        new[f"{gate.name}.threshold"] = np.array(0.5, np.float32)
        new[f"{gate.name}.fc2.bias"] = np.linspace(0, 1, gated.graph.gate_channels[gate.name], dtype=np.float32)
        new[f"{gate.name}.fc2.weight"] = new[f"{gate.name}.fc2.weight"] / 10
    return Checkpoint(gated.graph, {**gated.weights, **new}, gated.preprocessing, gated.classes)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_network_gets_gates_and_nothing_changes_until_they_are_trained(name: str) -> None:
    dense, gated = zoo.imported(name), manidp.gate(zoo.imported(name))
    images = dense.preprocessing.apply(PIXELS)
    before = run(dense.graph, dense.weights, images, np.float32).logits
    assert np.array_equal(run(gated.network.graph, gated.network.weights, images, np.float32).logits, before)
    assert gated.network.graph.gates and gate_macs(gated.network.graph) <= 0.05 * ungated_macs(dense.graph)
    convs = [node.name for node in dense.graph.nodes if type(node).__name__ == "Conv"]
    assert sorted(convs) == sorted([*sum(gated.gates.values(), ()), *(name for name, _ in gated.ungated)])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_what_is_skipped_cannot_be_told_from_what_is_masked(name: str) -> None:
    """Closed channels that nobody wants hold rubbish, those said to be zero are zero: the logits are the same."""
    checkpoint = half_closed(name)
    graph, chance = checkpoint.graph, np.random.default_rng(1)
    images = checkpoint.preprocessing.apply(PIXELS)
    meant = node_values(graph, checkpoint.weights, images)
    assert 0.1 < np.mean([(meant[gate.name] > 0).mean() for gate in graph.gates]) < 0.9
    values: dict[str, Array] = {}
    weights = {key: value.astype(np.float64) for key, value in checkpoint.weights.items()}  # else BLAS sums otherwise
    for node in graph.nodes:
        own = {key: weights[f"{node.name}.{key}"] for key in node.parameters(*graph.input_shapes(node))}
        value = value_of(node, own, *([values[source] for source in node.inputs] or [images.astype(np.float64)]))
        if node.name in graph.wanted_by:
            value[meant[graph.wanted_by[node.name]] == 0] = chance.normal(scale=1e6)
        if node.name in graph.zeroed_by:
            assert not value[meant[graph.zeroed_by[node.name]] == 0].any(), node
        values[node.name] = value
    assert np.array_equal(values[graph.output], meant[graph.output])
    saved = macs_per_image(graph, {gate.name: meant[gate.name] > 0 for gate in graph.gates})
    assert (saved < ungated_macs(graph)).all()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_engine_skips_what_is_closed(name: str) -> None:
    checkpoint = half_closed(name)
    try:
        result = Engine(checkpoint).run(PIXELS)
    except UnsupportedError as error:
        pytest.skip(str(error))
    meant = run(checkpoint.graph, checkpoint.weights, checkpoint.preprocessing.apply(PIXELS))
    assert np.abs(result.logits - meant.logits).max() <= 1e-4 * np.abs(meant.logits).max()
    assert np.array_equal(result.macs, meant.macs)
