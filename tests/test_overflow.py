"""Numbers that overflow, wherever in a network: an error that names the image, never a decent logit.

The networks end in something that makes finite logits of anything that is not NaN.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine_cases import Array, assert_close
from manidp import reference
from manidp.engine.engine import Engine
from manidp.engine.target import ISAS, available_isas, emulating_isas
from manidp.errors import ManiDPError, UnsupportedError
from manidp.gating.manidp import head
from manidp.graph import Activation, BatchNorm, Conv, GlobalPool, Graph, Input, LayerNorm, Linear, Multiply, Node, Pool
from networks import checkpoint_of, random_weights

PRECISIONS = [
    *(("float32", isa, 3e38) for isa in available_isas()),
    *(("float16", isa, 4e4) for isa in available_isas("float16") + emulating_isas("float16")),
]


def network(*middle: Node) -> Graph:
    """A convolution whose outputs can overflow, ``middle``, and what makes finite logits of anything finite."""
    nodes = (
        Input(name="image", dims=(3, 6, 6)),
        Conv(name="first", inputs=("image",), channels=2, kernel=1, padding=0),
        *middle,
        GlobalPool(name="pool", inputs=(middle[-1].name,), kind="max"),
        Activation(name="positive", inputs=("pool",), kind="relu6"),
        Linear(name="logits", inputs=("positive",), features=2),
    )
    return Graph(nodes, "logits")


OVERFLOWS = {
    "relu": network(
        Activation(name="act", inputs=("first",), kind="relu"),
        Conv(name="second", inputs=("act",), channels=2),
        Activation(name="last", inputs=("second",), kind="relu"),
    ),
    "max pool": network(
        Pool(name="window", inputs=("first",), kind="max", kernel=3, stride=2, padding=1),
        Activation(name="last", inputs=("window",), kind="hardsigmoid"),
    ),
    "gate": network(
        *head("gate", "first", 2, 2),
        Conv(name="second", inputs=("first",), channels=2, kernel=1, padding=0),
        Multiply(name="last", inputs=("second", "gate")),
    ),
    "silu": network(
        Activation(name="act", inputs=("first",), kind="silu"),
        Pool(name="last", inputs=("act",), kind="average", kernel=2, stride=2),
    ),
    "layer norm": network(
        LayerNorm(name="norm", inputs=("first",)),
        Activation(name="last", inputs=("norm",), kind="sigmoid"),
    ),
    "layer norm of a vector": network(
        Conv(name="second", inputs=("image",), channels=2, kernel=1, padding=0),
        GlobalPool(name="squeeze", inputs=("first",)),
        LayerNorm(name="norm", inputs=("squeeze",)),
        Activation(name="factor", inputs=("norm",), kind="sigmoid"),
        Multiply(name="last", inputs=("second", "factor")),
    ),
    "sigmoid": network(Activation(name="last", inputs=("first",), kind="sigmoid")),
    "squeeze and excite": network(
        Conv(name="second", inputs=("image",), channels=2, kernel=1, padding=0),
        GlobalPool(name="squeeze", inputs=("first",)),
        Linear(name="excitation", inputs=("squeeze",), features=2),
        Activation(name="factor", inputs=("excitation",), kind="sigmoid"),
        Multiply(name="scaled", inputs=("second", "factor")),
        Activation(name="last", inputs=("scaled",), kind="sigmoid"),
    ),
    "maximum of a map": network(
        GlobalPool(name="high", inputs=("first",), kind="max"),
        Activation(name="factor", inputs=("high",), kind="hardsigmoid"),
        Conv(name="second", inputs=("image",), channels=2, kernel=1, padding=0),
        Multiply(name="scaled", inputs=("second", "factor")),
        BatchNorm(name="normed", inputs=("scaled",)),
        Activation(name="last", inputs=("normed",), kind="relu6"),
    ),
}


def some_weights(graph: Graph, sign: int) -> dict[str, Array]:
    """Weights with which large numbers overflow in ``first``, and a gate that finite numbers close."""
    weights = random_weights(graph)
    weights["first.weight"] = np.full((2, 3, 1, 1), 2 * sign, dtype=np.float32)
    if "relu" in graph.by_name or "gate" in graph.by_name:
        weights["second.weight"] = -np.abs(weights["second.weight"])
    if "gate.threshold" in weights:
        weights["gate.threshold"] = np.array(10, dtype=np.float32)
        weights["gate.fc2.weight"] = -np.abs(weights["gate.fc2.weight"])
    return weights


@pytest.mark.parametrize(("precision", "isa", "large"), PRECISIONS)
@pytest.mark.parametrize("graph", OVERFLOWS.values(), ids=OVERFLOWS)
def test_an_overflow_anywhere_is_an_error_that_names_its_image(
    graph: Graph, precision: str, isa: str, large: float
) -> None:
    """Also where a comparison or a clipping would turn the overflow into a decent number again."""
    images = np.full((3, 3, 6, 6), 0.3, dtype=np.float32)
    one_place = images.copy()
    one_place[1, 0, 2, 3] = large
    for sign in (1, -1):
        weights = some_weights(graph, sign)
        wanted = reference.run(graph, weights, images)
        engine = Engine(checkpoint_of(graph, weights), precision=precision, isa=isa)
        assert_close(engine.run(images).logits, wanted.logits, "logits", element=ISAS[isa].element)
        message = rf"logits of images \[1\] are not finite: their values overflow {precision}"
        with pytest.raises(ManiDPError, match=message):
            engine.run(one_place)
        assert_close(engine.run(images).logits, wanted.logits, "logits", element=ISAS[isa].element)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", ["layer norm", "layer norm of a vector"])
def test_a_variance_that_overflows_is_an_error(name: str, isa: str) -> None:
    """The values themselves do not, and divided by an infinite deviation they would be decent numbers."""
    graph = OVERFLOWS[name]
    weights = random_weights(graph) | {"first.weight": np.array([[1, 0, 0], [-1, 0, 0]]).reshape(2, 3, 1, 1)}
    image = np.full((1, 3, 6, 6), 1e20, dtype=np.float32)
    with pytest.raises(ManiDPError, match=r"logits of images \[0\] are not finite"):
        Engine(checkpoint_of(graph, weights), isa=isa).run(image)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("fc1", "fc2"), [(3e38, 1.0), (-3e38, 1.0), (1.0, 3e38), (1.0, -3e38)])
def test_an_overflow_within_a_gate_is_an_error(fc1: float, fc2: float, isa: str) -> None:
    """Its hidden values or saliencies are clipped at once."""
    graph = OVERFLOWS["gate"]
    weights = random_weights(graph) | {
        "first.weight": np.ones((2, 3, 1, 1)),
        "gate.fc1.weight": np.full((2, 2), fc1),
        "gate.fc2.weight": np.full((2, 2), fc2),
    }
    with pytest.raises(ManiDPError, match=r"logits of images \[0, 1\] are not finite"):
        Engine(checkpoint_of(graph, weights), isa=isa).run(np.full((2, 3, 6, 6), 0.9, dtype=np.float32))


def test_folded_weights_and_preprocessing_beyond_float32_are_refused() -> None:
    graph = OVERFLOWS["maximum of a map"]
    checkpoint = checkpoint_of(graph, random_weights(graph))
    Engine(checkpoint)
    checkpoint.weights["normed.moving_variance"][:] = 0
    checkpoint.weights["normed.gamma"][:] = 3e38
    with pytest.raises(UnsupportedError, match=r"'normed': weights up to 3\.40282e\+38 can be run"):
        Engine(checkpoint)
