"""A checkpoint as an ONNX model, gates and thresholds included.

A runtime that knows nothing of gates computes every channel and multiplies by the gate: the answers are the same, the
time is not saved. Input ``image``: float32 (B, C, H, W), normalised; mean, std and classes are in the model's metadata.
Output ``logits``: float32 (B, classes).

Names: a parameter has its own, as in the graph; it ends in a dot and a word, such as ``.weight``. All that a node
makes is called NODE:WHAT, where WHAT is a word of ours; ``NODE:out`` is what the node is for. So no two names meet,
whatever the nodes are called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manidp.errors import CheckpointError, MissingExtraError
from manidp.files import replacing
from manidp.formats.checkpoint import Checkpoint
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

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

try:
    from onnx import ModelProto, checker, helper, numpy_helper
except ImportError as error:
    raise MissingExtraError("this needs onnx; install it with: pip install 'manidp[onnx]'") from error

OPSET = 17
MAX_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the rest is for everything but weights


def write_onnx(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write the model whole or not at all; raises CheckpointError if the file cannot be written."""
    try:
        with replacing(path) as file:
            file.write(onnx_model(checkpoint).SerializeToString())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def onnx_model(checkpoint: Checkpoint) -> ModelProto:
    """The model as onnx's own data, checked by onnx. Raises CheckpointError for 2 GiB and more: ONNX cannot hold it."""
    graph = checkpoint.graph
    if sum(value.nbytes for value in checkpoint.weights.values()) > MAX_BYTES:
        raise CheckpointError(f"an ONNX file holds weights of at most {MAX_BYTES:,} bytes; these have more")
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    for node in graph.nodes:
        handles[node](_Writer(checkpoint, node, nodes, tensors), node)
    nodes.append(helper.make_node("Identity", [_value(graph.output)], ["logits"]))
    float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    given = helper.make_tensor_value_info("image", float32, ["batch", *graph.input.dims])
    made = helper.make_tensor_value_info("logits", float32, ["batch", graph.num_classes])
    body = helper.make_graph(nodes, "manidp", [given], [made], tensors)
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="manidp", ir_version=9
    )
    preprocessing = checkpoint.preprocessing
    facts = {"mean": preprocessing.mean, "std": preprocessing.std, "classes": checkpoint.classes}
    helper.set_model_props(model, {name: json.dumps(list(value)) for name, value in facts.items()})
    checker.check_model(model)
    return model


class _Writer:
    """What handlers write a node with; ``inputs`` are the names of the values that it reads."""

    def __init__(self, checkpoint: Checkpoint, node: Node, nodes: list[NodeProto], tensors: list[TensorProto]) -> None:
        self._weights, self._node, self._nodes, self._tensors = checkpoint.weights, node, nodes, tensors
        self.inputs = [_value(source) for source in node.inputs]
        self.shapes = checkpoint.graph.input_shapes(node)

    def parameter(self, local: str) -> str:
        """The name of a parameter, which becomes part of the file."""
        name = f"{self._node.name}.{local}"
        self._tensors.append(numpy_helper.from_array(self._weights[name], name))
        return name

    def constant(self, what: str, value: Any) -> str:
        """The name of an array of our own."""
        name = _value(self._node.name, what)
        self._tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, sources: Sequence[str], what: str = "out", **attributes: Any) -> str:
        """One ONNX node, and the name of what it makes; ``out`` is what the node is for, and comes last."""
        made = _value(self._node.name, what)
        self._nodes.append(helper.make_node(kind, sources, [made], **attributes))
        return made


handles: Handlers[Callable[..., object]] = Handlers("ONNX")
"""Handlers take a writer and the node, and write the ONNX nodes that make its value."""


@handles(Input)
def _input(to: _Writer, node: Input) -> None:
    to.op("Identity", ["image"])


@handles(Conv)
def _conv(to: _Writer, node: Conv) -> None:
    bias = [to.parameter("bias")] if node.bias else []
    to.op("Conv", [*to.inputs, to.parameter("weight"), *bias], group=node.groups, **_window(node))


@handles(BatchNorm)
def _batch_norm(to: _Writer, node: BatchNorm) -> None:
    parameters = [to.parameter(local) for local in ("gamma", "beta", "moving_mean", "moving_variance")]
    to.op("BatchNormalization", [*to.inputs, *parameters], epsilon=node.eps)


@handles(LayerNorm)
def _layer_norm(to: _Writer, node: LayerNorm) -> None:
    (x,), is_map = to.inputs, len(to.shapes[0]) == 3
    if is_map:
        x = to.op("Transpose", [x], "channels_last", perm=[0, 2, 3, 1])
    gamma, beta = to.parameter("gamma"), to.parameter("beta")
    made = to.op("LayerNormalization", [x, gamma, beta], "normal" if is_map else "out", axis=-1, epsilon=node.eps)
    if is_map:
        to.op("Transpose", [made], perm=[0, 3, 1, 2])


ACTIVATIONS: dict[str, Callable[[_Writer], object]] = {
    "relu": lambda to: to.op("Relu", to.inputs),
    "relu6": lambda to: _clipped(to, 0, 6),
    "hardswish": lambda to: to.op("HardSwish", to.inputs),
    "silu": lambda to: to.op("Mul", [*to.inputs, to.op("Sigmoid", to.inputs, "sigmoid")]),
    "sigmoid": lambda to: to.op("Sigmoid", to.inputs),
    "hardsigmoid": lambda to: to.op("HardSigmoid", to.inputs, alpha=1 / 6, beta=0.5),
    "tanh": lambda to: to.op("Tanh", to.inputs),
    "gelu": lambda to: _gelu(to),
    "softplus": lambda to: to.op("Softplus", to.inputs),
    "mish": lambda to: to.op("Mul", [*to.inputs, to.op("Tanh", [to.op("Softplus", to.inputs, "softplus")], "tanh")]),
}


@handles(Activation)
def _activation(to: _Writer, node: Activation) -> None:
    handles.variant(node, ACTIVATIONS, node.kind)(to)


@handles(LeakyReLU)
def _leaky_relu(to: _Writer, node: LeakyReLU) -> None:
    to.op("LeakyRelu", to.inputs, alpha=node.slope)


@handles(PReLU)
def _prelu(to: _Writer, node: PReLU) -> None:
    (x,) = to.shapes
    shape = to.constant("shape", np.array([x[0], *[1] * (len(x) - 1)], np.int64))
    to.op("PRelu", [*to.inputs, to.op("Reshape", [to.parameter("slope"), shape], "slopes")])


@handles(ELU)
def _elu(to: _Writer, node: ELU) -> None:
    to.op("Elu", to.inputs, alpha=node.alpha)


@handles(Squareplus)
def _squareplus(to: _Writer, node: Squareplus) -> None:
    square = to.op("Mul", [*to.inputs, *to.inputs], "square")
    root = to.op("Sqrt", [to.op("Add", [square, to.constant("b", np.float32(node.b))], "above")], "root")
    to.op("Mul", [to.op("Add", [*to.inputs, root], "twice"), to.constant("half", np.float32(0.5))])


@handles(Clip)
def _clip(to: _Writer, node: Clip) -> None:
    _clipped(to, node.low, node.high)


def _gelu(to: _Writer) -> None:
    """x * (1 + erf(x / sqrt(2))) / 2; ONNX has an op for it from opset 20 on."""
    scaled = to.op("Mul", [*to.inputs, to.constant("scale", np.float32(0.5**0.5))], "scaled")
    above = to.op("Add", [to.op("Erf", [scaled], "erf"), to.constant("one", np.float32(1))], "above")
    to.op("Mul", [to.op("Mul", [*to.inputs, to.constant("half", np.float32(0.5))], "halved"), above])


def _clipped(to: _Writer, low: float, high: float) -> None:
    to.op("Clip", [*to.inputs, to.constant("low", np.float32(low)), to.constant("high", np.float32(high))])


@handles(Select)
def _select(to: _Writer, node: Select) -> None:
    zero = to.constant("zero", np.float32(0))
    score = to.inputs[0] if node.gain == "score" else to.constant("one", np.float32(1))
    kept = to.op("Greater", [*to.inputs, to.parameter("threshold") if node.rule == "threshold" else zero], "exceeds")
    if node.rule == "constant":
        if node.gain == "one":  # whatever the score
            kept = to.op("Or", [kept, to.op("Not", [kept], "not")], "any")
        kept = to.op("And", [kept, to.op("Greater", [to.parameter("mask"), zero], "open")], "both")
    to.op("Where", [kept, score, zero])


@handles(Add)
def _add(to: _Writer, node: Add) -> None:
    to.op("Sum", to.inputs)


@handles(Multiply)
def _multiply(to: _Writer, node: Multiply) -> None:
    (x, factor), (value, shape) = to.inputs, to.shapes
    if len(shape) < len(value):
        factor = to.op("Reshape", [factor, to.constant("shape", np.array([-1, *shape, 1, 1], np.int64))], "factor")
    to.op("Mul", [x, factor])


@handles(Concat)
def _concat(to: _Writer, node: Concat) -> None:
    to.op("Concat", to.inputs, axis=1)


@handles(Slice)
def _slice(to: _Writer, node: Slice) -> None:
    bounds = {"start": node.start, "stop": node.stop, "axis": 1}
    to.op("Slice", [*to.inputs, *(to.constant(what, np.array([at], np.int64)) for what, at in bounds.items())])


@handles(Shuffle)
def _shuffle(to: _Writer, node: Shuffle) -> None:
    (x,) = to.shapes
    parts = to.constant("parts", np.array([0, node.groups, x[0] // node.groups, *x[1:]], np.int64))
    apart = to.op("Reshape", [*to.inputs, parts], "apart")
    dealt = to.op("Transpose", [apart], "dealt", perm=[0, 2, 1, *range(3, len(x) + 2)])
    to.op("Reshape", [dealt, to.constant("whole", np.array([0, *x], np.int64))])


@handles(Scatter)
def _scatter(to: _Writer, node: Scatter) -> None:
    (x,) = to.shapes
    source = np.full(node.channels, x[0])  # where there is no channel, the zero put behind them
    source[list(node.at)] = range(x[0])
    pads = np.zeros((2, len(x) + 1), np.int64)
    pads[1, 1] = 1
    padded = to.op("Pad", [*to.inputs, to.constant("pads", pads.ravel())], "padded")
    to.op("Gather", [padded, to.constant("source", source.astype(np.int64))], axis=1)


@handles(Pool)
def _pool(to: _Writer, node: Pool) -> None:
    if node.kind == "max":
        to.op("MaxPool", to.inputs, **_window(node))
    else:
        to.op("AveragePool", to.inputs, count_include_pad=int(node.count_include_pad), **_window(node))


@handles(GlobalPool)
def _global_pool(to: _Writer, node: GlobalPool) -> None:
    kind = "GlobalMaxPool" if node.kind == "max" else "GlobalAveragePool"
    to.op("Flatten", [to.op(kind, to.inputs, "pooled")])


@handles(Flatten)
def _flatten(to: _Writer, node: Flatten) -> None:
    to.op("Flatten", to.inputs)


@handles(Linear)
def _linear(to: _Writer, node: Linear) -> None:
    bias = [to.parameter("bias")] if node.bias else []
    to.op("Gemm", [*to.inputs, to.parameter("weight"), *bias], transB=1)


def _value(node: str, what: str = "out") -> str:
    return f"{node}:{what}"


def _window(node: Conv | Pool) -> dict[str, Any]:
    dilated = {"dilations": node.spread} if node.spread != (1, 1) else {}
    return {"kernel_shape": pair(node.kernel), "strides": pair(node.stride), "pads": sides(node.padding), **dilated}
