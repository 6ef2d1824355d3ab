"""MobileNetV2 for pictures of 32 x 32 (Sandler et al. 2018), half as wide; the stem keeps their size.

`manidp prune research/mobilenet_v2.py:make` and `untrained`, which writes a checkpoint for `manidp train --from`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

# expansion, channels, blocks, stride of the first: table 2 of the paper, channels halved, two strides fewer
STAGES = (1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 1), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)
STEM, LAST = 16, 640


def conv(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    return [nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]


class Inverted(nn.Module):
    """1x1 to ``expansion`` times the channels, depthwise 3x3, 1x1 without an activation; added to its input."""

    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = into * expansion
        first = [*conv(into, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        self.branch = nn.Sequential(*first, *conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *conv(hidden, out, 1))
        self.added = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x + y if self.added else y


def make() -> nn.Module:
    """The network, untrained, always the same."""
    torch.manual_seed(0)
    layers, into = [*conv(3, STEM, 3), nn.ReLU6()], STEM
    for expansion, out, blocks, stride in STAGES:
        for block in range(blocks):
            layers.append(Inverted(into, out, 1 if block else stride, expansion))
            into = out
    layers += [*conv(into, LAST, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAST, 10)]
    module = nn.Sequential(*layers)
    for one in module.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.kaiming_normal_(one.weight, mode="fan_out")
    return module


def untrained(file: Path) -> None:
    """Write the network as a checkpoint."""
    from manidp import from_torch
    from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
    from manidp.formats.checkpoint import save_checkpoint

    example = torch.zeros(1, 3, 32, 32)
    imported = from_torch(make(), example, preprocessing=CIFAR10_PREPROCESSING, classes=CIFAR10_CLASSES)
    save_checkpoint(imported, file)


if __name__ == "__main__":
    untrained(Path(sys.argv[1]))
