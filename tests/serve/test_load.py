"""The load test's own rules: arrivals, requests, and what is counted."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from manidp.data.images import load_sample
from manidp.formats.checkpoint import OperatingPoint, save_checkpoint
from manidp.hub.find import find_model
from manidp.serve.limits import Limits
from manidp.serve.protocol import format_infer, parse_infer
from serve.served import engine, process, small_model

ROOT = Path(__file__).parents[2]


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def load() -> Any:
    return benchmark("load")


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


def test_the_document_has_the_table_of_the_recorded_run(load: Any) -> None:
    render, document = benchmark("render_load"), (ROOT / "docs" / "serve.md").read_text()
    if render.RECORD.exists():
        assert render.rendered(document, json.loads(render.RECORD.read_text())) == document
    row = load.Row("manidp", 2, 10.0, 40, 1.0, 0.99, 0.0, 1.5, 30.0, 0.925, {"default": 0.25, "35%": 0.75})
    options = {"model": "m", "dense": "d", "pictures": 8, "images": 10_000, "target": 50.0, "seconds": 20.0}
    record = {"options": options, "machine": {"cpu": "some", "cores": 2}, "rows": [load.asdict(row)],
              "saturation_requests_per_second": {"manidp": 900.4, "dense": 400.0}}  # fmt: skip
    told = render.rendered(document, record)
    line = "| 2x | manidp | 100.0% | 99.0% | 0.0% | 1.5 ms | 30.0 ms | 92.50% | default 25%, 35% 75% |"
    assert f"<!-- load -->\n{load.HEADING}\n{line}\n\n`m` beside `d`" in told
    assert "at most: manidp 900, dense 400. some, 2 cores.\n<!-- /load -->" in told
    assert render.rendered(told, record) == told


def test_a_real_server_goes_down_under_load_drops_nothing_and_comes_back(load: Any, tmp_path: Path) -> None:
    """Requests come faster than the default point answers them, without waiting for anything."""
    model = find_model("manidp-res20").checkpoint
    assert model.default_point.accuracy is not None
    closed = {name: np.asarray(9, np.float32) for name in model.graph.thresholds}
    cheap = OperatingPoint("closed", closed, macs=1e6, accuracy=model.default_point.accuracy)
    save_checkpoint(replace(model, points=(cheap,)), tmp_path / "two.safetensors")
    with process(tmp_path / "two.safetensors", "--threads", 1, "--target", 500, "--no-log") as (_, port):
        requests = load.Load(port, "two", load_sample(64), 64)

        async def loaded() -> list[Any]:
            alone = [await requests.open_loop(np.zeros(1)) for _ in range(5)]
            rate = 1.5 / float(np.median([took for ((took, _),) in alone]))
            found = await requests.open_loop(load.poisson(rate, 2.5, seed=1))
            await requests.close()
            return list(found)

        found = asyncio.run(loaded())
        row = requests.row("manidp", 1.5, 0.0, 0.5, found)
        assert (row.answered, row.refused) == (1.0, 0.0)
        assert row.budgets.keys() == {"default", "closed"}
        assert b'"budget":"default"' in found[0][1][2]
        assert b'"budget":"closed"' in found[-1][1][2]
        for _ in range(100):
            if httpx2.get(f"http://127.0.0.1:{port}/v1/status").json()["budget"] == "default":
                return
            time.sleep(0.05)
        raise AssertionError("the default point did not come back")
