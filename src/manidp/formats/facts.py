"""What a model's file holds, as plain data."""

from __future__ import annotations

from typing import Any

from manidp.formats.checkpoint import Found
from manidp.graph.macs import dense_macs, layers


def facts(found: Found) -> dict[str, Any]:
    """File, digest, sizes, multiply-adds, classes, preprocessing, provenance, layers, thresholds, operating points.

    All of it can be written as JSON. A layer's shape is that of its output for one image.
    """
    model = found.checkpoint
    return {
        "file": str(found.path),
        "bytes": found.path.stat().st_size,
        "sha256": found.sha256,
        "nodes": len(model.graph.nodes),
        "gates": len(model.graph.gates),
        "parameters": sum(value.size for value in model.weights.values()),
        "macs_with_everything_kept": dense_macs(model.graph),
        "classes": list(model.classes),
        "preprocessing": {"mean": model.preprocessing.mean, "std": model.preprocessing.std,
                          "size": model.preprocessing.size},
        "provenance": dict(model.provenance),
        "layers": layers(model.graph),
        "thresholds": {
            name.removesuffix(".threshold"): float(model.weights[name]) for name in model.graph.thresholds
        },
        "operating_points": [
            {"name": point.name, "macs": point.macs, "accuracy": point.accuracy}
            for point in model.every_point
        ],
    }  # fmt: skip
