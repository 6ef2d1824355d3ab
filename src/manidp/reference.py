"""The plain NumPy interpreter of a graph: no skipping, no folding, every node as it is defined. The oracle of tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from manidp.errors import ManiDPError
from manidp.graph import (
    ELU,
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
    pair,
    sides,
)
from manidp.graph.handlers import Handlers
from manidp.result import Array, Result

P = Mapping[str, Array]  # parameters of a node, by their local names
handles: Handlers[Callable[..., Array]] = Handlers("the NumPy reference")
"""Handlers take the node, its parameters and the values that it reads, and return its value."""


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
        values[node.name] = value_of(node, parameters, *inputs)
    return values


def value_of(node: Node, parameters: Mapping[str, Array], *inputs: Array) -> Array:
    """Value of one node, batch axis first, given its parameters under their local names and the values it reads."""
    return handles[node](node, parameters, *inputs)


@handles(Input)
def _input(node: Input, p: P, x: Array) -> Array:
    return x


@handles(Conv)
def _conv(node: Conv, p: P, x: Array) -> Array:
    windows = _windows(node, x)
    grouped = zip(np.split(windows, node.groups, axis=1), np.split(p["weight"], node.groups), strict=True)
    made = [np.tensordot(part, w, axes=((1, 4, 5), (1, 2, 3))) for part, w in grouped]
    value: Array = np.concatenate(made, axis=3).transpose(0, 3, 1, 2)
    return value + p["bias"][:, None, None] if node.bias else value


@handles(BatchNorm)
def _batch_norm(node: BatchNorm, p: P, x: Array) -> Array:
    scale = p["gamma"] / np.sqrt(p["moving_variance"] + x.dtype.type(node.eps))
    shift = p["beta"] - p["moving_mean"] * scale
    shape = (-1,) + (1,) * (x.ndim - 2)
    return x * scale.reshape(shape) + shift.reshape(shape)


@handles(LayerNorm)
def _layer_norm(node: LayerNorm, p: P, x: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    shape = (-1,) + (1,) * (x.ndim - 2)
    normal: Array = centred / np.sqrt(variance + x.dtype.type(node.eps))
    return normal * p["gamma"].reshape(shape) + p["beta"].reshape(shape)


_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
    "silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2)).astype(x.dtype)) / 2,
    "softplus": lambda x: np.logaddexp(x, x.dtype.type(0)),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, x.dtype.type(0))),
}


@handles(Activation)
def _activation(node: Activation, p: P, x: Array) -> Array:
    return handles.variant(node, ACTIVATIONS, node.kind)(x)


@handles(LeakyReLU)
def _leaky_relu(node: LeakyReLU, p: P, x: Array) -> Array:
    return np.where(x > 0, x, x.dtype.type(node.slope) * x)


@handles(PReLU)
def _prelu(node: PReLU, p: P, x: Array) -> Array:
    return np.where(x > 0, x, p["slope"].reshape(-1, *[1] * (x.ndim - 2)) * x)


@handles(ELU)
def _elu(node: ELU, p: P, x: Array) -> Array:
    return np.where(x > 0, x, x.dtype.type(node.alpha) * np.expm1(np.minimum(x, 0)))


@handles(Squareplus)
def _squareplus(node: Squareplus, p: P, x: Array) -> Array:
    return x.dtype.type(0.5) * (x + np.sqrt(x * x + x.dtype.type(node.b)))


@handles(Clip)
def _clip(node: Clip, p: P, x: Array) -> Array:
    return np.clip(x, x.dtype.type(node.low), x.dtype.type(node.high))


@handles(Select)
def _select(node: Select, p: P, x: Array) -> Array:
    kept = x > (p["threshold"] if node.rule == "threshold" else 0)
    if node.rule == "constant":
        kept = (p["mask"] > 0) & (kept | (node.gain == "one"))
    return np.where(kept, x if node.gain == "score" else x.dtype.type(1), x.dtype.type(0))


@handles(Add)
def _add(node: Add, p: P, x: Array, *others: Array) -> Array:
    return sum(others, start=x)


@handles(Multiply)
def _multiply(node: Multiply, p: P, x: Array, factor: Array) -> Array:
    value: Array = x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
    return value


@handles(Concat)
def _concat(node: Concat, p: P, *inputs: Array) -> Array:
    return np.concatenate(inputs, axis=1)


@handles(Slice)
def _slice(node: Slice, p: P, x: Array) -> Array:
    return x[:, node.start : node.stop]


@handles(Shuffle)
def _shuffle(node: Shuffle, p: P, x: Array) -> Array:
    return x.reshape(len(x), node.groups, -1, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)


@handles(Scatter)
def _scatter(node: Scatter, p: P, x: Array) -> Array:
    whole = np.zeros((len(x), node.channels, *x.shape[2:]), dtype=x.dtype)
    whole[:, node.at] = x
    return whole


@handles(Pool)
def _pool(node: Pool, p: P, x: Array) -> Array:
    if node.kind == "max":
        return np.asarray(_windows(node, x, -np.inf).max(axis=(4, 5)))
    if node.count_include_pad:
        return np.asarray(_windows(node, x).mean(axis=(4, 5)))
    return np.asarray(_windows(node, x).sum(axis=(4, 5)) / _windows(node, np.ones_like(x)).sum(axis=(4, 5)))


@handles(GlobalPool)
def _global_pool(node: GlobalPool, p: P, x: Array) -> Array:
    return np.asarray(x.mean(axis=(2, 3)) if node.kind == "average" else x.max(axis=(2, 3)))


@handles(Flatten)
def _flatten(node: Flatten, p: P, x: Array) -> Array:
    return x.reshape(len(x), -1)


@handles(Linear)
def _linear(node: Linear, p: P, x: Array) -> Array:
    value: Array = x @ p["weight"].T
    return value + p["bias"] if node.bias else value


def _windows(node: Conv | Pool, x: Array, outside: float = 0.0) -> Array:
    """(B, C, H, W) -> (B, C, H', W', kernel height, kernel width)."""
    (high, wide), (down, across), (rows, columns) = pair(node.kernel), pair(node.stride), node.spread
    top, left, bottom, right = sides(node.padding)
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=outside)
    reach = (rows * (high - 1) + 1, columns * (wide - 1) + 1)
    return sliding_window_view(x, reach, axis=(2, 3))[:, :, ::down, ::across, ::rows, ::columns]
