"""The folder of results: Parquet files written whole, whose names alone say what is done.

``UNIT-PART.parquet`` are the first, second, ... ``ROWS`` images of a unit; the last part is ``UNIT-PART-end.parquet``.
``_run.json`` says which run they are of. Readers of Parquet folders pass over names that begin with ``_`` or ``.``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from manidp.errors import ScoreError, reason, shown
from manidp.files import open_regular, replacing, sweep
from manidp.score.sources import parquet

RUN = "_run.json"
_RUN_BYTES = 2**16
_PART = re.compile(r"([0-9]{6,12})-([0-9]{6,12})(-end)?\.parquet")


@dataclass(frozen=True)
class Row:
    """What is told of one image; class, probability and multiply-adds are None where ``error`` says why."""

    key: str
    label: str | None = None
    probability: float | None = None
    macs: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Done:
    """How many parts of a unit are there, and whether these are all."""

    parts: int = 0
    whole: bool = False


class Results:
    """A folder of results. Raises ScoreError where it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, run: dict[str, Any]) -> FileLock:
        """Have the folder, new or of the same run, for this process alone, until the lock that is returned is released.

        run: JSON data; a folder goes on with the same only. Raises ScoreError.
        """
        lock = FileLock(self.folder / ".lock", thread_local=False)
        try:
            there = os.listdir(self.folder) if self.folder.is_dir() else []
            if RUN not in there and any(not name.startswith(".") for name in there):
                raise ScoreError(f"{shown(self.folder)}: expected a new folder or one of results; it holds other files")
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            sweep(self._path)
            if self._path.exists():
                self._check(run)
            else:
                with replacing(self._path) as file:
                    file.write((json.dumps(run, indent=1) + "\n").encode())
        except Timeout:
            raise ScoreError(f"{shown(self.folder)}: another process writes results there; wait for its end") from None
        except FileExistsError as error:
            raise ScoreError(f"{shown(self.folder)}: results are a folder of Parquet files; this is a file") from error
        except OSError as error:
            raise ScoreError(f"{shown(self.folder)}: cannot be written: {reason(error)}") from error
        except BaseException:
            lock.release()
            raise
        return lock

    def done(self) -> dict[int, Done]:
        """What is there, by the number of the unit."""
        found: dict[int, Done] = {}
        for name in os.listdir(self.folder):
            if match := _PART.fullmatch(name):
                before = found.get(int(match[1]), Done())
                found[int(match[1])] = Done(max(before.parts, int(match[2]) + 1), before.whole or bool(match[3]))
        return found

    def write(self, unit: int, part: int, rows: Sequence[Row], budget: str, *, last: bool) -> None:
        """Write a part, whole or not at all. Raises ScoreError."""
        path = self.folder / f"{unit:06d}-{part:06d}{'-end' if last else ''}.parquet"
        try:
            with replacing(path) as file:
                parquet().write_table(_table(rows, budget), file)
        except OSError as error:
            raise ScoreError(f"{shown(path)}: cannot be written: {reason(error)}") from error

    def count(self) -> tuple[int, int]:
        """Images in all parts, and those of them with an error."""
        pq, images, errors = parquet(), 0, 0
        for name in filter(_PART.fullmatch, os.listdir(self.folder)):
            with open(self.folder / name, "rb") as file:  # pyarrow itself takes no name that is not UTF-8
                facts = pq.read_metadata(file)
            images += facts.num_rows
            for group in range(facts.num_row_groups):
                chunk = facts.row_group(group).column(facts.schema.names.index("error"))
                errors += chunk.num_values - chunk.statistics.null_count
        return images, errors

    @property
    def _path(self) -> Path:
        return self.folder / RUN

    def _check(self, run: dict[str, Any]) -> None:
        try:
            with open_regular(self._path) as file:
                there = json.loads(file.read(_RUN_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise ScoreError(f"{shown(self._path)}: cannot be read; begin anew in another folder") from error
        if not isinstance(there, dict):
            raise ScoreError(f"{shown(self._path)}: not of a run; begin anew in another folder")
        if other := [f"{name} {there.get(name)!r:.80} there, {run[name]!r:.80} here" for name in run
                     if there.get(name) != run[name]]:  # fmt: skip
            raise ScoreError(
                f"{shown(self.folder)}: holds results of another run: {'; '.join(other)}; choose another folder"
            )


def _table(rows: Sequence[Row], budget: str) -> Any:
    import pyarrow as pa

    return pa.table(
        {
            "key": pa.array([row.key.encode("utf-8", "backslashreplace").decode() for row in rows], pa.string()),
            "class": pa.array([row.label for row in rows], pa.string()),
            "probability": pa.array([row.probability for row in rows], pa.float64()),
            "macs": pa.array([row.macs for row in rows], pa.int64()),
            "budget": pa.array([budget] * len(rows), pa.string()),
            "error": pa.array([row.error for row in rows], pa.string()),
        }
    )
