"""Graphs check themselves, know their shapes and parameters, and gates are a rewrite that leaves the rest alone."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manidp.errors import GraphError
from manidp.gating.manidp import head
from manidp.gating.place import residual_convs, with_gates
from manidp.graph import (
    Activation,
    Add,
    BatchNorm,
    Conv,
    GlobalPool,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Pool,
    Shuffle,
    Slice,
    graph_from_json,
    with_classes,
)
from manidp.models import resnet

IMAGE = Input(name="image", dims=(3, 8, 8))


def small(*nodes: Node, output: str = "out") -> Graph:
    return Graph((IMAGE, *nodes), output)


HEAD = (GlobalPool(name="pool", inputs=("conv",)), Linear(name="out", inputs=("pool",), features=2))


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 8])
def test_resnet_has_as_many_weighted_layers_as_its_name_says(depth: int) -> None:
    graph = resnet(depth)
    layers = [node for node in graph.nodes if isinstance(node, (Conv, Linear)) and "downsample" not in node.name]
    assert len(layers) == depth
    assert graph.shapes["avgpool"] == (64,)


@pytest.mark.parametrize("depth", [0, 7, 19, 21, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(GraphError, match=f"6n \\+ 2 layers.*got {depth}"):
        resnet(depth)


def test_parameters_of_resnet20_are_the_published_ones() -> None:
    dense, gated = resnet(20), with_gates(resnet(20))
    assert trained(dense) == 272_282
    assert trained(gated) == 334_906
    assert list(gated.parameters)[:5] == [
        "conv_1_3x3.weight", "bn_1.moving_mean", "bn_1.moving_variance", "bn_1.gamma", "bn_1.beta",
    ]  # fmt: skip
    assert gated.parameters["stage_2.0.downsample.0.weight"] == (32, 16, 1, 1)
    assert gated.parameters["stage_3.0.mb1.fc1.weight"] == (64, 32)
    assert gated.parameters["stage_3.0.mb2.fc2.bias"] == (64,)
    assert gated.parameters["classifier.weight"] == (10, 64)


def trained(graph: Graph) -> int:
    fixed = ("moving_mean", "moving_variance", "threshold")
    return sum(math.prod(shape) for name, shape in graph.parameters.items() if not name.endswith(fixed))


def test_gates_come_in_the_order_of_the_blocks_and_spare_stem_and_shortcuts() -> None:
    gated = with_gates(resnet(20))
    assert [gate.name for gate in gated.gates] == [
        f"stage_{stage}.{block}.mb{k}" for stage in (1, 2, 3) for block in range(3) for k in (1, 2)
    ]
    first, second = gated.gates[:2]
    assert gated.by_name[f"{first.name}.pool"].inputs == ("relu_1",)
    assert gated.by_name[f"{second.name}.pool"].inputs == (
        "stage_1.0.mb1.gated",
    )  # the second gate reads what the first one let through
    assert gated.gated_value(first) == "stage_1.0.relu_a"
    assert gated.gated_value(second) == "stage_1.0.bn_b"
    assert gated.by_name["stage_1.0.add"].inputs == ("relu_1", "stage_1.0.mb2.gated")


def test_gates_add_nodes_and_change_nothing_else() -> None:
    dense, gated = resnet(32), with_gates(resnet(32))
    kept = {name: node for name, node in gated.by_name.items() if name in dense.by_name}
    assert kept.keys() == dense.by_name.keys()
    for name, node in kept.items():
        undone = tuple(source.replace(".mb1.gated", ".relu_a").replace(".mb2.gated", ".bn_b") for source in node.inputs)
        assert replace(node, inputs=undone) == dense.by_name[name]
    assert dense == resnet(32)


def test_what_a_gate_lets_us_skip_is_derived_from_the_graph() -> None:
    gated = with_gates(resnet(20))
    assert gated.wanted_by["stage_1.0.conv_a"] == "stage_1.0.mb1"
    assert gated.wanted_by["stage_1.0.conv_b"] == "stage_1.0.mb2"
    assert gated.zeroed_by["stage_1.0.mb1.gated"] == "stage_1.0.mb1"
    read_on = {
        f"stage_{stage}.{block}.mb2.pool" for stage in (1, 2, 3) for block in range(3)
    }  # of what mb1 let through
    assert gated.zeroed_by.keys() == {f"{gate.name}.gated" for gate in gated.gates} | read_on
    assert not {"conv_1_3x3", "stage_2.0.downsample.0", "stage_1.0.add", "classifier"} & gated.wanted_by.keys()


def test_a_second_reader_of_a_scaled_value_forbids_skipping() -> None:
    nodes = (
        Conv(name="conv", inputs=("image",), channels=4),
        *head("gate", "image", 4, 4),
        Multiply(name="scaled", inputs=("conv", "gate")),
        GlobalPool(name="pool", inputs=("scaled",)),
        Linear(name="out", inputs=("pool",), features=2),
    )
    alone = small(*nodes)
    assert alone.wanted_by == {"conv": "gate"}
    assert alone.zeroed_by == {"scaled": "gate", "pool": "gate"}
    other = (
        Add(name="sum", inputs=("scaled", "conv")),
        replace(nodes[-2], inputs=("sum",)),
        nodes[-1],
    )
    assert small(*nodes[:-2], *other).wanted_by == {}
    scaling_itself = small(nodes[0], replace(nodes[1], inputs=("conv",)), *nodes[2:])
    assert scaling_itself.wanted_by == {}  # the gate has to see the value first


def test_zeros_do_not_survive_what_shifts_them() -> None:
    def chain(node: Node) -> Graph:
        return small(
            Conv(name="conv", inputs=("image",), channels=4),
            *head("gate", "image", 4, 4),
            Multiply(name="scaled", inputs=("conv", "gate")),
            node,
            GlobalPool(name="pool", inputs=(node.name,)),
            Linear(name="out", inputs=("pool",), features=2),
        )

    keeps: list[Node] = [
        Activation(name="x", inputs=("scaled",), kind=kind) for kind in ("relu", "relu6", "hardswish", "silu")
    ]
    keeps += [Conv(name="x", inputs=("scaled",), channels=4, groups=4), Pool(name="x", inputs=("scaled",), kind="max", kernel=2, stride=2)]  # fmt: skip  # noqa: E501
    shifts: list[Node] = [Activation(name="x", inputs=("scaled",), kind=kind) for kind in ("sigmoid", "hardsigmoid")]
    shifts += [BatchNorm(name="x", inputs=("scaled",)), LayerNorm(name="x", inputs=("scaled",)), Conv(name="x", inputs=("scaled",), channels=4, groups=4, bias=True), Conv(name="x", inputs=("scaled",), channels=4)]  # fmt: skip  # noqa: E501
    for node in keeps:
        assert chain(node).zeroed_by.get("x") == "gate", node
    for node in shifts:
        assert "x" not in chain(node).zeroed_by, node


def test_gating_chosen_convolutions_of_a_plain_chain() -> None:
    plain = small(
        Conv(name="features.0", inputs=("image",), channels=4),
        Conv(name="features.1", inputs=("features.0",), channels=6),
        GlobalPool(name="pool", inputs=("features.1",)),
        Linear(name="out", inputs=("pool",), features=2),
    )
    assert residual_convs(plain) == ()
    gated = with_gates(plain, ["features.1"])
    assert [gate.name for gate in gated.gates] == ["features.mb1"]
    assert gated.wanted_by == {"features.1": "features.mb1"}
    with pytest.raises(GraphError, match="'pool' is not a convolution"):
        with_gates(plain, ["pool"])
    with pytest.raises(GraphError, match=r"'features\.1' has a gate already"):
        with_gates(gated, ["features.1"])


@given(st.sampled_from([8, 14, 20, 32]), st.integers(2, 200), st.booleans())
def test_json_there_and_back(depth: int, classes: int, gates: bool) -> None:
    graph = with_gates(resnet(depth, num_classes=classes)) if gates else resnet(depth, num_classes=classes)
    assert graph_from_json(json.loads(json.dumps(graph.to_json()))) == graph


CONV = Conv(name="conv", inputs=("image",), channels=4)
BROKEN = {
    "'out' reads 'nowhere'": (CONV, Linear(name="out", inputs=("nowhere",), features=2)),
    "cycle: a, b": (
        Activation(name="a", inputs=("b",)),
        Activation(name="b", inputs=("a",)),
        CONV,
        *HEAD,
    ),
    "more than once: conv": (CONV, CONV, *HEAD),
    "exactly one Input": (Input(name="other", dims=(3, 8, 8)), CONV, *HEAD),
    "'sum' .*inputs of one shape; got conv \\(4, 8, 8\\), image \\(3, 8, 8\\)": (
        CONV,
        Add(name="sum", inputs=("conv", "image")),
        *HEAD,
    ),
    "'conv' .*groups divide": (Conv(name="conv", inputs=("image",), channels=4, groups=2), *HEAD),
    "'out' .*a vector": (CONV, Linear(name="out", inputs=("conv",), features=2)),
    "'conv' .*11x11 kernel": (Conv(name="conv", inputs=("image",), channels=4, kernel=11), *HEAD),
    "'sum' \\(Add\\) takes 2 to 64 inputs; got 1": (CONV, Add(name="sum", inputs=("conv",)), *HEAD),
    "output 'out' does not exist": (CONV,),
    "must be a vector": (replace(CONV, name="out"),),
    "'mul' .*one of the same shape|'mul' .*vector": (
        CONV,
        GlobalPool(name="v", inputs=("image",)),
        Multiply(name="mul", inputs=("conv", "v")),
        *HEAD,
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_graph_that_cannot_be_is_refused_and_its_nodes_named(message: str) -> None:
    with pytest.raises(GraphError, match=message):
        small(*BROKEN[message])


def test_nodes_may_be_given_in_any_order() -> None:
    graph = resnet(20)
    assert Graph(graph.nodes[::-1], graph.output).shapes == graph.shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "Attention"}, "unknown op 'Attention'"),
        ({"channels": "16"}, "'channels' must be of type int; got '16'"),
        ({"channels": True}, "'channels' must be of type int"),
        ({"channels": 10**12}, "'channels' must be of type int"),
        ({"taps": 2}, "no field 'taps'"),
        ({"inputs": "image"}, "'inputs' must be of type"),
        ({"name": ""}, "'name' must be of type str"),
        ({"op": ["Conv"]}, "unknown op"),
    ],
)
def test_json_that_describes_no_node_is_refused_with_the_place(change: dict[str, object], message: str) -> None:
    data = resnet(8).to_json()
    data["nodes"][1] |= change
    with pytest.raises(GraphError, match=f"node 1 .*{message}"):
        graph_from_json(data)


@pytest.mark.parametrize(
    "data", [None, [], {}, {"nodes": {}}, {"nodes": [1], "output": "x"}, {"nodes": [], "output": 3}]
)
def test_json_that_is_no_graph_is_refused(data: object) -> None:
    with pytest.raises(GraphError):
        graph_from_json(data)


def test_a_new_head_has_the_new_number_of_classes_and_nothing_else_changes() -> None:
    graph = with_classes(with_gates(resnet(20)), 3)
    assert graph.num_classes == 3
    changed = {n for n, s in graph.parameters.items() if with_gates(resnet(20)).parameters[n] != s}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_slices_and_shuffles_say_which_channel_is_which_and_refuse_what_does_not_fit() -> None:
    conv = Conv(name="conv", inputs=("image",), channels=6)
    shuffle = Shuffle(name="shuffle", inputs=("conv",), groups=3)
    part = Slice(name="part", inputs=("shuffle",), start=1, stop=4)
    head = (replace(HEAD[0], inputs=("part",)), HEAD[1])
    graph = small(conv, shuffle, part, *head)
    assert graph.shapes["part"] == (3, 8, 8)
    assert shuffle.origin((6, 8, 8)).tolist() == [0, 2, 4, 1, 3, 5]
    assert part.origin((6, 8, 8)).tolist() == [1, 2, 3]
    assert graph_from_json(json.loads(json.dumps(graph.to_json()))) == graph
    for start, stop in ((-1, 2), (2, 2), (0, 7)):
        with pytest.raises(GraphError, match=rf"'part' \(Slice\) expects channels {start} to {stop - 1}; got shuffle"):
            small(conv, shuffle, replace(part, start=start, stop=stop), *head)
    for groups in (0, -2, 4):
        with pytest.raises(GraphError, match=rf"'shuffle' \(Shuffle\) expects channels that {groups} groups divide"):
            small(conv, replace(shuffle, groups=groups), part, *head)
