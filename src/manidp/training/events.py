"""A training's records as TensorBoard events; costs tensorboard."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from manidp.errors import MissingExtraError, TrainingError
from manidp.training.state import EpochRecord


@contextlib.contextmanager
def events(folder: Path) -> Iterator[Callable[[EpochRecord], None]]:
    """What writes a record into a new event file of the folder. Raises MissingExtraError, TrainingError."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise MissingExtraError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    writer = EventFileWriter(str(folder))

    def write(record: EpochRecord) -> None:
        told = asdict(record)
        for point, seen in told.pop("points").items():
            told |= {f"{name}/{point}": value for name, value in seen.items()}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in told.items()]
        try:
            writer.add_event(Event(wall_time=time.time(), step=record.epoch, summary=Summary(value=values)))
            writer.flush()
        except OSError as error:
            raise TrainingError(f"{folder}: TensorBoard's events cannot be written: {error.strerror}") from error

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            writer.close()
