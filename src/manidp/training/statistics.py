"""Batch statistics of a network as it is: estimated on images that are cropped and flipped as in its training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.data.images import ImageSet
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import BatchNorm
from manidp.training.backend import Backend, Weights, below, estimate_statistics
from manidp.training.recipe import Recipe

BATCH = 128


def estimated(backend: Backend, checkpoint: Checkpoint, images: NDArray[np.uint8]) -> Weights:
    """Moving mean and variance of every batch norm, by parameter, over images (N, H, W, 3) to train with."""
    norms = [node.name for node in checkpoint.graph.nodes if isinstance(node, BatchNorm)]
    if not norms:
        return {}
    learner = backend.learner(checkpoint, *to_observe(checkpoint, images))
    estimate_statistics(learner, 0, len(images), min(BATCH, len(images)))
    found = below(learner.state(), "network/")
    return {name: found[name] for norm in norms for name in (f"{norm}.moving_mean", f"{norm}.moving_variance")}


def to_observe(checkpoint: Checkpoint, images: NDArray[np.uint8]) -> tuple[ImageSet, Recipe]:
    """What a learner of the checkpoint that only looks at these images is made of; nobody asks for their classes."""
    return ImageSet(images, np.zeros(len(images), np.int64), ("any",)), _as_trained(checkpoint)


def _as_trained(checkpoint: Checkpoint) -> Recipe:
    """How the checkpoint's recipe crops and flips; a model without one saw whole pictures, as far as is known."""
    told: Any = checkpoint.provenance.get("recipe")
    told = told if isinstance(told, dict) else {}
    mirrored = told.get("padding_mode") == "reflect"
    return Recipe(
        batch_size=BATCH, augment=told.get("augment") is True, padding_mode="reflect" if mirrored else "constant",
        precision="float32",
    )  # fmt: skip
