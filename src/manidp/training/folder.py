"""The folder of a run: its files, and that one process at a time has it."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from manidp.errors import TrainingError

STATE = "state.safetensors"
LOG = "log.jsonl"
MODEL = "model.safetensors"


def hold(folder: Path) -> FileLock:
    """Have the folder of a run, made if need be, for this process alone; the system frees it when the process ends.

    Raises TrainingError if another has it or if it cannot be one.
    """
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise TrainingError(
            f"{folder}: another process trains there now; wait for its end or choose another folder"
        ) from None
    except FileExistsError as error:
        raise _no_folder(folder) from error
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return lock


def check_folder(folder: Path, resume: bool) -> None:
    """What Training would refuse this folder for, as far as it can be told before data are read; nothing is written."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise _no_folder(folder)
    if holds_run(folder, resume):
        hold(folder).release()


def holds_run(folder: Path, resume: bool) -> bool:
    """Whether a run's state lies there. Raises TrainingError if it does and ``resume`` is not set."""
    there = os.path.lexists(folder / STATE)
    if there and not resume:
        raise TrainingError(f"{folder} holds a run already; go on with --resume or choose another folder")
    return there


def _no_folder(folder: Path) -> TrainingError:
    came = "a file" if folder.exists() else "a symbolic link that leads nowhere"
    return TrainingError(f"{folder}: expected a folder for the run, or none yet; got {came}")
