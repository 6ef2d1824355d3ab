"""A web server on this machine that can be made to misbehave."""

from __future__ import annotations

import contextlib
import itertools
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TLS = Path(__file__).parent / "data" / "tls"
Route = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; ``answer`` and ``send`` are what routes are made of."""

    server: Loopback
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.server.routes.get(self.path, status(404))(self)

    def answer(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, content: bytes, pause: float = 0.0, step: int = 2**16) -> None:
        for at in range(0, len(content), step):
            self.wfile.write(content[at : at + step])
            self.wfile.flush()
            self.pause(pause)

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.server.closing:
            time.sleep(0.01)

    def offset(self) -> int:
        """The byte that the client wants to go on at."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *_: object) -> None:
        pass


class Loopback(ThreadingHTTPServer):
    """``routes``: path -> what to do; ``asked``: (path, Range) of every request so far."""

    daemon_threads = True

    def __init__(self, certificate: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.routes: dict[str, Route] = {}
        self.asked: list[tuple[str, str]] = []
        self.closing = False
        self.scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(TLS / certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server would also look up this machine's name, slowly
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested."""


@contextlib.contextmanager
def serving(certificate: str = "", **routes: Route) -> Iterator[Loopback]:
    """A running server; the keyword ``name`` is the route ``/name``."""
    with Loopback(certificate) as server:
        server.routes = {f"/{name}": route for name, route in routes.items()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing = True
            server.shutdown()
            thread.join()


def whole(content: bytes, **headers: object) -> Route:
    """A file, from where the client wants to go on."""

    def route(request: Request) -> None:
        at = request.offset()
        if not at:
            request.answer(200, Content_Length=len(content), **headers)
        elif at < len(content):
            span = f"bytes {at}-{len(content) - 1}/{len(content)}"
            request.answer(206, Content_Length=len(content) - at, Content_Range=span)
        else:
            request.answer(416, Content_Length=0)
            return
        request.send(content[at:])

    return route


def status(code: int, **headers: object) -> Route:
    return lambda request: request.answer(code, Content_Length=0, **headers)


def redirect(url: str, code: int = 302) -> Route:
    return status(code, Location=url)


def in_turn(*routes: Route) -> Route:
    """The first route for the first request, and so on; the last for all that follow."""
    left = list(routes)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


@contextlib.contextmanager
def trickling(content: bytes, every: float = 0.05) -> Iterator[int]:
    """The port of a server that sends this byte by byte, and the last one again and again, whatever it is asked."""
    done = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = listening.accept()
            with client:
                for byte in itertools.chain(content, itertools.repeat(content[-1])):
                    client.sendall(bytes([byte]))
                    if done.wait(every):
                        return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            done.set()
            thread.join(3)
