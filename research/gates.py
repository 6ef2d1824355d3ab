"""Do gates that read the image pay? Many students in lockstep on one GPU, and the figures of each on held-out images.

Everything starts from random weights and is trained on 45,000 of CIFAR-10's training images; 5,000 are held out to
choose by. The test images are never read. Three phases share the time that is given:

- teacher: a ResNet-20 of four times the width, and a dense ResNet-20, both taught by labels alone;
- short: every variant, three seeds each, from that dense network, taught by the teacher;
- long: the dynamic variant that is best on the held-out images goes on, on all 50,000 images, and so does the bundled
  model. Beside each goes its static twin, the same weights with the gates frozen to one mask of the same budget; and
  the best variant whose gates never saw the image, and the dense network.

All students of a seed get the same batches. A student's whole step is one CUDA graph on a stream of its own; nothing
waits for the host but the end of an epoch. ``--help`` tells the options; README.md beside this tells what it gave.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from manidp.data.preprocessing import CIFAR10_PREPROCESSING
from manidp.formats.checkpoint import checkpoint_path, load_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Clip, Graph
from manidp.graph.macs import gate_macs, macs_per_image, node_macs
from manidp.models import resnet
from manidp.torch.losses import complexity_weights, distillation_loss, similarity_loss, sparsity_loss
from manidp.torch.network import Network, _mean
from manidp.training.schedule import keep_rate, learning_rate

BUDGET = 18.6e6  # mean multiply-adds an image, gates included where they are computed
BATCH = 256
BLOCKS = tuple(f"stage_{stage}.{block}" for stage in (1, 2, 3) for block in range(3))
GATES = tuple(f"{block}.mb{k}" for block in BLOCKS for k in (1, 2))
HARD_SLOPE = 1e4  # a 0/1 gate as the format knows it: min(relu(slope * (score - threshold) + 1/2), 1)
Array = NDArray[Any]


@dataclass(frozen=True)
class Variant:
    """One way to gate. ``reads``: scores depend on the image; else a constant for each channel, which costs nothing.

    normalised: scores are batch-normalised for each channel before the threshold. rule: "follow" is ManiDP, thresholds
    at the rank of mean saliencies that meets the budget, and its sparsity loss; "loss" is one constant threshold,
    a straight-through gradient for open and closed channels alike, and a loss on the batch's mean multiply-adds;
    "frozen" is a given mask. noise: scale of logistic noise on scores, 0 in the last third. hard: the gate is 0 or 1,
    else it scales the channel by the score. easy_cheap: weight of the squared distance of each image's cost to a target
    of 0.6 to 1.4 budgets, by how sure the teacher is. similarity: weight of ManiDP's similarity loss. spread: standard
    deviation of normalised scores at the start. clip: greatest norm of a gradient.
    """

    gated: bool = True
    reads: bool = True
    normalised: bool = False
    rule: str = "loss"
    noise: float = 0.0
    hard: bool = False
    easy_cheap: float = 0.0
    similarity: float = 0.1
    width: int = 16
    spread: float = 0.15
    clip: float = 1.0


VARIANTS: dict[str, Variant] = {
    "dense": Variant(gated=False, reads=False),
    "published": Variant(rule="follow"),
    "normalised": Variant(rule="follow", normalised=True),
    "budget-loss": Variant(),
    "norm-budget": Variant(normalised=True),
    "norm-budget-noise": Variant(normalised=True, noise=0.1),
    "hard": Variant(normalised=True, noise=0.1, hard=True),
    "easy-cheap": Variant(normalised=True, easy_cheap=1.0),
    "constant": Variant(reads=False, similarity=0.0),
    "constant-noise": Variant(reads=False, similarity=0.0, noise=0.1),
}


FROZEN = Variant(reads=False, rule="frozen", similarity=0.0)


class Pixels:
    """The training images on the device, with a mirrored border of four pixels for the random crop."""

    def __init__(self, images: Array, labels: Array, device: str) -> None:
        border = ((0, 0), (4, 4), (4, 4), (0, 0))
        self.padded = torch.from_numpy(np.pad(images, border, "reflect")).to(device)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        mean, std = (torch.tensor(v, device=device) for v in (CIFAR10_PREPROCESSING.mean, CIFAR10_PREPROCESSING.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
        return (pixels * self.scale + self.shift).permute(0, 3, 1, 2)

    def plain(self, chosen: Tensor, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as they are, in batches."""
        for part in torch.split(chosen, size):
            yield self.normalise(self.padded[part, 4:-4, 4:-4]), self.labels[part]

    def crops(self, chosen: Tensor, corner: Tensor, flip: Tensor) -> Tensor:
        """Crops at ``corner`` (2, B), mirrored where ``flip`` (B,) is 1."""
        steps = torch.arange(32, device=chosen.device)
        rows = corner[0][:, None] + steps
        columns = corner[1][:, None] + torch.where(flip[:, None] == 1, 31 - steps, steps)
        return self.normalise(self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]])


class Lane:
    """The batches of one seed, and what the teacher says of them; every student of that seed reads them here."""

    def __init__(self, pixels: Pixels, chosen: Tensor, seed: int, teacher: Network | None, dtype: torch.dtype) -> None:
        self.pixels, self.chosen, self.seed, self.teacher, self.dtype = pixels, chosen, seed, teacher, dtype
        device = chosen.device
        self.steps = len(chosen) // BATCH
        self.order = torch.zeros(self.steps, BATCH, dtype=torch.int64, device=device)
        self.corner = torch.zeros(self.steps, 2, BATCH, dtype=torch.int64, device=device)
        self.flip = torch.zeros(self.steps, BATCH, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.images = torch.zeros(BATCH, 3, 32, 32, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self.taught = torch.zeros(BATCH, 10, device=device)
        self.shuffle(0)

    def shuffle(self, epoch: int) -> None:
        """The order, crops and flips of an epoch, from (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.chosen), generator=generator)[: self.order.numel()]
        self.order.copy_(self.chosen[order.to(self.chosen.device)].view_as(self.order))
        self.corner.copy_(torch.randint(0, 9, self.corner.shape, generator=generator))
        self.flip.copy_(torch.randint(0, 2, self.flip.shape, generator=generator))
        self.position.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """The next batch."""
        chosen, corner, flip = (t.index_select(0, self.position)[0] for t in (self.order, self.corner, self.flip))
        images = self.pixels.crops(chosen, corner, flip)
        self.images.copy_(images)
        self.labels.copy_(self.pixels.labels[chosen])
        if self.teacher is not None:
            with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
                self.taught.copy_(self.teacher(images).logits)
        self.position.add_(1).remainder_(self.steps)


def _bn(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, True, 0.0, 1e-5)


def _after_stem(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(_bn(x, gamma, beta))
    return y, _mean(y)


def _after_a(x: Tensor, gamma: Tensor, beta: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    y = F.relu(_bn(x, gamma, beta))
    return (y, y[:, :, 0, 0]) if gate is None else (y * gate.to(y.dtype)[:, :, None, None], _mean(y))


def _after_b(x: Tensor, gamma: Tensor, beta: Tensor, gate: Tensor | None, shortcut: Tensor) -> tuple[Tensor, ...]:
    y = _bn(x, gamma, beta)
    if gate is None:
        return F.relu(shortcut + y), y[:, :, 0, 0]
    out = F.relu(shortcut + y * gate.to(y.dtype)[:, :, None, None])
    return out, _mean(y), _mean(out)


def _scores(pooled: Tensor, fc1: Tensor, fc2: Tensor, scale: Tensor | None, bias: Tensor) -> tuple[Tensor, ...]:
    """Scores (B, C), and the batch's mean and variance of what ``scale`` normalises."""
    raw = F.linear(F.relu(F.linear(pooled, fc1)), fc2)
    if scale is None:
        return (raw + bias,)
    variance, mean = torch.var_mean(raw, 0, correction=0)
    return (raw - mean) * torch.rsqrt(variance + 1e-5) * scale + bias, mean, variance


def _decide(score: Tensor, threshold: Tensor, noise: Tensor | None, hard: bool) -> tuple[Tensor, ...]:
    """(saliency, open, gate); ``open`` is 0 or 1, with the gradient of a steep sigmoid."""
    saliency = F.relu(score)
    distance = score - threshold if noise is None else score - threshold + noise
    soft = torch.sigmoid(distance / 0.15)
    opened = (distance > 0).to(soft.dtype) + soft - soft.detach()
    return saliency, opened, opened if hard else saliency * opened


def _descend(
    flat: Tensor,
    grad: Tensor,
    momentum: Tensor,
    average: Tensor,
    decay: Tensor,
    rate: Tensor,
    clip: float,
) -> None:
    """SGD with Nesterov momentum and weight decay, and the running average of the weights; in place."""
    grad = grad * (clip / (grad.norm() + 1e-6)).clamp(max=1) + decay * flat
    momentum.mul_(0.9).add_(grad)
    flat.sub_(rate * (grad + 0.9 * momentum))
    average.lerp_(flat, 0.004)


class Compiled:
    """The fused pieces, through torch.compile or as they are."""

    def __init__(self, compiled: bool) -> None:
        torch._dynamo.config.recompile_limit = 64

        def wrap(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
            return torch.compile(function, dynamic=dynamic) if compiled else function

        self.stem, self.a, self.b = (wrap(f, False) for f in (_after_stem, _after_a, _after_b))
        self.scores, self.decide = (wrap(f, True) for f in (_scores, _decide))  # one code for all widths
        self.descend, self.similarity = wrap(_descend, True), wrap(similarity_loss, False)


@cache
def costs(variant: Variant) -> tuple[float, list[tuple[float, float]]]:
    """Multiply-adds that no gate governs, and for each block those of a kept channel of conv_a and of a kept pair."""
    graph = with_gates(resnet(20))
    macs = node_macs(graph)
    blocks = [(macs[f"{b}.conv_a"] / graph.shapes[f"{b}.conv_a"][0],
               macs[f"{b}.conv_b"] / graph.shapes[f"{b}.conv_b"][0] ** 2) for b in BLOCKS]  # fmt: skip
    gated = sum(macs[f"{b}.conv_{k}"] for b in BLOCKS for k in "ab")
    free = 0 if variant.reads else gate_macs(graph)
    return float(sum(macs.values()) - gated - free), blocks


def image_costs(variant: Variant, opened: Sequence[Tensor]) -> Tensor:
    """(B,) multiply-adds of each image, in budgets; ``opened``: (B, C) of every gate in order, differentiable."""
    fixed, blocks = costs(variant)
    total = torch.full_like(opened[0][:, 0], fixed / BUDGET)
    counts = [o.sum(1) for o in opened]
    for i, (single, pair) in enumerate(blocks):
        total = total + counts[2 * i] * (single / BUDGET) + counts[2 * i] * counts[2 * i + 1] * (pair / BUDGET)
    return total


def ranked_threshold(means: Tensor, rate: Tensor) -> Tensor:
    """``schedule.continuous_threshold`` for (gates, C) at once, on the device."""
    gates, channels = means.shape
    ordered = torch.cat([means.sort(1, descending=True).values, means.new_zeros(gates, 1)], 1)
    place = torch.where(rate <= 1, rate * channels - 1, channels - 2 + rate).clamp(0, channels - 1e-3)
    low = place.floor().long().expand(gates, 1)
    return ordered.gather(1, low)[:, 0].lerp(ordered.gather(1, low + 1)[:, 0], place - place.floor())


class Student:
    """One network in training: weights in one flat tensor, and everything its step needs on the device.

    ``control`` holds what changes from step to step: learning rate, budget (in BUDGETs), share of the noise.
    ``table`` sums, over an epoch, steps, loss, cross entropy, right answers (share), cost (in budgets).
    """

    def __init__(
        self, name: str, variant: Variant, lane: Lane, control: Tensor, parts: Compiled, *,
        weights: Mapping[str, Tensor] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.variant, self.lane, self.control, self.parts, self.seed = (
            name,
            variant,
            lane,
            control,
            parts,
            seed,
        )
        device = control.device
        self.graph = with_gates(resnet(20)) if variant.gated else resnet(20, width=variant.width)
        fresh = self._fresh(seed)
        given = {k: v for k, v in (weights or {}).items() if k in fresh}
        values = {k: given.get(k, v).to(device).float() for k, v in fresh.items()}
        self.convs = [k for k, v in values.items() if v.dim() == 4]
        self.rest = [k for k in values if k not in self.convs]
        self.shapes = {k: tuple(v.shape) for k, v in values.items()}
        pieces = [values[k].permute(0, 2, 3, 1).reshape(-1) for k in self.convs] + [
            values[k].reshape(-1) for k in self.rest
        ]
        self.flat = torch.cat(pieces).requires_grad_()
        marks = [
            torch.full((p.numel(),), 0.0 if ".mb" in k else 5e-4)
            for k, p in zip(self.convs + self.rest, pieces, strict=True)
        ]
        self.decay = torch.cat(marks).to(device)
        self.momentum, self.average = torch.zeros_like(self.flat), self.flat.detach().clone()
        self.table = torch.zeros(5, device=device)
        self.recent_ce = torch.zeros((), device=device)  # moving mean of the cross entropy
        self.multiplier = torch.zeros((), device=device)  # price of the budget, rule "loss"
        self.level = torch.tensor(1.2 if variant.rule == "follow" else 0.5, device=device)  # keep rate or threshold
        self.means = [torch.ones(6, c, device=device) for c in (16, 32, 64)] if variant.gated else []
        self.thresholds = [torch.zeros(6, device=device) for _ in self.means]
        self.masks = {k: v.to(device) for k, v in (weights or {}).items() if k.endswith(".mask")}
        self.graphed: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def take_thresholds(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with the thresholds of a checkpoint: mean saliencies and keep rate as the first batch shows them."""
        for i, thresholds in enumerate(self.thresholds):
            thresholds.copy_(torch.stack([weights[f"{name}.threshold"] for name in GATES[6 * i : 6 * i + 6]]))
        self.lane.step()
        self.parts, parts = Compiled(False), self.parts
        records = self.forward(self.flat, self.lane.images)[1]
        self.parts, rates = parts, []
        for i, (means, thresholds) in enumerate(zip(self.means, self.thresholds, strict=True)):
            means.copy_(torch.stack([records[name][0].mean(0) for name in GATES[6 * i : 6 * i + 6]]))
            rates.append((means > thresholds[:, None]).float().mean())
        self.level.copy_(torch.stack(rates).mean())

    @torch.no_grad()
    def go_on_from(self, before: Student) -> None:
        """Take over what another student of the same variant has learned."""
        self.flat.copy_(before.average)
        self.average.copy_(before.average)
        mine = (self.multiplier, self.recent_ce, self.level, *self.means, *self.thresholds)
        theirs = (before.multiplier, before.recent_ce, before.level, *before.means, *before.thresholds)
        for own, other in zip(mine, theirs, strict=True):
            own.copy_(other)

    def _fresh(self, seed: int) -> dict[str, Tensor]:
        values = {k: v.detach() for k, v in Network(self.graph, seed=seed).named_parameters()}
        if not self.variant.gated:
            return values
        generator = torch.Generator().manual_seed(seed)
        if not self.variant.reads:
            return {k: v for k, v in values.items() if not k.endswith(("fc1.weight", "fc2.weight"))}
        if self.variant.normalised:
            for name in GATES:
                fc2 = values[f"{name}.fc2.weight"]
                fc2.copy_(torch.randn(fc2.shape, generator=generator) * math.sqrt(2 / fc2.shape[1]))
                values[f"{name}.scale"] = torch.full(fc2.shape[:1], self.variant.spread)
        return values

    def own(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as differentiable views; convolutions in the lane's precision, channels last."""
        sizes = {k: math.prod(s) for k, s in self.shapes.items()}
        conv, rest = flat.split([sum(sizes[k] for k in self.convs), sum(sizes[k] for k in self.rest)])  # type: ignore[no-untyped-call]
        out = {}
        for k, piece in zip(self.convs, conv.to(self.lane.dtype).split([sizes[k] for k in self.convs]), strict=True):
            o, i, h, w = self.shapes[k]
            out[k] = piece.view(o, h, w, i).permute(0, 3, 1, 2)
        for k, piece in zip(self.rest, rest.split([sizes[k] for k in self.rest]), strict=True):
            out[k] = piece.view(self.shapes[k])
        return out

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""
        return [self.flat.detach(), self.momentum, self.average, self.table, self.recent_ce, self.multiplier,
                self.level, *self.means, *self.thresholds]  # fmt: skip

    def forward(self, flat: Tensor, images: Tensor, train: bool = True) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        """Logits, and of every gate (saliency, open, gate, feature, mean and variance if normalised)."""
        p, parts, records = self.own(flat), self.parts, {}
        noise: Sequence[Tensor | None] = [None] * len(GATES)
        if self.variant.noise and train:
            widths = [self.shapes[f"{name}.fc2.bias"][0] for name in GATES]
            u = torch.rand(len(images), sum(widths), device=images.device).clamp(1e-6, 1 - 1e-6)
            noise = ((u.log() - (1 - u).log()) * (self.variant.noise * self.control[2])).split(widths, 1)  # type: ignore[no-untyped-call]
        x, pooled = parts.stem(F.conv2d(images, p["conv_1_3x3.weight"], padding=1), p["bn_1.gamma"], p["bn_1.beta"])
        for i, b in enumerate(BLOCKS):
            stride = 2 if i in (3, 6) else 1
            bn_a, bn_b = ((p[f"{b}.bn_{k}.gamma"], p[f"{b}.bn_{k}.beta"]) for k in "ab")
            first = self._gate(p, 2 * i, pooled, noise[2 * i])
            a, mean_a = parts.a(F.conv2d(x, p[f"{b}.conv_a.weight"], None, stride, 1), *bn_a, first and first[2])
            second = self._gate(p, 2 * i + 1, mean_a * first[2] if first else pooled, noise[2 * i + 1])
            shortcut = F.conv2d(x, p[f"{b}.downsample.0.weight"], None, 2) if stride == 2 else x
            x, mean_b, *means = parts.b(
                F.conv2d(a, p[f"{b}.conv_b.weight"], None, 1, 1), *bn_b, second and second[2], shortcut
            )
            if first and second:
                pooled = means[0]
                records[f"{b}.mb1"] = (*first[:3], mean_a, *first[3:])
                records[f"{b}.mb2"] = (*second[:3], mean_b, *second[3:])
        final = pooled if self.variant.gated else _mean(x)
        return F.linear(final, p["classifier.weight"], p["classifier.bias"]), records

    def _gate(
        self, p: Mapping[str, Tensor], index: int, pooled: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """(saliency, open, gate, mean and variance if normalised), or None in a dense network."""
        v, name = self.variant, GATES[index]
        if not v.gated:
            return None
        bias = p[f"{name}.fc2.bias"]
        if v.reads:
            score, *moments = self.parts.scores(
                pooled, p[f"{name}.fc1.weight"], p[f"{name}.fc2.weight"], p.get(f"{name}.scale"), bias
            )
        else:
            score, moments = bias.expand(len(pooled), -1), []
        if v.rule == "frozen":
            saliency = F.relu(score)
            opened = self.masks[f"{name}.mask"].expand_as(score)
            return saliency, opened, saliency * opened, *moments
        if v.rule == "follow":
            saliency = F.relu(score)
            opened = (saliency > self.thresholds[index // 6][index % 6]).to(score.dtype)
            return saliency, opened, saliency * opened, *moments
        return *self.parts.decide(score, self.level, noise, v.hard), *moments

    def loss(self) -> tuple[Tensor, Tensor]:
        """The total of the lane's batch, and what ``table`` sums."""
        v, lane = self.variant, self.lane
        logits, records = self.forward(self.flat, lane.images)
        each = F.cross_entropy(logits, lane.labels, reduction="none")
        total = ce = each.mean()
        if lane.teacher is not None:
            total = 0.1 * ce + 0.9 * distillation_loss(logits, lane.taught, 4.0)
        cost = torch.ones_like(each)
        if records:
            saliencies, opened, _, features = list(zip(*(r[:4] for r in records.values()), strict=True))
            cost = image_costs(v, opened)
            ratio = cost.mean() / self.control[1]
            if v.reads and v.similarity:
                total = total + v.similarity * self.parts.similarity(saliencies, features)
            if v.rule == "follow":
                total = total + 5e-3 * self._sparsity(saliencies, each)
                self._follow(saliencies, ratio.detach())
            elif v.rule == "loss":
                total = total + self.multiplier.clone() * ratio + 5.0 * (ratio - 1).square()
                if v.easy_cheap:
                    sure = F.softmax(lane.taught, 1).amax(1)
                    rank = (sure[:, None] < sure[None, :]).float().mean(1)  # 0: the surest
                    target = (0.6 + 0.8 * rank) * self.control[1]
                    total = total + v.easy_cheap * (cost - target).square().mean()
                with torch.no_grad():
                    self.multiplier.add_(0.01 * (ratio - 1)).clamp_(0, 10)
            with torch.no_grad():
                self.recent_ce.lerp_(ce, 0.01)
        right = (logits.argmax(1) == lane.labels).float().mean()
        return total, torch.stack([torch.ones_like(ce), total, ce, right, cost.mean()]).detach()

    def _sparsity(self, saliencies: Sequence[Tensor], each: Tensor) -> Tensor:
        limit = 0.5 * self.recent_ce
        weights = complexity_weights(each / limit.clamp(min=1e-6), 1.0)  # (C - CE) / C without asking the host for C
        return sparsity_loss(saliencies, weights)

    @torch.no_grad()
    def _follow(self, saliencies: Sequence[Tensor], ratio: Tensor) -> None:
        """Thresholds at the rate that keeps the budget, on moving means of the saliencies."""
        self.level.sub_(0.02 * (ratio - 1).clamp(-0.2, 0.2)).clamp_(0.02, 2)
        for i, (means, thresholds) in enumerate(zip(self.means, self.thresholds, strict=True)):
            means.lerp_(torch.stack([s.mean(0) for s in saliencies[6 * i : 6 * i + 6]]), 0.1)
            thresholds.copy_(ranked_threshold(means, self.level))

    def step(self) -> None:
        """One step of training on the lane's batch."""
        loss, row = self.loss()
        (grad,) = torch.autograd.grad(loss, [self.flat])
        with torch.no_grad():
            flat, rate, clip = self.flat.detach(), self.control[0], self.variant.clip
            self.parts.descend(flat, grad, self.momentum, self.average, self.decay, rate, clip)
            self.table.add_(row)

    @torch.no_grad()
    def settled(self, pixels: Pixels, chosen: Tensor) -> Settled:
        """The average weights in the project's own network: scores folded, budget met, batch statistics anew."""
        return Settled(self, pixels, chosen)


class Settled:
    """A student as the engine will run it."""

    def __init__(self, student: Student, pixels: Pixels, chosen: Tensor) -> None:
        self.student, self.variant, self.pixels, self.chosen = student, student.variant, pixels, chosen
        device = chosen.device
        self.level = float(student.level)
        graph = student.graph
        if self.variant.hard:
            nodes = tuple(replace(n, high=1.0) if isinstance(n, Clip) else n for n in graph.nodes)
            graph = Graph(nodes, graph.output)
        self.network: Network = Network(graph).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = self.network.state_dict()
        self._fold()
        for i, name in enumerate(GATES if self.variant.gated and self.variant.rule != "frozen" else ()):
            value = student.thresholds[i // 6][i % 6] if self.variant.rule == "follow" else student.level
            self.state[f"{name}.threshold"].fill_(0.5 if self.variant.hard else float(value))
            if self.variant.hard:
                self._set(self.level, [])
        self._estimate_statistics()
        for _ in range(2 if self.variant.gated else 1):
            if self.variant.rule != "frozen" and self.variant.gated:
                self._meet_budget()
            self._estimate_statistics()
        self.network.eval()

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Augmented training images, the same ones each time."""
        generator = torch.Generator().manual_seed(77)
        for part in self.chosen[:count].split(2000):  # type: ignore[no-untyped-call]
            corner = torch.randint(0, 9, (2, len(part)), generator=generator).to(part.device)
            flip = torch.randint(0, 2, (len(part),), generator=generator).to(part.device)
            yield self.pixels.crops(part, corner, flip)

    def _fold(self) -> None:
        student, flat = self.student, self.student.average
        parts, student.parts = student.parts, Compiled(False)  # a few batches are not worth compiling for
        moments: dict[str, list[Tensor]] = {}
        if self.variant.normalised:
            seen = []
            for images in self._batches(4000):
                for part in images.to(student.lane.dtype).split(BATCH):  # type: ignore[no-untyped-call]
                    if len(part) == BATCH:
                        seen.append(student.forward(flat, part, train=False)[1])
            for name in GATES:
                mean = torch.stack([r[name][4] for r in seen])
                variance = torch.stack([r[name][5] for r in seen]).mean(0) + mean.var(0, correction=0)
                moments[name] = [mean.mean(0), variance]
        student_dtype, student.lane.dtype = student.lane.dtype, torch.float32
        own = student.own(flat)
        student.lane.dtype, student.parts = student_dtype, parts
        for name, value in own.items():
            if name in self.state:
                self.state[name].copy_(value)
        for name in GATES if self.variant.gated else ():
            if self.variant.normalised:
                mean, variance = moments[name]
                factor = own[f"{name}.scale"] * torch.rsqrt(variance + 1e-5)
                self.state[f"{name}.fc2.weight"].mul_(factor[:, None])
                self.state[f"{name}.fc2.bias"].sub_(factor * mean)
            if not self.variant.reads:
                self.state[f"{name}.fc2.weight"].zero_()
            if self.variant.rule == "frozen":
                self.state[f"{name}.fc2.bias"].mul_(student.masks[f"{name}.mask"])
        if self.variant.hard:
            self.scores = {name: self.state[f"{name}.fc2.bias"].clone() for name in GATES}
            for name in GATES:
                self.state[f"{name}.fc2.weight"].mul_(HARD_SLOPE)

    def _set(self, level: float, means: Sequence[Tensor]) -> None:
        self.level = level
        for i, name in enumerate(GATES):
            if self.variant.hard:
                self.state[f"{name}.fc2.bias"].copy_(HARD_SLOPE * (self.scores[name] - level) + 0.5)
            value = 0.5 if self.variant.hard else level
            if self.variant.rule == "follow":
                value = float(ranked_threshold(means[i][None], torch.tensor(level, device=means[i].device)))
            self.state[f"{name}.threshold"].fill_(value)

    def _meet_budget(self, count: int = 2500) -> None:
        """The level under which training images take the budget, from below; by bisection around the student's."""
        self.network.eval()
        images = [x for x, _ in self.pixels.plain(self.chosen[:count], count)]
        means = [torch.cat(v).mean(0) for v in self._records(images, 0).values()]
        keep_more = -1 if self.variant.rule != "follow" else 1  # a higher threshold keeps fewer, a higher rate more
        poor, rich = self.level - 0.3 * keep_more, self.level + 0.3 * keep_more
        poor, rich = max(poor, 0.0), max(rich, 0.0)
        for _ in range(8):
            middle = (poor + rich) / 2
            self._set(middle, means)
            opened = [torch.cat(v) for v in self._records(images, 1).values()]
            if float(image_costs(self.variant, opened).mean()) > 1:
                rich = middle
            else:
                poor = middle
        self._set(poor, means)

    def _records(self, images: Sequence[Tensor], which: int) -> dict[str, list[Tensor]]:
        """Of every gate, per batch: saliencies (which = 0) or 0/1 of what is kept (1)."""
        out: dict[str, list[Tensor]] = {name: [] for name in GATES}
        for batch in images:
            for name, record in self.network(batch).records.items():
                out[name].append((record.gate > 0).float() if which else record.saliency)
        return out

    def _estimate_statistics(self) -> None:
        self.network.train()
        for index, images in enumerate(self._batches(8000)):
            self.network.momentum = 1 / (index + 1)
            self.network(images)
        self.network.eval()

    @torch.no_grad()
    def measure(self, chosen: Tensor) -> dict[str, Any]:
        """Accuracy, multiply-adds, and the share of decisions that differ from the majority, stage by stage."""
        right, opened = 0, [[] for _ in GATES]  # type: ignore[var-annotated]
        for images, labels in self.pixels.plain(chosen):
            output = self.network(images)
            right += int((output.logits.argmax(1) == labels).sum())
            for kept, record in zip(opened, output.records.values(), strict=False):
                kept.append((record.gate > 0).float())
        result: dict[str, Any] = {"right": right, "of": len(chosen)}
        if self.variant.gated:
            kept = [torch.cat(k) for k in opened]
            cost = image_costs(self.variant, kept) * BUDGET
            low, high = np.percentile(cost.cpu().numpy(), (5, 95)).tolist()
            share = [torch.minimum(k.mean(0), 1 - k.mean(0)).mean() for k in kept]
            result |= {"macs": float(cost.mean()), "macs_5": low, "macs_95": high}
            result |= {"differ": [round(float(torch.stack(share[i : i + 6]).mean()), 4) for i in (0, 6, 12)]}
        return result

    @torch.no_grad()
    def frozen(self) -> dict[str, Tensor]:
        """The weights of a static twin: the channels that are kept most often, as many as the budget allows."""
        images = [x for x, _ in self.pixels.plain(self.chosen[:10_000])]
        kept = {n: torch.cat(v).mean(0).cpu().numpy() for n, v in self._records(images, 1).items()}
        saliency = {n: torch.cat(v) for n, v in self._records(images, 0).items()}
        graph = self.network.graph
        free = gate_macs(graph)
        low, high = -1e-6, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            masks = {n: (v > middle)[None] for n, v in kept.items()}
            if float(macs_per_image(graph, masks)[0]) - free > BUDGET:
                low = middle
            else:
                high = middle
        weights = {k: v.clone() for k, v in self.state.items()}
        for name, share in kept.items():
            mask = torch.from_numpy(share > high).to(self.chosen.device)
            opened = saliency[name] > self.state[f"{name}.threshold"]
            mean = (saliency[name] * opened).sum(0) / opened.sum(0).clamp(min=1)
            weights[f"{name}.mask"] = mask.float()
            weights[f"{name}.fc2.bias"] = torch.where(mask, mean, torch.zeros_like(mean))
        return weights

    def weights(self) -> dict[str, Tensor]:
        """A copy of all parameters, on the host."""
        return {k: v.detach().float().cpu().contiguous().clone() for k, v in self.state.items()}


class Run:
    """The whole experiment: device, images, log, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpu = self.device == "cuda"
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        self.began, self.out = time.perf_counter(), args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.parts = Compiled(args.compile)
        self.control = torch.zeros(4, device=self.device)
        images, labels = read_images(args.data, args.images)
        self.pixels = Pixels(images, labels, self.device)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images))).to(self.device)
        held = len(images) // 10
        self.held, self.kept, self.all = order[:held], order[held:], order
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        card = torch.cuda.get_device_name() if self.gpu else "CPU"
        self.log(event="start", card=card, torch=torch.__version__, compiled=args.compile, images=len(images))

    def log(self, **what: Any) -> None:
        """One line of the log."""
        line = json.dumps({"seconds": round(time.perf_counter() - self.began, 1), **what})
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def _once(self, students: Sequence[Student], lanes: Sequence[Lane], graphs: Mapping[Lane, Any]) -> None:
        if not self.gpu:
            for lane in lanes:
                lane.step()
            for student in students:
                student.step()
            return
        main = torch.cuda.current_stream()
        for lane in lanes:
            graphs[lane].replay()
            for student in students:
                if student.lane is lane:
                    assert student.stream is not None and student.graphed is not None
                    student.stream.wait_stream(main)
                    with torch.cuda.stream(student.stream):
                        student.graphed.replay()
        for student in students:
            main.wait_stream(student.stream)  # type: ignore[arg-type]

    def _capture(self, students: Sequence[Student], lanes: Sequence[Lane]) -> dict[Lane, Any]:
        """Every step once as a CUDA graph. Weights are as before afterwards."""
        gc.freeze()  # a capture collects garbage first: let it look at new objects only
        graphs: dict[Lane, Any] = {}
        actors: list[Lane | Student] = [*lanes, *students]
        for actor in actors:
            began = time.perf_counter()
            saved = [t.clone() for t in actor.tensors] if isinstance(actor, Student) else []
            stream = torch.cuda.Stream() if isinstance(actor, Lane) else actor.stream  # type: ignore[no-untyped-call]
            assert stream is not None
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    actor.step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                actor.step()
            torch.cuda.synchronize()
            if isinstance(actor, Student):
                actor.graphed = graph
                for tensor, before in zip(actor.tensors, saved, strict=True):
                    tensor.copy_(before)
            else:
                graphs[actor] = graph
            if time.perf_counter() - began > 3:
                self.log(
                    event="capture", name=getattr(actor, "name", "lane"), took=round(time.perf_counter() - began, 1)
                )
        return graphs

    def time_step(
        self, students: Sequence[Student], lanes: Sequence[Lane], graphs: Mapping[Lane, Any], n: int
    ) -> float:
        """Seconds a step; weights are as before afterwards."""
        saved = [[t.clone() for t in s.tensors] for s in students]
        self._once(students, lanes, graphs)
        if self.gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            self._once(students, lanes, graphs)
        if self.gpu:
            torch.cuda.synchronize()
        took = (time.perf_counter() - began) / n
        for student, before in zip(students, saved, strict=True):
            for tensor, value in zip(student.tensors, before, strict=True):
                tensor.copy_(value)
        return took

    def train(
        self, phase: str, students: Sequence[Student], lanes: Sequence[Lane], until: float, peak: float,
        full: float, reach: float, limit: int,
    ) -> None:  # fmt: skip
        """Train all until about ``until`` seconds after the start; the epochs are fixed before the first one.

        The budget falls from ``full`` to 1 over ``reach`` of the epochs; noise ends after two thirds of them.
        """
        graphs = self._capture(students, lanes) if self.gpu else {}
        each = self.time_step(students, lanes, graphs, 20 if self.gpu else 1)
        steps = lanes[0].steps
        remaining = until - (time.perf_counter() - self.began)
        epochs = max(1, min(limit, int(remaining / (each * steps * 1.01))))
        rate = BATCH * len(students) / each
        self.log(event="phase", phase=phase, students=len(students), epochs=epochs, step_ms=round(1e3 * each, 2),
                 images_per_second=round(rate), batch=BATCH, peak=peak)  # fmt: skip
        for lane in lanes:
            lane.position.zero_()
        rows = []
        for step in range(epochs * steps):
            done = step / (epochs * steps)
            lr = learning_rate(step, epochs * steps, peak=peak, warmup=steps)
            budget = 1 + (full - 1) * keep_rate(step, max(1, round(reach * epochs * steps)), 0.0)
            rows.append((lr, budget, max(0.0, 1 - 1.5 * done), 0.0))
        table = torch.tensor(rows, device=self.device)
        for epoch in range(epochs):
            for lane in lanes:
                lane.shuffle(epoch)
            for step in range(steps):
                self.control.copy_(table[epoch * steps + step])
                self._once(students, lanes, graphs)
            sums = torch.stack([s.table for s in students]).cpu().numpy()
            for student, (count, *values) in zip(students, sums, strict=True):
                student.table.zero_()
                loss, ce, right, cost = (round(float(v / count), 4) for v in values)
                level, price = round(float(student.level), 4), round(float(student.multiplier), 3)
                self.log(
                    phase=phase, name=student.name, seed=student.seed, epoch=epoch, loss=loss, ce=ce, right=right,
                    cost=cost, level=level, price=price,
                )  # fmt: skip
        for student in students:
            student.graphed = None

    def settle(self, phase: str, students: Sequence[Student], chosen: Tensor, held: Tensor | None) -> list[Settled]:
        """Students as the engine will run them; their figures to the log, their weights to files."""
        settled, figures = [], []
        for student in students:
            model = student.settled(self.pixels, chosen)
            settled.append(model)
            figures.append({"phase": phase, "name": student.name, "seed": student.seed,
                            **(model.measure(held) if held is not None else model.measure(chosen[:5000]))})  # fmt: skip
            self.log(event="result", held_out=held is not None, **figures[-1])
        for start in range(0, len(settled), 11):
            tensors = {f"{m.student.name}/{m.student.seed}/{k}": v for m in settled[start : start + 11]
                       for k, v in m.weights().items()}  # fmt: skip
            if sum(v.numel() for v in tensors.values()) > 4e6:
                tensors = {k: v.half() for k, v in tensors.items()}
            save_file(tensors, self.out / f"{phase}-{start // 11}.safetensors")
        return settled


def read_images(folder: Path, limit: int | None) -> tuple[Array, Array]:
    """CIFAR-10's training images (N, 32, 32, 3) and labels from its five training files; noise if there are none."""
    files = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
    if not files[0].exists():
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (limit or 50_000, 32, 32, 3), np.uint8), rng.integers(0, 10, limit or 50_000)
    raw = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in files])[:limit]
    return np.ascontiguousarray(raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), raw[:, 0]


def main() -> None:
    """The three phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder with data_batch_1.bin to 5")
    parser.add_argument("--out", type=Path, required=True, help="folder for the log and the weights")
    parser.add_argument("--seconds", type=float, default=630, help="time for all")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.127, 0.49, 1.0), help="when each phase ends")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=None, help="use only the first ones")
    parser.add_argument("--limit", type=int, default=200, help="most epochs of a phase")
    parser.add_argument("--compile", action="store_true", help="fuse kernels with torch.compile")
    args = parser.parse_args()
    run = Run(args)
    ends = [share * args.seconds for share in args.shares]
    control, parts = run.control, run.parts

    lane = Lane(run.pixels, run.kept, 0, None, run.dtype)
    broad = replace(VARIANTS["dense"], width=64 if run.gpu else 16)
    wide = Student("teacher", broad, lane, control, parts, seed=1)
    thin = Student("start", VARIANTS["dense"], lane, control, parts, seed=2)
    run.train("teacher", [wide, thin], [lane], ends[0], 0.2, 1, 0, args.limit)
    teacher, start = run.settle("teacher", [wide, thin], run.kept, run.held)

    def lanes_of(chosen: Tensor) -> list[Lane]:
        return [Lane(run.pixels, chosen, 10 + seed, teacher.network, run.dtype) for seed in range(args.seeds)]

    full = sum(node_macs(with_gates(resnet(20))).values()) / BUDGET
    lanes = lanes_of(run.kept)
    dense = start.weights()
    short = [
        Student(name, VARIANTS[name], lanes[seed], control, parts, weights=dense, seed=seed)
        for name in args.variants
        for seed in range(args.seeds)
    ]
    run.train("short", short, lanes, ends[1], 0.1, full, 0.4, args.limit)
    settled = {(m.student.name, m.student.seed): m for m in run.settle("short", short, run.kept, run.held)}

    right = {name: [settled[name, s].measure(run.held)["right"] for s in range(args.seeds)] for name in args.variants}
    dynamic = max((n for n in right if VARIANTS[n].reads), key=lambda n: sum(right[n]))
    static = max((n for n in right if VARIANTS[n].gated and not VARIANTS[n].reads), key=lambda n: sum(right[n]))
    run.log(event="choice", dynamic=dynamic, static=static, right=right)

    lanes = lanes_of(run.all)
    bundled = {
        k: torch.from_numpy(v.copy()) for k, v in load_checkpoint(checkpoint_path("manidp-res20")).weights.items()
    }
    long = []
    for seed, lane in enumerate(lanes):
        for name in dict.fromkeys((dynamic, static, *(("dense",) if seed == 0 else ()))):
            long.append(Student(name, VARIANTS[name], lane, control, parts, seed=seed))
            long[-1].go_on_from(settled[name, seed].student)
        again = Student("bundled", VARIANTS["published"], lane, control, parts, weights=bundled, seed=seed)
        again.take_thresholds({k: v.to(run.device) for k, v in bundled.items()})
        long.append(again)
        for name, model in ((dynamic, settled[dynamic, seed]), ("bundled", again.settled(run.pixels, run.all))):
            long.append(Student(f"{name}-majority", FROZEN, lane, control, parts, weights=model.frozen(), seed=seed))
    run.train("long", long, lanes, ends[2], 0.08, 1, 0, args.limit)
    run.settle("long", long, run.all, None)
    run.log(event="end", variants={name: asdict(v) for name, v in VARIANTS.items()})


if __name__ == "__main__":
    main()
