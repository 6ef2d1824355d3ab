"""On which CPUs the engine's helping threads may run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

import manidp
from manidp.data.images import load_sample
from manidp.engine.processors import keep_apart

if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
    pytest.skip("needs Linux and two CPUs", allow_module_level=True)

ALL = os.sched_getaffinity(0)


@pytest.fixture
def helper() -> Iterator[int]:
    end, known = threading.Event(), threading.Event()

    def wait() -> None:
        known.set()
        end.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    assert known.wait(10) and thread.native_id is not None
    yield thread.native_id
    end.set()
    thread.join()


def on_one_cpu(cpu: int, work: Callable[[], object]) -> None:
    """Do it in a thread that has no other CPU."""

    def alone() -> None:
        os.sched_setaffinity(0, {cpu})
        work()

    thread = threading.Thread(target=alone)
    thread.start()
    thread.join()


def test_a_helper_may_run_wherever_its_caller_may_but_where_it_runs(helper: int) -> None:
    keep_apart([helper])
    allowed = os.sched_getaffinity(helper)
    assert allowed < ALL and len(allowed) == len(ALL) - 1


def test_with_one_cpu_or_a_thread_that_has_ended_nothing_happens(helper: int) -> None:
    on_one_cpu(min(ALL), lambda: keep_apart([helper]))
    assert os.sched_getaffinity(helper) == ALL
    keep_apart([2**22 + 1])


def test_the_engine_keeps_its_helpers_apart_from_each_run() -> None:
    images = load_sample(4).images
    before = set(os.listdir("/proc/self/task"))
    with manidp.load("manidp-res20", threads=2) as engine:
        engine.run(images)  # its helper begins within this run
        (helper,) = set(os.listdir("/proc/self/task")) - before
        for _ in range(50):
            engine.run(images)
            if len(os.sched_getaffinity(int(helper))) == len(ALL) - 1:
                return
    raise AssertionError("the helper may run where its caller does")
