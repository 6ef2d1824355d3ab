"""The routes, in this process: answers are those of the library, refusals are one line of JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from manidp.data.pictures import decode_picture
from manidp.predict import predict
from manidp.serve.app import _GoneError, make_app
from manidp.serve.batching import Batcher
from manidp.serve.limits import Limits, RefusedError
from manidp.serve.log import Log
from serve.served import IMAGES, engine, png, service

FILES = [png(image) for image in IMAGES]


@pytest.fixture(scope="module")
def lines() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def client(lines: list[Any]) -> Iterator[TestClient]:
    own = service(Limits(body=100_000, pictures=8, pixels=2000), log=Log(lambda: None, lines.append))
    with TestClient(make_app(own)) as client:
        until_ready(client)
        yield client


def until_ready(client: TestClient) -> None:
    for _ in range(600):
        if client.get("/v2/health/ready").status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError("not ready")


def told(answer: Any) -> list[tuple[Any, ...]]:
    assert answer.status_code == 200, answer.text
    return [(one["class"], one["macs"], tuple(one["kept"])) for one in answer.json()["pictures"]]


@pytest.mark.parametrize("budget", ["default", "50%", "25%"])
def test_every_kind_of_body_gets_the_answer_of_the_library(client: TestClient, budget: str) -> None:
    wanted = [(one.label, one.macs, tuple(one.kept)) for one in predict(engine(), IMAGES, budget=budget)]
    texts = [base64.b64encode(file).decode() for file in FILES]
    in_form = client.post("/v1/classify", files=[("pictures", file) for file in FILES], data={"budget": budget})
    assert told(in_form) == wanted
    assert in_form.json()["budget"] == budget
    assert told(client.post("/v1/classify", json={"pictures": texts, "budget": budget})) == wanted
    assert told(client.post("/v1/classify", params={"budget": budget}, content=FILES[0])) == wanted[:1]


def test_an_answer_tells_top_kept_and_channels(client: TestClient) -> None:
    answer = client.post("/v1/classify?top=3&channels=true", content=FILES[1], headers={"content-type": "image/png"})
    one = answer.json()["pictures"][0]
    result = engine().run(IMAGES[1:2])
    expected = predict(engine(), IMAGES[1:2])[0]
    assert one["top"] == [{"class": name, "probability": round(share, 6)} for name, share in expected.top[:3]]
    assert one["kept"] == pytest.approx(expected.kept, abs=1e-6)
    assert one["channels"] == {
        gate: "".join("1" if kept else "0" for kept in mask[0]) for gate, mask in result.kept.items()
    }


@pytest.mark.parametrize(
    ("query", "body", "status", "words"),
    [
        ("", b"no picture", 422, "picture 0: not a readable JPEG"),
        ("", FILES[0][:200], 422, "picture 0: "),
        ("", png(np.zeros((50, 50, 3), np.uint8)), 422, "at most 2,000 pixels, got 50 x 50"),
        ("", bytes(100_001), 413, "at most 100,000 bytes"),
        ("?budget=cheap", FILES[0], 422, "no operating point fits the budget 'cheap'"),
        ("?budget=nan", FILES[0], 422, "no operating point"),
        ("?budget=../../etc/passwd", FILES[0], 422, "no operating point"),
        ("?deadline_ms=0", FILES[0], 422, "deadline_ms"),
        ("?deadline_ms=inf", FILES[0], 422, "deadline_ms"),
        ("?top=1.5", FILES[0], 422, "top"),
        ("?top=1_0", FILES[0], 422, "top"),
        ("?top=%D9%A1", FILES[0], 422, "top"),
        ("?channels=maybe", FILES[0], 422, "channels"),
        ("?colour=red", FILES[0], 422, "options are"),
    ],
)
def test_what_makes_no_sense_is_one_line(client: TestClient, query: str, body: bytes, status: int, words: str) -> None:
    answer = client.post(f"/v1/classify{query}", content=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]


def test_pictures_are_large_or_many(client: TestClient) -> None:
    large = png(np.zeros((40, 40, 3), np.uint8))
    answers = [client.post("/v1/classify", files=[("pictures", large)] * count) for count in (5, 6)]
    assert [answer.status_code for answer in answers] == [200, 422]
    assert "at most 8,000 pixels" in answers[1].json()["error"]


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, 10**400, "?", "\ud800", 90_000 * "?"])
def test_options_of_any_type_are_refused(client: TestClient, value: Any) -> None:
    for option in ("budget", "deadline_ms", "top"):
        body = json.dumps({"pictures": [base64.b64encode(FILES[0]).decode()], option: value})
        answer = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (option, answer.text)
        assert len(answer.content) < 500


def test_other_addresses_methods_and_models(client: TestClient) -> None:
    for path in ("/v1/nothing", "/v2/models/other", "/v2/models/small/versions/2", "/v2/models/%2e%2e%2fsmall/ready"):
        assert client.get(path).status_code == 404, path
    wrong = client.get("/v1/classify")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    squeezed = client.post("/v1/classify", content=FILES[0], headers={"content-encoding": "gzip"})
    assert squeezed.status_code == 415


def test_an_overloaded_server_says_when_to_come_again(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RefusedError(429, "later", retry=3)

    monkeypatch.setattr(Batcher, "place", full)
    answer = client.post("/v1/classify", content=FILES[0])
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


def test_an_error_of_ours_is_500_and_in_the_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    monkeypatch.setattr("manidp.serve.app.asked_of", lambda *_: 1 / 0)
    answer = client.post("/v1/classify", content=FILES[0])
    assert answer.status_code == 500
    assert "ZeroDivisionError" not in answer.text
    for _ in range(100):
        if "ZeroDivisionError" in str(lines):
            return
        time.sleep(0.01)
    raise AssertionError(lines[-1])


def test_the_log_has_a_line_for_each_request_with_what_was_used(client: TestClient, lines: list[Any]) -> None:
    client.post("/v1/classify?budget=25%25", content=FILES[0])
    client.get("/no/such%0apath")
    time.sleep(0.1)
    done, lost = [line for line in lines if line["route"] in ("/v1/classify", "other")][-2:]
    assert (done["status"], done["pictures"], done["budget"], done["method"]) == (200, 1, "25%", "POST")
    assert done["ms"] > 0
    assert (lost["status"], lost["route"]) == (404, "other")
    assert "such" not in json.dumps(lines)


def test_metrics_say_what_was_done(client: TestClient) -> None:
    def value(line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (.*)$", client.get("/metrics").text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    images, macs = 'manidp_images_total{budget="50%"}', 'manidp_macs_total{budget="50%"}'
    before = value(images), value(macs)
    spent = sum(one["macs"] for one in client.post(
        "/v1/classify?budget=50%25", files=[("pictures", file) for file in FILES]).json()["pictures"])  # fmt: skip
    assert (value(images), value(macs)) == (before[0] + 4, before[1] + spent)
    assert value('manidp_budget_in_force{budget="default"}') == 1
    assert value('manidp_budget_in_force{budget="50%"}') == 0
    assert value('manidp_request_seconds_count{route="/v1/classify"}') > 0
    assert value("manidp_batch_images_count") > 0
    assert value("manidp_queue_images") == 0
    assert value("manidp_ready") == 1


def test_model_and_status(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert {one["name"]: one["on_dial"] for one in model["points"]} == {"default": True, "50%": True, "25%": False}
    status = client.get("/v1/status").json()
    assert (status["ready"], status["budget"], status["queued"]) == (True, "default", 0)


def test_before_it_is_warm_it_lives_but_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    own = service()

    async def never() -> None:
        own.threads.shutdown()

    monkeypatch.setattr(own, "begin", never)
    with TestClient(make_app(own)) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        answer = client.post("/v1/classify", content=FILES[0])
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_model_that_cannot_be_warmed_up_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    own, told = service(), []
    own.on_fault = lambda: told.append(own.fault)
    monkeypatch.setattr("manidp.serve.app.warm_up", lambda *_: 1 / 0)
    with TestClient(make_app(own)) as client:
        while not told:
            time.sleep(0.01)
        assert client.get("/v2/health/ready").status_code == 503
    assert isinstance(own.fault, ZeroDivisionError)


def test_bodies_are_held_up_to_a_limit_and_given_back(client: TestClient) -> None:
    own = service(Limits(held=3000))
    with TestClient(make_app(own)) as small:
        until_ready(small)
        assert small.post("/v1/classify", content=bytes(3001)).status_code == 503
        assert small.post("/v1/classify", content=FILES[0]).status_code == 200
    assert own.held.bytes == 0


def test_the_description_names_every_route_status_and_body(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    classify = told["paths"]["/v1/classify"]["post"]
    assert "/v2/models/{name}/versions/{version}/infer" in told["paths"]
    for status in ("400", "413", "415", "422", "429", "503", "504"):
        assert status in classify["responses"], status
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(told["paths"])))
    assert named == told["components"]["schemas"].keys()
    assert "multipart/form-data" in classify["requestBody"]["description"]


def test_what_the_description_says_is_valid_is_accepted(client: TestClient) -> None:
    """schemathesis, which `make api` runs, makes up such requests; here are those that it found refused."""
    path = "/v2/models/small/infer"
    told = client.get("/openapi.json").json()["paths"]["/v2/models/{name}/infer"]["post"]
    schema = told["requestBody"]["content"]["application/json"]["schema"]["properties"]
    (tensor,) = schema["inputs"]["items"]["oneOf"]
    share = schema["parameters"]["properties"]["budget"]["anyOf"][0]["anyOf"][1]

    def status(number: float = 0, **parameters: Any) -> int:
        data = [number] * tensor["properties"]["data"]["minItems"]
        image = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": data}
        asked = {"id": None, "outputs": None, "inputs": [image], "parameters": parameters, "more": 1}
        return int(client.post(path, json=asked).status_code)

    assert [status(number) for number in (255, 7.0, -1, 256, 0.5)] == [200, 200, 400, 400, 400]
    assert [status(budget=value) for value in (share["minimum"], share["maximum"], None)] == [200, 200, 200]
    assert [status(budget=value) for value in (0.9 * share["minimum"], 1.01, "101%", "inf")] == [422] * 4
    assert status(deadline_ms=None, binary_data_output=True) == 200


def test_a_picture_is_decoded_as_everywhere(client: TestClient) -> None:
    large = png(np.random.default_rng(0).integers(0, 256, (40, 45, 3), dtype=np.uint8))
    wanted = predict(engine(), decode_picture(large, (32, 32))[None])[0]
    assert told(client.post("/v1/classify", content=large))[0][:2] == (wanted.label, wanted.macs)


@pytest.mark.parametrize("path", ["/v1/classify", "/nowhere"])
def test_the_time_limit_holds_for_refusals_that_nobody_reads(path: str) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Any) -> None:
        await asyncio.sleep(60)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    refusing = make_app(service(Limits(seconds=0.05)))  # which is not warm, or does not know the path
    with pytest.raises(_GoneError):
        asyncio.run(asyncio.wait_for(refusing(scope, receive, send), 5))
