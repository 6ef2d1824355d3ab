"""A checkpoint as an ONNX model, gates and thresholds included.

A runtime that knows nothing of gates computes every channel and multiplies by the gate: the answers are the same, the
time is not saved. Input ``image``: float32 (B, C, H, W), normalised; mean, std and classes are in the model's metadata.
Output ``logits``: float32 (B, classes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manidp.checkpoint import Checkpoint
from manidp.errors import CheckpointError, MissingExtraError
from manidp.files import replacing
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

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

try:
    from onnx import ModelProto, checker, helper, numpy_helper
except ImportError as error:
    raise MissingExtraError("this needs onnx; install it with: pip install 'manidp[onnx]'") from error

OPSET = 17


def write_onnx(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write the model whole or not at all; raises CheckpointError if the file cannot be written."""
    try:
        with replacing(path) as file:
            file.write(onnx_model(checkpoint).SerializeToString())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def onnx_model(checkpoint: Checkpoint) -> ModelProto:
    """The model as onnx's own data, checked by onnx."""
    graph = checkpoint.graph
    constants: dict[str, TensorProto] = {}
    nodes = [made for node in graph.nodes for made in _nodes(node, graph, checkpoint, constants)]
    nodes.append(helper.make_node("Identity", [graph.output], ["logits"]))
    float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    given = helper.make_tensor_value_info(graph.input.name, float32, ["batch", *graph.input.dims])
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
    """The ONNX nodes of one node; the last of them makes the value of its name."""
    name, inputs = node.name, list(node.inputs)

    def constant(local: str, value: Any = None) -> str:
        """Name of a parameter of the node, or of a ``value``."""
        full = f"{name}.{local}"
        array = checkpoint.weights[full] if value is None else np.asarray(value)
        constants[full] = numpy_helper.from_array(array, full)
        return full

    def op(kind: str, sources: list[str], out: str = name, **attributes: Any) -> NodeProto:
        return helper.make_node(kind, sources, [out], **attributes)

    match node:
        case Input():
            pass
        case Conv():
            bias = [constant("bias")] if node.bias else []
            yield op("Conv", [*inputs, constant("weight"), *bias], group=node.groups, **_window(node))
        case BatchNorm():
            parameters = [constant(local) for local in ("gamma", "beta", "moving_mean", "moving_variance")]
            yield op("BatchNormalization", [*inputs, *parameters], epsilon=node.eps)
        case Activation(kind="relu6"):
            yield op("Clip", [*inputs, constant("low", np.float32(0)), constant("high", np.float32(6))])
        case Activation(kind="silu"):
            yield op("Sigmoid", inputs, f"{name}.sigmoid")
            yield op("Mul", [*inputs, f"{name}.sigmoid"])
        case Activation(kind="hardsigmoid"):
            yield op("HardSigmoid", inputs, alpha=1 / 6, beta=0.5)
        case Activation():
            yield op({"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish"}[node.kind], inputs)
        case Gate():
            yield op("GlobalAveragePool", inputs, f"{name}.pooled")
            yield op("Flatten", [f"{name}.pooled"], f"{name}.mean")
            yield op("Gemm", [f"{name}.mean", constant("fc1.weight")], f"{name}.fc1", transB=1)
            yield op("Relu", [f"{name}.fc1"], f"{name}.hidden")
            fc2 = [f"{name}.hidden", constant("fc2.weight"), constant("fc2.bias")]
            yield op("Gemm", fc2, f"{name}.fc2", transB=1)
            limits = [constant("zero", np.float32(0)), constant("saliency_max", np.float32(node.saliency_max))]
            yield op("Clip", [f"{name}.fc2", *limits], f"{name}.saliency")
            yield op("Greater", [f"{name}.saliency", constant("threshold")], f"{name}.kept")
            yield op("Where", [f"{name}.kept", f"{name}.saliency", limits[0]])
        case Add():
            yield op("Sum", inputs)
        case Multiply():
            value, factor = graph.input_shapes(node)
            if len(factor) < len(value):
                shape = constant("shape", np.array([-1, *factor, 1, 1], np.int64))
                yield op("Reshape", [inputs[1], shape], f"{name}.factor")
                inputs[1] = f"{name}.factor"
            yield op("Mul", inputs)
        case Concat():
            yield op("Concat", inputs, axis=1)
        case Pool(kind="max"):
            yield op("MaxPool", inputs, **_window(node))
        case Pool():
            yield op("AveragePool", inputs, count_include_pad=1, **_window(node))
        case GlobalPool():
            kind = "GlobalMaxPool" if node.kind == "max" else "GlobalAveragePool"
            yield op(kind, inputs, f"{name}.pooled")
            yield op("Flatten", [f"{name}.pooled"])
        case Flatten():
            yield op("Flatten", inputs)
        case Linear():
            bias = [constant("bias")] if node.bias else []
            yield op("Gemm", [*inputs, constant("weight"), *bias], transB=1)
        case _:
            raise NotImplementedError(type(node).__name__)


def _window(node: Conv | Pool) -> dict[str, Any]:
    return {
        "kernel_shape": [node.kernel] * 2,
        "strides": [node.stride] * 2,
        "pads": [node.padding] * 4,
    }
