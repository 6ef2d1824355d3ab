"""The engine: machine code made for one checkpoint when it is loaded, which computes only what each image keeps."""

from __future__ import annotations

import _thread
import ctypes
import operator
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import chain, filterfalse, repeat, starmap
from queue import SimpleQueue
from typing import Any, Self

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from manidp.engine.cascade import cascaded
from manidp.engine.inputs import Images, batch_of
from manidp.engine.memory import aligned, held
from manidp.engine.module import Module
from manidp.engine.planner import make_plan
from manidp.engine.processors import keep_apart
from manidp.engine.steps import Plan
from manidp.engine.target import Isa, choose_isa
from manidp.errors import ImageError, ManiDPError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.result import Result

MAX_THREADS = 1024
MAX_WORKSPACES = 2**34  # bytes of all threads
_RUN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,  # images
    ctypes.c_int64,  # 1 if they are bytes
    ctypes.c_void_p,  # results: of each image logits and gates
    ctypes.c_void_p,  # state
    ctypes.c_int64,  # number of images
    ctypes.c_void_p,  # constants
    ctypes.c_void_p,  # workspace
)
_STATE = ctypes.c_int64 * 2
# What llvmlite itself holds during every call into LLVM, whose parsing and compiling share one global context.
_LLVM = getattr(llvm.ffi.lib, "_lock", None) or threading.RLock()


class Program:
    """A plan as machine code. ``run`` may be called from many threads at once, each with its own workspace.

    ``run(images, are_bytes, results, state, count, constants, workspace)`` takes images until all ``count`` are done
    and returns nothing; the other numbers are addresses. ``results`` are float32 (count, ``result_size``): logits, then
    the gates one after the other. ``state`` are two int64: number of the next image, and 1 if a number was met that is
    not finite.
    """

    def __init__(self, plan: Plan, isa: Isa) -> None:
        module = Module(plan, isa)
        self.constants = plan.constants
        self.workspace = module.workspace
        self.result_size = plan.graph.num_classes + sum(plan.graph.gate_channels.values())
        self._code = _compile(module.text, isa)
        self.run = _RUN(self._code.get_function_address("run"))


class _Address(int):
    """Where an array begins. Whatever holds the address keeps the array alive, and ``also``."""

    def __new__(cls, array: NDArray[Any], also: object = None) -> Self:
        address = super().__new__(cls, array.ctypes.data)
        address.kept = array, also
        return address

    kept: tuple[NDArray[Any], object]


class _Runner:
    """A program with its memory and its helping threads; the engine and every run under way keep it alive.

    An interrupt comes between two Python instructions, and there no thread ever holds a workspace: to take one, run in
    it and give it back is one step of iterators written in C. Helpers take such steps only, so no interrupt meets them.
    """

    def __init__(self, program: Program, threads: int) -> None:
        self.threads = threads
        self.result_size = program.result_size
        needed = f"{threads} threads of {4 * program.workspace:,} bytes each"
        if 4 * threads * program.workspace > MAX_WORKSPACES:
            raise ManiDPError(f"all threads together may have {MAX_WORKSPACES:,} bytes; {needed} are more")
        try:
            self._workspaces = [_Address(aligned(program.workspace)) for _ in range(threads)]
        except MemoryError as error:
            raise ManiDPError(f"there is no memory for {needed}; ask for fewer") from error
        self.program = program
        self.constants = _Address(program.constants, program)
        self.memory = sum(held(address.kept[0]) for address in (self.constants, *self._workspaces))
        self._run = program.run
        self.begin()
        _RUNNERS.add(self)

    def begin(self) -> None:
        """All workspaces are free and no helper is started: so it is at first, and in a child after a fork."""
        self._free: SimpleQueue[int] = SimpleQueue()
        for workspace in self._workspaces:
            self._free.put(workspace)
        self._jobs: SimpleQueue[Iterator[None] | None] = SimpleQueue()
        self._helpers: list[int] = []  # their native ids, as soon as they run
        self._to_start = iter([self._helper() for _ in range(self.threads - 1)])
        weakref.finalize(self, deque, map(self._jobs.put, repeat(None, self.threads - 1)), 0).atexit = False

    def _helper(self) -> tuple[Any, tuple[Any, ...]]:
        """A thread's function and arguments: it notes its id, then moves on each job by a step, until it meets None."""
        note = map(self._helpers.append, starmap(_thread.get_native_id, [()]))
        return deque, (map(next, chain([note], iter(self._jobs.get, None)), repeat(None)), 0)

    def run(self, batch: NDArray[Any], constants: _Address) -> tuple[NDArray[np.float32], bool]:
        """Results (B, ``result_size``) of at least one image, and whether all numbers met are finite."""
        results = np.empty((len(batch), self.result_size), dtype=np.float32)
        state = _STATE()
        hands = min(self.threads, len(batch))
        if hands == 1:  # alone: no helper can outlive this call, and none is waited for
            run = partial(
                self._run, batch.ctypes.data, batch.dtype == np.uint8, results.ctypes.data, state, len(batch), constants
            )
            next(map(self._free.put, filterfalse(run, map(self._free.get, (True,)))))
            return results, not state[1]
        turns = repeat((), hands)
        done: SimpleQueue[None] = SimpleQueue()
        run = partial(
            self._run, _Address(batch), batch.dtype == np.uint8, _Address(results), state, len(batch), constants
        )
        used = filterfalse(run, starmap(self._free.get, turns))  # passes on what it was given, as run returns nothing
        job = map(done.put, map(self._free.put, used))
        self._start_helpers()
        keep_apart(self._helpers)
        for _ in range(hands - 1):
            self._jobs.put(job)
        next(job)
        for _ in range(hands - len(list(turns))):  # turns that nobody took are not waited for
            done.get()
        return results, not state[1]

    def _start_helpers(self) -> None:
        try:
            deque(starmap(_thread.start_new_thread, self._to_start), 0)
        except RuntimeError as error:
            self._to_start = chain([self._helper()], self._to_start)
            raise ManiDPError(f"{self.threads} threads cannot be had: {error}; ask for fewer") from error


_RUNNERS: weakref.WeakSet[_Runner] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for runner in _RUNNERS:
        runner.begin()
    _LLVM.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):  # a child has one thread: what others held and did at the fork is lost in it
    os.register_at_fork(
        before=_LLVM.__enter__,
        after_in_parent=partial(_LLVM.__exit__, None, None, None),
        after_in_child=_after_fork_in_child,
    )


class Engine:
    """A checkpoint, ready to run.

    ``precision``: "float32", or "float16" for maps and convolutions where the CPU has such arithmetic. ``threads``
    work on different images; ``isa`` forces one of ``available_isas(precision)``, by default the widest.
    Many threads may call ``run`` at once: at most ``threads`` images are computed at any time, and ``memory`` bytes
    are all that the engine ever holds. It goes on in forked children; a copy or a pickle is of checkpoint and options,
    and is compiled anew. ``close``, or the end of a ``with`` block, gives memory and threads back.
    Raises UnsupportedError for a node, precision or instruction set it cannot run, ManiDPError for other options.
    """

    batch_size = 1  # images that run together on a thread

    def __init__(
        self, checkpoint: Checkpoint, *, precision: str = "float32", threads: int = 1, isa: str | None = None
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise ManiDPError(f"an engine runs a Checkpoint; got {checkpoint!r:.80}; manidp.load takes names and paths")
        self.checkpoint, self.graph, self.threads = checkpoint, checkpoint.graph, _threads(threads)
        self.precision, self.isa = precision, choose_isa(precision, isa)
        self._again = partial(type(self), precision=precision, threads=self.threads, isa=isa)
        self._points: dict[str, _Address] = {}  # packed weights of the operating points that have been asked for
        self._runner: _Runner | None = _Runner(Program(self._plan(checkpoint.weights), self.isa), self.threads)

    def reweighted(self, values: Mapping[str, NDArray[np.float32]]) -> Engine:
        """An engine of the same network with other values of some weights: without compiling, in memory of its own.

        values: name of a parameter of the graph -> its array. Raises CheckpointError for other names or shapes,
        ManiDPError once the engine is closed.
        """
        program = copy(self._open().program)
        made = object.__new__(type(self))
        made.__dict__ |= self.__dict__
        made.checkpoint = replace(self.checkpoint, weights={**self.checkpoint.weights, **values})
        program.constants = made._plan(made.checkpoint.weights).constants  # no code depends on them
        made._points, made._runner = {}, _Runner(program, self.threads)
        return made

    def _open(self) -> _Runner:
        if self._runner is None:
            raise ManiDPError("this engine is closed; load the model anew")
        return self._runner

    def _plan(self, weights: Mapping[str, NDArray[np.float32]]) -> Plan:
        std = np.array(self.checkpoint.preprocessing.std, dtype=np.float64)
        mean = np.array(self.checkpoint.preprocessing.mean, dtype=np.float64)
        return make_plan(
            self.graph,
            weights,
            lanes=self.isa.lanes,
            element=self.isa.element,
            scale=1 / (255 * std),
            shift=-mean / std,
        )

    def _constants(self, runner: _Runner, budget: str | float) -> _Address:
        """The packed weights of an operating point. The code is the same for all of them."""
        if budget == DEFAULT:  # the weights as they are
            return runner.constants
        point = self.checkpoint.point(budget)
        if not point.values:
            return runner.constants
        found = self._points.get(point.name)
        if found is None:
            constants = self._plan({**self.checkpoint.weights, **point.values}).constants
            found = self._points.setdefault(point.name, _Address(constants, runner.constants))
        return found

    @property
    def memory(self) -> int:
        """Bytes held for weights and for the workspaces of all threads; no run needs more but its own results.

        Each operating point that has been asked for adds its own weights.
        """
        if self._runner is None:
            return 0
        return self._runner.memory + sum(held(address.kept[0]) for address in self._points.values())

    def close(self) -> None:
        """Give back memory and threads, at once or as soon as runs under way have ended; no other run is begun."""
        self._runner = None
        self._points = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial[Engine], tuple[Checkpoint]]:
        return self._again, (self.checkpoint,)

    def run(
        self,
        images: Images,
        *,
        budget: str | float = DEFAULT,
        cascade: tuple[str | float, str | float] | None = None,
        confidence: float | None = None,
    ) -> Result:
        """Logits, gates, kept channels and multiply-adds of each image.

        ``budget``: an operating point of the checkpoint, by its name, or as the share of the dense multiply-adds that
        may be spent (0..1]: the most expensive point within it. Different threads may ask for different ones at once.
        Raises CheckpointError for an unknown budget, listing those known.

        ``cascade``: two operating points in place of a budget, the cheap one first; the dear one sees the images of
        which the cheap one gives its most probable class less than ``confidence`` (0..1). ``Result.went_on`` says
        which, and the multiply-adds of both passes are counted. Nothing of the first pass is used again: statistics
        and thresholds differ. ``manidp.training.calibrate.confidence_for`` chooses a confidence for a mean budget.
        Raises ManiDPError for a cascade that is no pair, or without a confidence, or with a budget.

        ``images``: uint8 (B, H, W, C), which are normalised as the checkpoint says, or float (B, C, H, W), already
        normalised; arrays of NumPy or tensors of any framework. Or the path of a picture, or a PIL picture, fitted as
        ``load_picture`` does. Or a list of such, with images of one kind: uint8 (H, W, C), paths and pictures, or
        float (C, H, W). Raises ImageError for what is none of these and for numbers that are not finite.
        """
        runner = self._open()
        if cascade is None and confidence is None:
            constants = self._constants(runner, budget)
            return self._pass(runner, batch_of(images, self.graph.input.dims), constants)

        def run(batch: NDArray[Any], point: str | float) -> Result:
            return self._pass(runner, batch, self._constants(runner, point))

        batch = batch_of(images, self.graph.input.dims)
        return cascaded(run, self.checkpoint, batch, cascade, confidence, budget)

    def _pass(self, runner: _Runner, batch: NDArray[Any], constants: _Address) -> Result:
        results, finite = np.empty((0, runner.result_size), np.float32), True
        if len(batch):
            results, finite = runner.run(batch, constants)
        logits = results[:, : self.graph.num_classes]
        if not finite:
            self._complain(batch, logits)
        return Result(self.graph, logits, results[:, self.graph.num_classes :])

    def _complain(self, batch: NDArray[Any], logits: NDArray[np.float32]) -> None:
        bad = np.flatnonzero(~np.isfinite(batch).all(axis=(1, 2, 3)))
        if len(bad):
            raise ImageError(f"images {bad.tolist()} hold numbers that are not finite (or exceed float32)")
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ManiDPError(f"the logits of images {bad.tolist()} are not finite: their values overflow {self.precision}")


def _threads(threads: object) -> int:
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_THREADS:
        raise ManiDPError(f"threads must be a whole number from 1 to {MAX_THREADS:,}; got {threads!r:.80}")
    return number


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
