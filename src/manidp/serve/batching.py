"""The queue before the engine: images of many requests in one batch, each request at an operating point.

A batch takes what waits, as much as the engine is expected to compute within a quarter of the latency target; it never
waits for more, since the engine gains nothing by a batch but work for all of its threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.images import load_sample
from manidp.data.pictures import fit_images
from manidp.engine.engine import Engine
from manidp.errors import ManiDPError
from manidp.formats.checkpoint import OperatingPoint
from manidp.result import Result
from manidp.serve.dial import Costs, Dial, Overload, Rate, within
from manidp.serve.limits import RefusedError

SHARE = 0.25  # of the target: what a batch may take, where it has more images than the engine has threads
TICK = 0.05  # seconds between looks at the dial when nothing comes
TICKS = 4  # looks of which the most punctual one tells how late the event loop is: one pause is no load
NEWS = 16  # answers over which it is averaged how late they come
LOOKS = 3  # runs of each kind that warm-up takes the fastest of


@dataclass(frozen=True)
class Answer:
    """What came of a request: the result of its images, and the name of the point it was computed at."""

    result: Result
    point: str


@dataclass(frozen=True)
class Ran:
    """One batch, as it is told to metrics: its point, images, seconds, and multiply-adds in all."""

    point: str
    images: int
    seconds: float
    macs: int


@dataclass(eq=False)
class Place:
    """A request's place in the queue, from before its images are known; it is given up at the end of ``with``."""

    _batcher: Batcher
    count: int
    asked: str | None
    deadline: float
    expected: float  # when the answer was expected, on the clock
    images: NDArray[Any] = field(init=False)
    answer: asyncio.Future[Answer] = field(init=False)
    taken: int = 0
    point: str | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Images that wait."""
        return self.count - self.taken

    async def compute(self, images: NDArray[Any]) -> Answer:
        """The answer for ``count`` images as ``Engine.run`` takes them.

        Raises RefusedError: 504 where the deadline passed in the queue, 400 for images that make no finite numbers.
        """
        return await self._batcher.compute(self, images)


@dataclass(frozen=True)
class _Part:
    job: Place
    first: int
    end: int


def warm_up(engine: Engine, points: Sequence[str]) -> Costs:
    """Run every point on bundled pictures, and measure what an image costs at each.

    Without it the first requests would wait for this, and the dial would not know what it turns.
    """
    many, size = 8, engine.checkpoint.preprocessing.size
    image = np.concatenate([fit_images(load_sample(many).images, size)] * engine.threads)
    one: dict[str, float] = {}
    all_: dict[str, float] = {}
    for _ in range(LOOKS):
        for point in points:
            for images, seconds in ((image[:1], one), (image, all_)):
                started = time.perf_counter()
                engine.run(images, budget=point)
                seconds[point] = min(seconds.get(point, math.inf), time.perf_counter() - started)
    each = {point: max((all_[point] - one[point]) / (many - 1), 1e-6) for point in points}
    fixed = min(max(0.0, one[point] - each[point]) for point in points)
    return Costs(fixed, each, engine.threads)


class Batcher:
    """Takes requests while it is expected to answer them in time, and turns the dial. One event loop's.

    ladder: the points that the dial may put in force, the best first. ``target``: seconds within which requests are to
    be answered. ``observe`` is told of every batch.
    """

    def __init__(
        self,
        engine: Engine,
        ladder: Sequence[OperatingPoint],
        costs: Costs,
        target: float,
        observe: Callable[[Ran], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.ladder, self.costs, self.target = engine, tuple(ladder), costs, target
        self.dial = Dial(len(self.ladder), target)
        self.overload = Overload(target)
        self.rate = Rate()
        self._observe, self._clock = observe, clock
        self._jobs: deque[Place] = deque()
        self._waiting: Counter[str | None] = Counter()  # images in the queue, by the name of the point asked for
        self._engine_free_at = 0.0
        self._late = deque([0.0], TICKS)  # seconds by which the last looks came too late
        self._behind = 0.0  # seconds by which answers come later than expected: whatever the engine does not take
        self._some = asyncio.Event()
        self._pool: Executor = ThreadPoolExecutor(1, "engine")
        self._tasks: list[asyncio.Task[None]] = []
        points = engine.checkpoint.every_point
        self._rank = {one.name: math.inf if one.macs is None else one.macs for one in points}

    def start(self) -> None:
        """Begin to compute; within a running event loop."""
        self._tasks = [asyncio.create_task(self._compute()), asyncio.create_task(self._look())]

    async def stop(self) -> None:
        """Compute what was taken, then end."""
        while self._jobs or self._engine_free_at:
            await asyncio.sleep(0.005)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown()

    @property
    def in_force(self) -> OperatingPoint:
        """The point of requests that ask for none."""
        return self.ladder[self.dial.level]

    @property
    def queued(self) -> int:
        """Images that wait."""
        return sum(self._waiting.values())

    def wait(self, level: int) -> float:
        """Seconds until the engine is expected to be free for an image that comes now, if the queue ran at a level."""
        now = self._clock()
        running = max(0.0, self._engine_free_at - now) if self._engine_free_at else 0.0
        queue = (images * self.costs.image(self._used(asked, level)) for asked, images in self._waiting.items())
        return min(self._late) + running + sum(queue)

    def _takes(self, count: int, asked: str | None, level: int) -> float:
        """Seconds until so many images that come now are computed, if the queue ran at a level."""
        return self.wait(level) + self.costs.batch(count, self._used(asked, level))

    @contextmanager
    def place(self, count: int, asked: str | None, deadline: float | None) -> Iterator[Place]:
        """A place in the queue for so many images, at most at the point asked for; ``deadline``: on the clock.

        Raises RefusedError (429) where the answer is expected too late, even at the cheapest point.
        """
        now = self._clock()
        self.rate.add(count, now)
        self._turn(now)
        last = len(self.ladder) - 1
        done = self._takes(count, asked, last) + max(0.0, self._behind)
        too_late = deadline is not None and done > deadline - now
        if too_late or (self._busy() and self.overload.refuses(now, done)):
            raise RefusedError(429, "the server cannot answer in time, even at its cheapest point; try again later",
                          retry=max(1, math.ceil(self.wait(last))))  # fmt: skip
        expected = now + self._takes(count, asked, self.dial.level)
        place = Place(self, count, asked, math.inf if deadline is None else deadline, expected)
        self._waiting[asked] += count
        try:
            yield place
        finally:
            self._waiting[asked] -= place.left

    async def compute(self, place: Place, images: NDArray[Any]) -> Answer:
        """What ``Place.compute`` does."""
        place.images = images
        place.answer = asyncio.get_running_loop().create_future()
        self._jobs.append(place)
        self._some.set()
        return await place.answer

    def _busy(self) -> bool:
        return bool(self._jobs) or self._engine_free_at > 0

    def _turn(self, now: float) -> None:
        rate = self.rate.at(now)
        self.dial.update(now, self.wait, lambda level: rate * self.costs.image(self.ladder[level].name))

    def _used(self, asked: str | None, level: int) -> str:
        """The cheaper one of the point asked for and that of a level."""
        own = self.ladder[level].name
        return own if asked is None or self._rank[asked] > self._rank[own] else asked

    async def _look(self) -> None:
        while True:
            expected = self._clock() + TICK
            await asyncio.sleep(TICK)
            self._late.append(max(0.0, self._clock() - expected))
            self._turn(self._clock())

    async def _compute(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._jobs:
                for point, parts in self._batch():
                    await self._run(point, parts)

    def _batch(self) -> list[tuple[str, list[_Part]]]:
        """What is computed next: parts of jobs, in their order; those of one point and one type of images together."""
        groups: dict[tuple[str, np.dtype[Any]], list[_Part]] = {}
        seconds = SHARE * self.target
        now = self._clock()
        count = 0
        while self._jobs:
            job = self._jobs[0]
            if job.answer.done() or not self._in_time(job, now):
                self._jobs.popleft()
                continue
            assert job.point is not None
            cost = self.costs.image(job.point)
            room = max(self.engine.threads - count, int(seconds / cost))
            if room <= 0:
                break
            first, job.taken = job.taken, min(job.count, job.taken + room)
            took = job.taken - first
            self._waiting[job.asked] -= took
            seconds -= took * cost
            count += took
            groups.setdefault((job.point, job.images.dtype), []).append(_Part(job, first, job.taken))
            if job.left:
                break
            self._jobs.popleft()
        return [(point, parts) for (point, _), parts in groups.items()]

    def _in_time(self, job: Place, now: float) -> bool:
        """Whether a job's deadline has not passed; sets its point when its first image is taken."""
        if now > job.deadline:
            job.answer.set_exception(RefusedError(504, "the deadline passed while the request waited", retry=1))
            return False
        if job.point is None:
            names = dict.fromkeys(self._used(job.asked, level) for level in range(self.dial.level, len(self.ladder)))
            job.point = within(job.deadline - now, names, lambda name: self.costs.batch(job.count, name))
        return True

    async def _run(self, point: str, parts: list[_Part]) -> None:
        images = [part.job.images[part.first : part.end] for part in parts]
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        started = self._clock()
        self._engine_free_at = started + self.costs.batch(len(batch), point)
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                self._pool, lambda: self.engine.run(batch, budget=point)
            )
        except Exception as error:
            if len(parts) > 1:  # the others are not to suffer from one
                for part in parts:
                    await self._run(point, [part])
            elif not parts[0].job.answer.done():
                fault = RefusedError(400, str(error)) if isinstance(error, ManiDPError) else error
                parts[0].job.answer.set_exception(fault)
            return
        finally:
            self._engine_free_at = 0.0
        seconds = self._clock() - started
        self.costs.learn(len(batch), point, seconds)
        self._observe(Ran(point, len(batch), seconds, int(result.macs.sum())))
        at = 0
        for part, own in zip(parts, images, strict=True):
            end = at + len(own)
            whole = len(own) == len(batch)  # of which the multiply-adds are counted already
            mine = result if whole else Result(result.graph, result.logits[at:end], result.gate_values[at:end])
            part.job.results.append(mine)
            at = end
            if part.end == part.job.count and not part.job.answer.done():
                part.job.answer.set_result(Answer(_joined(part.job.results), point))
                self._behind += (self._clock() - part.job.expected - self._behind) / NEWS


def _joined(results: list[Result]) -> Result:
    if len(results) == 1:
        return results[0]
    return Result(
        results[0].graph,
        np.concatenate([one.logits for one in results]),
        np.concatenate([one.gate_values for one in results]),
    )
