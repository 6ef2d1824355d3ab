"""What the engine makes where it is needed: no copy for a concatenation, no pass for what a 1x1 convolution can do."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

from engine_cases import check, plan_of, run_program
from manidp.engine import choice
from manidp.engine.engine import Program
from manidp.engine.kernels import matrix
from manidp.engine.kernels.depthwise import ConvolveEach
from manidp.engine.kernels.matrix import MultiplyMatrices
from manidp.engine.kernels.pointwise import Pointwise
from manidp.engine.steps import MapKey, VectorKey
from manidp.engine.target import ISAS, available_isas
from manidp.gating.manidp import head
from manidp.graph import Activation, Add, BatchNorm, Clip, Concat, Conv, GlobalPool, Graph, Input, Multiply, Node
from networks import classifier, images_for, random_weights, some_open

ISA = available_isas()


def one(name: str, channels: int) -> Conv:
    return Conv(name=name, channels=channels, kernel=1, padding=0)


def dense_block(layers: int) -> tuple[Node, ...]:
    """Each layer puts four channels behind all that there are."""
    nodes: list[Node] = [one("stem", 5)]
    for n in range(layers):
        last = nodes[-1].name
        nodes += [
            BatchNorm(name=f"{n}.norm"), Activation(name=f"{n}.relu"), one(f"{n}.one", 6),
            Conv(name=f"{n}.three", channels=4),
            Concat(name=f"{n}.all", inputs=(last, f"{n}.three")),
        ]  # fmt: skip
    return tuple(nodes)


def passes(graph: Graph) -> int:
    plan = plan_of(graph, random_weights(graph), ISA[0])
    return sum(isinstance(step, Pointwise) for step in plan.steps)


@pytest.mark.parametrize("isa", ISA)
def test_a_dense_block_makes_no_pass_over_its_maps(isa: str) -> None:
    graph = classifier(*dense_block(3), one("last", 7))
    plan = plan_of(graph, random_weights(graph), isa)
    assert not [step for step in plan.steps if isinstance(step, Pointwise)]
    whole = plan.maps[MapKey("2.all", 1)]
    for name, first in (("stem", 0), ("0.three", 5), ("1.all", 0), ("2.three", 13)):
        part = plan.maps[MapKey(name, 1)]
        assert (part.at, part.layout) == (whole.at + first * whole.layout.channel, whole.layout)
    check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize("isa", ISA)
def test_a_map_has_one_place(isa: str) -> None:
    """It is copied where it is put together twice, or its memory is another's, or sums are made of what is copied."""
    twice = classifier(one("a", 3), one("b", 3), Concat(name="c", inputs=("a", "b", "a")), one("d", 4),
                       Concat(name="e", inputs=("d", "b")), one("last", 5))  # fmt: skip
    assert passes(twice) == 2
    added = classifier(one("a", 3), one("b", 3), Add(name="c", inputs=("a", "b")), one("d", 3),
                       Concat(name="e", inputs=("c", "d")), one("last", 5))  # fmt: skip
    kept = classifier(one("a", 3), one("b", 3), Concat(name="c", inputs=("a", "b")), one("d", 3),
                      Add(name="e", inputs=("d", "b")), Concat(name="f", inputs=("c", "e")),
                      one("last", 5))  # fmt: skip
    pooled = classifier(one("a", 3), one("b", 3), Concat(name="c", inputs=("a", "b")))
    assert passes(pooled) == 2
    for graph in (twice, added, kept, pooled):
        check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize("isa", ISA)
def test_a_1x1_convolution_does_what_stands_before_it(isa: str) -> None:
    graph = classifier(
        Conv(name="a", channels=9), GlobalPool(name="squeezed"),
        Activation(name="factors", kind="sigmoid"), Multiply(name="scaled", inputs=("a", "factors")), one("last", 5),
    )  # fmt: skip
    plan = plan_of(graph, random_weights(graph), isa)
    (step,) = [step for step in plan.steps if isinstance(step, MultiplyMatrices) and step.node.name == "last"]
    assert [op.operand for op in step.before] == [VectorKey("factors")]
    assert not [step for step in plan.steps if isinstance(step, Pointwise)]
    check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize("isa", ISA)
def test_a_1x1_convolution_leaves_alone_what_others_read_or_what_it_cannot_do(isa: str) -> None:
    others = (
        classifier(Conv(name="a", channels=9), one("b", 9), Activation(name="relu", inputs=("a",)), one("c", 9),
                   Add(name="d", inputs=("b", "c", "relu"))),
        classifier(*dense_block(1)[:3], Conv(name="last", channels=5)),
        classifier(*dense_block(1)[:3], Conv(name="last", channels=5, kernel=1, padding=1)),
    )  # fmt: skip
    for graph in others:
        plan = plan_of(graph, random_weights(graph), isa)
        assert not any(step.before for step in plan.steps if isinstance(step, MultiplyMatrices))
        check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize(("kernel", "spread"), [(3, 1), (5, 1), (3, 9)])
@pytest.mark.parametrize("isa", ISA)
def test_a_1x1_convolution_does_a_depthwise_one_before_it_to_the_same_bits(isa: str, kernel: int, spread: int) -> None:
    """Where its map is large, here if it is any; otherwise each has a step of its own."""
    each = Conv(name="each", channels=40, groups=40, kernel=kernel, padding=kernel // 2 * spread, dilation=spread)
    graph = classifier(
        Conv(name="a", channels=40), each, BatchNorm(name="norm"), Clip(name="clip", low=0, high=2),
        one("last", 70), image=Input(name="image", dims=(3, 23, 19)),
    )  # fmt: skip
    weights, images = random_weights(graph), images_for(graph)
    logits = []
    for large, steps in ((0, 0), (2**40, 1)):
        with (
            mock.patch.object(choice, "_LARGE", large),
            mock.patch.object(matrix, "_WHOLE", 0),
            mock.patch.object(matrix, "_CONVOLVED", 1),  # so that not all blocks are taken at once
        ):
            plan = plan_of(graph, weights, isa)
            assert sum(isinstance(step, ConvolveEach) for step in plan.steps) == steps
            logits.append(run_program(Program(plan, ISAS[isa]), plan, images)[0].logits)
            check(graph, weights, images, isa)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("width", [5, 7, 13, 37])
@pytest.mark.parametrize("isa", ISA)
def test_a_depthwise_convolution_makes_each_number_once(isa: str, width: int, padding: int, stride: int) -> None:
    """Rows of less than a vector, or not of whole ones; sums made in place, pooled sums, and zeros around the map."""
    image = Input(name="image", dims=(3, 17, width))
    made: dict[str, Any] = {"channels": 6, "padding": padding, "stride": stride}
    after = Conv(name="after", channels=3)
    for nodes in (
        (Conv(name="each", groups=6, **made), Activation(name="relu"), after),
        (Conv(name="each", groups=6, **made), Activation(name="silu", kind="silu")),
        (Conv(name="beside", **made), Conv(name="each", inputs=("stem",), groups=6, **made),
         Add(name="sum", inputs=("beside", "each")), after),
    ):  # fmt: skip
        graph = classifier(Conv(name="stem", channels=6), *nodes, image=image)
        check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize("isa", ISA)
def test_a_block_that_is_activated_first(isa: str) -> None:
    """Its convolution reads what its result is added to, through what stands before it."""
    graph = classifier(
        Conv(name="a", channels=40), BatchNorm(name="norm"), Activation(name="relu"), one("b", 40),
        Add(name="sum", inputs=("a", "b")), one("last", 5),
    )  # fmt: skip
    check(graph, random_weights(graph), images_for(graph), isa)


@pytest.mark.parametrize("isa", ISA)
def test_gated_parts_lie_within_and_gated_maps_are_read_through_what_stands_before(isa: str) -> None:
    graph = classifier(
        Conv(name="x", channels=6), *head("gate", "x", 8, 3), Conv(name="second", inputs=("x",), channels=8),
        Multiply(name="gated", inputs=("second", "gate")), Concat(name="all", inputs=("x", "gated")),
        BatchNorm(name="norm"), Activation(name="relu"), one("last", 7),
    )  # fmt: skip
    check(graph, some_open(graph), images_for(graph), isa)
