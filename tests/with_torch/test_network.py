"""The torch network walks the graph: equal to the reference, identity gates, exact names."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.errors import CheckpointError
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    Conv,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Node,
    with_classes,
)
from manidp.models import resnet
from manidp.reference import run
from manidp.torch.convert import network_from
from manidp.torch.network import Network
from manidp.training.start import inheriting
from networks import images_for, random_weights, some_open


def test_records_are_what_the_reference_has() -> None:
    graph = with_gates(resnet(8))
    weights, images = some_open(graph), images_for(graph)
    network = Network(graph).eval()
    network.load(weights)
    with torch.no_grad():
        output = network(torch.from_numpy(images))
    result = run(graph, weights, images)
    assert output.records.keys() == result.gates.keys()
    for name, record in output.records.items():
        assert ((record.gate > 0).numpy() == result.kept[name]).all(), name
        assert record.gate.numpy() == pytest.approx(result.gates[name], rel=1e-4)
        assert (np.where(record.gate > 0, record.saliency, 0) == record.gate.numpy()).all()


def test_maps_are_forgotten_once_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    network, maps, most = Network(with_gates(resnet(20))).eval(), weakref.WeakSet[Tensor](), 0
    step = Network._step

    def counted(self: Network, *given: Any) -> Tensor:
        nonlocal most
        value = step(self, *given)
        if value.dim() == 4:
            maps.add(value)
        most = max(most, len(maps))
        return value

    monkeypatch.setattr(Network, "_step", counted)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
        assert most == 3  # a block's input, what an op reads and what it makes
        assert len(network.node_values(torch.zeros(1, 3, 32, 32))) == len(network.graph.nodes)


def test_a_gate_may_scale_a_vector_and_what_another_scaled() -> None:
    chain: list[Node] = [Input(name="image", dims=(3, 8, 8)), Conv(name="m0", inputs=("image",), channels=4)]
    for index in range(1500):  # deeper than Python calls itself
        chain += [*head(f"g{index}", "image", 4, 1), Multiply(name=f"m{index + 1}", inputs=(f"m{index}", f"g{index}"))]
    chain += [
        *head("last", "m1500", 4, 2),
        GlobalPool(name="pool", inputs=("m0",)),
        Multiply(name="scaled", inputs=("pool", "last")),
        Linear(name="out", inputs=("scaled",), features=3),
    ]
    graph = Graph(tuple(chain), "out")
    weights = random_weights(graph, 0)
    for index in range(1500):  # all exactly 1
        weights |= {f"g{index}.fc1.weight": np.zeros((1, 3), np.float32), f"g{index}.fc2.bias": np.ones(4, np.float32)}
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    network = Network(graph).eval()
    network.load(weights)
    with torch.no_grad():
        output = network(torch.from_numpy(images))
    assert output.logits.numpy() == pytest.approx(run(graph, weights, images).logits, rel=1e-4, abs=1e-5)
    assert output.records["last"].feature.shape == (2, 4)


def test_state_has_exactly_the_graphs_parameters() -> None:
    graph = with_gates(resnet(20))
    state = Network(graph).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(graph.parameters)
    trained = sum(parameter.numel() for parameter in Network(graph).parameters())
    assert trained == 334_906


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_fresh_gates_are_the_identity_to_the_last_bit(training: bool, bfloat16: bool) -> None:
    dense = Network(resnet(20), seed=1).train(training)
    checkpoint = checkpoint_of(dense)
    gated = network_from(inheriting(checkpoint_of(Network(with_gates(resnet(20)))), checkpoint)).train(training)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        ungated, output = dense(images).logits, gated(images)
    assert torch.equal(ungated, output.logits)
    assert all(bool((record.gate == 1).all()) for record in output.records.values())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_strided_depthwise_convolution_is_trained_in_float32(stride: int) -> None:
    """Where bfloat16 is slow: its weights are not rounded, its output is."""
    nodes = (
        Input(name="image", dims=(8, 6, 6)),
        Conv(name="conv", inputs=("image",), channels=8, groups=8, stride=stride),
        GlobalPool(name="mean", inputs=("conv",)),
    )
    network = Network(Graph(nodes, "mean"), seed=1).train()
    images = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact = network.node_values(images)["conv"]
    with torch.autocast("cpu", torch.bfloat16):
        made = network.node_values(images)["conv"]
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, exact.bfloat16()) == (stride == 2)


def test_a_saliency_exactly_on_the_threshold_is_not_kept() -> None:
    graph = with_gates(resnet(8))
    network = Network(graph)  # every saliency is exactly 1
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for threshold, kept in ((1.0, False), (float(np.nextafter(np.float32(1), np.float32(0))), True)):
        for gate in graph.gates:
            network.state_dict()[f"{gate.name}.threshold"].fill_(threshold)
        records = network(images).records
        assert all(bool(((record.gate > 0) == kept).all()) for record in records.values())


def test_the_feature_is_the_mean_of_the_map_before_it_is_scaled() -> None:
    graph = with_gates(resnet(8))
    weights = random_weights(graph, 5)
    network = Network(graph).eval()
    network.load(weights)
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    from manidp.reference import node_values

    values = node_values(graph, weights, images)
    with torch.no_grad():
        records = network(torch.from_numpy(images)).records
    for gate in graph.gates:
        expected = values[graph.gated_value(gate)].mean((2, 3))
        assert records[gate.name].feature.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_gradients_keep_the_fast_memory_layout_and_are_right() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(True)
    from manidp.torch.network import _mean

    y = torch.randn(2, 3, dtype=torch.float32)
    (_mean(x) * y).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.numpy() == pytest.approx(np.broadcast_to(y[:, :, None, None].numpy() / 20, x.shape), rel=1e-6)


def checkpoint_of(network: Network) -> Checkpoint:
    classes = CIFAR10_CLASSES[: network.graph.num_classes]
    return Checkpoint(network.graph, network.weights(), CIFAR10_PREPROCESSING, classes)


def test_weights_there_and_back() -> None:
    checkpoint = checkpoint_of(Network(with_gates(resnet(8)), seed=3))
    again = network_from(checkpoint).weights()
    assert all((again[name] == value).all() for name, value in checkpoint.weights.items())
    assert again.keys() == checkpoint.weights.keys()


def test_inheriting_is_strict() -> None:
    checkpoint, gated = (checkpoint_of(Network(graph, seed=3)) for graph in (resnet(8), with_gates(resnet(8))))
    with pytest.raises(CheckpointError, match=r"stage_1\.1\.bn_a"):
        inheriting(checkpoint_of(Network(resnet(14))), checkpoint)  # would silently be half fresh
    with pytest.raises(CheckpointError, match=r"\(\d+ in all\)"):
        inheriting(checkpoint_of(Network(resnet(8))), gated)  # gates would be lost
    with pytest.raises(CheckpointError, match="do not fit"):
        Network(resnet(8)).load({})


def test_a_new_head_is_fresh_and_the_rest_inherited() -> None:
    checkpoint = checkpoint_of(Network(with_gates(resnet(8)), seed=3))
    weights = inheriting(checkpoint_of(Network(with_classes(checkpoint.graph, 4), seed=4)), checkpoint).weights
    assert weights["classifier.weight"].shape == (4, 64)
    for name, value in checkpoint.weights.items():
        if not name.startswith("classifier."):
            assert (weights[name] == value).all()


def test_nothing_of_a_pass_outlives_its_output() -> None:
    network = Network(with_gates(resnet(8))).eval()
    images = torch.zeros(2, 3, 32, 32)
    network(images)
    gc.collect()
    gc.disable()  # a cycle would now keep every feature map, until memory runs out on a long evaluation
    try:
        network(images)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("channels", [3, 4, 12])
def test_the_gradient_of_a_strided_projection_of_few_channels_is_right(channels: int) -> None:
    """Some versions of oneDNN write beyond their memory here and end the process."""
    graph = Graph(
        (
            Input(name="image", dims=(channels, 32, 32)),
            Conv(name="a", inputs=("image",), channels=8, kernel=1, stride=2, padding=0),
            GlobalPool(name="b", inputs=("a",)),
            Linear(name="out", inputs=("b",), features=2),
        ),
        "out",
    )
    network, chance = Network(graph), torch.Generator().manual_seed(0)
    images = torch.randn(8, channels, 32, 32, generator=chance)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images.clone(memory_format=layout).requires_grad_(True)
        network(x).logits.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
