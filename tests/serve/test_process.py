"""A server as a process of its own: the real client, slow and hostile clients, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton

from manidp.formats.checkpoint import save_checkpoint
from manidp.result import probabilities
from manidp.serve.connection import Refusals
from serve.served import IMAGES, engine, png, process, small_model

OPTIONS = "--name", "small", "--threads", 2, "--target", 10_000, "--timeout", 2, "--max-connections", 20, "--grace", 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "any.safetensors"
    save_checkpoint(small_model(), path)
    return path


@pytest.fixture(scope="module")
def port(model: Path) -> Iterator[int]:
    with process(model, *OPTIONS) as (_, port):
        yield port


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_works_unchanged(port: int, binary: bool) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        (told,) = client.get_model_metadata("small", "1")["inputs"]
        image = triton.InferInput(told["name"], [4, 32, 32, 3], told["datatype"])
        image.set_data_from_numpy(IMAGES, binary_data=binary)
        names = "logits", "class", "probabilities", "macs"
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
        for asked in (outputs, None):
            answer = client.infer("small", [image], outputs=asked, request_id="9", parameters={"budget": "50%"})
            wanted = engine().run(IMAGES, budget="50%")
            np.testing.assert_array_equal(answer.as_numpy("logits"), wanted.logits)
            np.testing.assert_array_equal(answer.as_numpy("macs"), wanted.macs)
            np.testing.assert_allclose(answer.as_numpy("probabilities"), probabilities(wanted.logits), rtol=1e-6)
            classes = [small_model().classes[i] for i in wanted.logits.argmax(1)]
            found = answer.as_numpy("class").tolist()
            assert [one.decode() if isinstance(one, bytes) else one for one in found] == classes
            assert answer.get_response()["parameters"] == {"budget": "50%"}
            assert answer.get_response()["id"] == "9"
        floats = triton.InferInput("image", [4, 3, 32, 32], "FP32")
        floats.set_data_from_numpy(small_model().preprocessing.apply(IMAGES), binary_data=binary)
        np.testing.assert_array_equal(client.infer("small", [floats]).as_numpy("macs"), engine().run(IMAGES).macs)
        with pytest.raises(triton.InferenceServerException, match="the model is 'small'"):
            client.infer("other", [image])


def test_full_collections_of_a_warm_server_look_at_little() -> None:
    """The larger part of what is alive was there before the first request; looking at it takes 30 to 70 ms."""
    script = dedent("""
        import gc, os, signal, sys, threading, time
        sys.path.insert(0, sys.argv[1])
        from manidp.serve.server import serve
        from serve.served import service

        def look():
            while not own.ready:
                time.sleep(0.01)
            found.extend((gc.get_freeze_count(), len(gc.get_objects())))
            os.kill(os.getpid(), signal.SIGTERM)

        own, found = service(), []
        threading.Thread(target=look).start()
        serve(own, "127.0.0.1", 0)
        print(*found, gc.get_freeze_count())
    """)
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1])]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    frozen, watched, in_the_end = map(int, told.split())
    assert frozen > 20 * watched
    assert in_the_end == 0


def spoken(port: int, *parts: bytes, pause: float = 0.0, wait: float = 10.0) -> bytes:
    """What comes back, to the end of the connection, for what is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


POST = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"rubbish\r\n\r\n"], b"400"),
        ([b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"], b"431"),
        ([b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n"], b"431"),
        ([b"GET / HTTP/1.1\r\n"] + 50 * [b"x: " + b"y" * 1000 + b"\r\n"], b"431"),
        ([POST + b"Content-Length: 99999999999\r\n\r\n"], b"413"),
        ([POST + b"Content-Length: -1\r\n\r\n"], b"400"),
        ([POST + b"Content-Length: 20000000\r\n\r\n", bytes(20_000_000)], b"413"),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n"] + 40 * [b"80000\r\n" + bytes(0x80000) + b"\r\n"], b"413"),
        ([POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n"], b"400"),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], b"400"),
        ([POST + b"Content-Length: 10\r\n\r\nshort"], b"408"),
    ],
)
def test_hostile_requests_are_answered_and_end_the_connection(port: int, parts: list[bytes], status: bytes) -> None:
    assert spoken(port, *parts).split(b" ")[1] == status


def test_ten_thousand_parts_and_bombs_are_refused(port: int) -> None:
    url = f"http://127.0.0.1:{port}/v1/classify"
    parts = 10_000 * b'\r\n--x\r\nContent-Disposition: form-data; name="pictures"\r\n\r\nx' + b"\r\n--x--"
    many = httpx2.post(url, content=parts, headers={"content-type": "multipart/form-data; boundary=x"})
    assert many.status_code == 413
    bomb = png(np.zeros((1, 1, 3), np.uint8)).replace(b"\0\0\0\x01\0\0\0\x01", b"\0\0\xff\xff\0\0\xff\xff")
    assert httpx2.post(url, content=bomb).status_code == 422
    flat = png(np.zeros((4200, 4200, 3), np.uint8))  # 52 MB in 50 KB
    assert "at most 16,777,216 pixels" in httpx2.post(url, content=flat).json()["error"]


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"


def refusals(port: int) -> Counter[str]:
    """What /metrics counts of refused connections, by reason."""
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.findall(r'^manidp_connections_refused_total\{reason="(.*)"\} (\d+)', text, re.MULTILINE)
    return Counter({reason: int(count) for reason, count in found})


def test_slow_silent_and_idle_clients_are_sent_away_and_others_served_meanwhile(port: int) -> None:
    started, before = time.monotonic(), refusals(port)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(spoken, port, POST, b"Content-Le", pause=0.1, wait=15)
        silent = pool.submit(spoken, port, wait=15)
        idle = pool.submit(spoken, port, LIVE + b"\r\n", wait=15)
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/classify", content=png(IMAGES[0])).status_code == 200
    assert slow.result().split(b" ")[1] == b"408"
    assert silent.result() == b""
    assert idle.result().count(b"HTTP/1.1 200 OK") == 1
    assert time.monotonic() - started < 12
    assert refusals(port) - before == {"headers too slow": 1, "nothing sent": 1}


def test_connections_that_no_route_sees_are_counted(port: int) -> None:
    before = refusals(port)
    for _ in range(2):
        spoken(port, b"rubbish\r\n\r\n")
        spoken(port, b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n")
        spoken(port, b"GET / HTTP/1.1\r\nx: " + b"y" * 17_000 + b"\r\n\r\n")
        spoken(port, 5000 * (LIVE + b"\r\n"))
    assert refusals(port) - before == {"not HTTP": 2, "headers too long": 4, "too many requests ahead": 2}


def test_the_log_tells_of_refused_connections_in_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manidp.serve.connection.PAUSE", 0.05)
    counted: list[str] = []
    lines: list[dict[str, object]] = []

    async def flood() -> None:
        refused = Refusals(counted.append, lambda **entry: lines.append(entry))
        for number in range(1000):
            refused.add("not HTTP", f"192.0.2.{number % 9}")
        await asyncio.sleep(0.2)
        refused.add("too many", None)

    asyncio.run(flood())
    assert len(counted) == 1001
    assert [line["connections"] for line in lines] == [{"not HTTP": 1}, {"not HTTP": 999}, {"too many": 1}]


def test_connections_are_limited(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=15))
        time.sleep(0.2)
        assert spoken(port).split(b" ")[1] == b"503"
    for _ in range(100):  # the server sees in its own time that they have gone
        if spoken(port, LIVE + b"Connection: close\r\n\r\n").split(b" ")[1] == b"200":
            assert refusals(port)["too many"] > 0
            return
        time.sleep(0.05)
    raise AssertionError("connections that have gone still count")


def test_many_requests_in_one_go_do_not_pile_up(port: int) -> None:
    few = 15 * (LIVE + b"\r\n") + LIVE + b"Connection: close\r\n\r\n"
    assert spoken(port, few).count(b"200 OK") == 16
    assert spoken(port, 5000 * (LIVE + b"\r\n")).count(b"200 OK") < 100


def test_sigterm_loses_no_request_that_was_accepted(model: Path) -> None:
    """Clients ask without a pause while the server is told to end: it answers whatever comes within its grace."""
    with process(model, *OPTIONS) as (running, port):
        answered: list[tuple[float, int]] = []
        lost: list[float] = []

        def ask() -> None:
            body = png(IMAGES[0])
            while True:
                begun = time.monotonic()
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                try:
                    client.request("POST", "/v1/classify", body)
                    answered.append((begun, client.getresponse().status))
                except OSError:
                    lost.append(begun)
                    return
                finally:
                    client.close()

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for one in clients:
            one.start()
        while len(answered) < 20:
            time.sleep(0.01)
        health = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

        def ready() -> tuple[int, str | None]:
            health.request("GET", "/v2/health/ready")
            answer = health.getresponse()
            answer.read()
            return answer.status, answer.headers["connection"]

        assert ready() == (200, None)
        told = time.monotonic()
        running.terminate()
        time.sleep(0.1)
        assert ready() == (503, "close")
        assert running.stdout
        lines = [json.loads(line) for line in running.stdout]
        assert lines[-1] == {"event": "stopped"}
        assert any({"method", "route", "status", "ms", "client", "pictures", "budget"} <= line.keys() for line in lines)
        assert running.wait(15) == 0
        for one in clients:
            one.join()
        assert min(lost) > told + 0.5  # the grace
        assert {status for _, status in answered} == {200}
        assert max(begun for begun, _ in answered) > told
