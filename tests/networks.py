"""The zoo: small networks, a row for every op and variant that a backend may treat apart, and a few whole ones.

Names begin with the op, or are of a network; ``tests/conformance`` runs all of them in every backend, and
``docs/support.md`` has a row for each. Weights, images and checkpoints for any graph are made here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from manidp.data.preprocessing import Preprocessing
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    ELU,
    Activation,
    ActivationKind,
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
    Select,
    Shuffle,
    Slice,
    Squareplus,
)
from manidp.models import resnet
from manidp.reference import node_values

Array = NDArray[Any]
IMAGE = Input(name="image", dims=(3, 11, 8))


def chain(*nodes: Node, image: Input = IMAGE) -> tuple[Node, ...]:
    """The image and the nodes, each reading the one before where it names no inputs."""
    made: list[Node] = [image]
    for node in nodes:
        made.append(node if node.inputs else replace(node, inputs=(made[-1].name,)))
    return tuple(made)


def small_gated(width: int, classes: int) -> Graph:
    """ResNet-8 for images of 8 x 8, its gates as wide as on the paper's 32 x 32: so small, a gate would be narrower."""
    large = with_gates(resnet(8, num_classes=classes, width=width))
    nodes = (replace(node, dims=(3, 8, 8)) if isinstance(node, Input) else node for node in large.nodes)
    return Graph(tuple(nodes), large.output)


def classifier(*nodes: Node, image: Input = IMAGE) -> Graph:
    """The same, with what makes logits of a map at the end."""
    nodes = chain(*nodes, GlobalPool(name="mean"), Linear(name="logits", features=3), image=image)
    return Graph(nodes, "logits")


def on_map(*nodes: Node) -> Graph:
    """Nodes on a map of 12 channels."""
    return classifier(Conv(name="stem", channels=12, kernel=1, padding=0), *nodes)


def on_vector(*nodes: Node) -> Graph:
    """Nodes on a vector of 12 numbers."""
    return Graph(
        chain(GlobalPool(name="mean"), Linear(name="hidden", features=12), *nodes, Linear(name="logits", features=3)),
        "logits",
    )


def on_map_and_vector(node: Node) -> Graph:
    """A node on a map of 12 channels, and the same on a vector."""
    return on_map(node, GlobalPool(name="a"), Linear(name="b", features=12), replace(node, name="y"),
                  Multiply(name="c", inputs=("x", "y")))  # fmt: skip


def decided_by(select: Select) -> Graph:
    """A convolution that a Select closes channels of, by scores on both sides of 0."""
    return classifier(
        Conv(name="first", channels=6),
        GlobalPool(name="pool"),
        Linear(name="scores", features=8),
        select,
        Conv(name="conv", inputs=("first",), channels=8),
        Activation(name="relu"),
        Multiply(name="gated", inputs=("relu", select.name)),
        Conv(name="last", channels=5),
    )


def vgg() -> Graph:
    nodes: list[Node] = []
    for index, channels in enumerate((6, 6, 9, 9)):
        nodes += [
            Conv(name=f"features.{index}.conv", channels=channels, bias=True),
            BatchNorm(name=f"features.{index}.bn"),
            Activation(name=f"features.{index}.relu"),
        ]
        nodes += [Pool(name=f"pool.{index}", kind="max", kernel=2, stride=2)] if index % 2 else []
    nodes += [Flatten(name="flat"), Linear(name="hidden", features=7), Activation(name="relu")]
    graph = Graph(chain(*nodes, Linear(name="logits", features=3)), "logits")
    return with_gates(graph, [f"features.{index}.conv" for index in range(1, 4)])


def inverted_residual() -> Graph:
    """MobileNetV2's block: expanded by 1x1, depthwise, projected by 1x1, with a shortcut."""
    nodes: list[Node] = [Conv(name="stem", channels=6, stride=2), Activation(name="stem.relu6", kind="relu6")]
    for name, last in (("a", "stem.relu6"), ("b", "a.sum")):
        nodes += [
            Conv(name=f"{name}.expand", channels=14, kernel=1, padding=0),
            BatchNorm(name=f"{name}.bn1"),
            Activation(name=f"{name}.act1", kind="relu6"),
            Conv(name=f"{name}.depthwise", channels=14, groups=14),
            BatchNorm(name=f"{name}.bn2"),
            Activation(name=f"{name}.act2", kind="relu6"),
            Conv(name=f"{name}.project", channels=6, kernel=1, padding=0),
            BatchNorm(name=f"{name}.bn3"),
            Add(name=f"{name}.sum", inputs=(f"{name}.bn3", last)),
        ]
    return with_gates(classifier(*nodes), ["a.expand", "b.expand", "b.depthwise"])


def squeeze_and_excite() -> Graph:
    graph = classifier(
        Conv(name="stem", channels=6, stride=2),
        Conv(name="conv", channels=12),
        BatchNorm(name="bn"),
        Activation(name="act", kind="hardswish"),
        GlobalPool(name="squeeze"),
        Linear(name="fc1", features=4),
        Activation(name="relu"),
        Linear(name="fc2", features=12),
        Activation(name="sigmoid", kind="hardsigmoid"),
        Multiply(name="excite", inputs=("act", "sigmoid")),
        Conv(name="project", channels=6, kernel=1, padding=0),
        Add(name="sum", inputs=("project", "stem")),
    )
    return with_gates(graph, ["conv"])


def inception() -> Graph:
    graph = classifier(
        Conv(name="stem", channels=6),
        Activation(name="relu"),
        Conv(name="one", inputs=("relu",), channels=4, kernel=1, padding=0),
        Conv(name="three", inputs=("relu",), channels=5),
        Activation(name="three.relu"),
        Conv(name="five", inputs=("three.relu",), channels=6),
        Pool(name="pool", inputs=("relu",), kind="average", kernel=3, stride=1, padding=1),
        Concat(name="all", inputs=("one", "three.relu", "five", "pool")),
        Conv(name="last", channels=7, stride=2),
    )
    return with_gates(graph, ["three", "five", "last"])


def shufflenet() -> Graph:
    """ShuffleNetV2's block: half of the channels go through, the others through three convolutions."""
    graph = classifier(
        Conv(name="stem", channels=8),
        Slice(name="kept", stop=4),
        Slice(name="rest", inputs=("stem",), start=4, stop=8),
        Conv(name="first", channels=4, kernel=1, padding=0),
        BatchNorm(name="bn"),
        Activation(name="relu"),
        Conv(name="depthwise", channels=4, groups=4),
        Conv(name="second", channels=4, kernel=1, padding=0),
        Concat(name="both", inputs=("kept", "second")),
        Shuffle(name="shuffled", groups=2),
    )
    return with_gates(graph, ["first"])


def shuffled() -> Graph:
    """ShuffleNetV1's chain: one gate for a convolution and the depthwise one behind its shuffled channels."""
    graph = classifier(
        Conv(name="stem", channels=6),
        Conv(name="wide", channels=12, kernel=1, padding=0),
        Activation(name="relu"),
        Shuffle(name="mixed", groups=3),
        Conv(name="depthwise", channels=12, groups=12, stride=2),
        Conv(name="narrow", channels=6),
    )
    return with_gates(graph, ["wide"])


def convnext() -> Graph:
    """ConvNeXt's block: depthwise, layer norm, expanded and projected by 1x1, scaled; layer norms of a stem and a mean.

    Gates close what the layer norm reads and what lies behind it.
    """
    nodes = chain(
        Conv(name="stem", channels=6, kernel=2, stride=2, padding=0, bias=True),
        LayerNorm(name="stem.norm", eps=1e-6),
        Conv(name="depthwise", channels=6, kernel=7, padding=3, groups=6, bias=True),
        LayerNorm(name="norm", eps=1e-6),
        Conv(name="wide", channels=14, kernel=1, padding=0, bias=True),
        Activation(name="gelu", kind="gelu"),
        Conv(name="back", channels=6, kernel=1, padding=0, bias=True),
        Conv(name="scaled", channels=6, kernel=1, padding=0, groups=6),
        Add(name="sum", inputs=("scaled", "stem.norm")),
        GlobalPool(name="mean"),
        LayerNorm(name="mean.norm", eps=1e-6),
        Linear(name="logits", features=3),
    )
    return with_gates(Graph(nodes, "logits"), ["depthwise", "wide", "back"])


_KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)

ZOO: dict[str, Graph] = {
    "Input, the image": classifier(),
    "Conv, 3x3": on_map(Conv(name="x", channels=10)),
    "Conv, 1x1": on_map(Conv(name="x", channels=10, kernel=1, padding=0)),
    "Conv, 5x5": on_map(Conv(name="x", channels=10, kernel=5, padding=2)),
    "Conv, 8x8": on_map(Conv(name="x", channels=10, kernel=8, padding=4)),
    "Conv, kernel 3x5": on_map(Conv(name="x", channels=10, kernel=(3, 5))),
    "Conv, stride 2": on_map(Conv(name="x", channels=10, stride=2)),
    "Conv, stride 9 and more": on_map(Conv(name="x", channels=10, stride=9)),
    "Conv, stride 2x1": on_map(Conv(name="x", channels=10, stride=(2, 1))),
    "Conv, 1x1, stride 2x1": on_map(Conv(name="x", channels=10, kernel=1, stride=(2, 1), padding=0)),
    "Conv, without padding": on_map(Conv(name="x", channels=10, padding=0)),
    "Conv, padding 1x2": on_map(Conv(name="x", channels=10, padding=(1, 2))),
    "Conv, padding different on each side": on_map(Conv(name="x", channels=10, padding=(0, 1, 2, 3))),
    "Conv, dilation 2": on_map(Conv(name="x", channels=10, dilation=2, padding=2)),
    "Conv, dilation 1x2": on_map(Conv(name="x", channels=10, dilation=(1, 2))),
    "Conv, groups": on_map(Conv(name="x", channels=9, groups=3)),
    "Conv, depthwise": on_map(Conv(name="x", channels=12, groups=12)),
    "Conv, depthwise, two outputs a channel": on_map(Conv(name="x", channels=24, groups=12)),
    "Conv, with bias": on_map(Conv(name="x", channels=10, bias=True)),
    "BatchNorm, after a Conv": on_map(BatchNorm(name="x")),
    "BatchNorm, after another op": on_map(Activation(name="relu"), BatchNorm(name="x", eps=1e-3)),
    "BatchNorm, of a vector": on_vector(BatchNorm(name="x")),
    "BatchNorm, use_global_stats": on_map_and_vector(BatchNorm(name="x", eps=0.5, use_global_stats=True)),
    "LayerNorm, of a map": on_map(LayerNorm(name="x")),
    "LayerNorm, of a vector": on_vector(LayerNorm(name="x", eps=1e-3)),
    **{f"Activation, {kind}": on_map_and_vector(Activation(name="x", kind=kind)) for kind in _KINDS},
    "LeakyReLU, of a map and a vector": on_map_and_vector(LeakyReLU(name="x", slope=0.2)),
    "PReLU, of a map and a vector": on_map_and_vector(PReLU(name="x")),
    "ELU, of a map and a vector": on_map_and_vector(ELU(name="x", alpha=0.75)),
    "Squareplus, of a map and a vector": on_map_and_vector(Squareplus(name="x", b=0.5)),
    "Clip, of a map": on_map(Clip(name="x", low=-0.5, high=0.75)),
    "Clip, of a vector": on_vector(Clip(name="x", low=-0.5, high=0.75)),
    **{
        f"Select, {rule}, gain {gain}": decided_by(Select(name="x", rule=rule, gain=gain))
        for rule in ("threshold", "constant")
        for gain in ("score", "one")
    },
    "Add, two maps": on_map(Conv(name="a", channels=12), Add(name="x", inputs=("a", "stem"))),
    "Add, three maps": on_map(
        Conv(name="a", channels=12), Activation(name="b"), Add(name="x", inputs=("b", "stem", "a"))
    ),
    "Add, a map to itself": on_map(Add(name="x", inputs=("stem", "stem"))),
    "Add, vectors": on_vector(Activation(name="a"), Add(name="x", inputs=("a", "hidden", "a"))),
    "Multiply, maps": on_map(Conv(name="a", channels=12), Multiply(name="x", inputs=("a", "stem"))),
    "Multiply, a map by a vector": on_map(
        GlobalPool(name="a"), Activation(name="b", kind="sigmoid"), Multiply(name="x", inputs=("stem", "b"))
    ),
    "Multiply, vectors": on_vector(Activation(name="a"), Multiply(name="x", inputs=("a", "hidden"))),
    "Multiply, a vector by a Select": on_vector(
        *head("gate", "image", 12, 3), Multiply(name="x", inputs=("hidden", "gate"))
    ),
    "Concat, maps": on_map(Conv(name="a", channels=5), Concat(name="x", inputs=("a", "stem", "a"))),
    "Concat, vectors": on_vector(Activation(name="a"), Concat(name="x", inputs=("a", "mean", "hidden"))),
    "Slice, of a map": on_map(Slice(name="x", start=3, stop=10)),
    "Slice, of a vector": on_vector(Slice(name="x", stop=5)),
    "Shuffle, of a map": on_map(Shuffle(name="x", groups=3)),
    "Shuffle, of a vector": on_vector(Shuffle(name="x", groups=2)),
    "Scatter, of a map": on_map(Scatter(name="x", channels=15, at=(*range(1, 8), *range(10, 15)))),
    "Scatter, of a vector": on_vector(Scatter(name="x", channels=14, at=(*range(6), *range(8, 14)))),
    "Pool, max": on_map(Pool(name="x", kind="max", kernel=3, stride=2, padding=1)),
    "Pool, average": on_map(Pool(name="x", kind="average", kernel=3, stride=1, padding=1)),
    "Pool, window 9x9": on_map(
        Conv(name="a", channels=4, padding=2), Pool(name="x", kind="max", kernel=9, stride=1)
    ),
    "Pool, window 2x3": on_map(Pool(name="x", kind="max", kernel=(2, 3), stride=2)),
    "Pool, stride 2x1": on_map(Pool(name="x", kind="average", kernel=2, stride=(2, 1))),
    "Pool, max, padding different on each side": on_map(
        Pool(name="x", kind="max", kernel=3, stride=2, padding=(0, 0, 1, 1))
    ),
    "Pool, average, padding different on each side": on_map(
        Pool(name="x", kind="average", kernel=3, stride=2, padding=(0, 1, 1, 0))
    ),
    "Pool, max, padding of more than half the kernel": on_map(
        Pool(name="x", kind="max", kernel=3, stride=2, padding=2)
    ),
    "Pool, average, padding of more than half the kernel": on_map(
        Pool(name="x", kind="average", kernel=(3, 4), stride=3, padding=(0, 3, 2, 3), count_include_pad=False)
    ),
    "Pool, average, count_include_pad=False": on_map(
        Pool(name="x", kind="average", kernel=3, stride=1, padding=1, count_include_pad=False)
    ),
    "Pool, average, count_include_pad=False, padding different on each side": on_map(
        Pool(name="x", kind="average", kernel=3, stride=2, padding=(0, 0, 1, 1), count_include_pad=False)
    ),
    "GlobalPool, average": on_map(
        GlobalPool(name="x"), Linear(name="a", features=12), Multiply(name="b", inputs=("stem", "a"))
    ),
    "GlobalPool, max": on_map(
        GlobalPool(name="x", kind="max"), Linear(name="a", features=12), Multiply(name="b", inputs=("stem", "a"))
    ),
    "Flatten, of a map": Graph(
        chain(Conv(name="conv", channels=4), Flatten(name="x"), Linear(name="logits", features=3)), "logits"
    ),
    "Flatten, of a vector": on_vector(Flatten(name="x")),
    "Linear, with bias": on_vector(Linear(name="x", features=17)),
    "Linear, without bias": on_vector(Linear(name="x", features=5, bias=False)),
    "ResNet, gated": with_gates(resnet(8, num_classes=3, width=5, image=(3, 12, 10))),
    "VGG, gated": vgg(),
    "Inverted residuals, gated": inverted_residual(),
    "Squeeze and excite, gated": squeeze_and_excite(),
    "Inception, gated": inception(),
    "ShuffleNetV2, gated": shufflenet(),
    "ShuffleNetV1, gated": shuffled(),
    "ConvNeXt, gated": convnext(),
}  # fmt: skip


def random_weights(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Weights that keep values near 1, whatever the graph; gates scale by about 1."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, shape in graph.parameters.items():
        if name.endswith(("moving_variance", "gamma", "fc2.bias")):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("threshold"):
            value = np.array(0.0)
        elif len(shape) > 1:
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
            value *= 0.3 if ".fc" in name else 1.0
        else:
            value = rng.normal(size=shape) * 0.2
        weights[name] = np.asarray(value, dtype=np.float32)
    return weights


def spread_weights(graph: Graph, threshold: float, seed: int = 0) -> dict[str, Array]:
    """Weights under which gates of scores around 1 keep some channels, by the threshold, and close some."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, shape in graph.parameters.items():
        value = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if name.endswith(("moving_variance", "gamma", "fc2.bias")):
            value = 0.5 + rng.random(shape)
        weights[name] = np.asarray(threshold if name.endswith("threshold") else value, np.float32)
    return weights


def with_thresholds(
    graph: Graph, weights: Mapping[str, Array], images: Array, keep: Mapping[str, float]
) -> dict[str, Array]:
    """Thresholds at which each gate keeps about the given share of the channels of these images.

    Each lies in a wide gap between two saliencies, so that rounding cannot carry one across. 0 closes all channels,
    1 leaves those with a saliency open.
    """
    weights = dict(weights)
    for gate in graph.gates:
        if gate.rule == "constant":
            continue
        weights[f"{gate.name}.threshold"] = np.array(-1, dtype=np.float32)
        saliencies = np.unique(np.maximum(node_values(graph, weights, images)[gate.inputs[0]], 0))
        share = keep[gate.name]
        if share >= 1:
            threshold = -1.0
        elif share <= 0:
            threshold = float(saliencies[-1]) * 2 + 1
        else:
            last = len(saliencies) - 1
            wanted = int(np.clip((1 - share) * last, 0, last - 1)) if last else 0
            near = range(max(0, wanted - 4), min(last, wanted + 5))
            best = max(near, key=lambda i: saliencies[i + 1] - saliencies[i], default=0)
            threshold = float(saliencies[best : best + 2].mean())
        weights[f"{gate.name}.threshold"] = np.array(threshold, dtype=np.float32)
    return weights


def images_for(graph: Graph, count: int = 2) -> Array:
    """(count, C, H, W) float32, normalised."""
    return np.random.default_rng(1).normal(size=(count, *graph.input.dims)).astype(np.float32)


def some_open(graph: Graph, share: float = 0.6) -> dict[str, Array]:
    """Weights under which each gate keeps about this share of the channels of ``images_for`` the graph."""
    keep = dict.fromkeys(graph.gate_channels, share)
    return with_thresholds(graph, random_weights(graph), images_for(graph), keep)


def checkpoint_of(graph: Graph, weights: Mapping[str, Array]) -> Checkpoint:
    """A checkpoint with these weights as float32, those of others left out."""
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), graph.input.dims[1:])
    own = {name: np.asarray(weights[name], dtype=np.float32) for name in graph.parameters}
    return Checkpoint(graph, own, preprocessing, tuple(str(i) for i in range(graph.num_classes)))
