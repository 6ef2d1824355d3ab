"""A network's figures on a whole image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.result import Result

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
    run: Callable[[NDArray[np.float32]], Result], data: ImageSet, preprocessing: Preprocessing, *, batch_size: int = 500
) -> Evaluation:
    """Run every image of the set once, gates as they are; nothing is left out.

    run: normalised images (B, C, H, W) -> their Result, e.g. ``Learner.run``.
    """
    correct, macs = 0, []
    for start in range(0, len(data), batch_size):
        result = run(preprocessing.apply(data.images[start : start + batch_size]))
        correct += int((result.logits.argmax(1) == data.labels[start : start + batch_size]).sum())
        macs.append(result.macs)
    return Evaluation(correct, len(data), np.concatenate(macs))
