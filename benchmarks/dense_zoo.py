"""The dense engine beside ONNX Runtime, float32, one image at a time, one thread, on networks as in their papers.

`make zoo` measures all of them for pictures of 32 x 32 and 224 x 224; `make zoo ONLY=mobilenet-v2` one. Networks enter
through ``manidp.from_torch`` with random weights. The two take turns; times are medians over rounds, and so is the
ratio of their times in a round: below 1 the engine is faster. At 32 x 32 stems have no stride and no pooling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from zoo import Basic, Bottleneck, DenseLayer, Head, Inverted, ShuffleV2, SqueezeExcite, conv, seeded

from manidp import from_torch
from manidp.bench.measure import Contender, interleaved, pinned
from manidp.bench.peers import PEERS
from manidp.engine.engine import Engine
from manidp.graph.macs import dense_macs
from manidp.machine import describe

SIZES = (32, 224)
SECONDS = 0.1  # that a turn takes, about
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


def measured(name: str, size: int, rounds: int) -> dict[str, Any]:
    """Medians and quartiles of one network. Raises AssertionError if the two differ in their logits."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    checkpoint = from_torch(seeded(lambda: NETWORKS[name](size), 0), image)
    pixels, engine = image.numpy(), Engine(checkpoint)
    peer = PEERS[0].open(checkpoint, 1, 1, pixels)
    wanted = peer.run(pixels)
    assert np.abs(engine.run(pixels).logits - wanted).max() < 1e-3 * np.abs(wanted).max(), f"{name}: logits differ"
    runs = {"manidp": lambda images: engine.run(images).logits, PEERS[0].name: peer.run}
    contenders = [Contender(runtime, name, "everything", "float32", run) for runtime, run in runs.items()]
    with pinned(1):
        once = np.mean(interleaved(contenders, {name: pixels}, 1, 1, 1, 1)) / 1e3
        turn = np.repeat(pixels, max(1, round(SECONDS / float(once))), axis=0)
        ours, theirs = interleaved(contenders, {name: turn}, 1, len(turn), rounds, 1)
    low, ratio, high = np.percentile(ours / theirs, [25, 50, 75])
    return {
        "network": name, "size": size, "macs": dense_macs(checkpoint.graph), "isa": engine.isa.name,
        "manidp": np.median(ours), PEERS[0].name: np.median(theirs), "ratio": ratio, "lower": low, "upper": high,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--size", type=int, action="append", choices=SIZES, help="of the pictures; default: both")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file for the record, JSON")
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(NETWORKS))
    if unknown:
        parser.error(f"networks are {', '.join(NETWORKS)}; got {', '.join(unknown)}")
    rows = []
    print(f"{'':16} size  M multiply-adds    manidp, ms  {PEERS[0].name}, ms  ratio (quartiles)")
    for name in options.networks:
        for size in options.size or SIZES:
            row = measured(name, size, options.rounds)
            rows.append(row)
            print(
                f"{name:16} {size:4} {row['macs'] / 1e6:16,.0f} {row['manidp']:13.3f} {row[PEERS[0].name]:17.3f}"
                f"  {row['ratio']:.2f} ({row['lower']:.2f}, {row['upper']:.2f})",
                flush=True,
            )
    ratios = [row["ratio"] for row in rows]
    print(f"geometric mean of the ratios {np.exp(np.mean(np.log(ratios))):.2f}, largest {max(ratios):.2f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": describe(PEERS[0].package, "torch"), "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
