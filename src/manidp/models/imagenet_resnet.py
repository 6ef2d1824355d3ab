"""The ResNets of basic blocks for ImageNet. Source: He et al. 2016, table 1."""

from __future__ import annotations

from collections.abc import Iterator

from manidp.errors import GraphError
from manidp.graph import Activation, Add, BatchNorm, Conv, GlobalPool, Graph, Input, Linear, Node, Pool


def imagenet_resnet(
    depth: int, *, num_classes: int = 1000, width: int = 64, image: tuple[int, int, int] = (3, 224, 224)
) -> Graph:
    """ImageNet ResNet of basic blocks, 18 or 34 layers deep: 7x7 stem with stride 2, max pooling, four stages.

    The shortcut at the start of stages 2 to 4 is a 1x1 convolution with stride 2 and a batch norm. Nodes have the
    names of torchvision's modules. Source: He et al. 2016, table 1.
    """
    stages = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}.get(depth)
    if stages is None:
        raise GraphError(f"an ImageNet ResNet of basic blocks has 18 or 34 layers; got {depth}")
    nodes: list[Node] = [
        Input(name="image", dims=image),
        Conv(name="conv1", inputs=("image",), channels=width, kernel=7, stride=2, padding=3),
        BatchNorm(name="bn1", inputs=("conv1",)),
        Activation(name="relu", inputs=("bn1",)),
        Pool(name="maxpool", inputs=("relu",), kind="max", kernel=3, stride=2, padding=1),
    ]
    x = "maxpool"
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            block_nodes = list(_imagenet_block(f"layer{stage + 1}.{block}", x, width * 2**stage, stride))
            nodes += block_nodes
            x = block_nodes[-1].name
    nodes.append(GlobalPool(name="avgpool", inputs=(x,)))
    nodes.append(Linear(name="fc", inputs=("avgpool",), features=num_classes))
    return Graph(tuple(nodes), "fc")


def _imagenet_block(name: str, x: str, channels: int, stride: int) -> Iterator[Node]:
    yield Conv(name=f"{name}.conv1", inputs=(x,), channels=channels, stride=stride)
    yield BatchNorm(name=f"{name}.bn1", inputs=(f"{name}.conv1",))
    yield Activation(name=f"{name}.relu1", inputs=(f"{name}.bn1",))
    yield Conv(name=f"{name}.conv2", inputs=(f"{name}.relu1",), channels=channels)
    yield BatchNorm(name=f"{name}.bn2", inputs=(f"{name}.conv2",))
    shortcut = x
    if stride > 1:
        shortcut = f"{name}.downsample.1"
        yield Conv(name=f"{name}.downsample.0", inputs=(x,), channels=channels, kernel=1, stride=stride, padding=0)
        yield BatchNorm(name=shortcut, inputs=(f"{name}.downsample.0",))
    yield Add(name=f"{name}.add", inputs=(shortcut, f"{name}.bn2"))
    yield Activation(name=f"{name}.relu2", inputs=(f"{name}.add",))
