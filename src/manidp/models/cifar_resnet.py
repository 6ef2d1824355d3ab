"""The ResNets for CIFAR. Source: He et al. 2016, section 4.2."""

from __future__ import annotations

from collections.abc import Iterator

from manidp.errors import GraphError
from manidp.graph import Activation, Add, BatchNorm, Conv, GlobalPool, Graph, Input, Linear, Node
from manidp.limits import Limits


def resnet(depth: int, *, num_classes: int = 10, width: int = 16, image: tuple[int, int, int] = (3, 32, 32)) -> Graph:
    """CIFAR ResNet of ``depth`` = 6n + 2 layers: 3x3 stem, three stages of n basic blocks, widths 1, 2, 4 x ``width``.

    The shortcut at the start of stages 2 and 3 is a 1x1 convolution with stride 2, without batch norm and bias.
    """
    Limits.from_environment().check("nodes", depth, "the graph")  # a layer is a node at least
    if depth < 8 or (depth - 2) % 6:
        raise GraphError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, 110, ...); got {depth}")
    nodes: list[Node] = [
        Input(name="image", dims=image),
        Conv(name="conv_1_3x3", inputs=("image",), channels=width),
        BatchNorm(name="bn_1", inputs=("conv_1_3x3",)),
        Activation(name="relu_1", inputs=("bn_1",)),
    ]
    x = "relu_1"
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 1 and block == 0 else 1
            block_nodes = list(_basic_block(f"stage_{stage}.{block}", x, width * 2 ** (stage - 1), stride))
            nodes += block_nodes
            x = block_nodes[-1].name
    nodes.append(GlobalPool(name="avgpool", inputs=(x,)))
    nodes.append(Linear(name="classifier", inputs=("avgpool",), features=num_classes))
    return Graph(tuple(nodes), "classifier")


def _basic_block(name: str, x: str, channels: int, stride: int) -> Iterator[Node]:
    yield Conv(name=f"{name}.conv_a", inputs=(x,), channels=channels, stride=stride)
    yield BatchNorm(name=f"{name}.bn_a", inputs=(f"{name}.conv_a",))
    yield Activation(name=f"{name}.relu_a", inputs=(f"{name}.bn_a",))
    yield Conv(name=f"{name}.conv_b", inputs=(f"{name}.relu_a",), channels=channels)
    yield BatchNorm(name=f"{name}.bn_b", inputs=(f"{name}.conv_b",))
    shortcut = x
    if stride > 1:
        shortcut = f"{name}.downsample.0"
        yield Conv(name=shortcut, inputs=(x,), channels=channels, kernel=1, stride=stride, padding=0)
    yield Add(name=f"{name}.add", inputs=(shortcut, f"{name}.bn_b"))
    yield Activation(name=f"{name}.relu_b", inputs=(f"{name}.add",))
