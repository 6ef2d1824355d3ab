"""What each backend makes of a network, layer by layer, against the NumPy reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import numpy as np

from engine_cases import assert_layers, assert_same_result, plan_of, run_program
from manidp import reference
from manidp.engine.engine import Program
from manidp.engine.target import ISAS, available_isas
from manidp.errors import UnsupportedError
from manidp.graph import Graph
from networks import ZOO, Array, checkpoint_of, images_for, some_open

Values = Mapping[str, Array]  # of every node by name, batch axis first


def assert_values(came: Values, graph: Graph, weights: Values, images: Array, tolerance: float) -> None:
    """Every node's value differs from the reference's by at most ``tolerance`` times the value's largest number."""
    wanted = reference.node_values(graph, weights, images)
    assert came.keys() == wanted.keys()
    for name, value in wanted.items():
        assert came[name].shape == value.shape == (len(images), *graph.shapes[name]), name
        error = np.abs(came[name] - value).max()
        assert error <= tolerance * max(1e-2, np.abs(value).max()), f"'{name}' is off by {error}"


def numpy(graph: Graph, weights: Values, images: Array) -> None:
    values = reference.node_values(graph, weights, images, np.float32)
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    assert_values(values, graph, weights, images, 2e-5)


def torch(graph: Graph, weights: Values, images: Array) -> None:
    import torch

    from manidp.torch.network import Network

    torch.set_num_threads(1)
    network = Network(graph).eval()
    network.load(weights)
    with torch.no_grad():
        values = network.double().node_values(torch.from_numpy(images).double())
    assert_values({name: value.numpy() for name, value in values.items()}, graph, weights, images, 1e-10)


def onnx(graph: Graph, weights: Values, images: Array) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    from manidp.onnx import onnx_model

    model = onnx_model(checkpoint_of(graph, weights))
    for name, shape in graph.shapes.items():
        made = helper.make_tensor_value_info(f"{name}:out", TensorProto.FLOAT, ["batch", *shape])
        model.graph.output.append(made)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logits, *values = session.run(None, {"image": images})
    assert_values(dict(zip(graph.shapes, values, strict=True)), graph, weights, images, 2e-5)
    np.testing.assert_array_equal(logits, values[list(graph.shapes).index(graph.output)])


def mindspore(graph: Graph, weights: Values, images: Array) -> None:
    from mindspore import Tensor

    from manidp.mindspore.convert import from_checkpoint

    network = from_checkpoint(checkpoint_of(graph, weights))
    values = {graph.input.name: Tensor(images)}
    for names, step, sources in zip(network.names[1:], network.steps, network.sources, strict=True):
        inputs = [values[network.names[source][-1]] for source in sources]
        for name, cell in zip(names, step.chain, strict=True):
            inputs = [cell(*inputs)]
            values[name] = inputs[0]
    assert_values({name: value.asnumpy() for name, value in values.items()}, graph, weights, images, 2e-5)
    np.testing.assert_array_equal(network(Tensor(images)).asnumpy(), values[graph.output].asnumpy())


def engine(graph: Graph, weights: Values, images: Array) -> None:
    isa = available_isas()[0]
    plan = plan_of(graph, weights, isa, reuse=False)
    result, workspace = run_program(Program(plan, ISAS[isa]), plan, images)
    assert_same_result(result, reference.run(graph, weights, images))
    assert_layers(plan, workspace, graph, weights, images[-1])


COMPARE: dict[str, tuple[str, Callable[[Graph, Values, Array], None]]] = {
    "NumPy": ("numpy", numpy),
    "torch": ("torch", torch),
    "ONNX": ("onnxruntime", onnx),
    "MindSpore": ("mindspore", mindspore),
    "engine": ("llvmlite", engine),
}
"""Backend -> the package that it needs, and its comparison: AssertionError for what it computes otherwise."""

HERE = (
    ["MindSpore"]
    if find_spec("mindspore")
    else [backend for backend, (package, _) in COMPARE.items() if getattr(find_spec(package), "origin", None)]
)
"""The backends to try in this environment: MindSpore has one of its own."""


@cache
def runs(backend: str, name: str) -> bool:
    """Whether a backend runs a network of the zoo: it equals the reference, or it is refused by name."""
    graph = ZOO[name]
    try:
        COMPARE[backend][1](graph, some_open(graph), images_for(graph))
    except UnsupportedError as error:
        assert any(f"node '{node.name}'" in str(error) for node in graph.nodes), f"{error} names no node"
        return False
    return True
