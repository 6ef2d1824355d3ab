"""Multiply-adds against closed formulas, published totals and torch's own counter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from manidp.errors import GraphError
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import Activation, Add, Conv, GlobalPool, Graph, Input, Linear, Multiply
from manidp.graph.macs import dense_macs, gate_macs, macs_per_image, node_macs
from manidp.models import imagenet_resnet, resnet


@pytest.mark.parametrize(("depth", "macs"), [(20, 40_813_184), (32, 69_124_736), (56, 125_747_840)])
def test_dense_resnets_cost_what_was_published(depth: int, macs: int) -> None:
    assert dense_macs(resnet(depth)) == macs


@pytest.mark.parametrize(("depth", "macs"), [(18, 1_814_073_344), (34, 3_663_761_408)])
def test_imagenet_resnets_cost_what_torchvisions_do(depth: int, macs: int) -> None:
    graph = imagenet_resnet(depth)
    assert dense_macs(graph) == macs
    statistics = ("moving_mean", "moving_variance")
    counted = sum(math.prod(s) for name, s in graph.parameters.items() if not name.endswith(statistics))
    assert counted == {18: 11_689_512, 34: 21_797_672}[depth]
    assert len(with_gates(graph).gates) == {18: 16, 34: 32}[depth]


def test_gates_of_resnet20_cost_their_linear_layers() -> None:
    assert len(with_gates(resnet(20)).gates) == 18
    assert gate_macs(with_gates(resnet(20))) == 61_952
    assert dense_macs(with_gates(resnet(20))) == 40_813_184 + 61_952


def test_an_empty_batch_costs_nothing() -> None:
    for graph in (with_gates(resnet(8)), with_gates(imagenet_resnet(18))):
        kept = {gate: np.ones((0, channels), dtype=bool) for gate, channels in graph.gate_channels.items()}
        assert macs_per_image(graph, kept).shape == (0,)


def test_each_image_of_resnet20_costs_what_the_closed_formula_says() -> None:
    """fixed part + per block: k1 * in * 9 * HW + k1 * k2 * 9 * HW."""
    graph = with_gates(resnet(20))
    rng = np.random.default_rng(0)
    kept = {gate: rng.random((5, channels)) < rng.random() for gate, channels in graph.gate_channels.items()}
    expected = np.full(5, 442_368 + 2 * 131_072 + 640 + 61_952)
    for stage, block in np.ndindex(3, 3):
        k1, k2 = (kept[f"stage_{stage + 1}.{block}.mb{i}"].sum(axis=1) for i in (1, 2))
        channels, positions = 16 * 2**stage, (32 // 2**stage) ** 2
        inputs = channels // 2 if stage and not block else channels
        expected = expected + (k1 * inputs + k1 * k2) * 9 * positions
    np.testing.assert_array_equal(macs_per_image(graph, kept), expected)


def test_everything_kept_costs_what_dense_costs_and_nothing_kept_only_the_fixed_part() -> None:
    graph = with_gates(resnet(20))
    everything = {gate: np.ones((2, channels), dtype=bool) for gate, channels in graph.gate_channels.items()}
    nothing = {name: ~mask for name, mask in everything.items()}
    assert macs_per_image(graph, everything).tolist() == [dense_macs(graph)] * 2
    assert macs_per_image(graph, nothing).tolist() == [442_368 + 2 * 131_072 + 640 + 61_952] * 2


def test_a_batch_counted_in_pieces_is_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = with_gates(resnet(8))
    rng = np.random.default_rng(0)
    kept = {gate: rng.random((5, channels)) < 0.5 for gate, channels in graph.gate_channels.items()}
    whole, nodes = macs_per_image(graph, kept), node_macs(graph, kept)
    np.testing.assert_array_equal(sum(nodes.values()), whole)
    monkeypatch.setattr("manidp.graph.counters._PIECE", 2 * len(graph.counters.numbers))
    np.testing.assert_array_equal(macs_per_image(graph, kept), whole)
    for name, own in node_macs(graph, kept).items():
        np.testing.assert_array_equal(own, nodes[name])


def test_groups_and_depthwise_count_pairs_within_each_group() -> None:
    nodes = (
        Input(name="image", dims=(4, 6, 6)),
        *head("g", "image", 4, 3),
        Multiply(name="x", inputs=("image", "g")),
        Conv(name="grouped", inputs=("x",), channels=8, groups=2, kernel=3),
        Conv(name="depthwise", inputs=("x",), channels=4, groups=4, kernel=5, stride=2, padding=2),
        GlobalPool(name="a", inputs=("grouped",)),
        GlobalPool(name="b", inputs=("depthwise",)),
        Linear(name="la", inputs=("a",), features=7),
        Linear(name="lb", inputs=("b",), features=7),
        Add(name="out", inputs=("la", "lb")),
    )
    graph = Graph(nodes, "out")
    assert node_macs(graph) == {
        "g.fc1": 4 * 3, "g.fc2": 3 * 4, "grouped": 8 * 2 * 9 * 36, "depthwise": 4 * 25 * 9, "la": 8 * 7, "lb": 4 * 7,
    }  # fmt: skip
    counts = node_macs(graph, {"g": np.array([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=bool)})
    assert counts["grouped"].tolist() == [(2 * 4 + 1 * 4) * 9 * 36, 0]
    assert counts["depthwise"].tolist() == [3 * 25 * 9, 0]
    assert counts["la"].tolist() == [56, 56]


def test_a_conv_whose_output_is_scaled_and_read_elsewhere_is_computed_whole() -> None:
    def net(also_read: str) -> Graph:
        return Graph(
            (
                Input(name="image", dims=(3, 4, 4)),
                *head("g", "image", 5, 2),
                Conv(name="c", inputs=("image",), channels=5),
                Activation(name="r", inputs=("c",)),
                Multiply(name="m", inputs=("r", "g")),
                Add(name="s", inputs=("m", also_read)),
                GlobalPool(name="p", inputs=("s",)),
                Linear(name="out", inputs=("p",), features=2),
            ),
            "out",
        )

    kept = {"g": np.array([[True, False, False, True, False]])}
    assert node_macs(net("m"), kept)["c"].tolist() == [2 * 3 * 9 * 16]
    assert node_macs(net("r"), kept)["c"].tolist() == [5 * 3 * 9 * 16]


def test_a_missing_gate_a_wrong_shape_and_mixed_batches_are_named() -> None:
    graph = with_gates(resnet(8))
    kept = {gate: np.ones((2, channels), dtype=bool) for gate, channels in graph.gate_channels.items()}
    with pytest.raises(GraphError, match=r"stage_1\.0\.mb1"):
        macs_per_image(graph, {})
    with pytest.raises(GraphError, match=r"stage_1\.0\.mb2.*\(B, 16\); got \(16,\)"):
        macs_per_image(graph, kept | {"stage_1.0.mb2": np.ones(16, dtype=bool)})
    with pytest.raises(GraphError, match=r"different sizes: \[2, 3\]"):
        macs_per_image(graph, kept | {"stage_1.0.mb2": np.ones((3, 16), dtype=bool)})


def test_torch_counts_the_same() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed: its flop counter cannot be asked")
    import torch
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    graph = resnet(20)
    values = {}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        values["image"] = torch.empty(1, *graph.input.dims)
        for node in graph.nodes[1:]:
            x = values[node.inputs[0]]
            weight = torch.empty(graph.parameters.get(f"{node.name}.weight", ()))
            if isinstance(node, Conv):
                x = functional.conv2d(x, weight, stride=node.stride, padding=node.padding, groups=node.groups)
            elif isinstance(node, GlobalPool):
                x = x.mean((2, 3))
            elif isinstance(node, Linear):
                x = functional.linear(x, weight)
            assert tuple(x.shape[1:]) == graph.shapes[node.name]
            values[node.name] = x
    assert counter.get_total_flops() == 2 * dense_macs(graph)
