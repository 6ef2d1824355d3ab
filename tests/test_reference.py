"""The NumPy interpreter against definitions written out as loops, and against the original network's own outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from manidp.errors import ManiDPError
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    ELU,
    Activation,
    Add,
    BatchNorm,
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
    Shuffle,
    Slice,
    Squareplus,
)
from manidp.graph.macs import dense_macs
from manidp.models import resnet
from manidp.reference import node_values, run
from networks import random_weights

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mindspore"


def value_of(node: Node, *inputs: np.ndarray, **parameters: np.ndarray) -> np.ndarray:
    """What the interpreter makes of one node; every input, batch first, is concatenated into one image and cut out."""
    stacked = np.concatenate(inputs, axis=1)
    nodes: list[Node] = [Input(name="image", dims=stacked.shape[1:])]
    weights: dict[str, np.ndarray] = {f"node.{name}": value for name, value in parameters.items()}
    start = 0
    for i, x in enumerate(inputs):  # a 1x1 convolution by a selection matrix
        nodes.append(Conv(name=f"in{i}", inputs=("image",), channels=x.shape[1], kernel=1, padding=0))
        weights[f"in{i}.weight"] = np.eye(stacked.shape[1])[start : start + x.shape[1], :, None, None]
        start += x.shape[1]
    nodes.append(node)
    nodes.append(Flatten(name="flat", inputs=("node",)))
    return node_values(Graph(tuple(nodes), "flat"), weights, stacked)["node"]


@pytest.mark.parametrize(
    ("size", "channels", "out", "kernel", "stride", "padding", "groups"),
    [
        ((5, 7), 3, 4, 3, 1, 1, 1), ((6, 5), 4, 6, 3, 2, 1, 2), ((4, 4), 3, 3, 1, 2, 0, 3), ((7, 8), 4, 8, 5, 1, 2, 4),
        ((9, 7), 2, 2, 7, 2, 3, 1), ((3, 3), 1, 1, 2, 1, 0, 1), ((4, 6), 2, 3, 3, 3, 2, 1),
    ],
)  # fmt: skip
def test_conv_is_the_sum_it_is_defined_as(
    size: tuple[int, int], channels: int, out: int, kernel: int, stride: int, padding: int, groups: int
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, channels, *size))
    weight, bias = rng.normal(size=(out, channels // groups, kernel, kernel)), rng.normal(size=out)
    node = Conv(name="node", inputs=("in0",), channels=out, kernel=kernel, stride=stride, padding=padding,
                groups=groups, bias=True)  # fmt: skip
    made = value_of(node, x, weight=weight, bias=bias)
    for b, o, i, j in np.ndindex(made.shape):
        expected = bias[o]
        first = o // (out // groups) * (channels // groups)
        for c, u, v in np.ndindex(weight.shape[1:]):
            row, column = i * stride + u - padding, j * stride + v - padding
            if 0 <= row < size[0] and 0 <= column < size[1]:
                expected += weight[o, c, u, v] * x[b, first + c, row, column]
        assert made[b, o, i, j] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["average", "inside", "max"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 1, 1)])
def test_pool_counts_padding_as_zero_in_averages_if_at_all_and_never_as_maximum(
    kind: str, kernel: int, stride: int, padding: int
) -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 7, 6)) - 3
    node = Pool(name="node", inputs=("in0",), kind="max" if kind == "max" else "average", kernel=kernel, stride=stride,
                padding=padding, count_include_pad=kind != "inside")  # fmt: skip
    made = value_of(node, x)
    for b, c, i, j in np.ndindex(made.shape):
        window = [
            x[b, c, row, column]
            for row in range(i * stride - padding, i * stride - padding + kernel)
            for column in range(j * stride - padding, j * stride - padding + kernel)
            if 0 <= row < 7 and 0 <= column < 6
        ]
        count = len(window) if kind == "inside" else kernel**2
        assert made[b, c, i, j] == pytest.approx(max(window) if kind == "max" else sum(window) / count)


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("relu", {-2.0: 0.0, 0.0: 0.0, 1.5: 1.5}),
        ("relu6", {-1.0: 0.0, 5.0: 5.0, 7.0: 6.0}),
        ("hardsigmoid", {-4.0: 0.0, 0.0: 0.5, 1.5: 0.75, 4.0: 1.0}),
        ("hardswish", {-4.0: 0.0, -1.5: -0.375, 1.5: 1.125, 4.0: 4.0}),
        ("sigmoid", {0.0: 0.5, 1.0: 0.7310585786300049, -800.0: 0.0, 800.0: 1.0}),
        ("tanh", {0.0: 0.0, 0.5: 0.46211715726000975, -40.0: -1.0}),
        ("gelu", {0.0: 0.0, 1.0: 0.8413447460685429, -1.0: -0.15865525393145707, 40.0: 40.0}),
        ("softplus", {0.0: 0.6931471805599453, 1.0: 1.3132616875182228, -800.0: 0.0, 800.0: 800.0}),
        ("mish", {0.0: 0.0, 1.0: 0.8650983882673103, -1.0: -0.30340146137410895, 800.0: 800.0}),
        ("silu", {0.0: 0.0, 1.0: 0.7310585786300049, -2.0: -0.23840584404423515, 50.0: 50.0}),
    ],
)
def test_activations_at_known_points(kind: str, points: dict[float, float]) -> None:
    x = np.array(list(points)).reshape(1, 1, 1, -1)
    made = value_of(Activation(name="node", inputs=("in0",), kind=kind), x)  # type: ignore[arg-type]
    np.testing.assert_allclose(made.ravel(), list(points.values()), atol=1e-14)


def test_the_other_nodes_are_what_they_are_defined_as() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 4, 3, 5))
    np.testing.assert_allclose(value_of(Add(name="node", inputs=("in0", "in1")), x, y), x + y)
    np.testing.assert_allclose(value_of(Multiply(name="node", inputs=("in0", "in1")), x, y), x * y)
    np.testing.assert_array_equal(value_of(Concat(name="node", inputs=("in0", "in1")), x, y)[:, 4:], y)
    np.testing.assert_array_equal(value_of(Slice(name="node", inputs=("in0",), start=1, stop=3), x), x[:, 1:3])
    np.testing.assert_array_equal(value_of(Shuffle(name="node", inputs=("in0",), groups=2), x), x[:, [0, 2, 1, 3]])
    np.testing.assert_allclose(
        value_of(LeakyReLU(name="node", inputs=("in0",), slope=0.5), x), np.where(x < 0, x / 2, x)
    )
    slope = np.arange(4.0)
    made = value_of(PReLU(name="node", inputs=("in0",)), x, slope=slope)
    np.testing.assert_allclose(made[:, 3], np.where(x[:, 3] < 0, 3 * x[:, 3], x[:, 3]))
    made = value_of(ELU(name="node", inputs=("in0",), alpha=2.0), x)
    np.testing.assert_allclose(made, np.where(x < 0, 2 * (np.exp(x) - 1), x))
    made = value_of(Squareplus(name="node", inputs=("in0",), b=0.25), x)
    np.testing.assert_allclose(made * (made - x), 0.25 / 4)  # the positive root of y (y - x) = b / 4
    flat = value_of(Flatten(name="node", inputs=("in0",)), x)
    assert flat[1, 2 * 15 + 1 * 5 + 4] == x[1, 2, 1, 4]
    gamma, beta, mean, variance = rng.normal(size=(4, 4))
    made = value_of(BatchNorm(name="node", inputs=("in0",), eps=0.25), x,
                    gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance**2)  # fmt: skip
    assert made[1, 2, 0, 3] == pytest.approx(
        gamma[2] * (x[1, 2, 0, 3] - mean[2]) / (variance[2] ** 2 + 0.25) ** 0.5 + beta[2]
    )
    gamma, beta = rng.normal(size=(2, 4))
    made = value_of(LayerNorm(name="node", inputs=("in0",), eps=0.25), x, gamma=gamma, beta=beta)
    column = [float(x[1, c, 0, 3]) for c in range(4)]
    mean = sum(column) / 4
    variance = sum((value - mean) ** 2 for value in column) / 4
    assert made[1, 2, 0, 3] == pytest.approx(gamma[2] * (column[2] - mean) / (variance + 0.25) ** 0.5 + beta[2])


def small_gated() -> Graph:
    return Graph(
        (
            Input(name="image", dims=(2, 3, 3)),
            *head("gate", "image", 4, 2, 3.0),
            Conv(name="conv", inputs=("image",), channels=4),
            Multiply(name="gated", inputs=("conv", "gate")),
            GlobalPool(name="pool", inputs=("gated",)),
            Linear(name="out", inputs=("pool",), features=2),
        ),
        "out",
    )


def test_a_gate_keeps_what_exceeds_its_threshold_and_drops_what_only_reaches_it() -> None:
    graph = small_gated()
    weights = random_weights(graph) | {
        "gate.fc1.weight": np.eye(2), "gate.fc2.weight": np.array([[1.0, 0], [0, 1.0], [1.0, 1.0], [-1.0, 0]]),
        "gate.fc2.bias": np.zeros(4), "gate.threshold": np.array(0.5),
    }  # fmt: skip
    images = np.stack([np.full((2, 3, 3), 0.5), np.full((2, 3, 3), 0.0), np.full((2, 3, 3), 4.0)])
    images[0, 1] = 0.75
    result = run(graph, weights, images)
    np.testing.assert_array_equal(result.gates["gate"], [[0, 0.75, 1.25, 0], [0, 0, 0, 0], [3, 3, 3, 0]])
    np.testing.assert_array_equal(result.kept["gate"], [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert result.macs.tolist() == [n * 2 * 9 * 9 + 12 + 8 for n in (2, 0, 3)]
    values = node_values(graph, weights, images)
    np.testing.assert_array_equal(values["gated"][0, 0], 0)
    np.testing.assert_allclose(values["gated"][0, 2], 1.25 * values["conv"][0, 2])


def test_float32_is_computed_in_float32_and_agrees() -> None:
    graph = with_gates(resnet(8))
    weights = random_weights(graph)
    weights |= {name: np.zeros(shape) for name, shape in graph.parameters.items() if name.endswith("fc2.weight")}
    weights |= {f"{gate}.fc2.bias": np.linspace(0.5, 1.5, channels) for gate, channels in graph.gate_channels.items()}
    weights |= {f"{gate.name}.threshold": np.array(0.9) for gate in graph.gates}
    images = np.random.default_rng(4).normal(size=(2, 3, 32, 32))
    double, single = run(graph, weights, images), run(graph, weights, images, np.float32)
    assert double.logits.dtype == np.float64
    assert {v.dtype for v in node_values(graph, weights, images, np.float32).values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(single.logits, double.logits, rtol=1e-4, atol=1e-4 * np.abs(double.logits).max())
    assert 0 < double.macs[0] < dense_macs(graph)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ManiDPError, match=r"\(B, 3, 32, 32\) needed; got \(3, 32, 32\)"):
        run(resnet(8), {}, np.zeros((3, 32, 32)))


def read_ckpt(data: bytes) -> dict[str, np.ndarray]:
    """A MindSpore checkpoint of float32 tensors: repeated Value {1: tag, 2: {1: dims, 2: type, 3: content}}."""

    def fields(message: bytes) -> list[tuple[int, int | bytes]]:
        found: list[tuple[int, int | bytes]] = []
        at = 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = message[at]
                at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
                if byte < 128:
                    return value

        while at < len(message):
            key = varint()
            number = varint()
            if key & 7 == 2:
                found.append((key >> 3, message[at : at + number]))
                at += number
            else:
                found.append((key >> 3, number))
        return found

    arrays = {}
    for _, value in fields(data):
        tag, tensor = (content for _, content in fields(value))  # type: ignore[arg-type]
        dims = [n for field, n in fields(tensor) if field == 1]  # type: ignore[arg-type]
        (content,) = [c for field, c in fields(tensor) if field == 3]  # type: ignore[arg-type]
        arrays[tag.decode()] = np.frombuffer(content, "<f4").reshape(dims)  # type: ignore[union-attr, arg-type]
    return arrays


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden set at {GOLDEN}")
def test_the_original_network_says_the_same() -> None:
    graph = with_gates(resnet(20))
    weights = read_ckpt((GOLDEN / "resnet20.ckpt").read_bytes())
    thresholds = np.load(GOLDEN / "thres.npy").astype(np.float32)
    weights |= {f"{gate.name}.threshold": t for gate, t in zip(graph.gates, thresholds, strict=True)}
    result = run(graph, weights, np.load(GOLDEN / "input.npy"))
    logits, golden = np.load(GOLDEN / "logits.npy"), np.load(GOLDEN / "gates.npz")
    assert np.abs(result.logits - logits).max() <= 1e-4 * np.abs(logits).max()
    for i, gate in enumerate(graph.gates):
        mask = golden[f"mask_{i:02d}"].reshape(16, -1)
        np.testing.assert_array_equal(result.kept[gate.name], mask > 0)
        np.testing.assert_allclose(result.gates[gate.name], mask, rtol=1e-4, atol=1e-4)
