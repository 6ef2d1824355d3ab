"""Runs random networks with everything that generated code is given next to pages that cannot be touched.

``python guarded.py ISA,ISA,... NETWORKS [FLOATS]``: each network twice, with images, results, workspace, constants and
state once directly behind such a page and once directly before one. ``FLOATS`` are taken from the workspace's end.
Prints what it runs, so that the last line tells what a segmentation fault came from.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_cases import Array, call_program, plan_of
from manidp.engine.engine import Program
from manidp.engine.target import ISAS
from manidp.graph import Graph
from networks import random_weights, with_thresholds
from test_engine_random import networks

_LIBC = ctypes.CDLL(None, use_errno=True)
_NOTHING = 0  # PROT_NONE


class Guarded:
    """``size`` bytes with a page on either side that cannot be touched; all else is 0xFF, NaN as a float."""

    def __init__(self, size: int, *, at_end: bool) -> None:
        inner = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        self.memory.write(b"\xff" * len(self.memory))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for page in (base, base + mmap.PAGESIZE + inner):
            if _LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _NOTHING):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = base + mmap.PAGESIZE + (inner - size if at_end else 0)
        self.array: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def put(self, values: Array) -> int:
        self.array[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return self.address


def run_guarded(program: Program, constants: Array, images: Array, *, at_end: bool, missing: int = 0) -> Array:
    """Logits and gates of each image."""
    sizes = (
        images.nbytes,
        4 * program.result_size * len(images),
        4 * (program.workspace - missing),
        constants.nbytes,
        16,
    )
    areas = [Guarded(size, at_end=at_end) for size in sizes]
    given, results, workspace, weights, state = areas
    given.put(images), weights.put(constants), workspace.put(np.zeros(sizes[2], np.uint8))
    state.put(np.zeros(2, np.int64))
    call_program(
        program, images, given.address, state.address, results.address, workspace.address, weights.address
    )  # fmt: skip
    return np.array(results.array.view(np.float32).reshape(len(images), -1))


def main(isa: str, examples: int, missing: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(networks(), st.integers(0, 2**16), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    def law(graph: Graph, seed: int, keep: float) -> None:
        print(isa, "seed", seed, "kept", keep, graph, flush=True)
        rng = np.random.default_rng(seed)
        images = rng.normal(size=(2, *graph.input.dims)).astype(np.float32)
        weights = with_thresholds(graph, random_weights(graph, seed), images, {g.name: keep for g in graph.gates})
        plan = plan_of(graph, weights, isa)
        program = Program(plan, ISAS[isa])
        bytes_ = rng.integers(0, 256, (2, *graph.input.dims[1:], graph.input.dims[0]), np.uint8)
        for batch in (images, bytes_, np.full_like(images, np.nan)):
            made = [run_guarded(program, plan.constants, batch, at_end=end, missing=missing) for end in (False, True)]
            np.testing.assert_array_equal(made[0], made[1])

    law()


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        main(name, int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
