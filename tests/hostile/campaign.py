"""Mutants, each loaded within limits of time and memory, and run in the engine where that is cheap.

``python -m hostile.campaign FIRST COUNT [KIND ...]`` (with ``src`` and ``tests`` on the path) tries mutants by their
numbers and prints those that break a rule; the number makes the mutant again. A parent runs them in children that write
down which mutant they are at, so that a crash of the process is told too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine_cases import assert_same_result, close_calls, some_images
from hostile import strangers
from hostile.mutate import checkpoint_mutant, ckpt_mutant
from hostile.strangers import assert_one_line
from manidp.data.preprocessing import MINDSPORE_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.errors import CheckpointError, CkptError, ManiDPError
from manidp.formats.checkpoint import Checkpoint, load_checkpoint
from manidp.formats.ckpt import read_ckpt
from manidp.formats.conversion import from_ckpt, resnet_of_ckpt
from manidp.graph.macs import dense_macs
from manidp.reference import node_values, run

SECONDS, MEGABYTES = 1.0, 200  # of processor time and of memory that one file may cost before it is refused or read
RUN_MACS, RUN_NODES = 300_000, 60  # what is larger is loaded, but not run
RUN_EVERY = 16  # mutants, of which one is run if it loads: compiling takes a hundred times as long as loading


def try_checkpoint(path: Path, runs: bool) -> str:
    """What becomes of a checkpoint file: 'refused', 'loaded' or 'run'; what may not be is an AssertionError."""
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        assert_one_line(error)
        return "refused"
    assert checkpoint.weights.keys() == checkpoint.graph.parameters.keys()
    small = dense_macs(checkpoint.graph) <= RUN_MACS and len(checkpoint.graph.nodes) <= RUN_NODES
    return _run(checkpoint) if runs and small else "loaded"


def try_ckpt(path: Path, runs: bool) -> str:
    """What becomes of a .ckpt file."""
    try:
        values = read_ckpt(path)
        graph = resnet_of_ckpt(values)
        classes = tuple(f"class {i}" for i in range(graph.num_classes))
        from_ckpt(values, [0.5] * len(graph.gates), graph, MINDSPORE_PREPROCESSING, classes)
    except ManiDPError as error:
        assert isinstance(error, (CkptError, CheckpointError)), f"{type(error).__name__}: {error}"
        assert_one_line(error)
        return "refused"
    return "loaded"


KINDS: dict[str, tuple[Callable[[int], bytes], Callable[[Path, bool], str]]] = {
    "checkpoint": (checkpoint_mutant, try_checkpoint),
    "ckpt": (ckpt_mutant, try_ckpt),
    **strangers.KINDS,
}


def try_mutant(kind: str, seed: int, path: Path, runs: bool = True) -> str:
    """The outcome of one mutant, written to ``path``; AssertionError names it if it breaks a rule."""
    try:
        return try_file(kind, KINDS[kind][0](seed), path, runs)
    except Exception as error:
        raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {error}") from error


def try_file(kind: str, data: bytes, path: Path, runs: bool = True, seconds: float = SECONDS) -> str:
    """The outcome of one file, written to ``path``, within the limits of time and memory if it is not run."""
    path.write_bytes(data)
    memory, started = _peak(), time.process_time()
    outcome = KINDS[kind][1](path, runs)
    spent, megabytes = time.process_time() - started, _peak() - memory
    if not outcome.startswith("run"):
        assert spent < seconds, f"{outcome} after {spent:.1f} s"
        assert megabytes < MEGABYTES, f"{outcome} with {megabytes:.0f} MB"
    return outcome


def _run(checkpoint: Checkpoint) -> str:
    """The engine's results are the reference's, or an error of our own."""
    graph = checkpoint.graph
    images = np.random.default_rng(0).normal(size=(2, *graph.input.dims)).astype(np.float32)
    try:
        with np.errstate(all="ignore"):
            largest = max(
                float(np.abs(value).max()) for value in node_values(graph, checkpoint.weights, images).values()
            )
            wanted = run(graph, checkpoint.weights, images)
        result = Engine(checkpoint).run(images)
    except ManiDPError as error:
        assert_one_line(error)
        return "run, refused"
    if not 0 <= largest < 1e18:
        return "run, too large to compare"
    differ = close_calls(result, wanted, checkpoint.weights)
    assert_same_result(some_images(result, ~differ), some_images(wanted, ~differ))
    return "run"


def _peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(kind: str, first: int, count: int, note: str) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            Path(note).write_text(str(seed))
            try:
                outcomes[try_mutant(kind, seed, Path(folder, "mutant"), runs=seed % RUN_EVERY == 0)] += 1
            except AssertionError as error:
                outcomes["BROKEN"] += 1
                print(str(error)[:1000], flush=True)
    print(f"{kind} {first} to {first + count - 1}: {dict(outcomes.most_common())}", flush=True)
    os._exit(1 if outcomes["BROKEN"] else 0)


def main(kind: str, first: int, count: int, chunk: int = 2000) -> int:
    """Try the mutants in children of ``chunk`` each; returns how many chunks had one that broke a rule."""
    broken = 0
    for start in range(first, first + count, chunk):
        with tempfile.NamedTemporaryFile() as note:
            arguments = (kind, start, min(chunk, first + count - start), note.name)
            child = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
            child.start()
            child.join()
            if child.exitcode not in (0, 1):
                print(f"{kind} {Path(note.name).read_text()}: the process died with {child.exitcode}", flush=True)
            broken += child.exitcode != 0
    return broken


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    sys.exit(sum(main(kind, first, count) for kind in sys.argv[3:] or KINDS) > 0)
