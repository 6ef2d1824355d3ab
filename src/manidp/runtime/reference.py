"""The plain NumPy interpreter of a graph: no skipping, no folding, every node as it is defined. The oracle of tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from manidp.errors import ManiDPError
from manidp.graph import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    Gate,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Node,
    Pool,
)
from manidp.macs import macs_per_image

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Result:
    """What a network says about a batch of B images, and what it spent on each.

    logits: (B, classes). gate_values: (B, channels of all gates), gate after gate, 0 where a channel is closed.
    """

    graph: Graph
    logits: Array
    gate_values: Array

    @cached_property
    def gates(self) -> dict[str, Array]:
        """Gate name -> (B, C)."""
        ends = np.cumsum([gate.channels for gate in self.graph.gates])[:-1]
        parts = np.split(self.gate_values, ends, axis=1)
        return {gate.name: part for gate, part in zip(self.graph.gates, parts, strict=False)}

    @cached_property
    def kept(self) -> dict[str, NDArray[np.bool_]]:
        """Gate name -> (B, C) bool, gate > 0."""
        return {name: gate > 0 for name, gate in self.gates.items()}

    @cached_property
    def macs(self) -> NDArray[np.int64]:
        """(B,) multiply-adds of each image, gates included."""
        return np.broadcast_to(macs_per_image(self.graph, self.kept), len(self.logits)).copy()


def run(graph: Graph, weights: Mapping[str, Array], images: Array, dtype: type = np.float64) -> Result:
    """The network on ``images`` (B, C, H, W), already normalised, computed in ``dtype`` (float64 or float32)."""
    values = node_values(graph, weights, images, dtype)
    logits = values[graph.output]
    gates = [values[gate.name] for gate in graph.gates]
    return Result(graph, logits, np.concatenate([np.empty((len(images), 0), dtype=dtype), *gates], axis=1))


def node_values(
    graph: Graph, weights: Mapping[str, Array], images: Array, dtype: type = np.float64
) -> dict[str, Array]:
    """Value of every node by name, batch axis first, for ``images`` (B, C, H, W) and all of ``graph.parameters``."""
    if images.ndim != 4 or images.shape[1:] != graph.input.dims:
        raise ManiDPError(f"images of shape (B, {', '.join(map(str, graph.input.dims))}) needed; got {images.shape}")
    values: dict[str, Array] = {}
    for node in graph.nodes:
        parameters: dict[str, Array] = {
            name: np.asarray(weights[f"{node.name}.{name}"], dtype=dtype)
            for name in node.parameters(*graph.input_shapes(node))
        }
        inputs = [values[source] for source in node.inputs] or [np.asarray(images, dtype=dtype)]
        values[node.name] = _value(node, parameters, *inputs)
    return values


def _value(node: Node, p: dict[str, Array], x: Array, *others: Array) -> Any:
    match node:
        case Input():
            return x
        case Conv():
            return _conv(node, x, p["weight"]) + (p["bias"][:, None, None] if node.bias else 0)
        case BatchNorm():
            scale = p["gamma"] / np.sqrt(p["moving_variance"] + x.dtype.type(node.eps))
            shift = p["beta"] - p["moving_mean"] * scale
            return x * scale[:, None, None] + shift[:, None, None]
        case Activation():
            return _activation(node.kind, x)
        case Gate():
            hidden = np.maximum(x.mean(axis=(2, 3)) @ p["fc1.weight"].T, 0)
            saliency = np.maximum(hidden @ p["fc2.weight"].T + p["fc2.bias"], 0)
            saliency = np.minimum(saliency, x.dtype.type(node.saliency_max))
            return np.where(saliency > p["threshold"], saliency, x.dtype.type(0))
        case Add():
            return sum(others, start=x)
        case Multiply():
            (factor,) = others
            return x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
        case Concat():
            return np.concatenate((x, *others), axis=1)
        case Pool(kind="max"):
            padded = _padded(x, node.padding, -np.inf)
            return _windows(padded, node.kernel, node.stride).max(axis=(4, 5))
        case Pool():
            return _windows(_padded(x, node.padding), node.kernel, node.stride).mean(axis=(4, 5))
        case GlobalPool():
            return x.mean(axis=(2, 3)) if node.kind == "average" else x.max(axis=(2, 3))
        case Flatten():
            return x.reshape(len(x), -1)
        case Linear():
            return x @ p["weight"].T + (p["bias"] if node.bias else 0)
    raise NotImplementedError(type(node).__name__)


def _conv(node: Conv, x: Array, weight: Array) -> Array:
    windows = _windows(_padded(x, node.padding), node.kernel, node.stride)
    grouped = zip(np.split(windows, node.groups, axis=1), np.split(weight, node.groups), strict=True)
    made = [np.tensordot(part, w, axes=((1, 4, 5), (1, 2, 3))) for part, w in grouped]
    return np.concatenate(made, axis=3).transpose(0, 3, 1, 2)


def _padded(x: Array, padding: int, value: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=value)


def _windows(x: Array, kernel: int, stride: int) -> Array:
    """(B, C, H, W) -> (B, C, H', W', kernel, kernel)."""
    return sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]


def _activation(kind: str, x: Array) -> Any:
    match kind:
        case "relu":
            return np.maximum(x, 0)
        case "relu6":
            return np.clip(x, 0, 6)
        case "hardsigmoid":
            return np.clip(x + 3, 0, 6) / 6
        case "hardswish":
            return x * np.clip(x + 3, 0, 6) / 6
        case "sigmoid":
            return (1 + np.tanh(x / 2)) / 2
        case "silu":
            return x * (1 + np.tanh(x / 2)) / 2
    raise NotImplementedError(kind)
