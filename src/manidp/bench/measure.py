"""What is measured: contenders in turn on the same images, start-up, and networks of growing size.

All times are of one interleaved run: in every round each contender takes the round's images once, in an order that
changes from round to round. Medians and quartiles are over rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from manidp.bench.peers import PEERS, Batch, Peer, Run
from manidp.data.images import ImageSet
from manidp.data.preprocessing import CIFAR10_PREPROCESSING, Preprocessing
from manidp.engine.engine import Engine
from manidp.engine.peak import multiply_add_peak
from manidp.engine.target import ISAS, available_isas
from manidp.errors import ManiDPError, MissingExtraError, UnsupportedError
from manidp.formats.checkpoint import Checkpoint, OperatingPoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph.macs import dense_macs, ungated_macs
from manidp.machine import describe
from manidp.models import imagenet_resnet, resnet

Labels = Mapping[str, NDArray[np.int64]]  # of every image, into the classes of each model
Say = Callable[[str], None]  # told what is being done
PRECISIONS = ("float32", "float16")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []  # before a peer changes it
PIECE = 100  # images of which answers are computed at once
SINGLE = 2**26  # numbers that the images may have of which single ones are timed
KEEP_RATE = 0.58  # of the networks without training: about 54 % fewer multiply-adds in a ResNet-20


class Images(Protocol):
    """Images as a model reads them, float32 (N, C, H, W): an array, or what makes the part that is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Batch: ...


@dataclass(frozen=True)
class Prepared:
    """Pixels, made into what a model reads when it is asked for: as float32 a large test set takes too much memory."""

    preprocessing: Preprocessing
    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, part: slice, /) -> Batch:
        return self.preprocessing.apply(self.pixels[part])


@dataclass(frozen=True)
class Contender:
    """One way to run one model. ``computes``: "everything", "all channels, times the gate" or "kept channels"."""

    runtime: str
    model: str
    computes: str
    precision: str
    run: Run


@dataclass(frozen=True)
class Row:
    """What one contender did. Times in milliseconds an image; ``share_of_peak`` of one core's, times the threads.

    ``macs``: mean multiply-adds an image. ``largest_difference``: from the float32 engine's logits on the same model,
    relative to the largest of them; ``other_answers``: images on which the class differs from the engine's.
    """

    runtime: str
    model: str
    computes: str
    precision: str
    correct: int | None
    total: int
    macs: float
    median: float
    lower_quartile: float
    upper_quartile: float
    share_of_peak: float
    largest_difference: float
    other_answers: int


def bench(
    models: Mapping[str, Checkpoint],
    images: ImageSet,
    *,
    threads: int,
    batch: int,
    rounds: int,
    growth: bool,
    say: Say,
    peers: Sequence[Peer] = PEERS,
    calibration: NDArray[np.uint8] | None = None,
    scored: bool = True,
) -> dict[str, Any]:
    """Everything that `manidp bench` shows, as JSON data; ``models`` all read images of one size, the gated one last.

    One image at a time on one thread, then batches on one thread and on ``threads``. calibration: pixels (N, H, W, 3)
    with which peers choose the scales of int8; by default the first 200 of ``images``. scored: whether the labels are
    of the models' classes: then accuracy is told, and images of a class that a model does not know are an ImageError.
    """
    skipped: dict[str, str] = {}
    labels = {name: images.relabelled(model.classes, name).labels for name, model in models.items()} if scored else None
    calibration = calibration if calibration is not None else images.images[:200]
    with pinned(1):
        say("the processor's peak")
        peak = {isa: multiply_add_peak(ISAS[isa]) for _, isa in _own()}
    modes = []
    for of_batch, of_threads in dict.fromkeys([(1, 1), (batch, 1), (batch, threads)]):
        say(f"{of_batch} at a time on {of_threads}, every contender")
        mode, reasons = _apart(models, images.images, labels, calibration, of_batch, of_threads, rounds, peak, peers)
        modes.append(mode)
        skipped |= reasons
    return {
        "machine": describe(*dict.fromkeys(peer.package for peer in peers)),
        "features": sorted(name for name, there in llvm.get_host_cpu_features().items() if there),
        "peak": peak,
        "images": len(images),
        "modes": modes,
        "skipped": skipped,
        "single_images": _single_images(models, images, say),
        "start_up": _start_up(list(models.values())[-1], say),
        "growth": [_grown(name, peak, rounds, skipped, say) for name in GROWN] if growth else [],
    }


def _apart(
    models: Mapping[str, Checkpoint], images: NDArray[np.uint8], labels: Labels | None,
    calibration: NDArray[np.uint8], batch: int, threads: int, rounds: int, peak: Mapping[str, float],
    peers: Sequence[Peer],
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """``_mode`` in a process of its own: some peers count their cores once and for all, at their first use."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(
                _mode, models, images, labels, calibration, batch, threads, rounds, peak, peers
            ).result()
        except BrokenProcessPool as error:
            raise ManiDPError(f"the process that measured {batch} at a time on {threads} threads has died") from error


def _mode(
    models: Mapping[str, Checkpoint], images: NDArray[np.uint8], labels: Labels | None,
    calibration: NDArray[np.uint8], batch: int, threads: int, rounds: int, peak: Mapping[str, float],
    peers: Sequence[Peer],
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """The figures, and who could not be measured and why."""
    skipped: dict[str, str] = {}
    total = len(images)
    batch = min(batch, total)
    pixels = {name: Prepared(model.preprocessing, images) for name, model in models.items()}
    scales = {name: model.preprocessing.apply(calibration) for name, model in models.items()}
    a_round = min(total // batch, max(100 // batch, 5)) * batch
    with pinned(threads):
        contenders = list(_contenders(models, _own(), peers, batch, threads, scales, skipped))
        times = interleaved(contenders, pixels, batch, a_round, rounds, threads)
        rows = _rows(contenders, times, models, pixels, labels, batch, threads, peak)
        figures = {"batch": batch, "threads": threads, "rounds": rounds, "images_a_round": a_round}
        return {**figures, "rows": [asdict(row) for row in rows]}, skipped


def _contenders(
    models: Mapping[str, Checkpoint], own: Sequence[tuple[str, str]], peers: Sequence[Peer], batch: int, threads: int,
    scales: Mapping[str, Batch], skipped: dict[str, str],
) -> Iterator[Contender]:  # fmt: skip
    """The engine in its ``own`` ways, then every peer that is installed; ``skipped`` takes the reasons of others."""
    for name, model in models.items():
        gated = bool(model.graph.gates)
        pin(threads)
        for precision, isa in own:
            engine = Engine(model, precision=precision, threads=threads, isa=isa)
            computes = "kept channels" if gated else "everything"
            yield Contender(f"manidp {isa}", name, computes, precision, _logits(engine))
        for peer in peers:
            try:
                pin(threads)
                opened = peer.open(model, batch, threads, scales[name])
                opened.run(np.zeros((batch, *model.graph.input.dims), dtype=np.float32))
            except (MissingExtraError, UnsupportedError) as error:
                skipped[f"{peer.name}, {name}"] = str(error)
                continue
            except Exception as error:  # whatever a peer raises, the others are still measured
                skipped[f"{peer.name}, {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            computes = "all channels, times the gate" if gated else "everything"
            yield Contender(peer.name, name, computes, opened.precision, opened.run)


def _own() -> list[tuple[str, str]]:
    """The engine's own ways to run here: precision and instruction set."""
    return [(precision, isa) for precision in PRECISIONS for isa in available_isas(precision)]


def _logits(engine: Engine) -> Run:
    return lambda images: engine.run(images).logits


def interleaved(
    contenders: Sequence[Contender],
    pixels: Mapping[str, Images],
    batch: int,
    a_round: int,
    rounds: int,
    threads: int,
) -> list[NDArray[np.float64]]:
    """Milliseconds an image of each contender, (rounds,) each; a first round warms up and is not counted.

    ``pixels``: of each model, the same images as it reads them.
    """
    total = len(next(iter(pixels.values())))
    times = np.empty((len(contenders), rounds))
    order = np.random.default_rng(0)
    for round_ in range(-1, rounds):
        start = max(round_, 0) * a_round % (total - a_round + 1)
        parts = {
            name: [of_model[at : at + batch] for at in range(start, start + a_round, batch)]
            for name, of_model in pixels.items()
        }
        for i in order.permutation(len(contenders)):
            run, own = contenders[i].run, parts[contenders[i].model]
            pin(threads)
            started = time.perf_counter()
            for part in own:
                run(part)
            times[i, round_] = (time.perf_counter() - started) / a_round * 1e3
    return list(times)


def _rows(
    contenders: Sequence[Contender], times: Sequence[NDArray[np.float64]], models: Mapping[str, Checkpoint],
    pixels: Mapping[str, Images], labels: Labels | None, batch: int, threads: int,
    peak: Mapping[str, float],
) -> Iterator[Row]:  # fmt: skip
    truth = {name: _computed(Engine(model, threads=threads), pixels[name]) for name, model in models.items()}
    fastest = peak[available_isas()[0]]
    for contender, milliseconds in zip(contenders, times, strict=True):
        wanted, computed = truth[contender.model]
        own = pixels[contender.model]
        logits = _all_logits(contender.run, own, batch)
        answers = logits.argmax(1)
        model = models[contender.model]
        macs = float(dense_macs(model.graph))
        if contender.computes == "kept channels":  # only the engine does, and in float16 it may keep others
            if contender.precision != "float32":
                _, computed = _computed(Engine(model, precision=contender.precision, threads=threads), own)
            macs = computed
        lower, median, upper = np.percentile(milliseconds, [25, 50, 75])
        isa = contender.runtime.removeprefix("manidp ")
        yield Row(
            contender.runtime, contender.model, contender.computes, contender.precision,
            None if labels is None else int((answers == labels[contender.model]).sum()), len(own), macs,
            median, lower, upper,
            macs / median * 1e3 / (peak.get(isa, fastest) * threads),
            float(np.abs(logits - wanted).max() / np.abs(wanted).max()),
            int((answers != wanted.argmax(1)).sum()),
        )  # fmt: skip


def _computed(engine: Engine, images: Images) -> tuple[Batch, float]:
    """Logits of every image, and mean multiply-adds."""
    logits, macs = [], []
    for start in range(0, len(images), PIECE):
        result = engine.run(images[start : start + PIECE])
        logits.append(result.logits)
        macs.append(result.macs)
    return np.concatenate(logits), float(np.concatenate(macs).mean())


def _all_logits(run: Run, images: Images, batch: int) -> Batch:
    """Of every image; the last batch is filled up with the first images, whose answers are then dropped."""
    whole = len(images) // batch * batch
    logits = [run(images[at : at + batch]) for at in range(0, whole, batch)]
    if whole < len(images):
        filled = np.concatenate([images[whole : len(images)], images[: whole + batch - len(images)]])
        logits.append(run(filled)[: len(images) - whole])
    return np.concatenate(logits)


def _single_images(models: Mapping[str, Checkpoint], images: ImageSet, say: Say) -> list[dict[str, Any]]:
    """Time of single images beside their multiply-adds: each the median of 15 passes over up to 1,000 images, or as
    many as SINGLE allows."""
    found = []
    with pinned(1):
        for name, model in models.items():
            if not model.graph.gates:
                continue
            say(f"single images, {name}")
            engine = Engine(model)
            height, width = images.size
            pixels = model.preprocessing.apply(images.images[: min(1000, max(1, SINGLE // (3 * height * width)))])
            macs = engine.run(pixels).macs
            if np.ptp(macs) == 0:  # gates that are not trained: no image costs more than another
                continue
            times = np.empty((15, len(pixels)))
            for passes in times:
                for i in range(len(pixels)):
                    started = time.perf_counter()
                    engine.run(pixels[i : i + 1])
                    passes[i] = time.perf_counter() - started
            microseconds = np.median(times, axis=0) * 1e6
            slope, fixed = np.polyfit(macs / 1e6, microseconds, 1)
            found.append({
                "model": name, "macs": macs.tolist(), "microseconds": np.round(microseconds, 2).tolist(),
                "microseconds_per_million_macs": float(slope), "fixed_microseconds": float(fixed),
                "correlation": float(np.corrcoef(macs, microseconds)[0, 1]),
            })  # fmt: skip
    return found


_FIRST_IMAGE = """
import sys
import time
started = time.perf_counter()
import manidp
imported = time.perf_counter()
engine = manidp.load(sys.argv[1])
loaded = time.perf_counter()
import numpy as np
engine.run(np.zeros((1, *engine.checkpoint.preprocessing.size, 3), np.uint8))
try:  # not ru_maxrss: that begins with what the parent held
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    resident = float("nan")
print(imported - started, loaded - imported, resident)
"""


PROCESSES = 7  # of which the start is timed


def _start_up(model: Checkpoint, say: Say) -> dict[str, float]:
    """Medians of fresh processes: seconds to import, to load, from process start to result; resident MiB."""
    say("fresh processes")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_checkpoint(model, file)
        for _ in range(PROCESSES):
            started = time.perf_counter()
            command = [sys.executable, "-c", _FIRST_IMAGE, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append([time.perf_counter() - started, *map(float, done.stdout.split())])
    whole, imported, loaded, resident = np.median(runs, axis=0).tolist()
    return {"import_seconds": imported, "load_seconds": loaded, "start_to_result_seconds": whole,
            "resident_mebibytes": resident}  # fmt: skip


GROWN = {
    "resnet-20": lambda: resnet(20),
    "resnet-32": lambda: resnet(32),
    "resnet-56": lambda: resnet(56),
    "imagenet-resnet-18": lambda: imagenet_resnet(18),
    "imagenet-resnet-34": lambda: imagenet_resnet(34),
}


def _grown(name: str, peak: Mapping[str, float], rounds: int, skipped: dict[str, str], say: Say) -> dict[str, Any]:
    """A network without training, thresholds calibrated so that KEEP_RATE of all channels is kept; one image a time."""
    say(f"{name}, random weights")
    graph = GROWN[name]()
    height, width = graph.input.dims[1:]
    pixels = np.random.default_rng(1).normal(size=(8, 3, height, width)).astype(np.float32)
    dense = random_checkpoint(graph)
    gated = calibrated(random_checkpoint(with_gates(graph)), pixels, KEEP_RATE)
    models = {f"{name} dense": dense, f"{name} gated": gated}
    with pinned(1):
        both = dict.fromkeys(models, pixels)
        contenders = list(_contenders(models, _own()[:1], PEERS[:1], 1, 1, both, skipped))
        times = interleaved(contenders, both, 1, len(pixels), rounds, 1)
        rows = list(_rows(contenders, times, models, both, None, 1, 1, peak))
    return {"network": name, "keep_rate": KEEP_RATE, "dense_macs": ungated_macs(graph), "images": len(pixels),
            "rounds": rounds, "rows": [asdict(row) for row in rows]}  # fmt: skip


def random_checkpoint(graph: Any, seed: int = 0) -> Checkpoint:
    """Weights that keep values near 1 whatever the depth; saliencies vary around 1 from image to image."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in graph.parameters.items():
        if name.endswith(("moving_variance", "fc2.bias")):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("gamma"):
            value = rng.uniform(0.2, 0.6, shape)  # else a residual network doubles its values with every block
        elif name.endswith("threshold"):
            value = np.zeros(())
        elif len(shape) > 1:
            value = rng.normal(size=shape) * np.sqrt((0.2 if ".fc" in name else 2) / np.prod(shape[1:]))
        else:
            value = rng.normal(size=shape) * 0.2
        weights[name] = np.asarray(value, dtype=np.float32)
    preprocessing = Preprocessing(CIFAR10_PREPROCESSING.mean, CIFAR10_PREPROCESSING.std, graph.input.dims[1:])
    return Checkpoint(graph, weights, preprocessing, tuple(f"class {i}" for i in range(graph.num_classes)))


def calibrated(model: Checkpoint, pixels: Batch, keep_rate: float) -> Checkpoint:
    """The same model with thresholds under which these images keep ``keep_rate`` of all gated channels.

    Each gate's threshold is one quantile of its saliencies as they are with everything open; the quantile is found by
    trial, since what earlier gates close changes the later saliencies. Candidates are operating points of one engine.
    """
    saliencies = Engine(model).run(pixels).gates
    low, high = 0.0, 1.0
    for _ in range(2):
        points = [
            OperatingPoint(f"{rate}", {
                f"{name}.threshold": np.array(np.quantile(value, 1 - rate), dtype=np.float32)
                for name, value in saliencies.items()
            })
            for rate in np.linspace(low, high, 17)
        ]  # fmt: skip
        engine = Engine(replace(model, points=tuple(points)))
        kept = [float((engine.run(pixels, budget=point.name).gate_values > 0).mean()) for point in points]
        place = next((i for i, share in enumerate(kept) if i and share > keep_rate), len(points) - 1)
        low, high = float(points[place - 1].name), float(points[place].name)
    return replace(model, weights={**model.weights, **points[place].values})


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """This thread, and those it starts meanwhile, stay on ``threads`` cores; where the system can do that."""
    if not CORES:
        yield
        return
    if threads > len(CORES):
        raise ManiDPError(f"{threads} threads were asked for; this process may use {len(CORES)} cores")
    pin(threads)
    try:
        yield
    finally:
        pin(len(CORES))


def pin(threads: int) -> None:
    """Said again before every turn: some peers leave the thread that calls them on one core, and so its children."""
    if CORES:
        os.sched_setaffinity(0, CORES[:threads])
