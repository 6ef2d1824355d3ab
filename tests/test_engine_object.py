"""The engine as an object of Python: forks, copies, an end, interrupts, many threads, and whatever is given to it."""

from __future__ import annotations

import _thread
import copy
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import manidp
from engine_cases import Array
from manidp.data.pictures import load_picture
from manidp.engine import engine as engine_module
from manidp.engine.engine import Engine
from manidp.errors import ImageError, ManiDPError, UnsupportedError
from manidp.gating.manidp import head
from manidp.graph import Conv, GlobalPool, Graph, Input, Linear, Multiply, Node
from networks import checkpoint_of, random_weights

NODES = (
    Input(name="image", dims=(3, 8, 6)),
    *head("gate", "image", 4, 2),
    Conv(name="conv", inputs=("image",), channels=4),
    Multiply(name="gated", inputs=("conv", "gate")),
    GlobalPool(name="pool", inputs=("gated",)),
    Linear(name="out", inputs=("pool",), features=2),
)
GRAPH = Graph(NODES, "out")
CHECKPOINT = checkpoint_of(GRAPH, random_weights(GRAPH))
BATCH = np.random.default_rng(0).normal(size=(9, 3, 8, 6)).astype(np.float32)
BYTES = np.random.default_rng(1).integers(0, 256, (9, 8, 6, 3), dtype=np.uint8)
SOURCE = Path(engine_module.__file__).parents[1]


@pytest.fixture(autouse=True)
def not_for_ever() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", params=[1, 2, 3])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(CHECKPOINT, threads=request.param)


@pytest.fixture(scope="module")
def one() -> Engine:
    return Engine(CHECKPOINT)


@pytest.fixture(scope="module")
def wanted(one: Engine) -> Array:
    return one.run(BATCH).logits


def works(engine: Engine, wanted: Array) -> None:
    """The engine answers, and all its workspaces come back."""
    np.testing.assert_array_equal(engine.run(BATCH).logits, wanted)
    runner = engine._runner
    assert runner is not None
    until(lambda: runner._free.qsize() == engine.threads)


def until(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.001)


# Forks


def in_child(work: Callable[[], object]) -> None:
    """The work is done in a forked child within 20 s."""
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
threads_may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@needs_fork
@threads_may_fork
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_goes_on_in_a_forked_child(threads: int, used: bool, wanted: Array) -> None:
    engine = Engine(CHECKPOINT, threads=threads)
    if used:
        works(engine, wanted)

    def child() -> None:
        works(engine, wanted)
        in_child(lambda: works(engine, wanted))

    in_child(child)
    works(engine, wanted)


@needs_fork
@threads_may_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_while_another_thread_runs(threads: int, wanted: Array) -> None:
    engine = Engine(CHECKPOINT, threads=threads)
    large, stop = np.repeat(BATCH, 2000, axis=0), threading.Event()
    runner = engine._runner
    assert runner is not None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [engine.run(large) for _ in iter(stop.is_set, True)])
        try:
            for _ in range(3):
                until(lambda: runner._free.qsize() < threads)
                in_child(lambda: works(engine, wanted))
        finally:
            stop.set()
        running.result()
    works(engine, wanted)


@needs_fork
@threads_may_fork
def test_a_fork_while_another_thread_compiles(wanted: Array) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(lambda: [Engine(CHECKPOINT) for _ in iter(stop.is_set, True)])
        try:
            for _ in range(3):
                time.sleep(0.02)
                in_child(lambda: works(Engine(CHECKPOINT, threads=2), wanted))
        finally:
            stop.set()
        making.result()


# Copies


def test_a_copy_and_a_pickle_are_engines_of_their_own(engine: Engine, wanted: Array) -> None:
    for other in (copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert (other.threads, other.precision, other.isa) == (engine.threads, engine.precision, engine.isa)
        assert not {id(space) for space in other._runner._workspaces} & {id(s) for s in engine._runner._workspaces}  # type: ignore[union-attr]
        works(other, wanted)
    works(engine, wanted)


def test_a_pickled_engine_is_opened_by_another_process(one: Engine, wanted: Array) -> None:
    code = (
        "import pickle, sys; e, x = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(e.run(x).logits.tobytes())"
    )
    given = pickle.dumps((one, BATCH))
    came = subprocess.run(
        [sys.executable, "-c", code], input=given, stdout=subprocess.PIPE, env=environment(), check=True
    )
    assert came.stdout == wanted.tobytes()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{SOURCE.parent}{os.pathsep}{Path(__file__).parent}"}


# The end


def test_a_closed_engine_says_so(wanted: Array) -> None:
    with Engine(CHECKPOINT, threads=2) as engine:
        works(engine, wanted)
        assert engine.memory > 0
    engine.close()
    assert engine.memory == 0
    with pytest.raises(ManiDPError, match="closed; load the model anew"):
        engine.run(BATCH)
    works(pickle.loads(pickle.dumps(engine)), wanted)


def test_what_runs_while_the_engine_is_closed_ends_as_ever(wanted: Array) -> None:
    engine = Engine(CHECKPOINT, threads=2)
    runner = engine._runner
    assert runner is not None
    many = np.repeat(BATCH, 2000, axis=0)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(engine.run, many) for _ in range(4)]
        free, gone = runner._free, weakref.ref(runner)
        until(lambda: not free.qsize() or all(run.done() for run in running))
        del runner
        engine.close()
        late = [run for run in running if isinstance(run.exception(), ManiDPError)]  # they had not begun
        assert len(late) < len(running)
        for run in set(running) - set(late):
            np.testing.assert_array_equal(run.result().logits, np.repeat(wanted, 2000, axis=0))
    running.clear()
    late.clear()
    del run
    until(lambda: gone() is None)


GROWTH = """
import os, resource, time
from networks import checkpoint_of, random_weights
from manidp.graph import GlobalPool, Graph, Input, Linear
from manidp.engine.engine import Engine
import numpy as np

nodes = (Input(name="image", dims=(3, 4, 4)), GlobalPool(name="pool", inputs=("image",)),
         Linear(name="wide", inputs=("pool",), features=50_000), Linear(name="out", inputs=("wide",), features=2))
graph = Graph(nodes, "out")
checkpoint, images = checkpoint_of(graph, random_weights(graph)), np.zeros((4, 3, 4, 4), np.float32)

def threads():  # those of the system: Python counts a thread only once it runs
    return len(os.listdir("/proc/self/task"))

alone = threads()

def use(times):
    for i in range(times):
        engine = Engine(checkpoint, threads=3)
        engine.run(images)
        if i % 2:
            engine.close()
    held = engine.memory
    del engine
    end = time.monotonic() + 20
    while threads() > alone and time.monotonic() < end:
        time.sleep(0.001)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = use(12)
print(use(24) - before, threads() - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_engines_that_are_dropped_leave_neither_memory_nor_threads() -> None:
    """Each of 24 holds 3.4 MB. What stays is what LLVM keeps of names and types, and what malloc keeps for threads."""
    came = subprocess.run([sys.executable, "-c", GROWTH], stdout=subprocess.PIPE, env=environment(), check=True)
    grown, threads = map(int, came.stdout.split())
    assert grown < 20_000_000
    assert threads == 0


# Interrupts


class Interrupt(BaseException):
    pass


def interrupted_at(place: int, call: Callable[[], object]) -> bool:
    """Whether the call was interrupted, before instruction number ``place`` of our own code."""
    left = place

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(str(SOURCE)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_instruction_leaves_the_engine_usable(wanted: Array) -> None:
    for threads in (1, 2):
        engine = Engine(CHECKPOINT, threads=threads)
        place = 0
        while interrupted_at(place, lambda: engine.run(BATCH)):  # noqa: B023
            works(engine, wanted)
            place += 1
        assert place > 200


@pytest.fixture
def interrupts() -> Iterator[None]:
    """They come: shells have what is in the background ignore them, and Python loses those that meet a collection."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_leaves_the_engine_usable(threads: int, wanted: Array) -> None:
    engine, delays, main = Engine(CHECKPOINT, threads=threads), queue.SimpleQueue[float](), threading.get_ident()

    def press() -> None:
        for delay in iter(delays.get, -1.0):
            time.sleep(delay)
            signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(press)
        try:
            for delay in np.random.default_rng(threads).uniform(0, 1e-3, 300):
                with pytest.raises(KeyboardInterrupt):
                    delays.put(delay)
                    while True:
                        engine.run(BATCH)
        finally:
            delays.put(-1.0)
    works(engine, wanted)


def test_helpers_that_outlive_an_interrupted_run_keep_its_memory() -> None:
    engine = Engine(CHECKPOINT, threads=2)
    runner = engine._runner
    assert runner is not None
    batch = BATCH.copy()
    kept, helping, go_on = weakref.ref(batch), threading.Event(), threading.Event()
    main = threading.get_ident()

    def run(*_: object) -> None:
        if threading.get_ident() == main:
            assert helping.wait(20)
            raise Interrupt
        helping.set()
        go_on.wait(20)

    runner._run = run  # type: ignore[assignment]
    with pytest.raises(Interrupt):
        engine.run(batch)
    engine.close()
    gone = weakref.ref(runner)
    del batch, runner
    gc.collect()
    assert kept() is not None
    go_on.set()
    until(lambda: kept() is None and gone() is None)


# Threads


def test_no_more_than_threads_are_computed_at_once_and_all_get_their_own_results(engine: Engine, one: Engine) -> None:
    fresh = Engine(CHECKPOINT, threads=engine.threads)
    runner = fresh._runner
    assert runner is not None
    true_run, at_work, most, lock = runner._run, set[int](), 0, threading.Lock()

    def run(*arguments: Any) -> None:
        nonlocal most
        with lock:
            assert arguments[-1] not in at_work
            at_work.add(arguments[-1])
            most = max(most, len(at_work))
        time.sleep(0.001)
        true_run(*arguments)
        with lock:
            at_work.remove(arguments[-1])

    runner._run = run  # type: ignore[assignment]
    batches = [np.roll(BATCH, i, axis=0)[: 1 + i % 9] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.run, batches))
    for batch, result in zip(batches, together, strict=True):
        np.testing.assert_array_equal(result.logits, one.run(batch).logits)
    assert most == engine.threads


def test_a_run_ends_after_all_of_its_helpers() -> None:
    engine = Engine(CHECKPOINT, threads=2)
    runner = engine._runner
    assert runner is not None
    main, helping, ended = threading.get_ident(), threading.Event(), threading.Event()

    def run(*_: object) -> None:
        if threading.get_ident() == main:
            assert helping.wait(20)
        else:
            helping.set()
            time.sleep(0.05)
            ended.set()

    runner._run = run  # type: ignore[assignment]
    engine.run(BATCH)
    assert ended.is_set()


def test_threads_that_the_system_refuses_are_an_error_once_and_had_later(
    wanted: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(CHECKPOINT, threads=3)

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refuse)
        with pytest.raises(ManiDPError, match="3 threads cannot be had: can't start new thread"):
            engine.run(BATCH)
    started, start = [], _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *arguments: started.append(start(*arguments)))
    for _ in range(3):
        works(engine, wanted)
    assert len(started) == 2


# Images


class DLPackOnly:
    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Tensor:
    """As torch has them: one that wants its gradient makes no array, its detached twin does."""

    def __init__(self, array: Array, wants_gradient: bool) -> None:
        self.array, self.wants_gradient = array, wants_gradient

    def detach(self) -> Tensor:
        return Tensor(self.array, False)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        if self.wants_gradient:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")
        return self.array


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.fromarray(BYTES[0]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    "given",
    [
        lambda: BATCH[::-1][::-1],
        lambda: np.asfortranarray(BATCH),
        lambda: BATCH.astype(">f4"),
        lambda: BATCH.astype(np.float64),
        lambda: BATCH.astype(np.longdouble),
        lambda: BATCH.tolist(),
        lambda: list(BATCH),
        lambda: tuple(BATCH.astype(np.float64)),
        lambda: (image for image in BATCH),
        lambda: read_only(BATCH),
        lambda: Tensor(BATCH, wants_gradient=True),
        lambda: [Tensor(image, wants_gradient=True) for image in BATCH],
        lambda: DLPackOnly(BATCH),
        lambda: BATCH.data,
    ],
)
def test_floats_of_all_kinds(given: Callable[[], Any], one: Engine, wanted: Array) -> None:
    np.testing.assert_array_equal(one.run(given()).logits, wanted)


def test_bytes_paths_and_pictures_of_all_kinds(one: Engine, path: Path) -> None:
    wanted = one.run(BYTES).logits
    picture = Image.fromarray(BYTES[0])
    for single in (
        path,
        str(path),
        [path],
        [str(path)],
        np.array([str(path)]),
        picture,
        [picture],
        [BYTES[0]],
        BYTES[:1],
    ):
        np.testing.assert_array_equal(one.run(single).logits, wanted[:1])
    mixed = [path, Image.fromarray(BYTES[1]), BYTES[2], Tensor(BYTES[3], False), str(path)]
    np.testing.assert_array_equal(one.run(mixed).logits, wanted[[0, 1, 2, 3, 0]])
    for array in (BYTES[::-1, ::-1][::-1, ::-1], np.asfortranarray(BYTES), read_only(BYTES), list(BYTES)):
        np.testing.assert_array_equal(one.run(array).logits, wanted)


def test_pictures_of_other_sizes_are_fitted_as_from_their_files(one: Engine, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 31, 4), dtype=np.uint8))
    picture.save(tmp_path / "b.png")
    wanted = one.run(load_picture(tmp_path / "b.png", (8, 6))[None]).logits
    np.testing.assert_array_equal(one.run([picture, tmp_path / "b.png"]).logits, np.repeat(wanted, 2, axis=0))


@pytest.mark.parametrize("empty", [[], (), BATCH[:0], BYTES[:0], BATCH.astype(np.float64)[:0], iter(())])
def test_an_empty_batch_has_empty_results(empty: Any, engine: Engine) -> None:
    result = engine.run(empty)
    assert (result.logits.shape, result.gate_values.shape) == ((0, 2), (0, 4))


STRUCTURED = np.zeros((2, 3, 8, 6), dtype=[("a", np.float32)])
EXPECTED = r"uint8 \(B, 8, 6, 3\) or float \(B, 3, 8, 6\)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (BYTES.transpose(0, 3, 1, 2), EXPECTED + r"; got uint8 \(9, 3, 8, 6\): .*transpose\(0, 2, 3, 1\)"),
        (BATCH.transpose(0, 2, 3, 1), EXPECTED + r"; got float32 \(9, 8, 6, 3\): .*transpose\(0, 3, 1, 2\)"),
        (BATCH[0], EXPECTED + r"; got float32 \(3, 8, 6\): .*images\[None\]"),
        (BYTES[0], EXPECTED + r"; got uint8 \(8, 6, 3\): .*images\[None\]"),
        (BYTES.astype(np.int64), EXPECTED + r"; got int64 .*astype\(np.uint8\)"),
        (BYTES > 3, EXPECTED + "; got bool .*"),
        (BYTES.astype(np.int8), EXPECTED + "; got int8 .*"),
        (BATCH.astype(np.complex64), EXPECTED + "; got complex64 "),
        (BATCH.astype(object), EXPECTED + "; got object "),
        (BATCH.astype("S4"), EXPECTED + r"; got \|S4 "),
        (STRUCTURED, EXPECTED + "; got .*a.*"),
        (BYTES[..., 0], EXPECTED + r"; got uint8 \(9, 8, 6\): a grey image .* 3 channels"),
        (BYTES[..., :1], "a grey image"),
        (np.zeros((2, 9, 6, 3), np.uint8), r"got uint8 \(2, 9, 6, 3\): .*resized"),
        (np.float32(3), EXPECTED + r"; got float32 \(\)"),
        (3, EXPECTED + r"; got int64 \(\)"),
        (None, EXPECTED + r"; got object \(\)"),
        ({"a": BATCH}, EXPECTED + r"; got object \(\)"),
        ({"a.png"}, EXPECTED + r"; got object \(\)"),
        (b"a.png", EXPECTED + r"; got \|S5 \(\)"),
        ([[1.0], [1.0, 2.0]], r"image 0 of the list, .*: images are " + EXPECTED),
        ([BATCH[0], np.zeros((3, 8, 7))], r"image 1 of the list, .*got float64 \(1, 3, 8, 7\)"),
        (
            [BATCH[0], [[1.0], [1.0, 2.0]]],
            r"image 1 of the list, .*type list cannot be read as an array: .*" + EXPECTED,
        ),
        ([BYTES[0], BATCH[0]], "images of one kind.*image 0 is uint8, image 1 is float32"),
        ([None], "image 0 of the list"),
        ([3], "image 0 of the list"),
        ([b"a.png"], "image 0 of the list"),
        (["a\0b"], "a.*b"),
        ("no such file", "no such file"),
        (Image.new("F", (6, 8)), "image 0: .*32 bits"),
        (np.ma.masked_less(BATCH, 0), "a masked array.*" + EXPECTED),
        (np.broadcast_to(np.float64(0), (10**14, 3, 8, 6)), "fewer at a time"),
        (np.broadcast_to(np.uint8(0), (10**14, 8, 6, 3)), "fewer at a time"),
    ],
)
def test_what_is_no_batch_is_refused_with_what_to_pass(given: Any, message: str, one: Engine) -> None:
    with pytest.raises(ImageError, match=message):
        one.run(given)


def test_a_tensor_that_lies_elsewhere_is_refused_in_its_own_words(one: Engine) -> None:
    class OnDevice:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            raise TypeError("can't convert cuda:0 device type tensor to numpy\nmore")

    with pytest.raises(ImageError, match=r"OnDevice cannot be .*: can't convert cuda:0 .* numpy; pass uint8 \(B, 8, 6"):
        one.run(OnDevice())


def test_float16_and_numbers_beyond_float32(one: Engine) -> None:
    half = BATCH.astype(np.float16)
    np.testing.assert_array_equal(one.run(half).logits, one.run(half.astype(np.float32)).logits)
    with pytest.raises(ImageError, match=r"images \[1\] hold numbers that are not finite"):
        one.run([BATCH[0], BATCH[1] * np.float64(1e300)])
    images = BATCH.astype(np.float64)
    images[1] *= 1e300
    with pytest.raises(ImageError, match=r"images \[1\] hold numbers that are not finite"):
        one.run(images)


# Options


@pytest.mark.parametrize("threads", [0, -1, True, 2.5, "2", None, 10**9, [2], np.array([1, 2])])
def test_threads_are_a_whole_number_within_bounds(threads: Any) -> None:
    with pytest.raises(ManiDPError, match=r"threads must be a whole number from 1 to 1,024; got"):
        Engine(CHECKPOINT, threads=threads)


def test_memory_is_bounded_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (
        Input(name="image", dims=(3, 512, 512)),
        Conv(name="conv", inputs=("image",), channels=32),
        Conv(name="again", inputs=("conv",), channels=32),
        GlobalPool(name="pool", inputs=("again",)),
    )
    graph = Graph(nodes, "pool")
    large = checkpoint_of(graph, random_weights(graph))
    with pytest.raises(ManiDPError, match=r"may have 17,179,869,184 bytes; 1024 threads of [\d,]+ bytes each are more"):
        Engine(large, threads=1024)

    def none(size: int) -> Array:
        raise MemoryError

    monkeypatch.setattr(engine_module, "aligned", none)
    with pytest.raises(ManiDPError, match=r"no memory for 2 threads of [\d,]+ bytes each; ask for fewer"):
        Engine(large, threads=2)


def test_packed_weights_are_held_once() -> None:
    nodes: list[Node] = [Input(name="image", dims=(3, 8, 8)), Conv(name="conv0", inputs=("image",), channels=256)]
    nodes += [Conv(name=f"conv{n + 1}", inputs=(f"conv{n}",), channels=256) for n in range(8)]
    graph = Graph((*nodes, GlobalPool(name="pool", inputs=(nodes[-1].name,))), "pool")
    checkpoint = checkpoint_of(graph, random_weights(graph))
    tracemalloc.start()
    try:
        engine = Engine(checkpoint)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert engine.memory <= held < 1.1 * engine.memory


def test_numbers_of_numpy_are_numbers(wanted: Array) -> None:
    engine = Engine(CHECKPOINT, threads=np.int64(2))  # type: ignore[arg-type]
    assert type(engine.threads) is int
    works(engine, wanted)


@pytest.mark.parametrize("rubbish", ["", "float64", 3, [], {}, np.zeros(2), b"float32"])
def test_rubbish_for_precision_and_instruction_set(rubbish: Any) -> None:
    with pytest.raises(UnsupportedError, match="can be run; got"):
        Engine(CHECKPOINT, precision=rubbish)
    with pytest.raises(UnsupportedError, match=r"this CPU has .*; got"):
        Engine(CHECKPOINT, isa=rubbish)


@pytest.mark.parametrize("rubbish", ["manidp-res20", None, GRAPH, Path("x")])
def test_an_engine_runs_a_checkpoint_only(rubbish: Any) -> None:
    with pytest.raises(ManiDPError, match=r"runs a Checkpoint; got .*manidp\.load"):
        Engine(rubbish)


@pytest.mark.parametrize("rubbish", [None, 3, b"manidp-res20", CHECKPOINT, ["manidp-res20"], "", "a\0b", "x" * 5000])
def test_load_takes_names_and_paths_only(rubbish: Any) -> None:
    with pytest.raises(ManiDPError):
        manidp.load(rubbish)
