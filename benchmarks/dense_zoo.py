"""The dense engine beside ONNX Runtime, float32, one image at a time, one thread, on networks as in their papers.

`make zoo` measures all of them for pictures of 32 x 32 and 224 x 224; `make zoo ONLY=mobilenet-v2` one. Networks enter
through ``manidp.from_torch`` with random weights. The two take turns; times are medians over rounds, and so is the
ratio of their times in a round: below 1 the engine is faster. At 32 x 32 stems have no stride and no pooling.

`make zoo GATED=1` adds the same networks with gates that close channels until half of the multiply-adds are left,
beside both on the dense network. Weights are random, and so are the scores of channels, U(0.5, 1.5); they are computed
for every image, but come out the same: each image keeps the same channels. One keep rate sets all thresholds. Where
half cannot be reached, because what has no gate takes more, the gates close everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from zoo import Basic, Bottleneck, DenseLayer, Head, Inverted, ShuffleV2, SqueezeExcite, conv, seeded

from manidp import from_torch, gate
from manidp.bench.measure import Contender, interleaved, pinned
from manidp.bench.peers import PEERS, Batch, Run
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint
from manidp.graph.macs import dense_macs
from manidp.machine import describe
from manidp.training.schedule import thresholds_for_budget

SIZES = (32, 224)
SECONDS = 0.1  # that a turn takes, about
SHARE = 0.5  # of the multiply-adds, of gated networks
Block = Callable[[int, int, int], nn.Module]  # of input channels, output channels, stride


def stem(size: int, channels: int, kernel: int = 3, act: type[nn.Module] = nn.ReLU, *, pool: bool = False) -> nn.Module:
    """The first layers, for pictures of this size."""
    if size <= min(SIZES):
        return conv(3, channels, 3, 1, act=act)
    first = conv(3, channels, kernel, 2, act=act)
    return nn.Sequential(first, nn.MaxPool2d(3, 2, 1)) if pool else first


def staged(into: int, stages: Sequence[tuple[int, int, int, Block]]) -> tuple[nn.Sequential, int]:
    """Stages of (channels, blocks, stride of the first, what a block is), and the channels of the last."""
    parts = []
    for out, blocks, stride, block in stages:
        for index in range(blocks):
            parts.append(block(into, out, stride if index == 0 else 1))
            into = out
    return nn.Sequential(*parts), into


def vgg16(size: int) -> nn.Module:
    """Simonyan and Zisserman 2015, D, with batch norm and one linear layer."""
    parts: list[nn.Module] = []
    into = 3
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            parts.append(conv(into, width))
            into = width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, Head(into))


def resnet(size: int, block: Block, blocks: Sequence[int], width: int) -> nn.Module:
    """He et al. 2016, table 1."""
    stages = [(width * 2**n, count, 2 if n else 1, block) for n, count in enumerate(blocks)]
    body, channels = staged(64, stages)
    return nn.Sequential(stem(size, 64, 7, pool=True), body, Head(channels))


def bottleneck(into: int, out: int, stride: int) -> nn.Module:
    """He et al. 2016, figure 5 right."""
    return Bottleneck(into, out, stride, width=out // 4)


def grouped_bottleneck(into: int, out: int, stride: int) -> nn.Module:
    """Xie et al. 2017: 32 groups, 4 channels each in the first stage."""
    return Bottleneck(into, out, stride, 32)


def densenet121(size: int) -> nn.Module:
    """Huang et al. 2017, table 1."""
    parts: list[nn.Module] = [stem(size, 64, 7, pool=True)]
    into = 64
    for layers in (6, 12, 24, 16):
        for _ in range(layers):
            parts.append(DenseLayer(into, 64 // 2))
            into += 32
        if layers != 16:
            parts += [nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, into // 2, 1, bias=False), nn.AvgPool2d(2)]
            into //= 2
    return nn.Sequential(*parts, nn.BatchNorm2d(into), nn.ReLU(), Head(into))


def regnet_x(size: int) -> nn.Module:
    """Radosavovic et al. 2020, RegNetX-200MF: groups of 8 channels."""

    def block(into: int, out: int, stride: int) -> nn.Module:
        return Bottleneck(into, out, stride, out // 8, out)

    body, channels = staged(32, [(24, 1, 2, block), (56, 1, 2, block), (152, 4, 2, block), (368, 7, 2, block)])
    return nn.Sequential(stem(size, 32), body, Head(channels))


def mobilenet_v1(size: int) -> nn.Module:
    """Howard et al. 2017, table 1."""

    def block(into: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(conv(into, into, 3, stride, into), conv(into, out, 1))

    widths = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
    body, channels = staged(32, [(*width, block) for width in widths])
    return nn.Sequential(stem(size, 32), body, Head(channels))


def mobilenet_v2(size: int) -> nn.Module:
    """Sandler et al. 2018, table 2."""

    def expanded(times: int) -> Block:
        return lambda into, out, stride: Inverted(into, out, stride, expansion=times)

    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    body, channels = staged(32, [(out, blocks, stride, expanded(times)) for times, out, blocks, stride in stages])
    return nn.Sequential(
        stem(size, 32, act=nn.ReLU6), body, conv(channels, 1280, 1, act=nn.ReLU6), Head(1280)
    )  # fmt: skip


def efficientnet_b0(size: int) -> nn.Module:
    """Tan and Le 2019, table 1."""

    def expanded(times: int, kernel: int) -> Block:
        def block(into: int, out: int, stride: int) -> nn.Module:
            squeeze = SqueezeExcite(times * into, into // 4, nn.SiLU)
            return Inverted(into, out, stride, nn.SiLU, squeeze, kernel, times)

        return block

    stages = (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    )  # fmt: skip
    rows: list[tuple[int, int, int, Block]] = [
        (out, blocks, stride, expanded(times, kernel)) for times, kernel, out, blocks, stride in stages
    ]
    body, channels = staged(32, rows)
    return nn.Sequential(stem(size, 32, act=nn.SiLU), body, conv(channels, 1280, 1, act=nn.SiLU), Head(1280))


def shufflenet_v2(size: int) -> nn.Module:
    """Ma et al. 2018, table 5, 1x."""
    body, channels = staged(24, [(116, 4, 2, ShuffleV2), (232, 8, 2, ShuffleV2), (464, 4, 2, ShuffleV2)])
    return nn.Sequential(stem(size, 24, pool=True), body, conv(channels, 1024, 1), Head(1024))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "vgg-16": vgg16,
    "resnet-18": lambda size: resnet(size, Basic, (2, 2, 2, 2), 64),
    "resnet-50": lambda size: resnet(size, bottleneck, (3, 4, 6, 3), 256),
    "resnext-50": lambda size: resnet(size, grouped_bottleneck, (3, 4, 6, 3), 256),
    "densenet-121": densenet121,
    "regnet-x-200mf": regnet_x,
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": mobilenet_v2,
    "efficientnet-b0": efficientnet_b0,
    "shufflenet-v2": shufflenet_v2,
}


def gated(dense: Checkpoint, share: float) -> Checkpoint:
    """The network with gates that leave ``share`` of its multiply-adds, those of the gates included; else the least."""
    made = gate(dense).network
    chance = np.random.default_rng(0)
    scores = {
        name: chance.uniform(0.5, 1.5, count).astype(np.float32) for name, count in made.graph.gate_channels.items()
    }
    limits = thresholds_for_budget(
        made.graph, {name: value[None] for name, value in scores.items()}, share * dense_macs(dense.graph)
    )
    weights = dict(made.weights)  # a new gate's score is its last bias
    for name, limit in limits.items():
        weights |= {f"{name}.fc2.bias": scores[name], f"{name}.threshold": np.array(limit, np.float32)}
    return replace(made, weights=weights)


def opened(checkpoint: Checkpoint, image: Batch, name: str) -> tuple[Engine, Run]:
    """The engine and ONNX Runtime. Raises AssertionError if the two differ in their logits."""
    engine, peer = Engine(checkpoint), PEERS[0].open(checkpoint, 1, 1, image)
    wanted = peer.run(image)
    assert np.abs(engine.run(image).logits - wanted).max() < 1e-3 * np.abs(wanted).max(), f"{name}: logits differ"
    return engine, peer.run


def measured(name: str, size: int, rounds: int, share: float | None = None) -> dict[str, Any]:
    """Medians and quartiles of one network; ``share``: of the multiply-adds, for which it is gated as well."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense, pixels = from_torch(seeded(lambda: NETWORKS[name](size), 0), image), image.numpy()
    engine, peer = opened(dense, pixels, name)
    runs = {PEERS[0].name: peer, "manidp": lambda images: engine.run(images).logits}
    row: dict[str, Any] = {"network": name, "size": size, "macs": dense_macs(dense.graph), "isa": engine.isa.name}
    if share is not None:
        skipping, _ = opened(gated(dense, share), pixels, name)
        runs["gated"] = lambda images: skipping.run(images).logits
        row["share"] = float(skipping.run(pixels).macs[0]) / row["macs"]
    contenders = [Contender(runtime, name, "everything", "float32", run) for runtime, run in runs.items()]
    with pinned(1):
        once = np.mean(interleaved(contenders, {name: pixels}, 1, 1, 1, 1)) / 1e3
        turn = np.repeat(pixels, max(1, round(SECONDS / float(once))), axis=0)
        times = dict(zip(runs, interleaved(contenders, {name: turn}, 1, len(turn), rounds, 1), strict=True))
    row |= {runtime: float(np.median(time)) for runtime, time in times.items()}
    row |= {f"ratio, {ours}/{theirs}": quartiles(times[ours] / times[theirs]) for ours, theirs in ratios(share)}
    return row


def quartiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return middle, low, high


def ratios(share: float | None) -> list[tuple[str, str]]:
    """Which time is divided by which."""
    dense = [("manidp", PEERS[0].name)]
    return dense if share is None else [*dense, ("gated", PEERS[0].name), ("gated", "manidp")]


def header(share: float | None) -> str:
    """The first two lines of the table, in Markdown."""
    cells = ["network", "pixels", "M multiply-adds", "manidp, ms", f"{PEERS[0].name}, ms"]
    cells += [] if share is None else ["computed", "gated, ms"]
    cells += [f"{ours} / {theirs} (quartiles)" for ours, theirs in ratios(share)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells)))


def line(row: dict[str, Any], share: float | None) -> str:
    """A network's line of it."""
    cells = [row["network"], str(row["size"]), f"{row['macs'] / 1e6:,.0f}"]
    cells += [f"{row[name]:.3f}" for name in ("manidp", PEERS[0].name)]
    cells += [] if share is None else [f"{row['share']:.0%}", f"{row['gated']:.3f}"]
    for ours, theirs in ratios(share):
        middle, low, high = row[f"ratio, {ours}/{theirs}"]
        cells.append(f"{middle:.2f} ({low:.2f}, {high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--size", type=int, action="append", choices=SIZES, help="of the pictures; default: both")
    parser.add_argument("--gated", action="store_true", help="half of the multiply-adds, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the record, JSON")
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(NETWORKS))
    if unknown:
        parser.error(f"networks are {', '.join(NETWORKS)}; got {', '.join(unknown)}")
    share = SHARE if options.gated else None
    rows = []
    print(header(share))
    for name in options.networks:
        for size in options.size or SIZES:
            rows.append(measured(name, size, options.rounds, share))
            print(line(rows[-1], share), flush=True)
    for ours, theirs in ratios(share):
        found = [row[f"ratio, {ours}/{theirs}"][0] for row in rows]
        mean = np.exp(np.mean(np.log(found)))
        print(f"{ours} / {theirs}: geometric mean {mean:.2f}, largest {max(found):.2f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": describe(PEERS[0].package, "torch"), "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
