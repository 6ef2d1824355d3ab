"""Random networks, odd in every way, through the engine and the float64 reference, layer by layer."""

from __future__ import annotations

import math
import os
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_cases import Array, check
from manidp.engine import choice
from manidp.engine.target import available_isas, emulating_isas
from manidp.gating.place import with_gates
from manidp.graph import (
    ELU,
    Activation,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    LayerNorm,
    LeakyReLU,
    Linear,
    Multiply,
    Node,
    Pool,
    PReLU,
    Scatter,
    Shuffle,
    Slice,
    Squareplus,
)
from manidp.reference import node_values, value_of
from networks import random_weights, with_thresholds

CHANNELS = (1, 2, 3, 7, 15, 16, 17, 33)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 28, 32, 40)
ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "tanh", "gelu", "mish")


class Builder:
    """A network grown node by node."""

    def __init__(self, dims: tuple[int, int, int]) -> None:
        self.nodes: list[Node] = [Input(name="image", dims=dims)]
        self.shapes: dict[str, tuple[int, ...]] = {"image": dims}

    @property
    def last(self) -> str:
        return self.nodes[-1].name

    def add(self, node_type: type[Node], /, *inputs: str, **options: Any) -> str:
        name = f"n{len(self.nodes)}"
        node = node_type(name=name, inputs=inputs or (self.last,), **options)
        self.shapes[name] = node.shape(*(self.shapes[source] for source in node.inputs))
        self.nodes.append(node)
        return name


def activation(draw: st.DrawFn, b: Builder) -> str:
    kind = draw(st.sampled_from((*ACTIVATIONS, "leaky_relu", "prelu", "elu", "squareplus")))
    if kind == "prelu":
        return b.add(PReLU)
    if kind == "leaky_relu":
        return b.add(LeakyReLU, slope=0.25)
    if kind == "squareplus":
        return b.add(Squareplus, b=0.5)
    return b.add(ELU, alpha=0.5) if kind == "elu" else b.add(Activation, kind=kind)


@st.composite
def networks(draw: st.DrawFn) -> Graph:
    size = draw(st.sampled_from([(h, w) for h in SIZES for w in SIZES if h * w <= 1100]))
    b = Builder((draw(st.sampled_from((1, 3, 4))), *size))
    for _ in range(draw(st.integers(1, 6))):
        channels, height, width = b.shapes[b.last]
        kinds = ["conv", "conv", "winograd", "batch norm", "activation", "pool", "add", "concat", "multiply", "excite",
                 "clip", "scatter", "slice", "shuffle", "oblong", "depthwise", "layer norm"]  # fmt: skip
        kind = draw(st.sampled_from(kinds))
        others = [n for n, s in b.shapes.items() if len(s) == 3 and n != b.last]
        same = [n for n in others if b.shapes[n] == b.shapes[b.last]]
        if kind == "winograd":
            margin = st.integers(0, 2)
            margins = (1, 1, 1, 1) if min(height, width) < 3 else tuple(draw(margin) for _ in range(4))
            b.add(Conv, channels=draw(st.sampled_from(CHANNELS)), padding=margins, bias=draw(st.booleans()))
        elif kind == "conv":
            kernel = draw(st.integers(1, min(7, height + 2, width + 2)))
            padding = draw(st.integers(max(0, -((min(height, width) - kernel) // 2)), max(3, kernel // 2)))
            out = draw(st.sampled_from(CHANNELS))
            groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
            b.add(Conv, channels=groups * -(-out // groups), kernel=kernel, stride=draw(st.integers(1, 3)),
                  padding=padding, groups=groups, bias=draw(st.booleans()))  # fmt: skip
        elif kind == "oblong":
            sides = draw(st.integers(1, 5)), draw(st.integers(1, 5))
            dilation = draw(st.integers(1, 2)), draw(st.integers(1, 3))
            margin = st.integers(0, 4)
            margins = draw(margin), draw(margin), draw(margin), draw(margin)
            node = Conv(name="probe", inputs=("x",), channels=draw(st.sampled_from(CHANNELS)), kernel=sides,
                        stride=draw(st.integers(1, 2)), padding=margins, dilation=dilation)  # fmt: skip
            if min(node.positions(height, width)) > 0:
                b.add(Conv, channels=node.channels, kernel=sides, stride=node.stride, padding=margins,
                      dilation=dilation)  # fmt: skip
        elif kind == "depthwise":
            kernel = draw(st.sampled_from((3, 5)))
            b.add(Conv, channels=channels, groups=channels, kernel=kernel, padding=kernel // 2,
                  stride=draw(st.integers(1, 2)), bias=draw(st.booleans()))  # fmt: skip
        elif kind == "slice":
            start = draw(st.integers(0, channels - 1))
            b.add(Slice, start=start, stop=draw(st.integers(start + 1, channels)))
        elif kind == "shuffle":
            b.add(Shuffle, groups=draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])))
        elif kind == "batch norm":
            b.add(BatchNorm, eps=1e-3)
        elif kind == "layer norm":
            b.add(LayerNorm, eps=0.25)
        elif kind == "activation":
            activation(draw, b)
        elif kind == "clip":
            b.add(Clip, low=draw(st.sampled_from((-0.5, 0.0, 0.1))), high=0.75)
        elif kind == "scatter" and channels < 40:
            among = channels + draw(st.integers(0, 5))
            places = draw(st.permutations(range(among)))[:channels]
            b.add(Scatter, channels=among, at=tuple(sorted(places)))
        elif kind == "pool" and min(height, width) >= 2:
            kernel = draw(st.integers(1, min(3, height, width)))
            b.add(Pool, kind=draw(st.sampled_from(("average", "max"))), kernel=kernel, stride=draw(st.integers(1, 3)),
                  padding=draw(st.integers(0, kernel - 1)), count_include_pad=draw(st.booleans()))  # fmt: skip
        elif kind == "add" and same:
            b.add(Add, *draw(st.permutations([b.last, *draw(st.lists(st.sampled_from(same), min_size=1, max_size=2))])))
        elif kind == "multiply" and same:
            b.add(Multiply, *draw(st.permutations([b.last, draw(st.sampled_from(same))])))
        elif kind == "concat":
            fitting = [n for n in others if b.shapes[n][1:] == (height, width)]
            if fitting and channels < 40:
                b.add(Concat, *draw(st.permutations([b.last, draw(st.sampled_from(fitting))])))
        elif kind == "excite":
            value = b.last
            b.add(GlobalPool, kind=draw(st.sampled_from(("average", "max"))))
            if draw(st.booleans()):
                b.add(LayerNorm, eps=0.25)
                b.add(Scatter, channels=channels + 2, at=(*range(1, channels), channels + 1))
                b.add(Clip, low=-1.0, high=0.5)
                b.add(Shuffle, groups=channels + 2)
                b.add(BatchNorm)
                activation(draw, b)
                b.add(Slice, start=1, stop=channels + 1)
            b.add(Linear, features=channels, bias=draw(st.booleans()))
            factor = b.add(Activation, kind="sigmoid")
            b.add(Multiply, value, factor)
    if math.prod(b.shapes[b.last]) < 600 and draw(st.booleans()):
        b.add(Flatten)
    else:
        b.add(GlobalPool, kind=draw(st.sampled_from(("average", "max"))))
    b.add(Linear, features=draw(st.sampled_from((1, 2, 10, 17))))
    convs = [node.name for node in b.nodes if isinstance(node, Conv)]
    gated = draw(st.sets(st.sampled_from(convs))) if convs else set()
    return with_gates(Graph(tuple(b.nodes), b.last), sorted(gated, key=convs.index))


@pytest.mark.parametrize("isa", [*available_isas(), *available_isas("float16"), *emulating_isas("float16")])
def test_random_networks_do_what_the_reference_does(isa: str) -> None:
    @settings(
        max_examples=int(os.environ.get("MANIDP_EXAMPLES", "25")),
        deadline=None,
        derandomize="MANIDP_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), st.integers(0, 2**16), st.data())
    def law(graph: Graph, seed: int, data: st.DataObject) -> None:
        images = np.random.default_rng(seed).normal(size=(2, *graph.input.dims)).astype(np.float32)
        shares = data.draw(st.lists(st.sampled_from((0.0, 0.1, 0.5, 0.8, 1.0)), min_size=len(graph.gates),
                                    max_size=len(graph.gates)))  # fmt: skip
        keep = {gate.name: share for gate, share in zip(graph.gates, shares, strict=True)}
        weights = with_thresholds(graph, random_weights(graph, seed), images, keep)
        with mock.patch.object(choice, "_LARGE", data.draw(st.sampled_from((0, choice._LARGE)))):
            check(graph, weights, images, isa)

    law()


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 2**16), st.sampled_from((0.1, 0.5, 0.8)))
def test_what_the_graph_says_of_closed_channels_is_true_of_the_reference(graph: Graph, seed: int, keep: float) -> None:
    """Closed channels that nobody wants hold rubbish, those said to be zero are zero: the logits are the same."""
    chance = np.random.default_rng(seed)
    images = chance.normal(size=(1, *graph.input.dims))
    weights = with_thresholds(graph, random_weights(graph, seed), images, dict.fromkeys(graph.gate_channels, keep))
    meant = node_values(graph, weights, images)
    opened = np.concatenate([*(meant[gate][0] > 0 for gate in graph.gate_channels), [True]])
    values: dict[str, Array] = {}
    for node in graph.nodes:
        own = {key: weights[f"{node.name}.{key}"] for key in node.parameters(*graph.input_shapes(node))}
        value = value_of(node, own, *([values[source] for source in node.inputs] or [images]))
        unwanted, closed = (
            ~opened[by.get(node.name, np.full(len(value[0]), -1))] for by in (graph.wanted, graph.zeroed)
        )
        value = value.copy()
        value[:, unwanted] = chance.normal(scale=1e6)
        assert not value[:, closed & ~unwanted].any(), node
        values[node.name] = value
    np.testing.assert_allclose(values[graph.output], meant[graph.output], rtol=1e-9, atol=1e-9)
