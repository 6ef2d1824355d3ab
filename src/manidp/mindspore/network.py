"""A network of manidp as a MindSpore cell that walks the description of a graph.

This file stands alone: it needs MindSpore and NumPy, not manidp. manidp itself runs it, and copies it as it is into
the bundles that it makes for the MindSpore hub.

A description is JSON data: ``nodes``, in an order in which they can be computed, the image first, each with ``op``,
``name``, ``inputs`` (names), all fields of its kind, ``shape`` (of its value, without the batch axis) and
``parameters`` (local name -> shape), a Select also ``scales``, the name of the value that is multiplied by it; and
``output``, the name of the node that makes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeNormal


class Network(nn.Cell):
    """The cell; its parameters have the names of the description, with dots: ``stage_1.0.conv_a.weight``.

    description: see above. thresholds: one number for every gate, in the order of the nodes; fixed, and no parameters,
    so a .ckpt does not hold them. With ``adjustable`` they are parameters ``GATE.threshold`` that no gradient moves.
    Fresh weights: convolutions N(0, sqrt(2 / (kernel^2 * out))), gates the identity.
    Runs in PYNATIVE and in GRAPH mode; ``set_train(False)`` (as it is when made) for inference.
    Raises NotImplementedError for an op that this file does not know.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        thresholds: Sequence[float] | np.ndarray[Any, Any],
        *,
        adjustable: bool = False,
    ) -> None:
        super().__init__(auto_prefix=False)
        nodes = description["nodes"]
        selects = [node for node in nodes if node["op"] == "Select"]
        gates = [node["name"] for node in selects if node["rule"] == "threshold"]
        thresholds = np.asarray(thresholds, np.float32)
        if thresholds.shape != (len(gates),):
            raise ValueError(f"one threshold for each of {len(gates)} gates expected; got shape {thresholds.shape}")
        threshold_of = dict(zip(gates, thresholds, strict=True))
        recorded = {name for node in selects for name in (node["name"], node["inputs"][0], node["scales"])}
        chains = _chains(nodes, recorded | {description["output"]})
        index = {chain[-1]["name"]: position for position, chain in enumerate(chains)}
        scorers = _scorers(nodes)
        steps = []
        for chain in chains[1:]:
            cells = []
            for node in chain:
                name = node["name"]
                more = {"threshold": threshold_of.get(name), "adjustable": adjustable, "scores": name in scorers}
                cell = _cell({**node, **more})
                for name, parameter in cell.parameters_and_names():  # update_parameters_name wants letters
                    parameter.name = f"{node['name']}.{name}"
                cells.append(cell)
            steps.append(_Chain(cells))
        self.num_classes = next(node["shape"][0] for node in nodes if node["name"] == description["output"])
        self.gate_names = tuple(node["name"] for node in selects)
        self.thresholds, self.deciding = thresholds, tuple(gates)
        self.names = tuple(tuple(node["name"] for node in chain) for chain in chains)
        self.steps = nn.CellList(steps, auto_prefix=False)
        self.sources = tuple(tuple(index[name] for name in chain[0]["inputs"]) for chain in chains[1:])
        self.output = index[description["output"]]
        self.scores = tuple(index[node["inputs"][0]] for node in selects)
        self.gates = tuple(index[node["name"]] for node in selects)
        self.gated = tuple(index[node["scales"]] for node in selects)

    def construct(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        return self.records(images)[0]

    def records(self, images: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
        """The logits, and (saliency, gate, feature) of every gate, three tensors (B, C).

        saliency: before the threshold, >= 0. gate: the factor, 0 where closed. feature: mean over H and W of the
        feature map that the gate scales, before it is scaled.
        """
        values: tuple[Tensor, ...] = (images,)
        for step in range(len(self.steps)):
            inputs: tuple[Tensor, ...] = ()
            for source in self.sources[step]:
                inputs = (*inputs, values[source])
            values = (*values, self.steps[step](*inputs))
        records: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
        for gate in range(len(self.gates)):
            feature = values[self.gated[gate]]
            if feature.ndim == 4:
                feature = feature.mean((2, 3))
            records = (*records, (values[self.scores[gate]], values[self.gates[gate]], feature))
        return values[self.output], records


def _chains(nodes: Sequence[Mapping[str, Any]], apart: set[str]) -> list[list[Mapping[str, Any]]]:
    """Nodes that follow one another and nothing else reads, as one step: fewer steps are compiled faster.

    A value in ``apart`` ends its chain.
    """
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node["inputs"]:
            readers[name] = readers.get(name, 0) + 1
    chains: list[list[Mapping[str, Any]]] = []
    ended: dict[str, list[Mapping[str, Any]]] = {}
    for node in nodes:
        before = node["inputs"][0] if len(node["inputs"]) == 1 else None
        if before is not None and before in ended and readers[before] == 1 and before not in apart:
            chain = ended.pop(before)
            chain.append(node)
        else:
            chain = [node]
            chains.append(chain)
        if len(chains) > 1:  # the image stands alone
            ended[node["name"]] = chain
    return chains


class _Chain(nn.Cell):
    """Cells one after the other, under their own parameters' names."""

    def __init__(self, cells: Sequence[nn.Cell]) -> None:
        super().__init__(auto_prefix=False)
        self.chain = nn.CellList(cells, auto_prefix=False)

    def construct(self, *inputs: Tensor) -> Tensor:
        value = self.chain[0](*inputs)
        for position in range(1, len(self.chain)):  # a slice of a CellList would rename its parameters
            value = self.chain[position](value)
        return value


class _Select(nn.Cell):
    """Scores (B, C) -> factors (B, C): the score, or 1, where the channel is open, else 0."""

    def __init__(self, threshold: float, gain: str, adjustable: bool) -> None:
        super().__init__()
        self.threshold, self.scales = float(threshold), gain == "score"
        if adjustable:
            self.threshold = Parameter(Tensor(np.array(threshold, np.float32)), name="threshold", requires_grad=False)

    def construct(self, scores: Tensor) -> Tensor:
        factors = scores if self.scales else ops.ones_like(scores)
        return ops.select(scores > self.threshold, factors, ops.zeros_like(scores))


class _Mask(nn.Cell):
    """Scores (B, C) -> factors, open where the parameter ``mask`` (C,) is above 0 for every image."""

    def __init__(self, channels: int, gain: str) -> None:
        super().__init__()
        self.mask = Parameter(Tensor(np.ones(channels, np.float32)), name="mask", requires_grad=False)
        self.scales = gain == "score"

    def construct(self, scores: Tensor) -> Tensor:
        factors = scores if self.scales else ops.ones_like(scores)
        open_ = ops.broadcast_to(self.mask > 0, scores.shape)
        if self.scales:
            open_ = ops.logical_and(open_, scores > 0)
        return ops.select(open_, factors, ops.zeros_like(scores))


class _Clip(nn.Cell):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def construct(self, x: Tensor) -> Tensor:
        return ops.clamp(x, self.low, self.high)


class _LayerNorm(nn.Cell):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.gamma = Parameter(Tensor(np.ones(channels, np.float32)), name="gamma")
        self.beta = Parameter(Tensor(np.zeros(channels, np.float32)), name="beta")
        self.eps = eps

    def construct(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keep_dims=True)
        normal = centred / ops.sqrt((centred * centred).mean(1, keep_dims=True) + self.eps)
        if x.ndim == 2:
            return normal * self.gamma + self.beta
        return normal * self.gamma.reshape((-1, 1, 1)) + self.beta.reshape((-1, 1, 1))


class _PReLU(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = Parameter(Tensor(np.full(channels, 0.25, np.float32)), name="slope")

    def construct(self, x: Tensor) -> Tensor:
        slope = self.slope if x.ndim == 2 else self.slope.reshape((-1, 1, 1))
        return ops.select(x > 0, x, slope * x)


class _ELU(nn.Cell):
    """MindSpore's own knows no alpha but 1."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def construct(self, x: Tensor) -> Tensor:
        return ops.select(x > 0, x, self.alpha * (ops.exp(ops.clamp(x, max=0)) - 1))


class _Squareplus(nn.Cell):
    def __init__(self, b: float) -> None:
        super().__init__()
        self.b = b

    def construct(self, x: Tensor) -> Tensor:
        return 0.5 * (x + ops.sqrt(x * x + self.b))


class _Scatter(nn.Cell):
    """Channels put at their places among more, zeros elsewhere: gathered from them and one channel of zeros."""

    def __init__(self, count: int, channels: int, at: Sequence[int]) -> None:
        super().__init__()
        source = np.full(channels, count, np.int32)
        source[list(at)] = range(count)
        self.source = Tensor(source)

    def construct(self, x: Tensor) -> Tensor:
        return ops.gather(ops.concat((x, ops.zeros_like(x[:, :1])), 1), self.source, 1)


class _Slice(nn.Cell):
    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def construct(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


class _Shuffle(nn.Cell):
    """Channels in equal parts, dealt out in turn."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.source = Tensor(np.arange(channels, dtype=np.int32).reshape(groups, -1).T.ravel())

    def construct(self, x: Tensor) -> Tensor:
        return ops.gather(x, self.source, 1)


class _Padded(nn.Cell):
    """Numbers around a map, then a cell."""

    def __init__(self, padding: tuple[int, int, int, int], value: float, then: nn.Cell) -> None:
        super().__init__()
        top, bottom, left, right = padding
        self.pad, self.then = nn.ConstantPad2d((left, right, top, bottom), value), then

    def construct(self, x: Tensor) -> Tensor:
        return self.then(self.pad(x))


class _Inside(nn.Cell):
    """An average that counts zeros around the map, made into one over what is inside."""

    def __init__(self, average: nn.Cell) -> None:
        super().__init__()
        self.average = average

    def construct(self, x: Tensor) -> Tensor:
        return self.average(x) / self.average(ops.ones_like(x[:1, :1]))


class _Function(nn.Cell):
    """A step without parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _add(x: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        x = x + other
    return x


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    if x.ndim != factor.ndim:
        factor = factor.reshape((*factor.shape, 1, 1))
    return x * factor


def _concat(*inputs: Tensor) -> Tensor:
    return ops.concat(inputs, 1)


def _tanh(x: Tensor) -> Tensor:
    return 2 * ops.sigmoid(2 * x) - 1  # MindSpore's own is off by 1e-4 on a CPU


def _global_average(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _global_max(x: Tensor) -> Tensor:
    return x.amax((2, 3))


def _scorers(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """The last linear node before each Select."""
    by_name = {node["name"]: node for node in nodes}
    found = set()
    for node in nodes:
        if node["op"] == "Select":
            while node["op"] != "Linear" and len(node["inputs"]) == 1:
                node = by_name[node["inputs"][0]]
            found.add(node["name"])
    return found


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), MindSpore's order."""
    if isinstance(padding, int):
        return (padding,) * 4
    top, left, bottom, right = padding if len(padding) == 4 else (*padding, *padding)
    return top, bottom, left, right


def _pair(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


# As in the description; with ``threshold``, whether that is ``adjustable``, and whether it makes a gate's ``scores``.
_Node = Mapping[str, Any]
_ACTIVATIONS: dict[str, Callable[[], nn.Cell]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.HSwish, "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.HSigmoid, "tanh": lambda: _Function(_tanh), "gelu": lambda: nn.GELU(approximate=False),
    "softplus": lambda: _Function(ops.softplus), "mish": nn.Mish,
}  # fmt: skip


def _cell(node: _Node) -> nn.Cell:
    """The cell of a node. Raises NotImplementedError for what this file does not know."""
    make = _CELLS.get(node["op"])
    if make is None or (node["op"] == "Activation" and node["kind"] not in _ACTIVATIONS):
        what = " ".join([node["op"], *(node[key] for key in ("kind",) if key in node)])
        raise NotImplementedError(f"node '{node['name']}' ({what}): MindSpore's network does not run this op")
    cell = make(node)
    if not node["trainable"]:
        for parameter in cell.get_parameters():
            parameter.requires_grad = False
    return cell


def _conv(node: _Node) -> nn.Cell:
    out, grouped, *kernel = node["parameters"]["weight"]
    return nn.Conv2d(
        grouped * node["groups"], out, tuple(kernel), _pair(node["stride"]), "pad", _sides(node["padding"]),
        _pair(node["dilation"]), node["groups"], has_bias=node["bias"],
        weight_init=HeNormal(mode="fan_out"), bias_init="zeros",
    )  # fmt: skip


def _batch_norm(node: _Node) -> nn.Cell:
    norm = nn.BatchNorm2d if len(node["shape"]) == 3 else nn.BatchNorm1d
    frozen = {"use_batch_statistics": False} if node["use_global_stats"] else {}
    return norm(node["parameters"]["gamma"][0], node["eps"], **frozen)


def _select(node: _Node) -> nn.Cell:
    if node["rule"] == "constant":
        return _Mask(node["shape"][0], node["gain"])
    return _Select(node["threshold"], node["gain"], node["adjustable"])


def _pool(node: _Node) -> nn.Cell:
    pool, outside = (nn.MaxPool2d, float("-inf")) if node["kind"] == "max" else (nn.AvgPool2d, 0.0)
    kernel, stride = _pair(node["kernel"]), _pair(node["stride"])
    if isinstance(node["padding"], int) and 2 * node["padding"] <= min(
        kernel if isinstance(kernel, tuple) else (kernel,)
    ):
        made = pool(kernel, stride, "pad", node["padding"])
    else:
        made = _Padded(_sides(node["padding"]), outside, pool(kernel, stride))
    return made if node["count_include_pad"] else _Inside(made)


def _linear(node: _Node) -> nn.Cell:
    features, inputs = node["parameters"]["weight"]
    if node["scores"]:  # the identity: every score is 1
        return nn.Dense(inputs, features, weight_init="zeros", bias_init="ones", has_bias=node["bias"])
    return nn.Dense(inputs, features, bias_init="zeros", has_bias=node["bias"])


_CELLS: dict[str, Callable[[_Node], nn.Cell]] = {
    "Conv": _conv,
    "BatchNorm": _batch_norm,
    "LayerNorm": lambda node: _LayerNorm(node["shape"][0], node["eps"]),
    "Activation": lambda node: _ACTIVATIONS[node["kind"]](),
    "LeakyReLU": lambda node: nn.LeakyReLU(node["slope"]),
    "PReLU": lambda node: _PReLU(node["shape"][0]),
    "ELU": lambda node: _ELU(node["alpha"]),
    "Squareplus": lambda node: _Squareplus(node["b"]),
    "Clip": lambda node: _Clip(node["low"], node["high"]),
    "Select": _select,
    "Add": lambda node: _Function(_add),
    "Multiply": lambda node: _Function(_multiply),
    "Concat": lambda node: _Function(_concat),
    "Slice": lambda node: _Slice(node["start"], node["stop"]),
    "Shuffle": lambda node: _Shuffle(node["shape"][0], node["groups"]),
    "Scatter": lambda node: _Scatter(len(node["at"]), node["channels"], node["at"]),
    "Pool": _pool,
    "GlobalPool": lambda node: _Function(_global_average if node["kind"] == "average" else _global_max),
    "Flatten": lambda node: nn.Flatten(),
    "Linear": _linear,
}
