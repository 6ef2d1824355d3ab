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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manidp.errors import CheckpointError, MissingExtraError
from manidp.files import replacing
from manidp.formats.checkpoint import Checkpoint
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
    constants: dict[str, TensorProto] = {}
    nodes = [made for node in graph.nodes for made in _nodes(node, graph, checkpoint, constants)]
    nodes.append(helper.make_node("Identity", [_value(graph.output)], ["logits"]))
    float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    given = helper.make_tensor_value_info("image", float32, ["batch", *graph.input.dims])
    made = helper.make_tensor_value_info("logits", float32, ["batch", graph.num_classes])
    body = helper.make_graph(nodes, "manidp", [given], [made], list(constants.values()))
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="manidp", ir_version=9
    )
    preprocessing = checkpoint.preprocessing
    facts = {"mean": preprocessing.mean, "std": preprocessing.std, "classes": checkpoint.classes}
    helper.set_model_props(model, {name: json.dumps(list(value)) for name, value in facts.items()})
    checker.check_model(model)
    return model


def _nodes(node: Node, graph: Graph, checkpoint: Checkpoint, constants: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """The ONNX nodes of one node; the last of them makes what the node is for."""
    inputs = [_value(source) for source in node.inputs]

    def parameter(local: str) -> str:
        name = f"{node.name}.{local}"
        constants[name] = numpy_helper.from_array(checkpoint.weights[name], name)
        return name

    def constant(what: str, value: Any) -> str:
        name = made(what)
        constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def made(what: str) -> str:
        return _value(node.name, what)

    def op(kind: str, sources: list[str], what: str = "out", **attributes: Any) -> NodeProto:
        return helper.make_node(kind, sources, [made(what)], **attributes)

    match node:
        case Input():
            yield op("Identity", ["image"])
        case Conv():
            bias = [parameter("bias")] if node.bias else []
            yield op("Conv", [*inputs, parameter("weight"), *bias], group=node.groups, **_window(node))
        case BatchNorm():
            parameters = [parameter(local) for local in ("gamma", "beta", "moving_mean", "moving_variance")]
            yield op("BatchNormalization", [*inputs, *parameters], epsilon=node.eps)
        case Activation(kind="relu6"):
            yield op("Clip", [*inputs, constant("low", np.float32(0)), constant("high", np.float32(6))])
        case Activation(kind="silu"):
            yield op("Sigmoid", inputs, "sigmoid")
            yield op("Mul", [*inputs, made("sigmoid")])
        case Activation(kind="hardsigmoid"):
            yield op("HardSigmoid", inputs, alpha=1 / 6, beta=0.5)
        case Activation():
            yield op({"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish"}[node.kind], inputs)
        case Clip():
            yield op("Clip", [*inputs, constant("low", np.float32(node.low)), constant("high", np.float32(node.high))])
        case Select():
            zero = constant("zero", np.float32(0))
            score = inputs[0] if node.gain == "score" else constant("one", np.float32(1))
            kept = "exceeds"
            yield op("Greater", [*inputs, parameter("threshold") if node.rule == "threshold" else zero], kept)
            if node.rule == "constant":
                yield op("Greater", [parameter("mask"), zero], "open")
                if node.gain == "one":  # whatever the score
                    yield op("Not", [made(kept)], "not")
                    yield op("Or", [made(kept), made("not")], "any")
                    kept = "any"
                yield op("And", [made(kept), made("open")], "both")
                kept = "both"
            yield op("Where", [made(kept), score, zero])
        case Add():
            yield op("Sum", inputs)
        case Multiply():
            value, factor = graph.input_shapes(node)
            if len(factor) < len(value):
                shape = constant("shape", np.array([-1, *factor, 1, 1], np.int64))
                yield op("Reshape", [inputs[1], shape], "factor")
                inputs[1] = made("factor")
            yield op("Mul", inputs)
        case Concat():
            yield op("Concat", inputs, axis=1)
        case Slice():
            bounds = [constant(what, np.array([at], np.int64)) for what, at in
                      (("start", node.start), ("stop", node.stop), ("axis", 1))]  # fmt: skip
            yield op("Slice", [*inputs, *bounds])
        case Shuffle():
            (x,) = graph.input_shapes(node)
            parts = constant("parts", np.array([0, node.groups, x[0] // node.groups, *x[1:]], np.int64))
            yield op("Reshape", [*inputs, parts], "apart")
            yield op("Transpose", [made("apart")], "dealt", perm=[0, 2, 1, *range(3, len(x) + 2)])
            yield op("Reshape", [made("dealt"), constant("whole", np.array([0, *x], np.int64))])
        case Scatter():
            (x,) = graph.input_shapes(node)
            source = np.full(node.channels, x[0])  # where there is no channel, the zero put behind them
            source[list(node.at)] = range(x[0])
            pads = np.zeros((2, len(x) + 1), np.int64)
            pads[1, 1] = 1
            yield op("Pad", [*inputs, constant("pads", pads.ravel())], "padded")
            yield op("Gather", [made("padded"), constant("source", source.astype(np.int64))], axis=1)
        case Pool(kind="max"):
            yield op("MaxPool", inputs, **_window(node))
        case Pool():
            yield op("AveragePool", inputs, count_include_pad=1, **_window(node))
        case GlobalPool():
            kind = "GlobalMaxPool" if node.kind == "max" else "GlobalAveragePool"
            yield op(kind, inputs, "pooled")
            yield op("Flatten", [made("pooled")])
        case Flatten():
            yield op("Flatten", inputs)
        case Linear():
            bias = [parameter("bias")] if node.bias else []
            yield op("Gemm", [*inputs, parameter("weight"), *bias], transB=1)
        case _:
            raise NotImplementedError(type(node).__name__)


def _value(node: str, what: str = "out") -> str:
    return f"{node}:{what}"


def _window(node: Conv | Pool) -> dict[str, Any]:
    dilated = {"dilations": node.spread} if node.spread != (1, 1) else {}
    return {"kernel_shape": pair(node.kernel), "strides": pair(node.stride), "pads": sides(node.padding), **dilated}
