"""`make load`: both servers under load that does not wait for answers, from a process of its own on loopback.

Requests arrive as a Poisson process at 0.5, 1, 2 and 3 times what the dense server can answer at most; a latency counts
from when a request was due, also where the client was late (no coordinated omission). The servers take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.images import ImageSet, holds_cifar10, load_cifar10, load_sample
from manidp.files import replacing
from manidp.machine import describe

FACTORS = (0.5, 1, 2, 3)
CONNECTIONS = 800  # of the client; a request for which none is free counts as lost
PATIENCE = 10.0  # seconds that the client waits for an answer
SETTLE = 3.0  # seconds between two loads, for queues to empty and the dial to come back


@dataclass(frozen=True)
class Row:
    """One server at one load. Shares are of all requests; accuracy and budgets of the images answered."""

    server: str
    factor: float
    offered: float
    requests: int
    answered: float
    in_time: float
    refused: float
    p50_ms: float | None
    p99_ms: float | None
    accuracy: float | None
    budgets: dict[str, float]


def poisson(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """When requests are due: independent times from 0 to ``seconds``, at ``rate`` a second on average."""
    generator = np.random.default_rng(seed)
    count = generator.poisson(rate * seconds)
    return np.sort(generator.uniform(0, seconds, count))


def request_of(port: int, name: str, images: NDArray[np.uint8]) -> bytes:
    """The bytes of an `infer` request in binary, whose answer holds the logits in binary."""
    raw = images.tobytes()
    head = json.dumps({
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": list(images.shape),
                    "parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    return (
        f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + len(raw)}\r\n\r\n"
    ).encode() + head + raw  # fmt: skip


class Client(asyncio.Protocol):
    """One connection, one request at a time; ``done`` gets status, headers and body."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes, bytes]] | None = None
        self._read = bytearray()
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def send(self, request: bytes) -> asyncio.Future[tuple[int, bytes, bytes]]:
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self._read += data
        end = self._read.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._read[:end]).lower()
        length = int(head.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0])
        if len(self._read) >= end + 4 + length and self.done and not self.done.done():
            body = bytes(self._read[end + 4 : end + 4 + length])
            self._read.clear()
            self.open = self.open and b"connection: close" not in head
            self.done.set_result((int(head[9:12]), head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.done and not self.done.done():
            self.done.set_exception(exc or ConnectionResetError("closed without an answer"))


class Load:
    """Requests to one server, made of images in turn."""

    def __init__(self, port: int, name: str, data: ImageSet, pictures: int) -> None:
        self.port, self._data, self._pictures = port, data, pictures
        starts = range(0, len(data) - pictures + 1, pictures)
        self._requests = [request_of(port, name, data.images[at : at + pictures]) for at in starts]
        self._idle: list[Client] = []
        self._open = 0

    async def one(self, number: int) -> tuple[int, bytes, bytes] | None:
        """The answer to a request; None where it was lost."""
        client = None
        while self._idle and client is None:
            client = self._idle.pop()
            if not client.open:
                client, self._open = None, self._open - 1
        if client is None:
            if self._open >= CONNECTIONS:
                return None
            self._open += 1
            try:
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.port)
            except OSError:
                self._open -= 1
                return None
        try:
            answer = await asyncio.wait_for(client.send(self._requests[number % len(self._requests)]), PATIENCE)
        except (OSError, TimeoutError):
            client.transport.abort()
            self._open -= 1
            return None
        self._idle.append(client)
        return answer

    async def closed(self, seconds: float, clients: int) -> float:
        """Requests a second that are answered where each client asks again at once."""
        end, answered = time.monotonic() + seconds, 0

        async def again(number: int) -> None:
            nonlocal answered
            while time.monotonic() < end:
                answer = await self.one(number)
                number += clients
                if answer and answer[0] == 200:
                    answered += 1
                else:
                    await asyncio.sleep(0.005)

        await asyncio.gather(*map(again, range(clients)))
        return answered / seconds

    async def open_loop(self, due: NDArray[np.float64]) -> list[tuple[float, tuple[int, bytes, bytes] | None]]:
        """Seconds from when each request was due to its answer, and the answer; nothing waits for anything."""
        found: list[Any] = [None] * len(due)
        tasks = set()
        started = time.monotonic()

        async def ask(number: int) -> None:
            answer = await self.one(number)
            found[number] = (time.monotonic() - started - due[number], answer)

        for number, at in enumerate(due):
            pause = started + at - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            task = asyncio.create_task(ask(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
        return found

    async def close(self) -> None:
        """Close all connections that wait for a request."""
        while self._idle:
            self._idle.pop().transport.abort()
        await asyncio.sleep(0)

    def row(self, server: str, factor: float, offered: float, target: float, found: list[Any]) -> Row:
        """What came of a load."""
        seconds, right, images, budgets = [], 0, 0, Counter[str]()
        statuses = Counter(answer[0] if answer else 0 for _, answer in found)
        for number, (took, answer) in enumerate(found):
            if not answer or answer[0] != 200:
                continue
            seconds.append(took)
            size = int(answer[1].partition(b"inference-header-content-length:")[2].split(b"\r\n", 1)[0])
            budgets[json.loads(answer[2][:size])["parameters"]["budget"]] += 1
            first = number % len(self._requests) * self._pictures
            logits = np.frombuffer(answer[2][size:], "<f4").reshape(self._pictures, -1)
            right += int((logits.argmax(1) == self._data.labels[first : first + self._pictures]).sum())
            images += self._pictures
        count = max(1, len(found))
        return Row(
            server, factor, offered, len(found), len(seconds) / count, sum(s <= target for s in seconds) / count,
            (statuses[429] + statuses[503]) / count,
            _milliseconds(seconds, 0.5), _milliseconds(seconds, 0.99),
            right / images if images else None,
            {name: answers / len(seconds) for name, answers in budgets.most_common()},
        )  # fmt: skip


def _milliseconds(seconds: list[float], quantile: float) -> float | None:
    return 1000 * float(np.quantile(seconds, quantile)) if seconds else None


@contextmanager
def running(command: list[str]) -> Iterator[tuple[int, str]]:
    """Port and model of a server that is ready."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            told = json.loads(line)
            yield told["port"], told["model"]
        finally:
            server.kill()


async def saturated(load: Load, seconds: float, clients: int) -> float:
    """Requests a second that a server answers at most."""
    await ready(load)
    most = await load.closed(seconds, clients)
    await load.close()
    return most


async def ready(load: Load) -> None:
    """Wait until a server answers."""
    while (answer := await load.one(0)) is None or answer[0] != 200:
        await asyncio.sleep(0.1)


async def measured(loads: dict[str, Load], options: argparse.Namespace, target: float, most: float) -> list[Row]:
    """All loads, the servers in turn; ``most``: requests a second of the dense server."""
    for load in loads.values():
        await ready(load)
    rows = []
    for factor in FACTORS:
        due = poisson(factor * most, options.seconds, seed=int(10 * factor))
        for name, load in loads.items():
            await asyncio.sleep(SETTLE)
            rows.append(load.row(name, factor, factor * most, target, await load.open_loop(due)))
            print(markdown_row(rows[-1]), flush=True)
    return rows


HEADING = """| load, of the dense server's most | server | answered | within the target | refused | p50 | p99 | correct | operating points |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def markdown_row(row: Row) -> str:
    """A line of the table."""
    times = [f"{value:.1f} ms" if value is not None else "-" for value in (row.p50_ms, row.p99_ms)]
    points = ", ".join(f"{name} {share:.0%}" for name, share in row.budgets.items())
    correct = "-" if row.accuracy is None else f"{row.accuracy:.2%}"
    cells = [f"{row.factor:g}x", row.server, f"{row.answered:.1%}", f"{row.in_time:.1%}", f"{row.refused:.1%}",
             *times, correct, points]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Start both servers, load them, print the table, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="manidp-res20", help="served by `manidp serve`")
    parser.add_argument("--dense", default="dense-res20", help="served by ONNX Runtime")
    parser.add_argument("--precision", default="float32", help="of our server")
    parser.add_argument("--floor", help="least accuracy under load")
    parser.add_argument("--target", type=float, default=50, help="milliseconds")
    parser.add_argument("--pictures", type=int, default=8, help="of a request")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--clients", type=int, default=8, help="that find the dense server's most")
    parser.add_argument("--data", default="cifar10", help="CIFAR-10's folder; without it, the bundled 200 test images")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    real = holds_cifar10(options.data)
    data = load_cifar10(options.data)[1] if real else load_sample()
    floor = ["--floor", options.floor] if options.floor else []

    def servers(target: float) -> dict[str, list[str]]:
        ours = ["-m", "manidp", "serve", options.model, "--port", "0", "--no-log", "--target", str(target),
                "--precision", options.precision, *floor]  # fmt: skip
        return {"manidp": ours, "dense": [str(Path(__file__).with_name("dense_server.py")), options.dense, str(target)]}

    gc.collect()
    gc.freeze()  # a full collection would stop the client for as long as a request takes
    saturation = {}
    for name, command in servers(1000 * PATIENCE).items():  # with time enough that none is refused
        with running(command) as (port, model):
            load = Load(port, model, data, options.pictures)
            saturation[name] = asyncio.run(saturated(load, options.seconds, options.clients))
    print(HEADING)
    with ExitStack() as stack:
        at = {name: stack.enter_context(running(command)) for name, command in servers(options.target).items()}
        loads = {name: Load(port, model, data, options.pictures) for name, (port, model) in at.items()}
        rows = asyncio.run(measured(loads, options, options.target / 1000, saturation["dense"]))
    told = {key: value for key, value in vars(options).items() if key != "out"}
    told["images"] = len(data)
    record = {"machine": describe("onnxruntime", "uvicorn", "fastapi"), "options": told,
              "saturation_requests_per_second": saturation, "rows": [asdict(row) for row in rows]}  # fmt: skip
    most = ", ".join(f"{name} {rate:.0f}" for name, rate in saturation.items())
    print(f"\nRequests of {options.pictures} pictures a second, at most: {most}. {len(data):,} test images.")
    if options.out:
        with replacing(options.out) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
