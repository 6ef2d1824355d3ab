"""``make zoo``: gated networks take the share asked for, or the least that they can, and the table says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manidp.bench.measure import random_checkpoint
from manidp.engine.engine import Engine
from manidp.graph.macs import dense_macs, least_and_most_macs
from manidp.models import resnet


@pytest.fixture(scope="module")
def dense_zoo() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "dense_zoo.py"
    spec = importlib.util.spec_from_file_location("dense_zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gates_leave_the_share_or_the_least(dense_zoo: Any) -> None:
    dense = random_checkpoint(resnet(8, width=32, image=(3, 16, 16)))
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    half, least = dense_zoo.gated(dense, 0.5), dense_zoo.gated(dense, 0.01)
    whole = dense_macs(dense.graph)
    assert Engine(half).run(images).macs / whole == pytest.approx(0.5, abs=0.02)
    assert (Engine(least).run(images).macs == least_and_most_macs(least.graph)[0]).all()
    assert np.isfinite(Engine(half).run(images).logits).all()


def test_the_table_has_a_cell_for_each_heading(dense_zoo: Any) -> None:
    row = {
        "network": "a", "size": 32, "macs": 10**7, "share": 0.5, "ONNX Runtime": 4.0, "manidp": 2.0, "gated": 1.0,
        "ratio, manidp/ONNX Runtime": (0.5, 0.4, 0.6), "ratio, gated/ONNX Runtime": (0.25, 0.2, 0.3),
        "ratio, gated/manidp": (0.5, 0.4, 0.6),
    }  # fmt: skip
    assert dense_zoo.line(row, None) == "| a | 32 | 10 | 2.000 | 4.000 | 0.50 (0.40, 0.60) |"
    assert dense_zoo.line(row, 0.5).endswith(
        "| 4.000 | 50% | 1.000 | 0.50 (0.40, 0.60) | 0.25 (0.20, 0.30) | 0.50 (0.40, 0.60) |"
    )
    for share in (None, 0.5):
        assert (
            len({text.count("|") for text in (*dense_zoo.header(share).splitlines(), dense_zoo.line(row, share))}) == 1
        )
