"""Kernels against the NumPy model beside it, which rounds as the code does: to the bit where sums are fused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine_cases import Array, plan_of, run_program
from manidp.engine import choice
from manidp.engine.engine import Program
from manidp.engine.kernels import lanes, linear, matrix, norm, pointwise, pool, select, winograd
from manidp.engine.kernels.convolution import Kernel
from manidp.engine.kernels.depthwise import Depthwise
from manidp.engine.kernels.direct import Direct
from manidp.engine.kernels.lanes import OutputLanes
from manidp.engine.kernels.matrix import Matrix
from manidp.engine.kernels.winograd import Winograd
from manidp.engine.target import ISAS, available_isas
from manidp.graph import Conv, Flatten, GlobalPool, Graph, Input, LayerNorm, Linear, Node, Pool, Select
from manidp.reference import node_values
from networks import random_weights

ISA = available_isas()


def fused(isa: str) -> bool:
    return isa != "sse"


def logits_of(nodes: Sequence[Node], isa: str, weights: dict[str, Array], images: Array) -> Array:
    """What the engine makes of the last node, channel by channel."""
    graph = Graph((*nodes, Flatten(name="flat", inputs=(nodes[-1].name,))), "flat")
    plan = plan_of(graph, weights, isa)
    return run_program(Program(plan, ISAS[isa]), plan, images)[0].logits


CONVOLUTIONS: list[tuple[Kernel, dict[str, Any]]] = [
    (Direct(), {"kernel": 3}),
    (Direct(), {"kernel": 3, "stride": 2}),
    (Direct(), {"kernel": 1, "padding": 0}),
    (Direct(), {"kernel": 5, "padding": 2, "groups": 3}),
    (Direct(), {"kernel": (1, 4), "padding": (0, 1, 2, 2), "dilation": (1, 2)}),
    (Direct(), {"kernel": (4, 2), "padding": 1, "dilation": 2, "stride": 2}),
    *((Matrix(rows), {"kernel": 1, "padding": 0, **more}) for rows in (False, True) for more in ({}, {"stride": 2})),
    *((Matrix(rows), {"kernel": kernel, "stride": 2}) for rows in (False, True) for kernel in (3, (2, 4))),
    (Matrix(False), {"kernel": 7, "padding": 3, "stride": 2}),
    *(
        (OutputLanes(), {"channels": channels, "kernel": 3, "stride": stride})
        for channels in (9, 56)
        for stride in (1, 2)
    ),
    (OutputLanes(), {"kernel": (4, 2), "padding": (0, 1, 2, 2), "dilation": (1, 2)}),
    *((OutputLanes(), {"channels": 56, "kernel": 1, "padding": 0, "stride": stride}) for stride in (1, 2)),
    (Depthwise(), {"kernel": 3}),
    (Depthwise(), {"kernel": 5, "padding": 2, "stride": 2}),
    (Depthwise(), {"kernel": (4, 2), "padding": (0, 1, 3, 2), "dilation": (1, 2), "stride": 2}),
    (Depthwise(), {"kernel": (2, 4), "padding": (2, 3, 0, 0), "stride": 3}),
    *((Matrix(rows), {"kernel": 5, "padding": 2}) for rows in (False, True)),
    (Matrix(False), {"kernel": (1, 7), "padding": (0, 3), "dilation": (2, 1)}),
    *(
        (Winograd(side), {"kernel": 3, **more})
        for side in (2, 4)
        for more in ({}, {"padding": 0}, {"padding": (0, 2, 1, 0)}, {"groups": 3})
    ),
]


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize(("kernel", "fields"), CONVOLUTIONS, ids=str)
def test_a_convolution_is_what_its_model_says(
    kernel: Kernel, fields: dict[str, Any], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "KERNELS", (kernel,))
    for module, name in (
        (matrix, "_WIDE"),
        (matrix, "_WIDE_ROWS"),
        (matrix, "_INPUTS"),
        (matrix, "_OUTPUTS"),
        (winograd, "_GROUP"),
    ):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(lanes, "_AT_ONCE", 5)  # of 6 inputs
    fields = {"channels": 6, "groups": 6} | fields if isinstance(kernel, Depthwise) else {"channels": 9} | fields
    conv = Conv(name="conv", inputs=("image",), **fields)
    nodes = (Input(name="image", dims=(6, 9, 11)), conv)
    graph = Graph((*nodes, Flatten(name="flat", inputs=("conv",))), "flat")
    weights = random_weights(graph)
    images = np.random.default_rng(1).normal(size=(2, 6, 9, 11)).astype(np.float32)
    made = logits_of(nodes, isa, weights, images)
    model = kernel.model(images, weights["conv.weight"].astype(np.float64), conv).reshape(2, -1)
    exact = node_values(graph, weights, images.astype(np.float64))["flat"]
    if not isinstance(kernel, Winograd) and fused(isa):
        np.testing.assert_array_equal(made, model)
    size = np.abs(exact).max()
    transforms = isinstance(kernel, Winograd)  # their sums are made in another order
    assert np.abs(made - model).max() < (4e-6 if transforms else 1e-6) * size
    assert np.abs(model - exact).max() < 2e-5 * size


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("kind", ["max", "average", "inside"])
def test_a_pool_is_what_its_model_says(kind: str, isa: str) -> None:
    node = Pool(name="pool", inputs=("image",), kind="max" if kind == "max" else "average", kernel=3, stride=2,
                padding=1, count_include_pad=kind != "inside")  # fmt: skip
    images = np.random.default_rng(1).normal(size=(2, 5, 9, 11)).astype(np.float32)
    made = logits_of((Input(name="image", dims=(5, 9, 11)), node), isa, {}, images)
    np.testing.assert_array_equal(made, pool.model(images, node).reshape(2, -1))


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("kind", ["max", "average"])
def test_a_pooled_map_is_what_its_model_says(kind: str, isa: str) -> None:
    node = GlobalPool(name="pool", inputs=("image",), kind=kind)  # type: ignore[arg-type]
    images = np.random.default_rng(1).normal(size=(2, 5, 9, 11)).astype(np.float32)
    made = logits_of((Input(name="image", dims=(5, 9, 11)), node), isa, {}, images)
    model = pointwise.pooled_model(images, kind, ISAS[isa].lanes)  # type: ignore[arg-type]
    np.testing.assert_allclose(made, model, rtol=0 if kind == "max" else 1e-5)


@pytest.mark.parametrize("inputs", [37, 192])
@pytest.mark.parametrize("isa", ISA)
def test_a_linear_layer_is_what_its_model_says(isa: str, inputs: int) -> None:
    nodes = (
        Input(name="image", dims=(inputs, 1, 1)),
        Flatten(name="vector", inputs=("image",)),
        Linear(name="linear", inputs=("vector",), features=77),
    )
    weights = random_weights(Graph(nodes, "linear"))
    images = np.random.default_rng(1).normal(size=(3, inputs, 1, 1)).astype(np.float32)
    made = logits_of(nodes, isa, weights, images)
    weight, bias = (weights[f"linear.{part}"].astype(np.float32) for part in ("weight", "bias"))
    model = linear.model(images.reshape(3, inputs), weight, bias, ISAS[isa].lanes)
    if fused(isa) and inputs == 37:  # with inputs in the lanes nothing is said of the order in which lanes are added
        np.testing.assert_array_equal(made, model)
    np.testing.assert_allclose(made, model, atol=1e-6 * np.abs(model).max())


@pytest.mark.parametrize("size", [(9, 11), (1, 1)], ids=["map", "vector"])
@pytest.mark.parametrize("isa", ISA)
def test_a_layer_norm_is_what_its_model_says(isa: str, size: tuple[int, int]) -> None:
    """Also of channels whose mean is 300 times their deviation."""
    pool = (GlobalPool(name="before", inputs=("image",)),) if size == (1, 1) else ()
    nodes = (
        Input(name="image", dims=(37, *size)),
        *pool,
        LayerNorm(name="norm", inputs=("before" if pool else "image",), eps=1e-6),
    )
    rng = np.random.default_rng(1)
    weights = {f"norm.{part}": rng.normal(size=37).astype(np.float32) for part in ("gamma", "beta")}
    images = (300 + rng.normal(size=(2, 37, *size))).astype(np.float32)
    made = logits_of(nodes, isa, weights, images).reshape(images.shape)
    model = norm.model(images, weights["norm.gamma"], weights["norm.beta"], 1e-6)
    exact = node_values(Graph((*nodes, Flatten(name="flat", inputs=("norm",))), "flat"), weights, images)["flat"]
    if fused(isa) and not pool:  # of a vector nothing is said of the order in which lanes are added
        np.testing.assert_array_equal(made, model)
    np.testing.assert_allclose(made, model, atol=1e-4 * np.abs(model).max())
    np.testing.assert_allclose(model, exact.reshape(model.shape), atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("gain", ["score", "one"])
@pytest.mark.parametrize("rule", ["threshold", "constant"])
@pytest.mark.parametrize("isa", ISA)
def test_select_is_what_its_model_says(rule: str, gain: str, isa: str) -> None:
    """On the threshold, and just above; the lists are tested by what they steer (test_memory.py)."""
    channels = 19
    node = Select(name="gate", inputs=("scores",), rule=rule, gain=gain)  # type: ignore[arg-type]
    nodes = (
        Input(name="image", dims=(channels, 1, 1)),
        GlobalPool(name="scores", inputs=("image",)),
        node,
    )
    rng = np.random.default_rng(2)
    weights: dict[str, Array] = {
        name: rng.uniform(size=shape) for name, shape in Graph(nodes, "gate").parameters.items()
    }
    mask = None
    if rule == "threshold":
        weights["gate.threshold"] = np.array(0.5)
    else:
        mask = weights["gate.mask"] = (rng.uniform(size=channels) > 0.5).astype(np.float64)
    scores = rng.uniform(size=(1, channels)).astype(np.float32)
    scores[0, :2] = 0.5, np.nextafter(np.float32(0.5), np.float32(1))
    scores[0, 2:6] *= -1
    made = logits_of(nodes, isa, weights, scores.reshape(1, channels, 1, 1))
    factors, order, below = select.model(scores[0], 0.5, None if mask is None else mask.astype(np.float32), gain)
    np.testing.assert_array_equal(made[0], factors)
    kept = set(order[: below[-1]].tolist())
    assert kept == set(np.flatnonzero(factors > 0).tolist())
    assert sorted(order.tolist()) == list(range(channels))
