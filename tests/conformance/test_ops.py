"""What the ops of the zoo say of themselves holds for what the NumPy reference computes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from manidp import reference
from manidp.errors import GraphError
from manidp.graph import Node, graph_from_json
from manidp.graph.ops import Shape
from networks import ZOO, Array

Case = tuple[Node, tuple[Shape, ...]]


def cases() -> dict[str, Case]:
    """Every node of the zoo with the shapes of its inputs, one of those that differ in their names alone."""
    found: dict[str, Case] = {}
    for graph in ZOO.values():
        for node in graph.nodes:
            if node.inputs:
                shapes = graph.input_shapes(node)
                plain = replace(node, name="x", inputs=tuple("abcdefgh"[: len(shapes)]))
                found.setdefault(f"{plain!r} {shapes}", (plain, shapes))
    return found


CASES = cases()


def parameters_of(node: Node, shapes: tuple[Shape, ...], rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.uniform(0.2, 1, shape) for name, shape in node.parameters(*shapes).items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shape_and_flow_of_channels_are_as_stated(case: Case) -> None:
    node, shapes = case
    rng = np.random.default_rng(0)
    parameters = parameters_of(node, shapes, rng)
    inputs = [rng.normal(size=(2, *shape)) for shape in shapes]
    value = reference.value_of(node, parameters, *inputs)
    channels = range(value.shape[1])
    assert value.shape == (2, *node.shape(*shapes))
    flow = node.channel_flow(*shapes)
    if flow == "own":
        for c in channels:
            changed = [np.where(np.arange(x.shape[1]).reshape(-1, *[1] * (x.ndim - 2)) == c, x, 7) for x in inputs]
            np.testing.assert_array_equal(reference.value_of(node, parameters, *changed)[:, c], value[:, c])
    elif flow == "moved":
        zeros = np.zeros_like(value[:, :1])
        np.testing.assert_array_equal(value, np.concatenate([*inputs, zeros], axis=1)[:, node.origin(*shapes)])
    elif flow == "summed":
        (x,) = inputs
        read, made = np.arange(0, x.shape[1], 2), np.arange(1, len(channels), 2)
        x[:, 1::2] = 0
        assert node.narrowed(len(made)).shape((len(read), *x.shape[2:])) == (len(made), *value.shape[2:])
        part = {name: p[made][:, read] if name == "weight" else p[made] for name, p in parameters.items()}
        whole = reference.value_of(node, parameters, x)
        np.testing.assert_allclose(reference.value_of(node, part, x[:, read]), whole[:, made], atol=1e-12)


@pytest.mark.parametrize("name", [name for name, (node, _) in CASES.items() if node.keeps_zero])
def test_what_keeps_zero_makes_channels_of_zeros_of_channels_of_zeros(name: str) -> None:
    node, shapes = CASES[name]
    if node.channel_flow(*shapes) == "own":
        rng = np.random.default_rng(0)
        inputs = [rng.normal(size=(2, *shape)) for shape in shapes]
        for x in inputs:
            x[:, ::2] = 0
        value = reference.value_of(node, parameters_of(node, shapes, rng), *inputs)
        np.testing.assert_array_equal(value[:, ::2], 0)


@pytest.mark.parametrize("name", [name for name, (node, _) in CASES.items() if node.keeps_gain])
def test_what_keeps_gains_scales_with_its_input(name: str) -> None:
    node, (shape,) = CASES[name]
    rng = np.random.default_rng(0)
    parameters, x = parameters_of(node, (shape,), rng), rng.normal(size=(2, *shape))
    gain = rng.uniform(0, 2, (shape[0], *[1] * (len(shape) - 1)))
    gain[1] = 0
    scaled = reference.value_of(node, parameters, gain * x)
    np.testing.assert_allclose(scaled, gain * reference.value_of(node, parameters, x), atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_with_every_channel_kept_the_multiply_adds_are_all(case: Case) -> None:
    node, shapes = case
    if (pairs := node.pair_macs(*shapes)) is not None:
        groups, each = pairs
        read, made = shapes[0][0] // groups, node.shape(*shapes)[0] // groups
        assert groups * read * made * each == node.macs(*shapes)


@pytest.mark.parametrize("name", ZOO)
def test_json_there_and_back(name: str) -> None:
    assert graph_from_json(json.loads(json.dumps(ZOO[name].to_json()))) == ZOO[name]


def test_the_laws_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim, made wrongly, fails its law."""
    wrong = {"own": "Conv, 3x3", "moved": "Conv, 3x3", "summed": "Conv, groups"}
    for flow, name in wrong.items():
        graph = ZOO[name]
        node = graph.by_name["x"]
        monkeypatch.setattr(type(node), "channel_flow", lambda self, *inputs, flow=flow: flow)
        with pytest.raises((AssertionError, NotImplementedError, GraphError)):
            test_shape_and_flow_of_channels_are_as_stated((node, graph.input_shapes(node)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_said_never_to_be_negative_is_not(case: Case) -> None:
    node, shapes = case
    rng = np.random.default_rng(0)
    parameters = parameters_of(node, shapes, rng)
    for known in (False, True):
        if node.nonnegative(*[known] * len(shapes)):
            inputs = [rng.normal(size=(2, *shape)) for shape in shapes]
            value = reference.value_of(node, parameters, *(np.abs(x) if known else x for x in inputs))
            assert value.min() >= 0
