"""What a gated network computed for whom, as plain arrays and figures; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from manidp.data.images import ImageSet
from manidp.errors import ManiDPError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph.macs import ungated_macs
from manidp.progress import Progress
from manidp.result import Result, probabilities

BATCH = 100  # images a call


class Network(Protocol):
    """Whatever runs on pictures: an engine, or another way to compute its ``checkpoint``."""

    checkpoint: Checkpoint

    def run(self, images: NDArray[np.uint8]) -> Result:
        """What the network makes of uint8 (B, H, W, 3)."""
        ...


class Agreement(NamedTuple):
    """How many images the dense and the gated network classify correctly; the first four add up to all images."""

    both_right: int
    only_dense: int
    only_gated: int
    both_wrong: int
    same_prediction: int


@dataclass(frozen=True)
class Findings:
    """What a gated network did with N labelled images.

    ``predicted`` int64 (N,) and its ``probability`` float (N,); ``kept``: gate name -> bool (N, C), in the order in
    which the gates are computed; ``macs`` int64 (N,), gates included. ``dense_macs``: of any image in the dense
    network, or where none ran in this one without gates; ``dense_predicted`` int64 (N,), if a dense network ran.
    """

    image_set: ImageSet
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    kept: Mapping[str, NDArray[np.bool_]]
    macs: NDArray[np.int64]
    dense_macs: int
    dense_predicted: NDArray[np.int64] | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,) whether the gated network is right."""
        return np.equal(self.predicted, self.image_set.labels)

    @property
    def dense_right(self) -> NDArray[np.bool_] | None:
        """(N,) whether the dense network is right, if one ran."""
        return None if self.dense_predicted is None else np.equal(self.dense_predicted, self.image_set.labels)

    @property
    def saved(self) -> float:
        """Share of the dense network's multiply-adds that an image saves on average."""
        return 1 - float(self.macs.mean()) / self.dense_macs

    @property
    def by_cost(self) -> NDArray[np.int64]:
        """Indices of the images, cheapest first; equal costs stay in order."""
        return np.argsort(self.macs, kind="stable").astype(np.int64)

    @property
    def agreement(self) -> Agreement | None:
        """Counts of images; None where no dense network ran."""
        gated, dense, same = self.right, self.dense_right, self.predicted == self.dense_predicted
        if dense is None:
            return None
        counts = (dense & gated, dense & ~gated, ~dense & gated, ~dense & ~gated, same)
        return Agreement(*(int(count.sum()) for count in counts))


def collect(
    network: Network,
    image_set: ImageSet,
    dense: Network | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Run ``network``, and if given the ``dense`` one, over all images; classes are matched by name.

    Raises ManiDPError for no images, images of a class that the network does not know, a network without gates (there
    is nothing to report on), a dense one that has gates or other classes, and logits that are not finite.
    """
    checkpoint = network.checkpoint
    if not len(image_set):
        raise ManiDPError("a report needs labelled images; the image set is empty")
    image_set = image_set.relabelled(checkpoint.classes, "the network")
    if not checkpoint.graph.gates:
        raise ManiDPError("a report shows what gates keep, and this network has none; give one that has")
    if dense is not None:
        if dense.checkpoint.graph.gates:
            raise ManiDPError("the dense network must have no gates")
        if sorted(dense.checkpoint.classes) != sorted(checkpoint.classes):
            expected, came = list(checkpoint.classes), list(dense.checkpoint.classes)
            raise ManiDPError(f"the dense network must know the classes of the gated one, {expected}; got {came}")
    total = len(image_set) * (1 if dense is None else 2)
    results = list(_results(network, image_set, progress, 0, total))
    logits = np.concatenate([result.logits for result in results]).astype(np.float64)
    dense_predicted = None
    dense_macs = ungated_macs(checkpoint.graph)
    if dense is not None:
        dense_results = list(_results(dense, image_set, progress, len(image_set), total))
        dense_macs = int(dense_results[0].macs[0])
        places = np.array([checkpoint.classes.index(name) for name in dense.checkpoint.classes], np.int64)
        dense_predicted = places[np.concatenate([result.logits for result in dense_results]).argmax(axis=1)]
    return Findings(
        image_set=image_set,
        predicted=logits.argmax(axis=1).astype(np.int64),
        probability=probabilities(logits).max(axis=1),
        kept={gate.name: np.concatenate([r.kept[gate.name] for r in results]) for gate in checkpoint.graph.gates},
        macs=np.concatenate([result.macs for result in results]).astype(np.int64),
        dense_macs=dense_macs,
        dense_predicted=dense_predicted,
    )


def _results(
    network: Network, image_set: ImageSet, progress: Progress | None, before: int, total: int
) -> Iterator[Result]:
    for start in range(0, len(image_set), BATCH):
        images = image_set.images[start : start + BATCH]
        result = network.run(images)
        if not np.isfinite(result.logits).all():
            raise ManiDPError(f"the network overflows: logits of images {start} to {start + len(images)} not finite")
        yield result
        if progress is not None:
            progress(before + start + len(images), total)


def macs_histogram(macs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts (K,) and edges (K + 1,) of at most some 60 bins, their width 1, 2 or 5 times a power of ten."""
    low, high = int(macs.min()), int(macs.max())
    rough = max((high - low) / 40, high / 100, 1)  # narrower than a hundredth of the axis cannot be seen
    power = 10 ** math.floor(math.log10(rough))
    width = min((power * step for step in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    edges = np.arange(low // width, high // width + 2, dtype=np.int64) * width
    return np.histogram(macs, edges)[0].astype(np.int64), edges


def class_keep_rates(findings: Findings) -> NDArray[np.float64]:
    """(classes, gates): share of the gate's channels kept, on average over the class's images; NaN without images."""
    rates = np.stack([kept.mean(axis=1) for kept in findings.kept.values()], axis=1)
    labels = findings.image_set.labels
    return np.stack([
        rates[labels == label].mean(axis=0) if (labels == label).any() else np.full(rates.shape[1], np.nan)
        for label in range(len(findings.image_set.classes))
    ])  # fmt: skip


def confidence_interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a rate. Source: Wilson 1927."""
    z, rate = 1.959964, count / total
    middle = rate + z * z / (2 * total)
    reach = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total**2))
    return (middle - reach) / (1 + z * z / total), (middle + reach) / (1 + z * z / total)


def millions(macs: float) -> str:
    """Multiply-adds as text: "18.64 M"."""
    return f"{macs / 1e6:,.2f}\N{NO-BREAK SPACE}M"


def percent(share: float) -> str:
    """A share of 0..1 as text: "45.7 %"."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def rate(count: int, total: int) -> str:
    """A count and its share: "9,260 of 10,000 (92.60 %)"."""
    return f"{count:,} of {total:,} ({100 * count / total:.2f}\N{NO-BREAK SPACE}%)"


def named(findings: Findings, label: int, length: int = 32) -> str:
    """A class name fit to be shown: no longer than ``length``, no character that XML or UTF-8 forbids."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in findings.image_set.classes[label])
    return name if len(name) <= length else f"{name[: length - 1]}…"
