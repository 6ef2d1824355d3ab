"""A network's figures on a whole image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.labelled import Labelled
from manidp.data.preprocessing import Preprocessing
from manidp.result import Result
from manidp.training.backend import pass_size

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Evaluation:
    """Counts over a whole image set: ``correct`` of ``total``, and ``macs`` (N,) of every image."""

    correct: int
    total: int
    macs: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Top-1, 0..1."""
        return self.correct / self.total

    def to_json(self, data: str) -> dict[str, Any]:
        """The figures as a checkpoint's provenance has them; ``data`` is what the set is called."""
        percentiles = np.percentile(self.macs, PERCENTILES)
        return {
            "data": data,
            "correct": self.correct,
            "total": self.total,
            "mean_macs": float(self.macs.mean()),
            "macs_percentiles": {str(q): float(value) for q, value in zip(PERCENTILES, percentiles, strict=True)},
        }


def evaluate(
    run: Callable[[NDArray[np.float32]], Result],
    data: Labelled,
    preprocessing: Preprocessing,
    *,
    batch_size: int | None = None,
) -> Evaluation:
    """Run every image of the set once, gates as they are; nothing is left out.

    run: normalised images (B, C, H, W) -> their Result, e.g. ``Learner.run``.
    """
    correct, macs, size = 0, [], batch_size or pass_size(data.size)
    places = [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    for chosen, pixels in zip(places, data.batches(places), strict=True):
        result = run(preprocessing.apply(pixels))
        correct += int((result.logits.argmax(1) == data.labels[chosen]).sum())
        macs.append(result.macs)
    return Evaluation(correct, len(data), np.concatenate(macs))
