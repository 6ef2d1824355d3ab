"""The exported model gives the reference's logits in ONNX Runtime, gates and thresholds included."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from manidp import reference
from manidp.data.images import Preprocessing
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    Activation,
    ActivationKind,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Pool,
)
from manidp.models import resnet

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'manidp[onnx]'")
from manidp.onnx import write_onnx  # noqa: E402


def checkpoint_of(graph: Graph, threshold: float = 0.4) -> Checkpoint:
    generator = np.random.default_rng(0)
    weights = {}
    for name, shape in graph.parameters.items():
        value = generator.normal(size=shape) / np.sqrt(np.prod(shape[1:], initial=1.0))
        if name.endswith(("moving_variance", "gamma", "fc2.bias")):
            value = 0.5 + generator.random(shape)
        weights[name] = np.asarray(threshold if name.endswith("threshold") else value, np.float32)
    size = (graph.input.dims[1], graph.input.dims[2])
    classes = tuple(f"class {i}" for i in range(graph.num_classes))
    return Checkpoint(graph, weights, Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), size), classes)


def logits_of(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {session.get_inputs()[0].name: images})
    return np.asarray(logits)


def assert_same_logits(checkpoint: Checkpoint, path: Path) -> None:
    write_onnx(checkpoint, path)
    images = np.random.default_rng(1).normal(size=(5, *checkpoint.graph.input.dims)).astype(np.float32)
    expected = reference.run(checkpoint.graph, checkpoint.weights, images)
    shares = [kept.mean() for kept in expected.kept.values()]
    assert not shares or 0 < np.mean(shares) < 1, "gates that close nothing or all would not be tested"
    assert np.abs(logits_of(path, images) - expected.logits).max() <= 1e-4 * np.abs(expected.logits).max()


@pytest.mark.parametrize("gates", [False, True])
def test_resnets(gates: bool, tmp_path: Path) -> None:
    graph = resnet(8, width=4)
    assert_same_logits(checkpoint_of(with_gates(graph) if gates else graph), tmp_path / "x.onnx")


@pytest.mark.parametrize("kind", ["relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"])
def test_every_node_type(kind: ActivationKind, tmp_path: Path) -> None:
    graph = Graph(
        (
            Input(name="image", dims=(3, 9, 7)),
            Conv(name="a", inputs=("image",), channels=6, kernel=5, stride=2, padding=2, groups=3, bias=True),
            BatchNorm(name="b", inputs=("a",), eps=1e-3),
            Activation(name="c", inputs=("b",), kind=kind),
            Pool(name="d", inputs=("c",), kind="max", kernel=3, stride=1, padding=1),
            Pool(name="d2", inputs=("c",), kind="average", kernel=3, stride=1, padding=1),
            Concat(name="e", inputs=("d2", "d")),
            *head("gate", "e", 12, 5),
            Multiply(name="scaled", inputs=("e", "gate")),
            GlobalPool(name="f", inputs=("e",), kind="max"),
            Linear(name="g", inputs=("f",), features=12, bias=False),
            Multiply(name="h", inputs=("scaled", "g")),
            Multiply(name="square", inputs=("h", "e")),
            Add(name="i", inputs=("square", "e", "h")),
            Flatten(name="j", inputs=("i",)),
            GlobalPool(name="k", inputs=("i",)),
            Concat(name="l", inputs=("j", "k")),
            Linear(name="out", inputs=("l",), features=3),
        ),
        "out",
    )
    assert_same_logits(checkpoint_of(graph), tmp_path / "x.onnx")


def test_a_saliency_on_the_threshold_is_closed(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(with_gates(resnet(8, width=4)))
    weights = {
        name: np.zeros_like(value) if name.endswith("fc2.weight") else np.ones_like(value)
        if name.endswith("fc2.bias") else value for name, value in checkpoint.weights.items()
    }  # fmt: skip
    images = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    found = []
    for threshold in (1.0, np.nextafter(np.float32(1), np.float32(0))):
        on = {name: np.asarray(threshold, np.float32) if "threshold" in name else v for name, v in weights.items()}
        changed = Checkpoint(checkpoint.graph, on, checkpoint.preprocessing, checkpoint.classes)
        write_onnx(changed, tmp_path / "x.onnx")
        found.append(logits_of(tmp_path / "x.onnx", images))
        expected = reference.run(changed.graph, on, images).logits
        assert found[-1] == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())
    assert np.abs(found[0] - found[1]).max() > 1e-3
