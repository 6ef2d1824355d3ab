"""Two operating points in turn: the dear one sees only the images of which the cheap one is unsure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.errors import ManiDPError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.result import Result


def cascaded(
    run: Callable[[NDArray[Any], str | float], Result],
    checkpoint: Checkpoint,
    batch: NDArray[Any],
    cascade: tuple[str | float, str | float] | None,
    confidence: float | None,
    budget: str | float = DEFAULT,
) -> Result:
    """What ``run``, of images and an operating point, makes of a batch in a cascade; see ``Engine.run``.

    Raises ManiDPError for a cascade that is no pair, without a confidence of 0..1, or with a budget; CheckpointError
    for unknown points.
    """
    pair = isinstance(cascade, (tuple, list)) and len(cascade) == 2
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool) and 0 <= confidence <= 1
    if cascade is None or confidence is None or not pair or not number or budget != DEFAULT:
        raise ManiDPError(
            f"a cascade is two operating points and a confidence of 0..1, without a budget, for example "
            f"run(images, cascade=('25%', 'default'), confidence=0.9); got cascade={cascade!r:.60}, "
            f"confidence={confidence!r:.40}, budget={budget!r:.40}"
        )
    cheap, dear = (checkpoint.point(point).name for point in cascade)
    first = run(batch, cheap)
    on = first.confidence < confidence
    second = run(batch[on], dear)
    logits, gates = first.logits.copy(), first.gate_values.copy()
    logits[on], gates[on] = second.logits, second.gate_values
    return Result(first.graph, logits, gates, on, np.where(on, first.macs, 0))
