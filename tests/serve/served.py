"""A small model with operating points, and servers of it: in this process, and as a process of their own."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint, OperatingPoint
from manidp.gating.place import with_gates
from manidp.graph.macs import ungated_macs
from manidp.models import resnet
from manidp.serve.app import Service
from manidp.serve.dial import ladder
from manidp.serve.limits import Limits
from networks import random_weights, with_thresholds

IMAGES = load_sample(4).images


@cache
def small_model() -> Checkpoint:
    """Gates that keep three quarters, and points of a half and a quarter, their accuracies made up."""
    graph = with_gates(resnet(8, width=4))
    weights: dict[str, NDArray[Any]] = random_weights(graph)
    batch = CIFAR10_PREPROCESSING.apply(load_sample(20).images)
    of = {share: with_thresholds(graph, weights, batch, dict.fromkeys(graph.gate_channels, share)) for share in
          (0.75, 0.5, 0.25)}  # fmt: skip
    chosen = {name: np.maximum(value, 0) if name in graph.thresholds else value for name, value in of[0.75].items()}
    model = Checkpoint(graph, chosen, CIFAR10_PREPROCESSING, CIFAR10_CLASSES)
    points = []
    for share, accuracy in ((0.5, 0.895), (0.25, 0.6)):
        values = {name: np.maximum(of[share][name], 0) for name in graph.thresholds}
        points.append(OperatingPoint(f"{share:.0%}", values, share * ungated_macs(graph), accuracy))
    measured = {"mean_macs": 0.75 * ungated_macs(graph), "correct": 90, "total": 100}
    return replace(model, points=tuple(points), provenance={"measured": measured})


@cache
def engine() -> Engine:
    return Engine(small_model(), threads=2)


def service(limits: Limits | None = None, **options: Any) -> Service:
    """With a target that a busy machine keeps, so that the dial stays where it is."""
    return Service("small", engine(), ladder(small_model()), 10.0, limits or Limits(), **options)


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def process(model: Path | str, *options: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own, and its port, once it is ready."""
    command = [sys.executable, "-m", "manidp", "serve", str(model), "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            port = json.loads(running.stdout.readline())["port"]
            wait_until_ready(port)
            yield running, port
        finally:
            running.kill()


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
        time.sleep(0.05)
    raise AssertionError("not ready in 30 seconds")
