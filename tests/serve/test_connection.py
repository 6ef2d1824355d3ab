"""What is written to a connection, and when it is sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from manidp.serve.connection import _Lingering


class Transport:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed


def test_what_is_written_in_one_turn_is_sent_at_once_and_before_the_end() -> None:
    async def main() -> None:
        under = Transport()
        ends: list[list[bytes]] = []
        connection = SimpleNamespace(
            loop=asyncio.get_running_loop(), _leaving=False, linger=lambda one: ends.append(list(one.sent))
        )
        transport = _Lingering(under, connection)  # type: ignore[arg-type]
        transport.write(b"head ")
        transport.write(b"body")
        assert under.sent == []
        await asyncio.sleep(0)
        assert under.sent == [b"head body"]
        transport.write(b"last")
        transport.close()
        assert ends == [[b"head body", b"last"]]
        transport.write(b"lost")
        under.closed = True  # the client has gone before the turn ends
        await asyncio.sleep(0)
        assert under.sent == [b"head body", b"last"]

    asyncio.run(main())
