"""uvicorn's HTTP connection with what it lacks: bounds for headers, slow clients and pipelines, and a polite end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manidp.serve.limits import Limits

PIPELINE = 16  # requests that may wait behind the one being answered
LINGER = 2.0  # seconds in which a client may still send what nobody reads, to get its answer
PAUSE = 10.0  # seconds between two lines of the log about refused connections, whoever makes how many


class Refusals:
    """Connections that end before their request is one, or before its answer is read, which no route ever sees.

    Each is counted at once. The log has a line for the first one, and then every PAUSE seconds one for all since.
    """

    def __init__(self, count: Callable[[str], None], line: Callable[..., None] | None = None) -> None:
        self._count, self._line = count, line
        self._since = Counter[str]()
        self._silent = False

    def add(self, reason: str, client: str | None) -> None:
        """One more; within a running event loop."""
        self._count(reason)
        self._since[reason] += 1
        self._client = client
        if not self._silent:
            self._tell()

    def _tell(self) -> None:
        self._silent = bool(self._since)
        if self._since:
            if self._line:
                self._line(event="refused", connections=dict(self._since), last_client=self._client)
            self._since.clear()
            asyncio.get_running_loop().call_later(PAUSE, self._tell)


class Connection(HttpToolsProtocol):
    """One connection. ``limits`` and ``refusals`` are set by the server that makes a subclass of its own."""

    limits: Limits
    refusals: Refusals

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head = 0  # bytes since the last request ended
        self._in_body = False
        self._leaving = False
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.limits.header_seconds, self._too_slow)
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.limits.connections:
            self._refused("too many")
            self._end(b"503 Service Unavailable", b"too many connections; try again", b"retry-after: 1\r\n", False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        if not self._in_body:
            if self._timer is None:
                self._timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)
            self._head += len(data)
        super().data_received(data)
        if not self._in_body and self._head > self.limits.header and not self._leaving:
            self._too_long()

    def send_400_response(self, msg: str) -> None:
        self._refused("not HTTP")
        super().send_400_response(msg)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else a trailer, which nobody asked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_body = True
        if self._leaving:
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.header:
            self._too_long()
        elif len(self.pipeline) >= PIPELINE:
            self._refused("too many requests ahead")
            self.transport.abort()
            self._leaving = True
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._leaving:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._head = False, 0
        if not self._leaving:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete:  # answered before the request ended: it is not waited for
            self.transport.close()

    def shutdown(self) -> None:
        if self._head == 0 or self._in_body:  # else headers are on their way: answered, then closed
            super().shutdown()
        else:
            self.timeout_keep_alive = 0

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._refused("answer not read")
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def linger(self, transport: asyncio.Transport) -> None:
        """Close: at once if the request was read, else after the client has had time to see its answer."""
        if self._leaving or transport.is_closing():
            return
        self._leaving = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self._in_body and transport.can_write_eof():
            transport.write_eof()
            transport.resume_reading()
        else:
            transport.close()
        self.loop.call_later(LINGER, transport.abort)

    def _end(self, status: bytes, message: bytes, header: bytes = b"", linger: bool = True) -> None:
        content = b'{"error":"' + message + b'"}'
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\ncontent-length: "
            + str(len(content)).encode() + b"\r\nconnection: close\r\n" + header + b"\r\n" + content
        )  # fmt: skip
        self._in_body = linger  # what follows is not read
        self.transport.close()

    def _refused(self, reason: str) -> None:
        self.refusals.add(reason, self.client[0] if self.client else None)

    def _too_long(self) -> None:
        self._refused("headers too long")
        self._end(b"431 Request Header Fields Too Large", b"the headers are too long")

    def _too_slow(self) -> None:
        self._timer = None
        self._refused("headers too slow" if self._head else "nothing sent")
        if self._head:
            self._end(b"408 Request Timeout", b"the headers took too long")
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Lingering:
    """A transport whose ``close`` is the connection's, and to which nothing is written after it.

    What is written in one turn of the event loop is sent at its end, the head and the body of an answer together.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection
        self._held: list[bytes] = []

    def close(self) -> None:
        self._send()
        self._connection.linger(self._transport)

    def write(self, data: bytes) -> None:
        if not self._connection._leaving:
            if not self._held:
                self._connection.loop.call_soon(self._send)
            self._held.append(data)

    def _send(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def is_closing(self) -> bool:
        return self._connection._leaving or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
