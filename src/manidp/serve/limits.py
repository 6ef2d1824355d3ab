"""What one client, one request and all of them together may ask of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MIB = 2**20
LONGEST_DEADLINE = 600_000  # milliseconds that a request may ask for


class RefusedError(Exception):
    """A request that is answered with an error; ``status``: of HTTP, ``retry``: seconds after which to try again."""

    def __init__(self, status: int, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry = status, message, retry


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes, counts and seconds; each is far above what a request needs that is meant well.

    body: bytes of a request. pictures: of a request; pixels: of a picture before it is fitted, and four times as many
    of all pictures of a request. fields: brackets and
    quotes of a JSON document; commas: its commas, as many as there are numbers. header: bytes of the request line and
    all headers. seconds: from a request's first byte to the last byte of its answer; header_seconds: to the end of its
    headers; keep_alive: between two requests. connections: open at one time. held: bytes of all bodies in memory.
    grace: seconds from SIGTERM in which requests on open connections are still taken.
    """

    body: int = 16 * MIB
    pictures: int = 64
    pixels: int = 2**24
    fields: int = 200_000
    commas: int = 2_000_000
    header: int = 16 * 2**10
    seconds: float = 30.0
    header_seconds: float = 5.0
    keep_alive: float = 5.0
    connections: int = 1000
    held: int = 256 * MIB
    grace: float = 1.0

    @property
    def pixels_together(self) -> int:
        """Of all pictures of a request."""
        return 4 * self.pixels


class Held:
    """Bytes of bodies in memory, of all requests together."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """What takes bytes for one body, given back at the end; it raises RefusedError (503) for too many."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self.bytes + size > self.most:
                raise RefusedError(503, "the server holds as many bytes of requests as it may; try again", retry=1)
            self.bytes += size
            taken += size

        try:
            yield take
        finally:
            self.bytes -= taken
