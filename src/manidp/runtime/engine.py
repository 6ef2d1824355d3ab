"""The engine: machine code made for one checkpoint when it is loaded, which computes only what each image keeps."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from manidp.checkpoint import Checkpoint
from manidp.errors import ImageError, ManiDPError, UnsupportedError
from manidp.images import load_picture
from manidp.runtime.codegen import ISAS, Generator, Isa
from manidp.runtime.ir import FLOAT, HALF
from manidp.runtime.plan import Plan, make_plan
from manidp.runtime.reference import Result

_ELEMENTS = {"float32": FLOAT, "float16": HALF}
_LLVM = threading.Lock()  # parsing and compiling share one global context
_RUN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,  # images
    ctypes.c_int64,  # 1 if they are bytes
    ctypes.c_void_p,  # results: of each image logits and gates
    ctypes.c_void_p,  # state
    ctypes.c_int64,  # number of images
    ctypes.c_void_p,  # workspace
    ctypes.c_void_p,  # constants
)


class Program:
    """A plan as machine code. ``run`` may be called from many threads at once, each with its own workspace."""

    def __init__(self, plan: Plan, isa: Isa) -> None:
        generator = Generator(plan, isa)
        self.constants = plan.constants
        self.workspace = generator.workspace
        self.result_size = plan.graph.num_classes + sum(gate.channels for gate in plan.graph.gates)
        self._code = _compile(generator.text, isa)
        self._run = _RUN(self._code.get_function_address("run"))

    def run(
        self, images: int, are_bytes: bool, results: int, state: int, count: int, work: int, constants: int
    ) -> None:
        """Take images until all ``count`` are done; the other numbers are addresses.

        ``results`` are float32 (count, ``result_size``): logits, then the gates one after the other. ``state`` are two
        int64: number of the next image, and 1 if a number was met that is not finite.
        """
        self._run(images, are_bytes, results, state, count, work, constants)


class Engine:
    """A checkpoint, ready to run.

    ``precision``: "float32", or "float16" for maps and convolutions where the CPU has such arithmetic. ``threads``
    work on different images; ``isa`` forces one of ``available_isas(precision)``, by default the widest.
    Many threads may call ``run`` at once: at most ``threads`` images are computed at any time, and ``memory`` bytes
    are all that the engine ever holds. Raises UnsupportedError for a node, precision or instruction set it cannot run.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, precision: str = "float32", threads: int = 1, isa: str | None = None
    ) -> None:
        if threads < 1:
            raise ManiDPError(f"an engine needs at least one thread; got {threads}")
        self.checkpoint, self.graph, self.threads = checkpoint, checkpoint.graph, threads
        self.precision, self.isa = precision, _choose(precision, isa)
        std = np.array(checkpoint.preprocessing.std, dtype=np.float64)
        mean = np.array(checkpoint.preprocessing.mean, dtype=np.float64)
        plan = make_plan(
            self.graph,
            checkpoint.weights,
            lanes=self.isa.lanes,
            element=self.isa.element,
            scale=1 / (255 * std),
            shift=-mean / std,
        )
        self._program = Program(plan, self.isa)
        constants, *workspaces = (
            _aligned(size) for size in (len(plan.constants), *[self._program.workspace] * threads)
        )
        constants[:] = plan.constants
        self._arrays = (constants, *workspaces)
        self._constants = constants.ctypes.data
        self._workspaces: queue.SimpleQueue[int] = queue.SimpleQueue()
        for workspace in workspaces:
            self._workspaces.put(workspace.ctypes.data)
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="manidp") if threads > 1 else None

    @property
    def memory(self) -> int:
        """Bytes held for weights and for the workspaces of all threads; no run needs more but its own results."""
        return sum(array.nbytes for array in self._arrays)

    def run(self, images: NDArray[Any] | Sequence[str | Path]) -> Result:
        """Logits, gates, kept channels and multiply-adds of each image.

        ``images``: uint8 (B, H, W, C), which are normalised as the checkpoint says, float (B, C, H, W), already
        normalised, or paths of pictures. Raises ImageError for other shapes and for numbers that are not finite.
        """
        batch = self._batch(images)
        count = len(batch)
        results = np.empty((count, self._program.result_size), dtype=np.float32)
        state = (ctypes.c_int64 * 2)()
        arguments = (
            batch.ctypes.data,
            batch.dtype == np.uint8,
            results.ctypes.data,
            ctypes.addressof(state),
            count,
        )
        if self._pool is None or count == 1:
            self._work(arguments)
        else:
            alive = (batch, results, state)
            helpers = [self._pool.submit(self._work, arguments, *alive) for _ in range(min(self.threads, count) - 1)]
            self._work(arguments)
            for helper in helpers:
                helper.result()
        logits = results[:, : self.graph.num_classes]
        if state[1]:
            self._complain(batch, logits)
        return Result(self.graph, logits, results[:, self.graph.num_classes :])

    def _work(self, arguments: tuple[int, bool, int, int, int], *_alive: object) -> None:
        """``_alive`` is what the addresses among the arguments point to: a helper must not outlive it."""
        workspace = self._workspaces.get()
        try:
            self._program.run(*arguments, workspace, self._constants)
        finally:
            self._workspaces.put(workspace)

    def _complain(self, batch: NDArray[Any], logits: NDArray[np.float32]) -> None:
        bad = np.flatnonzero(~np.isfinite(batch).all(axis=(1, 2, 3)))
        if len(bad):
            raise ImageError(f"images {bad.tolist()} hold numbers that are not finite (or exceed float32)")
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ManiDPError(f"the logits of images {bad.tolist()} are not finite: their values overflow {self.precision}")

    def _batch(self, images: NDArray[Any] | Sequence[str | Path]) -> NDArray[Any]:
        channels, height, width = self.graph.input.dims
        if not isinstance(images, np.ndarray):
            images = np.stack([load_picture(Path(path), (height, width)) for path in images])
        if images.dtype == np.uint8 and images.shape[1:] == (height, width, channels):
            return np.ascontiguousarray(images)
        if images.dtype.kind == "f" and images.shape[1:] == (channels, height, width):
            return np.ascontiguousarray(images, dtype=np.float32)
        raise ImageError(
            f"images are uint8 (B, {height}, {width}, {channels}) or float (B, {channels}, {height}, {width}); "
            f"got {images.dtype} {images.shape}"
        )


def available_isas(precision: str = "float32") -> tuple[str, ...]:
    """Names of the vector instruction sets of this CPU that have arithmetic of a precision, widest first."""
    return tuple(isa.name for isa in _runnable(precision) if not isa.emulates)


def emulating_isas(precision: str) -> tuple[str, ...]:
    """Names of those that only emulate it, slowly: never taken unless asked for."""
    return tuple(isa.name for isa in _runnable(precision) if isa.emulates)


def _runnable(precision: str) -> list[Isa]:
    if precision not in _ELEMENTS:
        raise UnsupportedError(f"precisions {' and '.join(map(repr, _ELEMENTS))} can be run; got {precision!r}")
    features = llvm.get_host_cpu_features()
    return [
        isa
        for isa in ISAS.values()
        if isa.element == _ELEMENTS[precision] and all(features.get(feature) for feature in isa.features)
    ]


def _choose(precision: str, name: str | None) -> Isa:
    available = available_isas(precision)
    if name in available + emulating_isas(precision):
        return ISAS[str(name)]
    if name is None and available:
        return ISAS[available[0]]
    if not available:
        missing = "AVX512-FP16 or Arm's FP16" if precision == "float16" else "vector"
        raise UnsupportedError(f"precision {precision!r} needs {missing} instructions, which this CPU does not have")
    raise UnsupportedError(f"for {precision} this CPU has {', '.join(available)}; got {name!r}")


def _compile(text: str, isa: Isa) -> llvm.ExecutionEngine:
    with _LLVM:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = ",".join(f"+{feature}" for feature in isa.features)
        target = llvm.Target.from_default_triple().create_target_machine(features=features, opt=2)
        module = llvm.parse_assembly(text)
        module.verify()
        engine = llvm.create_mcjit_compiler(module, target)
        engine.finalize_object()
        return engine


def _aligned(size: int) -> NDArray[np.float32]:
    """Zeros that begin at a multiple of 64 bytes."""
    memory = np.zeros(size + 16, dtype=np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size]
