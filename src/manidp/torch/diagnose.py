"""What a gated network's decisions are worth: the same network with its gates frozen, shuffled, or set by class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manidp.data.images import ImageSet
from manidp.errors import GraphError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Node, Select
from manidp.graph.macs import ungated_macs
from manidp.progress import Progress
from manidp.result import Result
from manidp.torch.backend import Torch
from manidp.torch.network import Network, Output
from manidp.training.backend import estimate_statistics
from manidp.training.diagnosis import Diagnosis, Variant, differing
from manidp.training.evaluate import evaluate
from manidp.training.statistics import BATCH, to_observe

Rule = Callable[[str, Tensor, Tensor, Callable[[], Tensor]], Tensor]
"""A gate's name, its scores (B, C), its factors (B, C), what tells the classes (B,) that the network as it is sees
-> factors."""


def diagnose(
    checkpoint: Checkpoint, images: NDArray[np.uint8], test: ImageSet, progress: Progress | None = None
) -> Diagnosis:
    """The network on ``test`` as it is and with changed gates. Runs in float32 on the CPU.

    images: uint8 (N, H, W, 3), pictures to train with. They say what each channel's majority is, and batch statistics
    are estimated anew on them, cropped and flipped as the checkpoint's recipe says. test: classes in the model's order.
    progress: called with variants done and variants in all. Frozen and within a class, a channel of the majority is
    scaled by its score as before, or by 1 where the gate has that gain. Raises GraphError for a network without gates.
    """
    if not checkpoint.graph.gates:
        raise GraphError("a diagnosis is of what gates decide, and this network has none; give one that has")
    plain = Network(checkpoint.graph)
    plain.load(checkpoint.weights)
    as_it_is = _run(plain, checkpoint, test.images)
    before = _run(plain, checkpoint, images)
    majority = {name: torch.from_numpy(kept.mean(0) > 0.5) for name, kept in before.kept.items()}
    classes = before.logits.argmax(1)
    of_class = {name: _of_classes(kept, classes, len(checkpoint.classes)) for name, kept in before.kept.items()}
    ones = {gate.name for gate in checkpoint.graph.gates if gate.gain == "one"}

    def opened(name: str, open_: Tensor, score: Tensor) -> Tensor:
        return open_ * (torch.ones_like(score) if name in ones else score.clamp(min=0))

    rules: dict[str, Rule] = {
        "as it is": lambda name, score, gate, classes: gate,
        "frozen to the majority": lambda name, score, gate, classes: opened(name, majority[name], score),
        "majority within the predicted class": lambda name, score, gate, classes: opened(
            name, of_class[name][classes()], score
        ),
        "gates of another image": lambda name, score, gate, classes: gate.roll(1, 0),
    }
    variants = []
    learner = Torch().learner(checkpoint, *to_observe(checkpoint, images))
    for done, (name, rule) in enumerate(rules.items(), 1):
        learner.network = _Changed(checkpoint, plain, rule)
        estimate_statistics(learner, 0, len(images), min(BATCH, len(images)))
        found = evaluate(learner.run, test, checkpoint.preprocessing)
        variants.append(Variant(name, found.correct, float(found.macs.mean())))
        if progress is not None:
            progress(done, len(rules))
    by_gate, by_stage = differing(as_it_is.kept)
    low, high = np.percentile(as_it_is.macs, (5, 95))
    return Diagnosis(
        total=len(test),
        correct=int((as_it_is.logits.argmax(1) == test.labels).sum()),
        mean_macs=float(as_it_is.macs.mean()),
        macs_5=float(low),
        macs_95=float(high),
        dense_macs=ungated_macs(checkpoint.graph),
        differing=by_gate,
        differing_by_stage=by_stage,
        variants=tuple(variants),
        estimated_on=len(images),
    )


class _Changed(Network):
    """A network whose gates are what a rule makes of them."""

    def __init__(self, checkpoint: Checkpoint, plain: Network, rule: Rule) -> None:
        super().__init__(checkpoint.graph)
        self.load(checkpoint.weights)
        self.rule = rule
        self.seen = [plain]  # in a list: no part of this module
        self.classes: Callable[[], Tensor] = lambda: torch.zeros(0, dtype=torch.int64)

    def forward(self, images: Tensor) -> Output:
        @functools.cache
        def classes() -> Tensor:
            with torch.no_grad():
                found: Tensor = self.seen[0].eval()(images).logits.argmax(1)
            return found

        self.classes = classes  # once for all gates, and only for rules that ask
        return super().forward(images)

    def _step(self, node: Node, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        value = super()._step(node, own, values)
        if not isinstance(node, Select):
            return value
        return self.rule(node.name, values[node.inputs[0]], value, self.classes)


def _run(network: Network, checkpoint: Checkpoint, images: NDArray[np.uint8]) -> Result:
    parts = [
        network.run(checkpoint.preprocessing.apply(images[start : start + 500])) for start in range(0, len(images), 500)
    ]
    logits, gates = (np.concatenate(values) for values in zip(*((p.logits, p.gate_values) for p in parts), strict=True))
    return Result(checkpoint.graph, logits, gates)


def _of_classes(kept: NDArray[np.bool_], classes: NDArray[np.int64], count: int) -> Tensor:
    """(classes, C) bool: the majority within each class; of all images for a class that none is seen to be of."""
    shares = [kept[classes == c] if (classes == c).any() else kept for c in range(count)]
    return torch.from_numpy(np.stack([share.mean(0) > 0.5 for share in shares]))
