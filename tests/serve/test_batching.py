"""Queue and batches, with an engine of known speed and a clock of its own where time matters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from manidp.engine.engine import Engine
from manidp.errors import ManiDPError
from manidp.result import Result
from manidp.serve.batching import Batcher, Ran, warm_up
from manidp.serve.dial import BURST, FULL, MOST, Costs, ladder
from manidp.serve.limits import RefusedError
from serve.served import IMAGES, small_model

TARGET = 0.1
EACH = {"default": 0.004, "50%": 0.002, "25%": 0.001}


class Known(Costs):
    """Costs that are as they are said to be."""

    def learn(self, images: int, point: str, seconds: float) -> None:
        pass


class FakeEngine:
    """Runs when it is let: logits are the first pixel of each image; an image that begins with 13 is an error."""

    threads = 2

    def __init__(self) -> None:
        self.checkpoint = small_model()
        self.ran: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.go.set()

    def run(self, images: NDArray[Any], *, budget: str) -> Result:
        assert self.go.wait(10)
        first = images[:, 0, 0, 0].astype(np.float32)
        if 13 in first:
            raise ManiDPError("overflow")
        self.ran.append((budget, len(images)))
        graph = self.checkpoint.graph
        return Result(
            graph, np.repeat(first[:, None], 10, 1), np.zeros((len(images), sum(graph.gate_channels.values())))
        )


def images(count: int, value: int = 0) -> NDArray[np.uint8]:
    return np.full((count, 32, 32, 3), value, np.uint8)


def with_batcher(body: Callable[[Batcher, FakeEngine, list[float]], Awaitable[None]]) -> list[Ran]:
    """Run a test in an event loop, with a clock that only the test moves."""
    ran: list[Ran] = []

    async def main() -> None:
        engine, now = FakeEngine(), [100.0]
        costs = Known(0.0, EACH, engine.threads)
        batcher = Batcher(engine, ladder(small_model()), costs, TARGET, ran.append, lambda: now[0])  # type: ignore[arg-type]
        batcher.start()
        await body(batcher, engine, now)
        engine.go.set()
        await batcher.stop()

    asyncio.run(main())
    return ran


async def ask(batcher: Batcher, batch: NDArray[Any], asked: str | None = None, deadline: float | None = None) -> Any:
    with batcher.place(len(batch), asked, deadline) as place:
        return await place.compute(batch)


async def started(*requests: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    """Requests that come one after the other."""
    tasks = []
    for one in requests:
        tasks.append(asyncio.ensure_future(one))
        await asyncio.sleep(0.002)
    return tasks


def test_what_waits_is_computed_together_and_each_gets_its_own() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        tasks = await started(*(ask(batcher, images(2, value)) for value in (1, 2, 3)))
        assert batcher.queued == 4  # the first runs
        engine.go.set()
        answers = await asyncio.gather(*tasks)
        assert [one.result.logits[:, 0].tolist() for one in answers] == [[1, 1], [2, 2], [3, 3]]
        assert engine.ran == [("default", 2), ("default", 4)]
        assert batcher.queued == 0

    assert [one.images for one in with_batcher(body)] == [2, 4]


def test_a_batch_holds_what_a_quarter_of_the_target_takes_and_a_request_may_span_several() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        batch = np.concatenate([images(1, value) for value in range(100, 140)])
        answer = await ask(batcher, batch)
        assert answer.result.logits[:, 0].tolist() == list(range(100, 140))
        assert max(count for _, count in engine.ran) == 12  # 25 ms, of 2 ms an image with two threads
        assert sum(count for _, count in engine.ran) == 40

    with_batcher(body)


def test_points_asked_for_run_apart_and_never_above_the_one_in_force() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        tasks = await started(ask(batcher, images(1)), ask(batcher, images(1), "25%"), ask(batcher, images(1)))
        engine.go.set()
        assert [one.point for one in await asyncio.gather(*tasks)] == ["default", "25%", "default"]
        assert engine.ran == [("default", 1), ("25%", 1), ("default", 1)]
        batcher.dial.level = 1
        assert (await ask(batcher, images(1), "default")).point == "50%"
        assert (await ask(batcher, images(1), "25%")).point == "25%"  # below the floor: the client's own wish

    with_batcher(body)


@pytest.mark.parametrize(("spell", "most"), [(False, MOST), (True, FULL)])
def test_under_load_the_point_goes_down_before_anything_is_refused_then_429(spell: bool, most: float) -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        if spell:  # requests have been late for longer than a burst lasts
            assert not batcher.overload.refuses(now[0], TARGET)
            now[0] += 1.01 * BURST * TARGET
        tasks: list[asyncio.Task[Any]] = []
        levels = []
        with pytest.raises(RefusedError) as error:
            for _ in range(100):
                place = batcher.place(1, None, None)
                with place:
                    pass
                tasks += await started(ask(batcher, images(4)))
                levels.append(batcher.dial.level)
        assert error.value.status == 429
        assert error.value.retry == 1
        assert levels == sorted(levels)
        assert levels[-1] == 1  # the floor
        assert 0.9 * most * TARGET < batcher.wait(1) <= most * TARGET
        engine.go.set()
        points = [one.point for one in await asyncio.gather(*tasks)]
        assert points[0] == "default"
        assert points[-1] == "50%"
        assert batcher.in_force.name == "50%"
        for _ in range(60):  # and back, once it is calm
            now[0] += 0.05
            batcher._turn(now[0])
        assert batcher.in_force.name == "default"

    with_batcher(body)


def test_one_pause_of_the_event_loop_is_no_wait_and_a_loop_that_is_always_late_is() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        async def looked() -> None:
            count = len(seen)
            while len(seen) == count:
                await asyncio.sleep(0.001)

        seen: list[float] = []
        batcher._turn = seen.append  # type: ignore[method-assign, assignment]
        for late in (1.0, 0.0, 0.0, 0.0):
            now[0] += 0.05 + late
            await looked()
            assert batcher.wait(1) == 0
        for _ in range(4):
            now[0] += 0.05 + 0.3
            await looked()
        assert batcher.wait(1) == pytest.approx(0.3)

    with_batcher(body)


def test_what_answers_take_beside_the_engine_is_expected_of_the_next() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        assert (await ask(batcher, images(2), None, now[0] + 0.03)).point == "default"
        for _ in range(200):  # each is answered 50 ms later than the engine would take
            with batcher.place(2, None, None) as place:
                now[0] += 0.054
                await place.compute(images(2))
        with pytest.raises(RefusedError, match="cannot answer in time"):
            await ask(batcher, images(2), None, now[0] + 0.05)
        await ask(batcher, images(2), None, now[0] + 0.06)

    with_batcher(body)


def test_a_deadline_gets_the_point_that_keeps_it_and_is_refused_where_none_does() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        at = now[0]
        assert (await ask(batcher, images(4), None, at + 0.0081)).point == "default"
        assert (await ask(batcher, images(4), None, at + 0.0041)).point == "50%"
        with pytest.raises(RefusedError, match="cannot answer in time"):
            await ask(batcher, images(4), None, at + 0.0039)

    with_batcher(body)


def test_a_deadline_that_passes_in_the_queue_is_told_and_not_computed() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        first, second = await started(ask(batcher, images(1)), ask(batcher, images(1), None, now[0] + 0.05))
        now[0] += 0.06
        engine.go.set()
        await first
        with pytest.raises(RefusedError) as error:
            await second
        assert error.value.status == 504
        assert engine.ran == [("default", 1)]
        assert batcher.queued == 0

    with_batcher(body)


def test_an_error_of_one_request_is_not_the_others() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        tasks = await started(*(ask(batcher, images(1, value)) for value in (1, 2, 13, 3)))
        engine.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one).__name__ for one in answers] == ["Answer", "Answer", "RefusedError", "Answer"]
        assert (await ask(batcher, images(1, 5))).result.logits[0, 0] == 5

    with_batcher(body)


def test_a_request_given_up_is_not_computed_and_leaves_nothing_behind() -> None:
    async def body(batcher: Batcher, engine: FakeEngine, now: list[float]) -> None:
        engine.go.clear()
        first, second = await started(ask(batcher, images(1)), ask(batcher, images(3)))
        second.cancel()
        engine.go.set()
        await first
        await asyncio.gather(second, return_exceptions=True)
        await ask(batcher, images(1))
        assert [count for _, count in engine.ran] == [1, 1]
        assert batcher.queued == 0

    with_batcher(body)


def test_warm_up_runs_every_point_and_knows_what_each_costs() -> None:
    engine = Engine(small_model(), threads=2)  # one that has run no point yet
    before = engine.memory
    costs = warm_up(engine, ["default", "50%", "25%"])
    assert engine.memory > before  # the points' own weights are made
    assert set(costs.each) == {"default", "50%", "25%"}
    assert 0 < costs.batch(4, "25%") < 1
    np.testing.assert_array_equal(engine.run(IMAGES).logits, Engine(small_model()).run(IMAGES).logits)
