"""A network of manidp as a MindSpore cell that walks the description of a graph.

This file stands alone: it needs MindSpore and NumPy, not manidp. manidp itself runs it, and copies it as it is into
the bundles that it makes for the MindSpore hub.

A description is JSON data: ``nodes``, in an order in which they can be computed, the image first, each with ``op``,
``name``, ``inputs`` (names), all fields of its kind, ``shape`` (of its value, without the batch axis) and
``parameters`` (local name -> shape), a gate also ``scales``, the name of the value that is multiplied by it; and
``output``, the name of the node that makes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal


class Network(nn.Cell):
    """The cell; its parameters have the names of the description, with dots: ``stage_1.0.conv_a.weight``.

    description: see above. thresholds: one number for every gate, in the order of the nodes; fixed, and no parameters,
    so a .ckpt does not hold them. Fresh weights: convolutions N(0, sqrt(2 / (kernel^2 * out))), gates the identity.
    Runs in PYNATIVE and in GRAPH mode; ``set_train(False)`` (as it is when made) for inference.
    """

    def __init__(self, description: Mapping[str, Any], thresholds: Sequence[float] | np.ndarray[Any, Any]) -> None:
        super().__init__(auto_prefix=False)
        nodes = description["nodes"]
        index = {node["name"]: position for position, node in enumerate(nodes)}
        gates = {node["name"]: node["scales"] for node in nodes if node["op"] == "Gate"}
        thresholds = np.asarray(thresholds, np.float32)
        if thresholds.shape != (len(gates),):
            raise ValueError(f"one threshold for each of {len(gates)} gates expected; got shape {thresholds.shape}")
        threshold_of = dict(zip(gates, thresholds, strict=True))
        cells = []
        for node in nodes[1:]:
            cell = _cell(node, threshold_of.get(node["name"]))
            for name, parameter in cell.parameters_and_names():  # update_parameters_name wants letters
                parameter.name = f"{node['name']}.{name}"
            cells.append(cell)
        self.num_classes = nodes[index[description["output"]]]["shape"][0]
        self.gate_names = tuple(gates)
        self.thresholds = thresholds
        self.steps = nn.CellList(cells, auto_prefix=False)
        self.sources = tuple(tuple(index[name] for name in node["inputs"]) for node in nodes[1:])
        self.is_gate = tuple(node["op"] == "Gate" for node in nodes[1:])
        self.output = index[description["output"]]
        self.gates = tuple(index[name] for name in gates)
        self.gated = tuple(index[name] for name in gates.values())

    def construct(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        return self.records(images)[0]

    def records(self, images: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
        """The logits, and (saliency, gate, feature) of every gate, three tensors (B, C).

        saliency: before the threshold, >= 0. gate: the factor, 0 where closed. feature: mean over H and W of the
        feature map that the gate scales, before it is scaled.
        """
        values: tuple[Tensor, ...] = (images,)
        saliencies: tuple[Tensor, ...] = ()
        for step in range(len(self.steps)):
            inputs: tuple[Tensor, ...] = ()
            for source in self.sources[step]:
                inputs = (*inputs, values[source])
            value = self.steps[step](*inputs)
            if self.is_gate[step]:
                saliencies = (*saliencies, value[0])
                value = value[1]
            values = (*values, value)
        records: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
        for gate in range(len(self.gates)):
            feature = values[self.gated[gate]]
            if feature.ndim == 4:
                feature = feature.mean((2, 3))
            records = (*records, (saliencies[gate], values[self.gates[gate]], feature))
        return values[self.output], records


class _Gate(nn.Cell):
    """(B, C, H, W) -> saliency and gate, (B, channels) each; see ``Network.records``."""

    def __init__(self, inputs: int, hidden: int, channels: int, saliency_max: float, threshold: float) -> None:
        super().__init__()
        self.fc1 = nn.Dense(inputs, hidden, weight_init=HeNormal(), has_bias=False)
        self.fc2 = nn.Dense(hidden, channels, weight_init="zeros", bias_init="ones")
        self.saliency_max = saliency_max
        self.threshold = float(threshold)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ops.relu(self.fc1(x.mean((2, 3))))
        saliency = ops.clamp(ops.relu(self.fc2(hidden)), max=self.saliency_max)
        return saliency, ops.select(saliency > self.threshold, saliency, ops.zeros_like(saliency))


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


def _global_average(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _global_max(x: Tensor) -> Tensor:
    return x.amax((2, 3))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "Add": _add, "Multiply": _multiply, "Concat": _concat, "average": _global_average, "max": _global_max,
}  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[], nn.Cell]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.HSwish, "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.HSigmoid,
}  # fmt: skip


def _cell(node: Mapping[str, Any], threshold: float | None) -> nn.Cell:
    shapes = node["parameters"]
    match node["op"]:
        case "Conv":
            out, grouped, kernel, _ = shapes["weight"]
            return nn.Conv2d(
                grouped * node["groups"], out, kernel, node["stride"], "pad", node["padding"], group=node["groups"],
                has_bias=node["bias"], weight_init=HeNormal(mode="fan_out"), bias_init="zeros",
            )  # fmt: skip
        case "BatchNorm":
            return nn.BatchNorm2d(shapes["gamma"][0], node["eps"])
        case "Activation":
            return _ACTIVATIONS[node["kind"]]()
        case "Gate":
            assert threshold is not None
            (hidden, inputs), saliency_max = shapes["fc1.weight"], node["saliency_max"]
            return _Gate(inputs, hidden, node["channels"], saliency_max, threshold)
        case "Pool":
            pool = nn.MaxPool2d if node["kind"] == "max" else nn.AvgPool2d
            return pool(node["kernel"], node["stride"], "pad", node["padding"])
        case "GlobalPool":
            return _Function(_FUNCTIONS[node["kind"]])
        case "Flatten":
            return nn.Flatten()
        case "Linear":
            features, inputs = shapes["weight"]
            return nn.Dense(inputs, features, bias_init="zeros", has_bias=node["bias"])
        case "Add" | "Multiply" | "Concat":
            return _Function(_FUNCTIONS[node["op"]])
    raise NotImplementedError(f"node '{node['name']}': this file does not know the op {node['op']!r}")
