"""The static twin of a gated network against the gated network whose gates say the same for every image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import manidp
from engine_cases import assert_close, check
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.engine.target import available_isas
from manidp.errors import GraphError
from manidp.formats.checkpoint import load_checkpoint, save_checkpoint
from manidp.gating.static import constant_masks, freeze, skipping_macs, static_macs, without_gates
from manidp.graph import Activation, BatchNorm, Conv, GlobalPool, Graph, Linear, Multiply, Select
from manidp.graph.macs import dense_macs, gate_macs, macs_per_image
from manidp.reference import run
from networks import ZOO, checkpoint_of, images_for, on_map, random_weights, some_open
from test_engine_random import networks

Array = NDArray[Any]
Masks = dict[str, NDArray[np.bool_]]
Gains = dict[str, NDArray[np.float32]]


def saying_the_same(weights: dict[str, Array], masks: Masks, gains: Gains) -> dict[str, Array]:
    """Weights of the gated network with which every gate's factors are its mask times its gain whatever the image."""
    weights = dict(weights)
    for gate, mask in masks.items():
        weights[f"{gate}.fc2.weight"] = np.zeros_like(weights[f"{gate}.fc2.weight"])
        weights[f"{gate}.fc2.bias"] = np.where(mask, gains[gate], 0).astype(np.float32)
        weights[f"{gate}.threshold"] = np.zeros((), np.float32)
    return weights


@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 2**16), st.data())
def test_a_twin_says_what_constant_gates_say_and_costs_what_they_keep(
    graph: Graph, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    masks, gains = {}, {}
    every = set(graph.gate_channels)
    frozen_gates = every and (data.draw(st.sets(st.sampled_from(sorted(every)))) or every)
    for gate in frozen_gates:
        channels = graph.gate_channels[gate]
        masks[gate] = rng.random(channels) < data.draw(st.sampled_from((0.2, 0.6, 1.0)))
        masks[gate][rng.integers(channels)] = True
        gains[gate] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    weights = random_weights(graph, seed)
    images = rng.normal(size=(2, *graph.input.dims)).astype(np.float32)
    frozen, own = without_gates(graph, weights, masks, gains)
    assert frozen.gate_channels.keys() == graph.gate_channels.keys() - frozen_gates
    norms = {node.name for node in graph.nodes if isinstance(node, BatchNorm)}
    factors = [node for node in frozen.nodes if isinstance(node, BatchNorm) and node.name not in norms]
    assert all(node.use_global_stats for node in factors)  # so that they stay factors when the twin is trained
    expected = run(graph, saying_the_same(weights, masks, gains), images)
    found = run(frozen, own, images)
    assert_close(found.logits, expected.logits, "twin in float64", 1e-5)
    assert dense_macs(frozen) <= dense_macs(graph) - gate_macs(graph) + gate_macs(frozen)
    ever = {gate: mask[None].repeat(2, 0) for gate, mask in masks.items()} | found.kept
    assert skipping_macs(graph, masks, expected.kept) == macs_per_image(graph, ever).mean() - (
        gate_macs(graph) - gate_macs(frozen)
    )
    assert static_macs(graph, masks, expected.kept) == macs_per_image(frozen, found.kept).mean()
    check(frozen, own, images, available_isas()[0])


def test_masks_open_what_is_open_most_often_within_the_budget() -> None:
    checkpoint, images = manidp.load_model("manidp-res20"), load_sample().images
    result = Engine(checkpoint).run(images)
    budget = float(result.macs.mean())
    masks, _ = constant_masks(checkpoint.graph, result.gates, budget, result.gates.keys())
    spent = static_macs(checkpoint.graph, masks, {})
    assert 0.98 * budget < spent <= budget
    least_open = min(result.kept[gate].mean(0)[mask].min() for gate, mask in masks.items())
    most_closed = max(result.kept[gate].mean(0)[~mask].max(initial=0) for gate, mask in masks.items())
    assert most_closed <= least_open


def test_the_frozen_model_is_an_ordinary_dense_one_and_smaller(tmp_path: Path) -> None:
    checkpoint, images = manidp.load_model("manidp-res20"), load_sample().images
    frozen = freeze(checkpoint, images)
    save_checkpoint(checkpoint, tmp_path / "gated")
    save_checkpoint(frozen, tmp_path / "frozen")
    assert (tmp_path / "frozen").stat().st_size < 0.7 * (tmp_path / "gated").stat().st_size
    back = load_checkpoint(tmp_path / "frozen")
    result = Engine(back).run(images)
    assert result.macs.tolist() == [dense_macs(back.graph)] * len(images)
    assert not result.gates


def test_only_the_gates_named_are_frozen_at_the_same_mean_cost() -> None:
    checkpoint, images = manidp.load_model("manidp-res20"), load_sample().images
    chosen = [gate for gate in checkpoint.graph.gate_channels if not gate.startswith("stage_3")]
    frozen = freeze(checkpoint, images, chosen)
    assert [*chosen, *frozen.graph.gate_channels] == list(checkpoint.graph.gate_channels)
    before, after = Engine(checkpoint).run(images), Engine(frozen).run(images)
    assert 0.97 * before.macs.mean() < after.macs.mean() < 1.01 * before.macs.mean()
    assert (after.logits.argmax(1) == before.logits.argmax(1)).mean() > 0.9
    assert frozen.provenance["frozen"]["gates"] == chosen
    for wrong in ([], ["stage_9.mb1"]):
        with pytest.raises(GraphError, match=r"gates to freeze are some of stage_1.0.mb1, .*; got (none|stage_9.mb1)"):
            freeze(checkpoint, images, wrong)


@pytest.mark.parametrize("name", [name for name, graph in ZOO.items() if graph.gates])
def test_a_twin_costs_no_more_than_the_gated_network_did(name: str) -> None:
    graph = ZOO[name]
    twin = freeze(checkpoint_of(graph, some_open(graph)), images_for(graph))
    within = dense_macs(twin.graph) <= twin.provenance["frozen"]["macs_before"]
    # a shuffle of what is left is none, and a depthwise convolution of some channels of a whole map is none, either:
    # so all channels are computed
    assert within == (name not in ("ShuffleNetV1, gated", "ConvNeXt, gated"))


def test_what_a_closed_channel_alone_reads_is_left_out_too() -> None:
    """Of a depthwise convolution's input as well, which the gate read to decide."""
    depthwise = Conv(name="each", channels=12, groups=12), Activation(name="relu")
    score = (
        GlobalPool(name="pool", inputs=("stem",)),
        Linear(name="score", inputs=("pool",), features=12),
        Select(name="gate", inputs=("score",)),
        Multiply(name="gated", inputs=("relu", "gate")),
        Conv(name="last", inputs=("gated",), channels=6),
    )
    graph = on_map(*depthwise, *score)
    mask = np.arange(12) % 3 == 0
    twin, _ = without_gates(graph, random_weights(graph), {"gate": mask}, {"gate": np.ones(12, np.float32)})
    assert [twin.shapes[name][0] for name in ("stem", "each", "last")] == [4, 4, 6]
    assert static_macs(graph, {"gate": mask}, {}) == dense_macs(twin)


@pytest.mark.parametrize("name", [name for name, graph in ZOO.items() if graph.gates])
def test_frozen_to_the_gates_of_an_image_the_twin_gives_its_logits(name: str) -> None:
    graph = ZOO[name]
    weights, image = some_open(graph), images_for(graph)[:1]
    wanted = run(graph, weights, image)
    masks = {gate: value[0] > 0 for gate, value in wanted.gates.items()}
    for mask in masks.values():
        mask[0] |= not mask.any()
    twin, own = without_gates(graph, weights, masks, {gate: value[0] for gate, value in wanted.gates.items()})
    assert not twin.gates
    assert own.keys() == twin.parameters.keys()
    np.testing.assert_allclose(run(twin, own, image).logits, wanted.logits, rtol=1e-4, atol=1e-5)
