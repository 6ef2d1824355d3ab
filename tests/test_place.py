"""Where gates go, rule by rule, on graphs that have just one."""

from __future__ import annotations

import numpy as np

import manidp
from manidp.gating.place import gate, with_gates
from manidp.graph import (
    Activation,
    Add,
    BatchNorm,
    Concat,
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
)
from manidp.graph.macs import gate_macs, node_macs, ungated_macs
from manidp.models import imagenet_resnet, resnet
from manidp.reference import run
from networks import chain, checkpoint_of, images_for, inverted_residual, random_weights


def network(*nodes: Node) -> Graph:
    """A stem of 12 channels, the nodes, and what makes logits."""
    stem = (Conv(name="stem", channels=12), Activation(name="first"))
    return Graph(chain(*stem, *nodes, GlobalPool(name="mean"), Linear(name="logits", features=3)), "logits")


def reasons(graph: Graph) -> dict[str, str]:
    return dict(gate(graph).ungated)


def test_one_gate_serves_a_whole_chain_of_channels() -> None:
    gated = gate(
        network(
            Conv(name="a.wide", channels=24, kernel=1, padding=0),
            BatchNorm(name="bn"),
            Activation(name="act", kind="silu"),
            Conv(name="a.depthwise", channels=24, groups=24),
            Activation(name="sigmoid", kind="sigmoid"),
            Pool(name="pool", kind="max", kernel=2, stride=2),
            Conv(name="a.narrow", channels=12),
        )
    )
    assert gated.gates == {"a.mb1": ("a.wide", "a.depthwise"), "a.mb2": ("a.narrow",)}
    graph = gated.network
    assert graph.by_name["a.mb1.gated"].inputs == ("pool", "a.mb1")
    assert graph.by_name["a.mb1.pool"].inputs == ("first",)
    assert [name for name, by in graph.wanted_by.items() if by == "a.mb1"][::-1] == [
        "a.wide", "bn", "act", "a.depthwise", "sigmoid", "pool",
    ]  # fmt: skip
    assert graph.zeroed_by["a.mb1.gated"] == "a.mb1"


def test_a_gate_stands_before_a_layer_norm_which_reads_zeros_and_makes_none() -> None:
    gated = gate(
        network(
            Conv(name="a.depthwise", channels=12, kernel=7, padding=3, groups=12, bias=True),
            LayerNorm(name="norm"),
            Conv(name="b.wide", channels=24, kernel=1, padding=0),
            Conv(name="b.narrow", channels=12),
        )
    )
    graph = gated.network
    assert gated.gates["a.mb1"] == ("a.depthwise",)
    assert graph.by_name["norm"].inputs == ("a.mb1.gated",) and "norm" not in graph.zeroed_by
    assert [name for name, by in graph.wanted_by.items() if by == "a.mb1"] == ["a.depthwise"]


def test_a_gate_stands_before_the_pooling_of_a_squeeze() -> None:
    graph = gate(
        network(
            Conv(name="conv", channels=12),
            Activation(name="act"),
            GlobalPool(name="squeeze"),
            Linear(name="fc", features=12),
            Activation(name="factor", kind="sigmoid"),
            Multiply(name="excited", inputs=("act", "factor")),
            Conv(name="next", channels=12),
        )
    ).network
    assert graph.by_name["mb1.gated"].inputs == ("act", "mb1")
    assert graph.by_name["squeeze"].inputs == ("mb1.gated",) and graph.by_name["excited"].inputs[0] == "mb1.gated"
    assert graph.zeroed_by["excited"] == "mb1"  # so the next convolution does not read what is closed


def test_stems_and_shortcuts_have_no_gates_and_it_is_said_why() -> None:
    graph = network(
        Conv(name="down", channels=12),  # its result is added to below
        Conv(name="x", channels=12),
        Conv(name="y", channels=12),
        Add(name="sum", inputs=("down", "y")),
        Conv(name="p", inputs=("sum",), channels=12),
        Conv(name="q", channels=12),
        Conv(name="side", inputs=("sum",), channels=12, kernel=1, padding=0),
        Add(name="all", inputs=("side", "q")),
    )
    assert set(sum(gate(graph).gates.values(), ())) == {"x", "y", "p", "q"}
    told = reasons(graph)
    assert "reads the image" in told["stem"]
    assert "is on a shortcut" in told["side"]
    assert "the shortcut of 'sum'" in told["down"]


def test_constants_and_single_channels_have_no_gates() -> None:
    """As what a spatial attention is made of: a mean over channels, a map of weights, that map repeated."""
    graph = network(
        Conv(name="wide", channels=64),
        Conv(name="mean over", channels=1, kernel=1, padding=0, trainable=False),
        Conv(name="attention", channels=1, kernel=7, padding=3),
        Conv(name="spread", channels=64, kernel=1, padding=0, trainable=False),
        Multiply(name="attended", inputs=("wide", "spread")),
        Conv(name="last", channels=64),
    )
    assert gate(graph).gates == {"mb1": ("wide",), "mb2": ("last",)}
    told = reasons(graph)
    assert "constants" in told["mean over"] and "constants" in told["spread"]
    assert told["attention"] == "it makes one channel"


def test_which_operand_is_the_branch_does_not_depend_on_their_order() -> None:
    for inputs in (("a", "b"), ("b", "a")):
        graph = network(
            Conv(name="a", inputs=("first",), channels=12),
            Conv(name="b", inputs=("first",), channels=12),
            Add(name="sum", inputs=inputs),
        )
        assert set(sum(gate(graph).gates.values(), ())) == {"a", "b"}


def test_operands_of_a_concatenation_have_gates_of_their_own() -> None:
    graph = network(
        Conv(name="a", inputs=("first",), channels=8),
        Conv(name="b", inputs=("first",), channels=6),
        Concat(name="both", inputs=("a", "b")),
        Slice(name="part", stop=7),
    )
    assert list(gate(graph).gates.values()) == [("a",), ("b",)]
    assert gate(graph).network.by_name["both"].inputs == ("mb1.gated", "mb2.gated")


def test_a_chain_goes_on_behind_shuffled_channels() -> None:
    graph = network(
        Conv(name="a.wide", channels=24, kernel=1, padding=0, groups=3),
        BatchNorm(name="bn"),
        Activation(name="act"),
        Shuffle(name="mixed", groups=3),
        Conv(name="a.depthwise", channels=24, groups=24),
        Conv(name="a.narrow", channels=12, kernel=1, padding=0, groups=3),
    )
    gated = gate(graph)
    assert gated.gates["a.mb1"] == ("a.wide", "a.depthwise")
    network_, origin = gated.network, Shuffle(name="x", groups=3).origin((24, 1, 1))
    assert network_.wanted["a.wide"][origin].tolist() == network_.gate_numbers["a.mb1"].tolist()
    assert network_.wanted_by["a.depthwise"] == "a.mb1" and "a.wide" not in network_.wanted_by


def test_each_closed_channel_is_followed_through_what_moves_adds_and_multiplies_it() -> None:
    graph = gate(
        network(
            Conv(name="a", inputs=("first",), channels=8),
            Conv(name="b", inputs=("first",), channels=6),
            Concat(name="both", inputs=("a", "b")),
            Shuffle(name="mixed", groups=2),
            Slice(name="part", start=2, stop=9),
            Activation(name="act"),
            Add(name="twice", inputs=("part", "act")),
            Conv(name="c", inputs=("part",), channels=7),
            Multiply(name="product", inputs=("c", "act")),
        )
    ).network
    both = [*graph.gate_numbers["mb1"], *graph.gate_numbers["mb2"]]
    assert graph.zeroed["both"].tolist() == both
    mixed = [both[c] for pair in zip(range(7), range(7, 14), strict=True) for c in pair]
    assert graph.zeroed["mixed"].tolist() == mixed
    for name in ("part", "act", "twice"):
        assert graph.zeroed[name].tolist() == mixed[2:9]
    assert graph.zeroed["product"].tolist() == graph.gate_numbers["mb3"].tolist()
    assert not {"both", "mixed", "part"} & graph.zeroed_by.keys()


def test_channels_that_are_the_logits_stay() -> None:
    nodes = chain(Conv(name="stem", channels=12), Conv(name="scores", channels=3), GlobalPool(name="logits"))
    gated = gate(Graph(nodes, "logits"))
    assert dict(gated.ungated)["scores"] == "its channels are the logits"
    assert not gated.gates


def test_a_gate_is_narrow_enough_to_pay_or_there_is_none() -> None:
    def on(side: int, channels: int) -> Graph:
        return Graph(
            chain(
                Conv(name="stem", channels=channels),
                Pool(name="small", kind="max", kernel=32 // side, stride=32 // side),
                Conv(name="conv", channels=channels, kernel=1, padding=0),
                GlobalPool(name="mean"),
                Linear(name="logits", features=3),
                image=Input(name="image", dims=(3, 32, 32)),
            ),
            "logits",
        )

    wide = gate(on(32, 32))
    assert wide.network.by_name["mb1.fc1"].features == 32  # type: ignore[attr-defined]
    narrow = gate(on(8, 128))
    hidden = narrow.network.by_name["mb1.fc1"].features  # type: ignore[attr-defined]
    assert 4 <= hidden < 64
    assert 8 * gate_macs(narrow.network) <= node_macs(narrow.network)["conv"] / 16  # each weight is read for one
    # a map of one position: the convolution's weights are read for one each, too
    assert reasons(on(1, 64))["conv"] == (
        "a gate would not pay: deciding takes as long as 65,536 multiply-adds and can save 32,768"
    )


def test_networks_of_the_paper_are_gated_as_before() -> None:
    for graph in (
        resnet(20),
        resnet(56),
        resnet(8, width=2),
        imagenet_resnet(18),
        imagenet_resnet(34),
    ):
        gated = gate(graph)
        assert gated.network == with_gates(graph) == with_gates(graph, sum(gated.gates.values(), ()))
        assert all("conv" in name.rpartition(".")[2] for name in sum(gated.gates.values(), ()))


def test_gating_twice_adds_nothing() -> None:
    once = gate(inverted_residual())
    assert gate(once.network).gates == {}
    assert "it has a gate already" in dict(gate(once.network).ungated).values()


def test_a_checkpoint_keeps_its_logits_to_the_last_bit() -> None:
    graph = network(Conv(name="conv", channels=12), BatchNorm(name="bn"), Activation(name="act"))
    checkpoint = checkpoint_of(graph, random_weights(graph, 1))
    gated = manidp.gate(checkpoint, seed=3)
    images = images_for(graph)
    before, after = (run(c.graph, c.weights, images, np.float32) for c in (checkpoint, gated.network))
    assert np.array_equal(before.logits, after.logits) and all(value.all() for value in after.kept.values())
    assert ungated_macs(gated.network.graph) == ungated_macs(graph)
    assert manidp.gate(graph).network == gated.network.graph
