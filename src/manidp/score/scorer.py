"""An engine with threads that decode for it: units of a source into parts of the results.

Pictures are decoded on the process's threads while the engine runs the batch before. Memory is that of two batches of
pictures, of one picture being decoded on each thread, and of the rows of one part, however many images there are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from manidp.data.pictures import MAX_PICTURE_BYTES, decode_picture
from manidp.engine.engine import Engine
from manidp.errors import ImageError, ManiDPError, reason
from manidp.files import open_regular
from manidp.formats.checkpoint import Checkpoint
from manidp.predict import Prediction, predict
from manidp.score.results import Results, Row
from manidp.score.sources import ROWS, Item, Unit

BATCH = 256  # images, fewer where they are large
_BATCH_BYTES = 2**26  # of encoded or of decoded pictures

Pixels = NDArray[np.uint8]
Decoded = tuple[str, Pixels | ImageError, float]  # key, picture, seconds of the processor


@dataclass
class Spent:
    """Seconds: ``decode`` of the processor, all threads together; ``engine`` by the clock, of all workers together."""

    decode: float = 0.0
    engine: float = 0.0


class Scorer:
    """An engine with threads that decode for it, and where its results go; ``spent`` so far."""

    def __init__(
        self, checkpoint: Checkpoint, results: Results, *, budget: str, threads: int = 1, precision: str = "float32"
    ) -> None:
        self._engine = Engine(checkpoint, threads=threads, precision=precision)
        self._pool = ThreadPoolExecutor(threads)
        self._size, self._results, self._budget = checkpoint.preprocessing.size, results, budget
        self.spent = Spent()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._engine.close()

    def score(self, unit: Unit, parts: int) -> Iterator[int]:
        """Score a unit of which ``parts`` parts are there; yields after each batch how much of its size is done."""
        items = islice(unit.items(), parts * ROWS, None)
        first, done = next(items, None), 0
        while True:
            rows: list[Row] = []
            for batch, scored in self._scored(islice(chain([first] if first else [], items), ROWS)):
                rows += scored
                done += sum(len(content) if isinstance(content, bytes) else 1 for _, content in batch)
                yield min(done, unit.size)
            first = next(items, None)
            self._results.write(unit.number, parts, rows, self._budget, last=first is None)
            parts += 1
            if first is None:
                return

    def _scored(self, items: Iterable[Item]) -> Iterator[tuple[list[Item], list[Row]]]:
        """Batches and their rows; while the engine runs one, the next one is decoded."""
        decoding: deque[tuple[list[Item], list[Future[Decoded]]]] = deque()
        for batch in chain(_batches(items, self._size), (None,)):
            if batch is not None:
                decoding.append((batch, [self._pool.submit(_decoded, item, self._size) for item in batch]))
            if decoding and (batch is None or len(decoding) == 2):
                before, futures = decoding.popleft()
                yield before, self._rows([future.result() for future in futures])

    def _rows(self, decoded: Sequence[Decoded]) -> list[Row]:
        self.spent.decode += sum(seconds for _, _, seconds in decoded)
        started = time.perf_counter()
        pixels = [picture for _, picture, _ in decoded if not isinstance(picture, ImageError)]
        found = iter(self._predicted(np.stack(pixels)) if pixels else [])
        rows = []
        for key, picture, _ in decoded:
            said = picture if isinstance(picture, ImageError) else next(found)
            if isinstance(said, Prediction):
                rows.append(Row(key, said.label, said.probability, said.macs))
            else:
                rows.append(Row(key, error=str(said)))
        self.spent.engine += time.perf_counter() - started
        return rows

    def _predicted(self, images: Pixels) -> list[Prediction | ManiDPError]:
        """Of each image a prediction; where one alone cannot have one, why."""
        try:
            return list(predict(self._engine, images, budget=self._budget, top=1))
        except ManiDPError as error:
            if len(images) == 1:
                return [error]
            return [found for image in images for found in self._predicted(image[None])]


def _batches(items: Iterable[Item], size: tuple[int, int]) -> Iterator[list[Item]]:
    """Items in order, cut where encoded or decoded pictures would take more than ``_BATCH_BYTES``, one at least."""
    most = max(1, min(BATCH, _BATCH_BYTES // (3 * size[0] * size[1])))
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(batch) == most or held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _decoded(item: Item, size: tuple[int, int]) -> Decoded:
    started = time.thread_time()
    key, content = item
    picture: Pixels | ImageError
    try:
        if isinstance(content, Path):
            with open_regular(content) as file:
                content = file.read(MAX_PICTURE_BYTES + 1)
        picture = content if isinstance(content, ImageError) else decode_picture(content, size)
    except ImageError as error:
        picture = error
    except OSError as error:
        picture = ImageError(reason(error))
    return key, picture, time.thread_time() - started
