"""Scoring on many machines or processes: units through Ray Data, whose pool of actors holds an engine each.

All of them see the source and the folder of results under the same paths. A unit's parts have fixed names and appear
whole, so a unit that a worker did not finish is begun again after the parts that are there, and one that two workers
score at once is there once. Ray sends code and arrays between its processes as pickles; nothing of a source is one.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from typing import Any

from manidp.errors import ManiDPError, MissingExtraError, ScoreError, reason
from manidp.score.results import Done
from manidp.score.run import Plan, Tell, Todo, Way
from manidp.score.scorer import Scorer, Spent

CONNECT = 10.0  # seconds to reach a cluster
DEATHS = 3  # of workers on one unit, after which it is given up
AT_ONCE = 1000  # units that Ray is told of, so that a folder of any size is never listed as a whole


def on_ray(address: str | None = None, workers: int | None = None) -> Way:
    """How ``score`` runs on Ray's workers.

    address: of a cluster; "local": a new one in this machine; None: that of RAY_ADDRESS, one that runs on this machine,
    or a new one. workers: how many; None: as many as the cluster has processors for. Raises MissingExtraError.
    """
    return partial(_spread, _ray(), address, workers)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else stderr tells what Ray does about a lost worker
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f"--ray needs Ray Data: pip install 'manidp[score,ray]' ({error})") from error
    return ray


class _Begun:
    """An actor: how often each unit was begun, which a worker that died cannot tell."""

    def __init__(self) -> None:
        self._times = Counter[int]()

    def once_more(self, number: int) -> int:
        self._times[number] += 1
        return self._times[number]


class _Worker:
    """An engine that outlives the units it scores. Where its process dies, Ray makes another and gives it the unit.

    plan: where Ray has it; todo: where it has each unit, by number, and the parts that are there.
    """

    def __init__(self, plan: list[Any], todo: dict[int, Any], begun: Any) -> None:
        self._ray, self._todo, self._begun = _ray(), todo, begun
        self._plan: Plan = self._ray.get(plan[0])

    @cached_property
    def _scorer(self) -> Scorer:
        return self._plan.scorer()

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """Score the unit of a number: what that took, and what went wrong, of which Ray would keep the text alone."""
        try:
            return {"unit": row["item"], "error": "", **asdict(self._score(row["item"]))}
        except ManiDPError as error:
            return {"unit": row["item"], "error": str(error), **asdict(Spent())}

    def _score(self, number: int) -> Spent:
        unit, parts = self._ray.get(self._todo[number])
        times = self._ray.get(self._begun.once_more.remote(number))
        if times > DEATHS:
            raise ScoreError(f"unit {number} of the source ended {DEATHS} workers, one after the other")
        done = Done(parts) if times == 1 else self._plan.results.done().get(number, Done())
        self._scorer.spent = Spent()
        if not done.whole:
            deque(self._scorer.score(unit, done.parts), 0)
        return self._scorer.spent


def _spread(ray: Any, address: str | None, workers: int | None, plan: Plan, todo: Todo, tell: Tell) -> Spent:
    ours = not ray.is_initialized()
    if ours:
        try:
            _reach(address or os.environ.get("RAY_ADDRESS"))
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ValueError, RuntimeError, OSError) as error:
            raise ScoreError(f"Ray cannot be had at {address or 'its default address'}: {reason(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours tells of images
    try:
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // plan.threads)
        pool = ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1)
        sent, begun, spent = [ray.put(plan)], ray.remote(_Begun).options(num_cpus=0).remote(), Spent()
        while some := {found[0].number: found for found in islice(todo, AT_ONCE)}:
            there = {number: ray.put(found) for number, found in some.items()}
            numbers = ray.data.from_items(list(some), override_num_blocks=len(some))
            scored = numbers.map(_Worker, fn_constructor_args=(sent, there, begun), num_cpus=plan.threads, compute=pool)
            for row in scored.iter_rows():
                if row["error"]:
                    raise ScoreError(row["error"])
                unit, _ = some[row["unit"]]
                spent.decode += row["decode"]
                spent.engine += row["engine"]
                tell(unit, unit.size)
        return spent
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try for ever."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT).close()
