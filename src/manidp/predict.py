"""From images to class, probability, multiply-adds and kept shares, and to accuracy and latency over a labelled set.

Command line, report and servers all call this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.graph.macs import ungated_macs
from manidp.result import Result, probabilities

if TYPE_CHECKING:
    from manidp.data.images import ImageSet


class Runner(Protocol):
    """Whatever runs a checkpoint on images, as ``Engine`` does."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The network that runs."""
        ...

    @property
    def threads(self) -> int:
        """Threads of the CPU that it runs on."""
        ...

    @property
    def precision(self) -> str:
        """Of maps and convolutions."""
        ...

    @property
    def batch_size(self) -> int:
        """Images that run together on a thread or a device."""
        ...

    def run(
        self,
        images: Any,
        *,
        budget: str | float = ...,
        cascade: tuple[str | float, str | float] | None = ...,
        confidence: float | None = ...,
    ) -> Result:
        """What the network makes of the images at an operating point, or at one or two of a cascade."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image, and what it spent on it.

    ``probability``: of ``label``, 0..1; ``top``: the most probable classes and their probabilities, most probable
    first. ``share_of_dense``: ``macs`` over the multiply-adds of the network without gates. ``kept``: stage -> share of
    the channels that its gates kept, 0..1.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    macs: int
    share_of_dense: float
    kept: Mapping[str, float]


def predict(
    engine: Runner,
    images: Any,
    *,
    budget: str | float = DEFAULT,
    cascade: tuple[str | float, str | float] | None = None,
    confidence: float | None = None,
    top: int = 5,
) -> list[Prediction]:
    """One prediction an image, in their order; all but ``top`` is what ``Engine.run`` takes.

    Of a cascade ``macs`` are those of both passes, ``kept`` is that of the last.
    """
    result = engine.run(images, budget=budget, cascade=cascade, confidence=confidence)
    return predictions_of(engine.checkpoint, result, top)


def predictions_of(checkpoint: Checkpoint, result: Result, top: int = 5) -> list[Prediction]:
    """What a network's result says of each image, in their order, with the ``top`` most probable classes."""
    shares = probabilities(result.logits)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    dense, stages = ungated_macs(checkpoint.graph), kept_by_stage(result.kept)
    predictions = []
    for i, best in enumerate(order):
        ranked = tuple((checkpoint.classes[c], float(shares[i, c])) for c in best)
        predictions.append(
            Prediction(
                label=ranked[0][0],
                probability=ranked[0][1],
                top=ranked,
                macs=int(result.macs[i]),
                share_of_dense=float(result.macs[i] / dense),
                kept={stage: float(share[i]) for stage, share in stages.items()},
            )
        )
    return predictions


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a labelled set.

    ``correct`` of ``total`` images are right. ``mean_macs``: multiply-adds an image, gates included; ``dense_macs``:
    the same without gates. ``milliseconds_per_image``: ``batch_size`` images at a time on each of ``threads`` threads,
    or on the device; median of ``rounds`` passes over the set. ``went_on``: share of the images that the dear point of
    a cascade saw, None without.
    """

    model: str
    correct: int
    total: int
    mean_macs: float
    dense_macs: int
    milliseconds_per_image: float
    rounds: int
    threads: int
    batch_size: int
    precision: str
    budget: str | float
    went_on: float | None = None


def evaluate(
    engines: Mapping[str, Runner],
    images: ImageSet,
    budgets: Mapping[str, str | float] | None = None,
    cascades: Mapping[str, tuple[str | float, str | float, float]] | None = None,
) -> list[Evaluation]:
    """Accuracy, mean multiply-adds and time of each engine; they take turns over the whole set.

    engines: by the name of the model. budgets: operating points other than the default, by the same names; cascades:
    cheap point, dear point and confidence, where an engine shall run two. Classes are matched by name: raises
    ImageError for images of a class that a model does not know.
    """
    budgets, cascades = budgets or {}, cascades or {}
    how: dict[str, dict[str, Any]] = {name: {"budget": budgets.get(name, DEFAULT)} for name in engines}
    how |= {name: {"cascade": (low, high), "confidence": least} for name, (low, high, least) in cascades.items()}
    labels = {name: images.relabelled(engine.checkpoint.classes, name).labels for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    results: dict[str, Result] = {}
    for _ in range(9 if len(images) <= 1000 else 3):
        for name, engine in engines.items():
            started = time.perf_counter()
            results[name] = engine.run(images.images, **how[name])
            seconds[name].append(time.perf_counter() - started)
    return [
        Evaluation(
            model=name,
            correct=int((results[name].logits.argmax(1) == labels[name]).sum()),
            total=len(images),
            mean_macs=float(results[name].macs.mean()),
            dense_macs=ungated_macs(engine.checkpoint.graph),
            milliseconds_per_image=float(np.median(seconds[name])) / len(images) * 1e3,
            rounds=len(seconds[name]),
            threads=engine.threads,
            batch_size=engine.batch_size,
            precision=engine.precision,
            budget=" then ".join(map(str, cascades[name][:2])) if name in cascades else budgets.get(name, DEFAULT),
            went_on=None if (on := results[name].went_on) is None else float(on.mean()),
        )
        for name, engine in engines.items()
    ]


def asked_budget(text: str) -> str | float:
    """What users call an operating point: "45%" and "0.45" are shares of the dense multiply-adds, else a name."""
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return text


def kept_by_stage(kept: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.float64]]:
    """Share of channels that each image keeps, over all gates with one first name: stage -> (B,)."""
    groups: dict[str, list[NDArray[np.bool_]]] = {}
    for gate, mask in kept.items():
        groups.setdefault(gate.partition(".")[0], []).append(mask)
    return {stage: np.concatenate(masks, axis=1).mean(axis=1) for stage, masks in groups.items()}
