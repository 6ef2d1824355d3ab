"""The same server around ONNX Runtime and a dense network: what `benchmarks/load.py` compares with.

Routes, queue, batches, limits and the refusal of what would be too late are ours; the engine is not, and has no dial.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from manidp.engine.engine import Engine
from manidp.graph import Graph
from manidp.hub.find import find_model
from manidp.machine import describe
from manidp.onnx import onnx_model
from manidp.result import Result
from manidp.serve.app import Service
from manidp.serve.dial import ladder
from manidp.serve.server import serve


class OnnxEngine:
    """What the server needs of an engine, from ONNX Runtime."""

    def __init__(self, model: str, threads: int) -> None:
        self.checkpoint, self.threads = find_model(model).checkpoint, threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are the handlers', too
        self._session = onnxruntime.InferenceSession(
            onnx_model(self.checkpoint).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @cached_property
    def graph(self) -> Graph:
        return self.checkpoint.graph

    def run(self, images: NDArray[Any], *, budget: str = "default") -> Result:
        """Logits of pixels or normalised images."""
        floats = self.checkpoint.preprocessing.apply(images) if images.dtype == np.uint8 else images
        logits = np.asarray(self._session.run(["logits"], {"image": floats})[0])
        return Result(self.graph, logits, np.zeros((len(logits), 0), np.float32))


def main() -> None:
    """Arguments: model, target in milliseconds."""
    model, target = sys.argv[1], float(sys.argv[2])
    engine = cast(Engine, OnnxEngine(model, int(describe()["cores"])))
    serve(Service("dense", engine, ladder(engine.checkpoint), target / 1000), "127.0.0.1", 0)


if __name__ == "__main__":
    main()
