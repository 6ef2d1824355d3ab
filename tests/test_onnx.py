"""The exported model gives the reference's logits in ONNX Runtime, gates and thresholds included."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from manidp import reference
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.place import with_gates
from manidp.models import resnet

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'manidp[onnx]'")
from manidp.onnx import write_onnx  # noqa: E402
from networks import checkpoint_of, images_for, random_weights, some_open  # noqa: E402


def logits_of(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {session.get_inputs()[0].name: images})
    return np.asarray(logits)


def test_a_file_gives_the_references_logits(tmp_path: Path) -> None:
    graph = with_gates(resnet(8, width=4))
    weights, images = some_open(graph), images_for(graph)
    write_onnx(checkpoint_of(graph, weights), tmp_path / "x.onnx")
    expected = reference.run(graph, weights, images).logits
    assert np.abs(logits_of(tmp_path / "x.onnx", images) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_saliency_on_the_threshold_is_closed(tmp_path: Path) -> None:
    graph = with_gates(resnet(8, width=4))
    checkpoint = checkpoint_of(graph, random_weights(graph))
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
