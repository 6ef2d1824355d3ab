"""What a gated network's decisions are worth, as plain data; ``manidp.torch.diagnose`` measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Variant:
    """The network with its gates changed: ``correct`` of all images, and their mean multiply-adds."""

    name: str
    correct: int
    mean_macs: float


@dataclass(frozen=True)
class Diagnosis:
    """A gated network on ``total`` labelled images.

    ``correct``, ``mean_macs``, ``macs_5`` and ``macs_95`` (percentiles) as it is; ``dense_macs`` without gates.
    ``differing``: gate -> share of its decisions, over images and channels, that differ from what the channel's
    decision is for most images; ``differing_by_stage`` the same for all gates with one first name. ``variants``: the
    network with changed gates, batch statistics estimated anew on ``estimated_on`` other images.
    """

    total: int
    correct: int
    mean_macs: float
    macs_5: float
    macs_95: float
    dense_macs: int
    differing: Mapping[str, float]
    differing_by_stage: Mapping[str, float]
    variants: tuple[Variant, ...]
    estimated_on: int


def differing(kept: Mapping[str, NDArray[np.bool_]]) -> tuple[dict[str, float], dict[str, float]]:
    """Share of decisions that differ from their channel's majority, by gate and by stage; kept: gate -> (N, C)."""
    shares = {name: np.minimum(opened.mean(0), 1 - opened.mean(0)) for name, opened in kept.items()}
    stages: dict[str, list[NDArray[np.float64]]] = {}
    for name, share in shares.items():
        stages.setdefault(name.partition(".")[0], []).append(share)
    by_stage = {stage: float(np.concatenate(parts).mean()) for stage, parts in stages.items()}
    return {name: float(share.mean()) for name, share in shares.items()}, by_stage
