"""Scoring on many machines or processes: Ray's actors, each with an engine of its own, take units in turn.

All of them see the source and the folder of results under the same paths. A unit's parts have fixed names and appear
whole, so a unit that a worker did not finish is begun again by another one after the parts that are there, and one that
two workers score at once is there once. Ray sends code and arrays between its processes as pickles; nothing of a source
is one.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from functools import partial
from typing import Any

from manidp.errors import ManiDPError, MissingExtraError, ScoreError, reason
from manidp.score.results import Done
from manidp.score.run import Plan, Tell, Todo, Way
from manidp.score.scorer import Spent
from manidp.score.sources import Unit

CONNECT = 10.0  # seconds to reach a cluster
DEATHS = 3  # of workers on one unit, after which it is given up


def on_ray(address: str | None = None, workers: int | None = None) -> Way:
    """How ``score`` runs on Ray's workers.

    address: of a cluster; "local": a new one in this machine; None: that of RAY_ADDRESS, one that runs on this machine,
    or a new one. workers: how many; None: as many as the cluster has processors for. Raises MissingExtraError.
    """
    return partial(_spread, _ray(), address, workers)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray: pip install 'manidp[score,ray]'") from error
    return ray


class _Worker:
    """An actor: an engine that outlives the units it scores."""

    def __init__(self, plan: Plan) -> None:
        self._scorer = plan.scorer()

    def score(self, unit: Unit, parts: int) -> Spent:
        """Score a unit; what all units of this worker took."""
        deque(self._scorer.score(unit, parts), 0)
        return self._scorer.spent


def _spread(ray: Any, address: str | None, workers: int | None, plan: Plan, todo: Todo, tell: Tell) -> Spent:
    ours = not ray.is_initialized()
    if ours:
        try:
            _reach(address or os.environ.get("RAY_ADDRESS"))
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ValueError, RuntimeError, OSError) as error:
            raise ScoreError(f"Ray cannot be had at {address or 'its default address'}: {reason(error)}") from error
    try:
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // plan.threads)
        return _Spreading(ray, plan, todo, tell).run(count)
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try for ever."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT).close()


class _Spreading:
    """Who works on what; a unit is asked for when a worker is free, so that only as many are held."""

    def __init__(self, ray: Any, plan: Plan, todo: Todo, tell: Tell) -> None:
        self._ray, self._plan, self._todo, self._tell = ray, plan, todo, tell
        self._actor = ray.remote(_Worker).options(num_cpus=plan.threads)
        self._sent = ray.put(plan)
        self._running: dict[Any, tuple[Any, Unit, int]] = {}  # of each result awaited: worker, unit, deaths on it
        self._spent: dict[Any, Spent] = {}

    def run(self, count: int) -> Spent:
        for _ in range(count):
            self._next(self._actor.remote(self._sent))
        while self._running:
            [ready], _ = self._ray.wait(list(self._running), num_returns=1)
            worker, unit, deaths = self._running.pop(ready)
            try:
                self._spent[worker] = self._ray.get(ready)
            except self._ray.exceptions.RayActorError as error:
                if deaths + 1 == DEATHS:
                    raise ScoreError(
                        f"unit {unit.number} of the source ended {DEATHS} workers, one after the other: {reason(error)}"
                    ) from error
                done = self._plan.results.done().get(unit.number, Done())
                if not done.whole:
                    self._start(self._actor.remote(self._sent), unit, done.parts, deaths + 1)
                    continue
                worker = self._actor.remote(self._sent)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, ManiDPError) else error from None
            self._tell(unit, unit.size)
            self._next(worker)
        return Spent(sum(one.decode for one in self._spent.values()), sum(one.engine for one in self._spent.values()))

    def _next(self, worker: Any) -> None:
        if (found := next(self._todo, None)) is not None:
            self._start(worker, *found, 0)

    def _start(self, worker: Any, unit: Unit, parts: int, deaths: int) -> None:
        self._running[worker.score.remote(unit, parts)] = worker, unit, deaths
