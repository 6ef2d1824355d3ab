"""A source through engines into a folder of results; killed at any moment, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manidp.formats.checkpoint import DEFAULT, Checkpoint, Found
from manidp.progress import Progress
from manidp.score.results import Done, Results
from manidp.score.scorer import Scorer, Spent
from manidp.score.sources import ROWS, Source, Unit


@dataclass(frozen=True)
class Scored:
    """How a run ended: ``images`` in all and ``errors`` among them; ``before``: those that were there at its start.

    ``seconds``: by the clock; ``decode`` and ``engine`` as in ``Spent``.
    """

    images: int
    errors: int
    before: int
    seconds: float
    decode: float
    engine: float


@dataclass(frozen=True)
class Plan:
    """What each worker needs to score units of a source."""

    checkpoint: Checkpoint
    results: Results
    budget: str
    threads: int
    precision: str

    def scorer(self) -> Scorer:
        """A worker's engine."""
        return Scorer(self.checkpoint, self.results, budget=self.budget, threads=self.threads, precision=self.precision)


Todo = Iterator[tuple[Unit, int]]  # units that are not whole, each with the number of parts that are there
Tell = Callable[[Unit, int], None]  # so much of a unit's size is done
Way = Callable[[Plan, Todo, Tell], Spent]


def here(plan: Plan, todo: Todo, tell: Tell) -> Spent:
    """Score all units in this process."""
    with plan.scorer() as scorer:
        for unit, parts in todo:
            for done in scorer.score(unit, parts):
                tell(unit, done)
            tell(unit, unit.size)
        return scorer.spent


def score(
    model: Found,
    source: Source,
    folder: Path,
    *,
    budget: str | float = DEFAULT,
    threads: int = 1,
    precision: str = "float32",
    progress: Progress | None = None,
    way: Way = here,
) -> Scored:
    """Score every image of the source once; goes on with what is in the folder already.

    budget: as for ``Engine.run``. progress: done and all of ``Source.size``. way: who does it, this process or the
    workers of ``manidp.score.cluster``. Raises ManiDPError: for an unknown budget, a folder of another run, a disk that
    is full.
    """
    point = model.checkpoint.point(budget).name
    results = Results(folder.absolute())
    with results.begin(identity(model, source, point, precision)):
        started = time.perf_counter()
        before, _ = results.count()
        finished, partly = 0, dict[int, int]()

        def tell(unit: Unit, done: int) -> None:
            nonlocal finished
            finished += done - partly.get(unit.number, 0)
            partly[unit.number] = done
            if done == unit.size:
                del partly[unit.number]
            if progress is not None:
                progress(finished, source.size)

        def todo() -> Todo:
            there = results.done()
            for unit in source.units():
                done = there.get(unit.number, Done())
                if done.whole:
                    tell(unit, unit.size)
                else:
                    yield unit, done.parts

        spent = way(Plan(model.checkpoint, results, point, threads, precision), todo(), tell)
        images, errors = results.count()
        return Scored(images, errors, before, time.perf_counter() - started, spent.decode, spent.engine)


def identity(model: Found, source: Source, budget: str, precision: str) -> dict[str, Any]:
    """What tells a run from all others: its results belong together."""
    return {
        "format": 1, "model": model.sha256, "budget": budget, "precision": precision, "source": source.sha256,
        "column": source.column, "rows": ROWS,
    }  # fmt: skip
