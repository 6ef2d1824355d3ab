"""Whatever a file calls its nodes: the same network, the same results, in every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_cases import assert_close, assert_same_result
from hostile.names import like_ours
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.formats.ckpt import read_ckpt, write_ckpt
from manidp.formats.conversion import from_ckpt, to_ckpt
from manidp.graph import Graph
from manidp.reference import run
from manidp.result import Result
from networks import checkpoint_of, random_weights


@pytest.fixture(params=like_ours(), ids=lambda graph: ascii(graph.nodes[1].name))
def graph(request: pytest.FixtureRequest) -> Graph:
    made: Graph = request.param
    return made


def weights_of(graph: Graph) -> dict[str, NDArray[Any]]:
    return random_weights(graph) | {f"{gate.name}.threshold": np.array(0.9, np.float32) for gate in graph.gates}


def case(graph: Graph) -> tuple[Checkpoint, NDArray[np.float32], Result]:
    images = np.random.default_rng(0).normal(size=(3, *graph.input.dims)).astype(np.float32)
    checkpoint = checkpoint_of(graph, weights_of(graph))
    return checkpoint, images, run(graph, checkpoint.weights, images)


def test_files_give_the_same_network_back(graph: Graph, tmp_path: Path) -> None:
    checkpoint, _, _ = case(graph)
    save_checkpoint(checkpoint, tmp_path / "x.safetensors")
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    values, thresholds = to_ckpt(checkpoint)
    write_ckpt(values, tmp_path / "x.ckpt")
    converted, ignored = from_ckpt(
        read_ckpt(tmp_path / "x.ckpt"), thresholds, graph, checkpoint.preprocessing, checkpoint.classes
    )
    assert not ignored
    for other in (loaded, converted):
        assert other.graph == graph
        assert other.weights.keys() == checkpoint.weights.keys()
        for name, value in checkpoint.weights.items():
            np.testing.assert_array_equal(other.weights[name], value)


def test_engine(graph: Graph) -> None:
    checkpoint, images, wanted = case(graph)
    assert_same_result(Engine(checkpoint).run(images), wanted)


def test_torch(graph: Graph) -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")  # tests/torch is a "torch", too
    import torch

    from manidp.torch.convert import network_from

    checkpoint, images, wanted = case(graph)
    network = network_from(checkpoint)
    assert network.weights().keys() == graph.parameters.keys()
    with torch.no_grad():
        output = network(torch.from_numpy(images))
    assert_close(output.logits.numpy(), wanted.logits, "logits")
    for name, gate in wanted.gates.items():
        assert_close(output.records[name].gate.numpy(), gate, name)
    network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
    for name, value in network.weights().items():
        np.testing.assert_array_equal(value, checkpoint.weights[name] + np.float32(1))


def test_onnx(graph: Graph, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from manidp.onnx import write_onnx

    checkpoint, images, wanted = case(graph)
    write_onnx(checkpoint, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert_close(session.run(["logits"], {"image": images})[0], wanted.logits, "logits")
