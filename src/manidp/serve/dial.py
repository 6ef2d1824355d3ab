"""Which operating point is in force: pure rules of numbers and time; nothing here knows of sockets or threads.

Under load the point in force goes down step by step (a brown-out; Klein et al., ICSE 2014), and comes back once the
better point would carry the load of now. All times are seconds, all rates images a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from manidp.errors import ManiDPError, quoted
from manidp.formats.checkpoint import DEFAULT, Checkpoint, OperatingPoint

LOSS = 0.01  # of accuracy: without a floor of its own, the dial goes no further below its best point
DOWN = 0.4  # of the target: a longer wait takes the dial down a step
UP = 0.1  # of the target: only with a shorter wait, and
BUSY = 0.75  # of the engine's time: only with less to do at the better point, does the dial come back
HOLD = 1.0  # seconds that this must have held, for each step back
FULL = 0.8  # of the target: what would be answered later than this is late
BURST = 5.0  # of the target: requests may be late for so long before they are refused, and
MOST = 3.0  # of the target: only where they would be answered within this


def ladder(
    checkpoint: Checkpoint, best: str | float = DEFAULT, floor: float | None = None
) -> tuple[OperatingPoint, ...]:
    """The points that the dial may put in force, from ``best`` down to the cheapest whose accuracy is the floor's.

    floor: least accuracy, 0..1, as measured in the checkpoint; by default LOSS below that of ``best``. Left out are
    points without a measured accuracy or cost, and those for which a cheaper one is as accurate. Raises ManiDPError
    for a floor that ``best`` itself is below, or is not known to reach.
    """
    top = checkpoint.point(best)
    if floor is not None and (top.accuracy is None or top.accuracy < floor):
        came = "was not measured" if top.accuracy is None else f"is {top.accuracy:.2%}"
        raise ManiDPError(
            f"the floor is an accuracy up to that of {quoted(top.name, 60)}, which {came}; got {floor:.2%}"
        )
    if top.accuracy is None or top.macs is None:
        return (top,)
    least = top.accuracy - LOSS if floor is None else floor
    cheapest_first = sorted(
        (one for one in checkpoint.every_point if one.macs is not None and one.macs < top.macs),
        key=lambda one: one.macs or 0.0,
    )
    below: list[OperatingPoint] = []
    most = -math.inf
    for one in cheapest_first:
        if one.accuracy is not None and one.accuracy >= least and one.accuracy > most:
            below.append(one)
            most = one.accuracy
    return (top, *reversed(below))


@dataclass
class Costs:
    """How long a batch is expected to take, from what warm-up measured and from every batch since.

    fixed: seconds of any batch; each: seconds of one image on one thread, by the name of the point. ``slowness`` is
    what batches now take, over what they took when the engine was warmed up: one number for all points, so that what
    one point shows is known of the others.
    """

    fixed: float
    each: Mapping[str, float]
    threads: int
    slowness: float = 1.0

    def batch(self, images: int, point: str) -> float:
        """Seconds of a batch at a point; 0 for none."""
        return self.slowness * self._warm(images, point) if images else 0.0

    def image(self, point: str) -> float:
        """Seconds of one image among many."""
        return self.slowness * self.each[point] / self.threads

    def learn(self, images: int, point: str, seconds: float) -> None:
        """What a batch has taken: an eighth of the news is believed, and at most a tenfold change."""
        news = min(max(seconds / self._warm(images, point), self.slowness / 10), self.slowness * 10)
        self.slowness += (news - self.slowness) / 8

    def _warm(self, images: int, point: str) -> float:
        return self.fixed + math.ceil(images / self.threads) * self.each[point]


@dataclass
class Rate:
    """How many images a second have come of late: those of t seconds ago count exp(-t / span)."""

    span: float = 1.0
    _sum: float = 0.0
    _at: float = 0.0

    def add(self, images: float, now: float) -> None:
        """So many have come."""
        self._sum = self._sum * math.exp(min(0.0, self._at - now) / self.span) + images
        self._at = max(self._at, now)

    def at(self, now: float) -> float:
        """Images a second."""
        return self._sum * math.exp(min(0.0, self._at - now) / self.span) / self.span


@dataclass
class Dial:
    """The place of the point in force on a ladder of ``steps`` points: 0 is the best, ``steps - 1`` the floor.

    target: seconds within which requests are to be answered.
    """

    steps: int
    target: float
    level: int = 0
    _calm_since: float | None = field(default=None, repr=False)

    def update(self, now: float, wait: Callable[[int], float], busy: Callable[[int], float]) -> int:
        """At most one step down or up; the level then in force.

        wait: level -> seconds that a request that comes now is expected to wait for the engine; busy: level -> share of
        its time that the engine would need for the images that come.
        """
        if wait(self.level) > DOWN * self.target:
            self._calm_since = None
            self.level = min(self.level + 1, self.steps - 1)
        elif self.level == 0 or wait(self.level - 1) > UP * self.target or busy(self.level - 1) > BUSY:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= HOLD:
            self._calm_since = now
            self.level -= 1
        return self.level


@dataclass
class Overload:
    """Tells load that stays, and is refused, from what passes: a burst of requests, or a pause of the machine.

    A spell of late requests ends when none was late for HOLD seconds (after Nichols & Jacobson, ACM Queue 2012: a queue
    is bad where it stands, good where it absorbs bursts). target: seconds within which requests are to be answered.
    """

    target: float
    _since: float = -math.inf
    _last: float = -math.inf

    def refuses(self, now: float, seconds: float) -> bool:
        """Whether a request that would be answered after so many seconds is refused."""
        if seconds <= FULL * self.target:
            return False
        if now - self._last > HOLD:
            self._since = now
        self._last = now
        return seconds > MOST * self.target or now - self._since > BURST * self.target


def within(slack: float, points: Iterable[str], seconds: Callable[[str], float]) -> str:
    """The first of the points, the most accurate ones first, whose ``seconds`` the slack holds; else the last."""
    chosen = ""
    for chosen in points:
        if seconds(chosen) <= slack:
            break
    return chosen
