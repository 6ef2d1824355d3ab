"""The plain NumPy interpreter of a graph: no skipping, no folding, every node as it is defined. The oracle of tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from manidp.errors import ManiDPError
from manidp.graph import (
    Activation,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Node,
    Pool,
    Scatter,
    Select,
    Shuffle,
    Slice,
    pair,
    sides,
)
from manidp.result import Array, Result


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
        case Clip():
            return np.clip(x, x.dtype.type(node.low), x.dtype.type(node.high))
        case Select():
            kept = x > (p["threshold"] if node.rule == "threshold" else 0)
            if node.rule == "constant":
                kept = (p["mask"] > 0) & (kept | (node.gain == "one"))
            return np.where(kept, x if node.gain == "score" else x.dtype.type(1), x.dtype.type(0))
        case Add():
            return sum(others, start=x)
        case Multiply():
            (factor,) = others
            return x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
        case Concat():
            return np.concatenate((x, *others), axis=1)
        case Slice():
            return x[:, node.start : node.stop]
        case Shuffle():
            return x.reshape(len(x), node.groups, -1, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)
        case Scatter():
            whole = np.zeros((len(x), node.channels, *x.shape[2:]), dtype=x.dtype)
            whole[:, node.at] = x
            return whole
        case Pool(kind="max"):
            return _windows(node, x, -np.inf).max(axis=(4, 5))
        case Pool():
            return _windows(node, x).mean(axis=(4, 5))
        case GlobalPool():
            return x.mean(axis=(2, 3)) if node.kind == "average" else x.max(axis=(2, 3))
        case Flatten():
            return x.reshape(len(x), -1)
        case Linear():
            return x @ p["weight"].T + (p["bias"] if node.bias else 0)
    raise NotImplementedError(type(node).__name__)


def _conv(node: Conv, x: Array, weight: Array) -> Array:
    windows = _windows(node, x)
    grouped = zip(np.split(windows, node.groups, axis=1), np.split(weight, node.groups), strict=True)
    made = [np.tensordot(part, w, axes=((1, 4, 5), (1, 2, 3))) for part, w in grouped]
    return np.concatenate(made, axis=3).transpose(0, 3, 1, 2)


def _windows(node: Conv | Pool, x: Array, outside: float = 0.0) -> Array:
    """(B, C, H, W) -> (B, C, H', W', kernel height, kernel width)."""
    (high, wide), (down, across), (rows, columns) = pair(node.kernel), pair(node.stride), node.spread
    top, left, bottom, right = sides(node.padding)
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=outside)
    reach = (rows * (high - 1) + 1, columns * (wide - 1) + 1)
    return sliding_window_view(x, reach, axis=(2, 3))[:, :, ::down, ::across, ::rows, ::columns]


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
