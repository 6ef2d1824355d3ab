"""The log of requests: JSON, a line each, written by a thread of its own, so that nothing waits for who reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import Empty, Full, Queue
from typing import Any

from manidp.terminal import say_json

WAITING = 10_000  # lines; more are lost, and counted


class Log:
    """Writes lines on stdout while it is open. ``lost``: called for each line that there was no room for."""

    def __init__(self, lost: Callable[[], None], write: Callable[[Mapping[str, Any]], None] = say_json) -> None:
        self._lines: Queue[Mapping[str, Any] | None] = Queue(WAITING)
        self._lost, self._write = lost, write
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def line(self, **entry: Any) -> None:
        """One line, as soon as the thread comes to it."""
        try:
            self._lines.put_nowait(entry)
        except Full:
            self._lost()

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, if somebody reads it in this time."""
        try:
            self._lines.put(None, timeout=seconds)
        except Full:
            return
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            try:
                entry = self._lines.get(timeout=3600)
            except Empty:
                continue
            if entry is None:
                return
            try:
                self._write(entry)
            except BaseException:  # nobody reads any more: the lines that follow are lost, the server goes on
                self._write = lambda _: self._lost()
