"""A network as data: named, typed nodes; every backend walks the same graph.

A :class:`Graph` holds no weights. It knows the shape of every value (without the batch axis: ``(C, H, W)`` for
feature maps, ``(C,)`` for vectors) and the name and shape of every parameter, and it checks itself when made, size
included (``manidp.limits``). Everything here takes time in proportion to nodes and edges.

``resnet(depth)`` builds the CIFAR ResNets; ``with_gates(graph)`` is ManiDP as a pure rewrite of any graph.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, reduce
from graphlib import CycleError, TopologicalSorter
from operator import and_, or_
from reprlib import repr as brief
from typing import Any, ClassVar, Literal, get_args

from manidp.errors import GraphError, some
from manidp.limits import FLOAT32_MAX, FLOAT32_TINY, NAME_LENGTH, Limits

Shape = tuple[int, ...]
ActivationKind = Literal["relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"]
PoolKind = Literal["average", "max"]


def _windows(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of a network. ``inputs`` are names of other nodes; ``name`` is also the prefix of its parameters."""

    arity: ClassVar[tuple[int, int]] = (1, 1)
    name: str
    inputs: tuple[str, ...] = ()

    def shape(self, *inputs: Shape) -> Shape:
        """Shape of the value this node makes from values of the given shapes; raises GraphError."""
        raise NotImplementedError

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        """Local name and shape of each parameter, given the shapes of the inputs."""
        return {}

    def macs(self, *inputs: Shape) -> int:
        """Multiply-adds of one image with every channel kept, given the shapes of the inputs."""
        return 0

    def __str__(self) -> str:
        return f"node '{self.name}' ({type(self).__name__})"

    def _expect(self, fits: bool, expected: str, *inputs: Shape) -> None:
        if not fits:
            came = some(f"{name} {shape}" for name, shape in zip(self.inputs, inputs, strict=False))
            raise GraphError(f"{self} expects {expected}; got {came}")


@dataclass(frozen=True, kw_only=True)
class Input(Node):
    """The image, ``dims`` = (C, H, W), already normalised."""

    arity: ClassVar[tuple[int, int]] = (0, 0)
    dims: tuple[int, int, int]

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(self.dims) == 3 and min(self.dims) > 0, "three positive dimensions (C, H, W)")
        return self.dims


@dataclass(frozen=True, kw_only=True)
class Conv(Node):
    """2-D convolution. Parameters: weight (out, in / groups, kernel, kernel), bias (out,) if ``bias``."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    bias: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        self._expect(len(x) == 3, "a feature map (C, H, W)", x)
        whole = self.groups > 0 and x[0] % self.groups == 0 and self.channels % self.groups == 0
        self._expect(whole, f"channels that {self.groups} groups divide ({self.channels} out)", x)
        positive = min(self.channels, self.kernel, self.stride) > 0 and self.padding >= 0
        self._expect(positive, "positive channels, kernel and stride", x)
        out = tuple(_windows(size, self.kernel, self.stride, self.padding) for size in x[1:])
        self._expect(min(out) > 0, f"a map at least as large as its {self.kernel}x{self.kernel} kernel", x)
        return (self.channels, *out)

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        weight = (self.channels, inputs[0][0] // self.groups, self.kernel, self.kernel)
        return {"weight": weight} | ({"bias": (self.channels,)} if self.bias else {})

    def macs(self, *inputs: Shape) -> int:
        return math.prod(self.shape(*inputs)) * inputs[0][0] // self.groups * self.kernel**2


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Node):
    """gamma * (x - moving_mean) / sqrt(moving_variance + eps) + beta, per channel."""

    eps: float = 1e-5

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 3, "a feature map (C, H, W)", *inputs)
        self._expect(FLOAT32_TINY <= self.eps <= FLOAT32_MAX, "an eps that is a positive float32", *inputs)
        return inputs[0]

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return dict.fromkeys(("moving_mean", "moving_variance", "gamma", "beta"), inputs[0][:1])


@dataclass(frozen=True, kw_only=True)
class Activation(Node):
    """An elementwise function."""

    kind: ActivationKind = "relu"

    def shape(self, *inputs: Shape) -> Shape:
        return inputs[0]


@dataclass(frozen=True, kw_only=True)
class Gate(Node):
    """ManiDP's gate: one number per image and channel, exactly 0 for a channel that this image skips.

    saliency = min(relu(fc2 relu(fc1 GAP(input)) + bias), saliency_max); gate = saliency where it exceeds the
    threshold, else 0. Source: Tang et al. 2021, eq. 2. ``threshold`` is one scalar parameter for each gate.
    """

    channels: int
    hidden: int
    saliency_max: float = 1000.0

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 3, "a feature map (C, H, W)", *inputs)
        self._expect(min(self.channels, self.hidden) > 0, "positive sizes", *inputs)
        fits = FLOAT32_TINY <= self.saliency_max <= FLOAT32_MAX
        self._expect(fits, "a saliency_max that is a positive float32", *inputs)
        return (self.channels,)

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return {
            "fc1.weight": (self.hidden, inputs[0][0]),
            "fc2.weight": (self.channels, self.hidden),
            "fc2.bias": (self.channels,),
            "threshold": (),
        }

    def macs(self, *inputs: Shape) -> int:
        return self.hidden * (inputs[0][0] + self.channels)


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """Sum of values of the same shape."""

    arity: ClassVar[tuple[int, int]] = (2, 64)

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(set(inputs)) == 1, "inputs of one shape", *inputs)
        return inputs[0]


@dataclass(frozen=True, kw_only=True)
class Multiply(Node):
    """First input times the second, which is of the same shape or a vector (C,): one factor per channel."""

    arity: ClassVar[tuple[int, int]] = (2, 2)

    def shape(self, *inputs: Shape) -> Shape:
        value, factor = inputs
        self._expect(factor in (value, value[:1]), "a second input of the same shape or a vector (C,)", *inputs)
        return value


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """Inputs one after the other along the channel axis."""

    arity: ClassVar[tuple[int, int]] = (2, 64)

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len({x[1:] for x in inputs}) == 1, "inputs of one height and width", *inputs)
        return (sum(x[0] for x in inputs), *inputs[0][1:])


@dataclass(frozen=True, kw_only=True)
class Pool(Node):
    """Windowed pooling. Average counts the padding in (as zeros); max never picks it."""

    kind: PoolKind
    kernel: int
    stride: int
    padding: int = 0

    def shape(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        self._expect(len(x) == 3, "a feature map (C, H, W)", x)
        fits = min(self.kernel, self.stride) > 0 and 0 <= 2 * self.padding <= self.kernel
        self._expect(fits, "a positive kernel and stride, and padding of at most half the kernel", x)
        out = tuple(_windows(size, self.kernel, self.stride, self.padding) for size in x[1:])
        self._expect(min(out) > 0, f"a map at least as large as its {self.kernel}x{self.kernel} window", x)
        return (x[0], *out)


@dataclass(frozen=True, kw_only=True)
class GlobalPool(Node):
    """Average or maximum over the whole map: (C, H, W) -> (C,)."""

    kind: PoolKind = "average"

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 3, "a feature map (C, H, W)", *inputs)
        return inputs[0][:1]


@dataclass(frozen=True, kw_only=True)
class Flatten(Node):
    """(C, H, W) -> (C * H * W,), channel by channel."""

    def shape(self, *inputs: Shape) -> Shape:
        return (math.prod(inputs[0]),)


@dataclass(frozen=True, kw_only=True)
class Linear(Node):
    """Fully connected. Parameters: weight (features, in), bias (features,) if ``bias``."""

    features: int
    bias: bool = True

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 1, "a vector (C,); pool or flatten first", *inputs)
        self._expect(self.features > 0, "at least one feature", *inputs)
        return (self.features,)

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        weight = {"weight": (self.features, inputs[0][0])}
        return weight | ({"bias": (self.features,)} if self.bias else {})

    def macs(self, *inputs: Shape) -> int:
        return inputs[0][0] * self.features


NODE_TYPES: dict[str, type[Node]] = {
    kind.__name__: kind
    for kind in (
        Input, Conv, BatchNorm, Activation, Gate, Add, Multiply, Concat, Pool, GlobalPool, Flatten, Linear,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed; the last one in ``output`` makes the logits.

    Raises GraphError naming the nodes for: no or several inputs, names used twice, an edge to nowhere, a cycle, a
    shape that does not fit, an output that is not a vector.
    """

    nodes: tuple[Node, ...]
    output: str

    def __post_init__(self) -> None:
        limits = Limits.from_environment()
        limits.check("nodes", len(self.nodes), "the graph")
        for node in self.nodes:
            name = node.name
            if not (0 < len(name) <= NAME_LENGTH and name.isprintable() and name == name.strip()):
                raise GraphError(
                    f"a node's name is 1 to {NAME_LENGTH} printable characters, "
                    f"the first and the last no space; got {brief(name)}"
                )
        named = self.by_name
        if len(named) != len(self.nodes):
            twice = sorted(name for name, count in Counter(node.name for node in self.nodes).items() if count > 1)
            raise GraphError(f"every node needs a name of its own; used more than once: {some(twice)}")
        for node in self.nodes:
            low, high = node.arity
            if not low <= len(node.inputs) <= high:
                wanted = str(low) if low == high else f"{low} to {high}"
                raise GraphError(f"{node} takes {wanted} inputs; got {len(node.inputs)}")
            for source in node.inputs:
                if source not in named:
                    raise GraphError(f"node '{node.name}' reads {brief(source)}, which does not exist")
        if self.output not in named:
            raise GraphError(f"the output {brief(self.output)} does not exist")
        inputs = [node.name for node in self.nodes if isinstance(node, Input)]
        if len(inputs) != 1:
            raise GraphError(f"a graph has exactly one Input node; got {len(inputs)}: {some(inputs) or 'none'}")
        object.__setattr__(self, "nodes", _in_order(self.nodes))
        if len(self.shapes[self.output]) != 1:
            raise GraphError(f"the output '{self.output}' must be a vector; it has shape {self.shapes[self.output]}")
        taken: dict[str, str] = {}
        for node in self.nodes:
            for name in node.parameters(*self.input_shapes(node)):
                other = taken.setdefault(f"{node.name}.{name}", node.name)
                if other != node.name:
                    raise GraphError(f"nodes '{other}' and '{node.name}' both own a parameter '{node.name}.{name}'")
        limits.check("weights", sum(map(math.prod, self.parameters.values())), "the graph")
        limits.check("macs", sum(node.macs(*self.input_shapes(node)) for node in self.nodes), "the graph")
        limits.check("map_bytes", sum(4 * math.prod(shape) for shape in self.shapes.values()), "the graph")
        limits.check("live_bytes", self._live_bytes(), "the graph")

    def _live_bytes(self) -> int:
        """The most bytes of values that are still to be read at one time, if each is float32 and freed when it can."""
        last = {source: node.name for node in self.nodes for source in node.inputs}
        live = most = 0
        for node in self.nodes:
            live += 4 * math.prod(self.shapes[node.name])
            most = max(most, live)
            for value in {*node.inputs, node.name}:
                if last.get(value, value) == node.name:
                    live -= 4 * math.prod(self.shapes[value])
        return most

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Every node under its name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every node's value, batch axis left out."""
        limits = Limits.from_environment()
        shapes: dict[str, Shape] = {}
        for node in self.nodes:
            if isinstance(node, (Conv, Pool)):
                limits.check("window", max(node.kernel, node.stride, node.padding), node)
            shapes[node.name] = shape = node.shape(*(shapes[source] for source in node.inputs))
            if len(shape) == 3:
                limits.check("side", max(shape[1:]), node)
            if len(shape) == 3 or isinstance(node, (Linear, Gate)):
                limits.check("channels", shape[0], node)
            limits.check("elements", math.prod(shape), node)
        return shapes

    @cached_property
    def parameters(self) -> Mapping[str, Shape]:
        """Shape of every parameter, thresholds and batch statistics included, under its full name."""
        return {
            f"{node.name}.{name}": shape
            for node in self.nodes
            for name, shape in node.parameters(*self.input_shapes(node)).items()
        }

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value, in order."""
        readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for source in dict.fromkeys(node.inputs):
                readers[source].append(node)
        return {name: tuple(nodes) for name, nodes in readers.items()}

    @cached_property
    def input(self) -> Input:
        """The image node."""
        return next(node for node in self.nodes if isinstance(node, Input))

    @cached_property
    def gates(self) -> tuple[Gate, ...]:
        """The gates in the order in which they are computed (the order of the original's threshold file)."""
        return tuple(node for node in self.nodes if isinstance(node, Gate))

    @cached_property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.shapes[self.output][0]

    @cached_property
    def zeroed_by(self) -> Mapping[str, str]:
        """value -> the gate whose closed channels are exactly 0 in it: reading those channels can be skipped."""
        zeroed: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, Multiply) and isinstance(self.by_name[node.inputs[1]], Gate):
                zeroed[node.name] = node.inputs[1]
            elif self._per_channel(node) and _keeps_zero(node) and node.inputs[0] in zeroed:
                zeroed[node.name] = zeroed[node.inputs[0]]
        return zeroed

    @cached_property
    def wanted_by(self) -> Mapping[str, str]:
        """value -> the gate that scales whatever is made of it: channels it closes need not be computed."""
        wanted: dict[str, str] = {}
        for node in reversed(self.nodes):
            gates = {self._wanted_through(reader, node.name, wanted) for reader in self.readers[node.name]}
            gate = gates.pop() if len(gates) == 1 and node.name != self.output else None
            if gate is not None:
                wanted[node.name] = gate
        return wanted

    def _wanted_through(self, reader: Node, value: str, wanted: Mapping[str, str]) -> str | None:
        if isinstance(reader, Multiply) and reader.inputs[0] == value != reader.inputs[1]:
            return reader.inputs[1] if isinstance(self.by_name[reader.inputs[1]], Gate) else None
        return wanted.get(reader.name) if self._per_channel(reader) else None

    def _per_channel(self, node: Node) -> bool:
        """Whether channel c of what the node makes depends on channel c of its one input alone."""
        if isinstance(node, Conv):
            return node.groups == node.channels == self.shapes[node.inputs[0]][0]
        return isinstance(node, (BatchNorm, Activation, Pool, GlobalPool))

    def input_shapes(self, node: Node) -> tuple[Shape, ...]:
        """Shapes of the values that a node reads."""
        return tuple(self.shapes[source] for source in node.inputs)

    def gated_value(self, gate: Gate) -> str:
        """Name of the value that a gate scales: the feature map just before the multiplication."""
        for reader in self.readers[gate.name]:
            if isinstance(reader, Multiply) and reader.inputs[1] == gate.name:
                return reader.inputs[0]
        raise GraphError(f"gate '{gate.name}' scales nothing: no Multiply has it as its second input")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; ``graph_from_json`` gives the same graph back."""
        return {"nodes": [_node_to_json(node) for node in self.nodes], "output": self.output}


def _keeps_zero(node: Node) -> bool:
    """Whether a per-channel node turns a channel of zeros into zeros."""
    if isinstance(node, Activation):
        return node.kind not in ("sigmoid", "hardsigmoid")
    return not isinstance(node, BatchNorm) and not (isinstance(node, Conv) and node.bias)


def _in_order(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Each node after those it reads, else as given; a cycle is an error that names its nodes."""
    place = {node.name: index for index, node in enumerate(nodes)}
    sorter = TopologicalSorter({place[node.name]: [place[source] for source in node.inputs] for node in nodes})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = [nodes[index].name for index in sorted(set(error.args[1]))]
        raise GraphError(f"these nodes wait for one another in a cycle: {some(cycle)}") from error
    ready: list[int] = []
    ordered = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, index)
        ordered.append(heapq.heappop(ready))
        sorter.done(ordered[-1])
    return tuple(nodes[index] for index in ordered)


def _node_to_json(node: Node) -> dict[str, Any]:
    values = {f.name: getattr(node, f.name) for f in fields(node) if f.default is MISSING or
              getattr(node, f.name) != f.default}  # fmt: skip
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"op": type(node).__name__} | plain


def _fits(value: object, annotation: str) -> bool:
    if annotation == "str":
        return isinstance(value, str) and value != ""
    if annotation == "int":
        return type(value) is int and abs(value) < 2**31
    if annotation == "bool":
        return type(value) is bool
    if annotation == "float":
        return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= FLOAT32_MAX
    if annotation == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation == "tuple[int, int, int]":
        return isinstance(value, tuple) and len(value) == 3 and all(_fits(item, "int") for item in value)
    return value in get_args({"ActivationKind": ActivationKind, "PoolKind": PoolKind}[annotation])


def graph_from_json(data: object) -> Graph:
    """The graph that ``Graph.to_json`` described; everything is checked, GraphError says what is wrong and where."""
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or "output" not in data:
        raise GraphError("a graph is an object with a list 'nodes' and a name 'output'")
    Limits.from_environment().check("nodes", len(data["nodes"]), "the graph")
    nodes = []
    for index, item in enumerate(data["nodes"]):
        if not isinstance(item, dict):
            raise GraphError(f"node {index} is not an object")
        where = f"node {index} ({brief(item.get('name', '?'))})"
        kind = NODE_TYPES.get(item["op"]) if isinstance(item.get("op"), str) else None
        if kind is None:
            raise GraphError(f"{where}: unknown op {brief(item.get('op'))}; known are {', '.join(NODE_TYPES)}")
        known = {f.name: f for f in fields(kind)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items() if k != "op"}
        for key, value in values.items():
            if key not in known:
                raise GraphError(f"{where}: {kind.__name__} has no field {brief(key)}; it has {', '.join(known)}")
            if not _fits(value, str(known[key].type)):
                raise GraphError(f"{where}: field {key!r} must be of type {known[key].type}; got {brief(value)}")
        missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
        if missing:
            raise GraphError(f"{where}: {kind.__name__} lacks {', '.join(missing)}")
        nodes.append(kind(**values))  # type: ignore[arg-type]  # each value was just checked against its field
    if not isinstance(data["output"], str):
        raise GraphError(f"the output must be a node's name; got {brief(data['output'])}")
    return Graph(tuple(nodes), data["output"])


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


def with_classes(graph: Graph, num_classes: int) -> Graph:
    """The same network with another number of classes; its output must be a Linear node."""
    head = graph.by_name[graph.output]
    if not isinstance(head, Linear):
        raise GraphError(f"the output '{head.name}' is a {type(head).__name__}; only a Linear head can be replaced")
    nodes = tuple(replace(head, features=num_classes) if node is head else node for node in graph.nodes)
    return Graph(nodes, graph.output)


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


def with_gates(graph: Graph, convs: Collection[str] | None = None) -> Graph:
    """The same network with a gate for each of ``convs``: the method as a graph transformation.

    The gate reads what its convolution reads and scales what comes out after the batch norm and activation that
    follow it, so it is known before the convolution runs: channels it closes need not be computed.
    ``convs`` are names; by default the convolutions on the residual branch of every addition (``residual_convs``).
    A gate is called ``mb<k>``, k counting the gated convolutions below the same prefix from 1.
    """
    chosen = dict.fromkeys(residual_convs(graph) if convs is None else convs)
    ends = {_end_of_chain(graph, name): name for name in chosen}
    renamed: dict[str, str] = {}  # value -> the gated value that later nodes read in its place
    counts: dict[str, int] = {}
    nodes: list[Node] = []
    gate_of: dict[str, Gate] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(source, source) for source in node.inputs))
        if node.name in chosen:
            assert isinstance(node, Conv)
            prefix = node.name.rpartition(".")[0]
            counts[prefix] = counts.get(prefix, 0) + 1
            name = f"{prefix}.mb{counts[prefix]}" if prefix else f"mb{counts[prefix]}"
            hidden = node.channels if node.channels < 80 else node.channels // 2
            gate_of[node.name] = Gate(name=name, inputs=node.inputs, channels=node.channels, hidden=hidden)
            nodes.append(gate_of[node.name])
        nodes.append(node)
        if node.name in ends:
            gate = gate_of[ends[node.name]]
            renamed[node.name] = f"{gate.name}.gated"
            nodes.append(Multiply(name=renamed[node.name], inputs=(node.name, gate.name)))
    return Graph(tuple(nodes), renamed.get(graph.output, graph.output))


def _end_of_chain(graph: Graph, conv: str) -> str:
    """The last of conv -> batch norm -> activation, as far as each is the only reader of the one before."""
    if not isinstance(graph.by_name.get(conv), Conv):
        raise GraphError(f"'{conv}' is not a convolution of this graph and cannot be gated")
    end = conv
    for kind in (BatchNorm, Activation):
        readers = graph.readers[end]
        if len(readers) == 1 and isinstance(readers[0], kind):
            end = readers[0].name
    if any(isinstance(reader, Multiply) and isinstance(graph.by_name.get(reader.inputs[1]), Gate)
           for reader in graph.readers[end]):  # fmt: skip
        raise GraphError(f"convolution '{conv}' has a gate already")
    return end


def residual_convs(graph: Graph) -> tuple[str, ...]:
    """Names of the convolutions on the residual branch of every addition, in order.

    Of the operands of an addition, the residual branch is the one with most convolutions since they last were one
    value; shortcuts, the stem and whatever stands outside a residual block are left alone.
    """
    convs = [node.name for node in graph.nodes if isinstance(node, Conv)]
    bits = {name: 1 << index for index, name in enumerate(convs)}
    behind: dict[str, int] = {}  # value -> the convolutions that it is made of, a bit each
    chosen = 0
    for node in graph.nodes:
        operands = [behind[source] for source in node.inputs]
        behind[node.name] = reduce(or_, operands, bits.get(node.name, 0))
        if isinstance(node, Add):
            common = reduce(and_, operands)
            chosen |= max((operand & ~common for operand in operands), key=int.bit_count)
    return tuple(name for name in convs if chosen & bits[name])
