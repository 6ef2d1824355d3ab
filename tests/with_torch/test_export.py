"""Imported networks out again as ONNX: gated in two runtimes, and their static twins without any gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gates_of_any_network import PIXELS, half_closed

from manidp import reference
from manidp.errors import MissingExtraError
from manidp.gating.static import freeze
from networks import Array

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'manidp[onnx]'")
from manidp.onnx import onnx_model, write_onnx  # noqa: E402


def in_onnxruntime(path: Path, images: Array) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": images})[0]


def in_openvino(path: Path, images: Array) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO is not installed") from error
    core = openvino.Core()
    return core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]


@pytest.mark.parametrize("name", ["mobilenet-v3", "densenet", "shufflenet-v2"])
def test_a_gated_network_and_its_twin_give_the_same_logits_elsewhere(name: str, tmp_path: Path) -> None:
    gated = half_closed(name)
    twin = freeze(gated, PIXELS)
    images = gated.preprocessing.apply(PIXELS)
    for checkpoint, what in ((gated, "gated"), (twin, "twin")):
        write_onnx(checkpoint, tmp_path / f"{what}.onnx")
        wanted = reference.run(checkpoint.graph, checkpoint.weights, images).logits
        for run in (in_onnxruntime, in_openvino):
            try:
                came = run(tmp_path / f"{what}.onnx", images)
            except MissingExtraError:
                continue
            np.testing.assert_allclose(came, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=f"{what} {run.__name__}")
    ops = {kind: {node.op_type for node in onnx_model(one).graph.node} for kind, one in (("g", gated), ("t", twin))}
    assert {"Greater", "Where"} <= ops["g"] and not {"Greater", "Where", "Less", "If"} & ops["t"]
