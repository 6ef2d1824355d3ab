"""On which CPUs threads run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

_NOW = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def keep_apart(threads: Iterable[int]) -> None:
    """Let threads of this process run on all CPUs that the caller may use but the one where it runs now.

    ``threads``: native ids. Linux in a virtual machine takes a CPU that sleeps for one that the host has taken, and
    wakes a thread on the CPU of whoever woke it, where it waits. Where affinity is not to be had, nothing is done.
    """
    if sys.platform == "linux" and _NOW is not None:
        with suppress(OSError):
            others = os.sched_getaffinity(0) - {_NOW()}
            for thread in threads if others else ():
                os.sched_setaffinity(thread, others)
