"""How a trained model came to be, as its checkpoint tells it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from manidp.errors import shown
from manidp.formats.checkpoint import Checkpoint, Found
from manidp.training.loop import Training

Origin = dict[str, str]


def provenance(
    training: Training,
    start: Origin | None,
    teachers: Sequence[Origin],
    *,
    data: str | None = None,
    measured: dict[str, Any] | None = None,
    parent: Checkpoint | None = None,
) -> dict[str, Any]:
    """JSON data for the checkpoint; data: what the training images are called; measured: figures on other images.

    parent: what training started from; if it was imported, so is what was trained, under the same names.
    """
    backend = training.backend
    return {
        "made_with": {
            "manidp": version("manidp"), backend.name: backend.version, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "recipe": asdict(training.recipe),
        "from": start,
        "teacher": list(teachers) or None,
        "data": {"name": data, "images": len(training.data), "sha256": training.data_sha256},
        "training": {
            "device": backend.device, "threads": backend.threads, "processes": backend.processes,
            "epochs": len(training.records),
        },
        "measured": measured,
    } | ({"imported": parent.provenance["imported"]} if parent and "imported" in parent.provenance else {})  # fmt: skip


def origin_of(model: Found) -> Origin:
    """Name and sha256 of a model's file."""
    return {"name": shown(model.name), "sha256": model.sha256}


def digest_of(model: Checkpoint) -> Origin:
    """sha256 of a model that is no file: of its graph and its weights."""
    digest = hashlib.sha256(json.dumps(model.graph.to_json()).encode())
    for name in model.graph.parameters:
        digest.update(np.ascontiguousarray(model.weights[name], "<f4").data)
    return {"sha256": digest.hexdigest()}
