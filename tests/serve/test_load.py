"""The load test's own rules: arrivals, requests, and what is counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manidp.data.images import load_sample
from manidp.serve.limits import Limits
from manidp.serve.protocol import format_infer, parse_infer
from serve.served import engine, small_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load() -> Any:
    spec = importlib.util.spec_from_file_location("load", ROOT / "benchmarks" / "load.py")
    assert spec and spec.loader
    module = sys.modules["load"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arrivals_are_a_poisson_process(load: Any) -> None:
    due = load.poisson(200.0, 100.0, seed=1)
    assert len(due) == pytest.approx(20_000, rel=0.03)
    gaps = np.diff(due)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential
    assert np.bincount(due.astype(int)).var() == pytest.approx(200, rel=0.5)
    np.testing.assert_array_equal(due, load.poisson(200.0, 100.0, seed=1))


def test_a_row_counts_what_came_in_time_and_was_right(load: Any) -> None:
    data, model = load_sample(8), small_model()
    requests = load.Load(1, "m", data, 4)
    answers: list[Any] = []
    for number in range(2):
        head, _, body = requests._requests[number].partition(b"\r\n\r\n")
        length = head.partition(b"Inference-Header-Content-Length: ")[2].split(b"\r\n")[0].decode()
        asked = parse_infer(body, length, model, Limits())
        np.testing.assert_array_equal(asked.images, data.images[4 * number : 4 * number + 4])
        result = engine().run(asked.images)
        content, size = format_infer(asked, "m", model, result, "50%")
        answers.append((200, b"http/1.1 200 ok\r\ninference-header-content-length: %d\r\n" % size, content))
    found = [(0.01, answers[0]), (0.2, answers[1]), (0.001, (429, b"", b"")), (9.0, None)]
    row = requests.row("manidp", 2, 10.0, 0.05, found)
    assert (row.requests, row.answered, row.in_time, row.refused) == (4, 0.5, 0.25, 0.25)
    right = (engine().run(data.images).logits.argmax(1) == data.labels).mean()
    assert row.accuracy == pytest.approx(right)
    assert row.budgets == {"50%": 1.0}
    assert "| 2x | manidp | 50.0% | 25.0% | 25.0% |" in load.markdown_row(row)
    json.dumps(load.asdict(row))
