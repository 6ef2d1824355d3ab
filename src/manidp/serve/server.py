"""The process: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from types import FrameType

import uvicorn

from manidp.errors import ManiDPError, reason
from manidp.serve.app import Service, make_app
from manidp.serve.connection import Connection, Refusals
from manidp.terminal import say_json

SWITCH = 0.0005  # seconds between looks at who wants the interpreter: the engine's thread must not wait for handlers


class _Server(uvicorn.Server):
    """Ends by itself: after SIGTERM or SIGINT requests are taken for a while longer, then the rest is answered."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second signal does not wait
        self.should_exit = True
        self._service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.get_running_loop().time() + self._service.limits.grace
        while not self.force_exit and self._service.fault is None and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was taken and return. ``port`` 0 is any that is free.

    Raises ManiDPError where the address cannot be had, and whatever went wrong in warm-up.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError) as error:
        raise ManiDPError(
            f"{host}, port {port}: {reason(error)}; say where to listen with --host and --port"
        ) from error
    refused = service.metrics.connections
    refusals = Refusals(lambda reason: refused.labels(reason).inc(), service.log.line if service.log else None)
    connection = type("Connection", (Connection,), {"limits": service.limits, "refusals": refusals})
    config = uvicorn.Config(
        make_app(service), http=connection, ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=int(service.limits.keep_alive),
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )  # fmt: skip
    for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the log of requests tells what there is to tell
    server = _Server(config, service)
    service.on_fault = lambda: setattr(server, "should_exit", True)
    at, number = listening.getsockname()[:2]
    service.on_warm = _settle
    say_json({"event": "listening", "host": at, "port": number, "model": service.name})
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        server.run([listening])
    finally:
        sys.setswitchinterval(switch)
        listening.close()
        gc.unfreeze()
        if service.log:
            service.log.close()
        say_json({"event": "stopped"})
    if service.fault is not None:
        raise service.fault


def _settle() -> None:
    """What is there once the engine is warm stays: without this, each full collection looked at it for 30 to 70 ms."""
    gc.collect()
    gc.freeze()
