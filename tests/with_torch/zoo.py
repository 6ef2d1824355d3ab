"""Small networks of the well-known families, written from their papers, for images of 32 x 32 and ten classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manidp.formats.checkpoint import Checkpoint
from manidp.torch.frontend import from_torch

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def norm_act(conv: nn.Module, channels: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), act())


def conv(
    into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    layer = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return norm_act(layer, out, act)


def linear_conv(into: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)
    )


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class LeNet(nn.Module):
    """LeCun et al. 1998."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 32), nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logits


def vgg() -> nn.Module:
    """Simonyan and Zisserman 2015, with batch norm; the last pooling reads a map of 2 x 2."""
    layers: list[nn.Module] = []
    into = 3
    for width in (8, 12, 16, 16, 16):
        layers += [conv(into, width), conv(width, width), nn.MaxPool2d(2)]
        into = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 10)
    )


class Basic(nn.Module):
    """He et al. 2016, figure 5 left; ``squeeze``: Hu et al. 2018, figure 3."""

    def __init__(self, into: int, out: int, stride: int, squeeze: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(into, out, 3, stride), linear_conv(out, out, 3))
        self.squeeze = SqueezeExcite(out, 4) if squeeze else nn.Identity()
        self.shortcut = nn.Sequential() if (into, stride) == (out, 1) else linear_conv(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(self.body(x))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class PaddedBasic(nn.Module):
    """A basic block whose shortcut takes every second pixel and adds channels of zeros: He et al. 2016, option A."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        around = (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], around))


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5 right; with ``groups`` Xie et al. 2017, figure 3c."""

    def __init__(self, into: int, out: int, stride: int, groups: int = 1, width: int | None = None) -> None:
        super().__init__()
        width = width or out // 2
        self.body = nn.Sequential(conv(into, width, 1), conv(width, width, 3, stride, groups), linear_conv(width, out))
        self.shortcut = nn.Sequential() if (into, stride) == (out, 1) else linear_conv(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class PreActivated(nn.Module):
    """He et al. 2016 (identity mappings), figure 1b."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None if (into, stride) == (out, 1) else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        made: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut
        return made


def staged(block: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """A stem, a block of each kind: shortcut as it is, shortcut with a stride and more channels."""
    return nn.Sequential(conv(3, 8), block(8, 8, 1), block(8, 16, 2), Head(16))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: of 1x1 convolutions, as MobileNetV3 and EfficientNet write it."""

    def __init__(
        self, channels: int, hidden: int, act: type[nn.Module] = nn.ReLU, gate: type[nn.Module] = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act = nn.Conv2d(channels, hidden, 1), act()
        self.fc2, self.gate = nn.Conv2d(hidden, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        factor: Tensor = self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))
        made: Tensor = x * factor
        return made


class LinearSqueezeExcite(nn.Module):
    """Hu et al. 2018: of linear layers, expanded to the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 4, bias=False), nn.ReLU(True), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = x.mean((2, 3))
        made: Tensor = x * self.fc(y).view(b, c, 1, 1).expand_as(x)
        return made


class DenseLayer(nn.Module):
    """Huang et al. 2017: batch norm, ReLU, 1x1, batch norm, ReLU, 3x3, put behind what it read."""

    def __init__(self, into: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([y, x], 1)


def densenet() -> nn.Module:
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False)]
    into = 8
    for block in range(2):
        for _ in range(2):
            parts.append(DenseLayer(into, 4))
            into += 4
        if block == 0:
            parts += [nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, into // 2, 1, bias=False), nn.AvgPool2d(2)]
            into //= 2
    return nn.Sequential(*parts, nn.BatchNorm2d(into), nn.ReLU(), Head(into))


class Inception(nn.Module):
    """Szegedy et al. 2015, figure 2b."""

    def __init__(self, into: int) -> None:
        super().__init__()
        self.one = conv(into, 4, 1)
        self.three = nn.Sequential(conv(into, 4, 1), conv(4, 6))
        self.five = nn.Sequential(conv(into, 2, 1), conv(2, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(into, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def googlenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Inception(8), nn.MaxPool2d(3, 2, 1), Inception(18), Head(18),
    )  # fmt: skip


def mobilenet_v1() -> nn.Module:
    """Howard et al. 2017."""
    parts: list[nn.Module] = [conv(3, 8)]
    for into, out, stride in ((8, 12, 1), (12, 16, 2), (16, 16, 1)):
        parts += [conv(into, into, 3, stride, into), conv(into, out, 1)]
    return nn.Sequential(*parts, Head(16))


class Inverted(nn.Module):
    """Sandler et al. 2018, figure 3; with a squeeze Howard et al. 2019, figure 4."""

    def __init__(
        self, into: int, out: int, stride: int, act: type[nn.Module] = nn.ReLU6, squeeze: nn.Module | None = None,
        kernel: int = 3, expansion: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        wide = expansion * into
        parts: list[nn.Module] = [conv(into, wide, 1, act=act)] if expansion > 1 else []
        parts += [conv(wide, wide, kernel, stride, wide, act)]
        parts += [squeeze] if squeeze is not None else []
        self.body = nn.Sequential(*parts, linear_conv(wide, out))
        self.residual = (into, stride) == (out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, act=nn.ReLU6), Inverted(8, 8, 1), Inverted(8, 12, 2), conv(12, 24, 1, act=nn.ReLU6), Head(24),
    )  # fmt: skip


def mobilenet_v3() -> nn.Module:
    def squeezed(into: int, out: int, stride: int, act: type[nn.Module]) -> nn.Module:
        return Inverted(into, out, stride, act, SqueezeExcite(3 * into, 6, gate=nn.Hardsigmoid))

    return nn.Sequential(
        conv(3, 8, act=nn.Hardswish), squeezed(8, 8, 1, nn.ReLU), squeezed(8, 12, 2, nn.Hardswish),
        conv(12, 24, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 16, 1), nn.Hardswish(), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


class ByHand(nn.Module):
    """x sigmoid(x), as EfficientNet's authors wrote it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def efficientnet() -> nn.Module:
    """Tan and Le 2019."""
    return nn.Sequential(
        conv(3, 8, act=ByHand), Inverted(8, 8, 1, nn.SiLU, SqueezeExcite(24, 2, nn.SiLU)),
        Inverted(8, 12, 2, ByHand, SqueezeExcite(24, 2, ByHand)), conv(12, 24, 1, act=nn.SiLU), nn.Dropout(0.2),
        Head(24),
    )  # fmt: skip


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class ShuffleV1(nn.Module):
    """Zhang et al. 2018, figure 2b and c."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, kept = stride, into if stride == 2 else 0
        self.first = conv(into, 8, 1, groups=2)
        self.depthwise = linear_conv(8, 8, 3, stride, 8)
        self.last = linear_conv(8, out - kept, 1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.depthwise(shuffled(self.first(x), 2)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


class ShuffleV2(nn.Module):
    """Ma et al. 2018, figure 3c and d."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, out // 2
        self.left = (
            nn.Sequential(linear_conv(into, into, 3, stride, into), conv(into, half, 1)) if stride == 2 else None
        )
        self.right = nn.Sequential(
            conv(into if stride == 2 else half, half, 1), linear_conv(half, half, 3, stride, half), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None:
            a, b = x.chunk(2, 1)
            return shuffled(torch.cat([a, self.right(b)], 1), 2)
        return shuffled(torch.cat([self.left(x), self.right(x)], 1), 2)


class OddEven(nn.Module):
    """A ShuffleNet V2 block that takes every second channel, through the batch axis, as its authors' code does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(conv(half, half, 1), linear_conv(half, half, 3, 1, half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        y = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return torch.cat([y[0], self.right(y[1])], 1)


def shufflenet_v1() -> nn.Module:
    return nn.Sequential(conv(3, 8), ShuffleV1(8, 16, 2), ShuffleV1(16, 16, 1), Head(16))


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(conv(3, 8), ShuffleV2(8, 16, 2), ShuffleV2(16, 16, 1), OddEven(16), conv(16, 24, 1), Head(24))


class RegNetY(nn.Module):
    """Radosavovic et al. 2020: a grouped bottleneck with a squeeze of linear layers."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(into, out, 1), conv(out, out, 3, stride, out // 4), LinearSqueezeExcite(out),
                                  linear_conv(out, out))  # fmt: skip
        self.shortcut = nn.Identity() if (into, stride) == (out, 1) else linear_conv(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.shortcut(x) + self.body(x))


class DualPath(nn.Module):
    """Chen et al. 2017: the first channels are added, the others put behind."""

    def __init__(self, into: int, out: int, dense: int, first: bool) -> None:
        super().__init__()
        self.out, self.dense = out, dense
        self.body = nn.Sequential(conv(into, 8, 1), conv(8, 8, groups=4), linear_conv(8, out + dense))
        self.shortcut = linear_conv(into, out + dense) if first else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x, y, d = self.shortcut(x), self.body(x), self.out
        return F.relu(torch.cat([x[:, :d] + y[:, :d], x[:, d:], y[:, d:]], 1))


def dpn() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), DualPath(8, 8, 4, True), DualPath(16, 8, 4, False), DualPath(20, 8, 4, False), Head(24)
    )


class Aggregation(nn.Module):
    """Yu et al. 2018, figure 3: a tree of blocks, its root a 1x1 convolution of all of them."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.left, self.right = Basic(into, out, stride), Basic(out, out, 1)
        self.root = conv(2 * out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.left(x)
        made: Tensor = self.root(torch.cat([first, self.right(first)], 1))
        return made


def dla() -> nn.Module:
    return nn.Sequential(conv(3, 8), Aggregation(8, 8, 1), Aggregation(8, 12, 2), Head(12))


class ChannelsNorm(nn.Module):
    """Layer norm over the channels of a map, written out, as ConvNeXt's authors do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels) / 10)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        normal = (x - mean) / torch.sqrt(variance + 1e-6)
        made: Tensor = self.weight[:, None, None] * normal + self.bias[:, None, None]
        return made


class ConvNeXt(nn.Module):
    """A depthwise 7x7, layer norm and linear layers on channels last, a scale by channel: Liu et al. 2022."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.back = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.back(F.gelu(self.wide(y)))
        made: Tensor = x + y.permute(0, 3, 1, 2)
        return made


class NormedHead(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(x.mean([-2, -1])))
        return logits


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), ChannelsNorm(8), ConvNeXt(8), ConvNeXt(8), ChannelsNorm(8), nn.Conv2d(8, 12, 2, 2),
        ConvNeXt(12), NormedHead(12),
    )  # fmt: skip


ZOO: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet,
    "vgg": vgg,
    "resnet": lambda: staged(Basic),
    "resnet-a": lambda: staged(PaddedBasic),
    "resnet-bottleneck": lambda: staged(Bottleneck),
    "resnet-preact": lambda: staged(PreActivated),
    "resnext": lambda: staged(lambda into, out, stride: Bottleneck(into, out, stride, 4)),
    "senet": lambda: staged(lambda into, out, stride: Basic(into, out, stride, squeeze=True)),
    "densenet": densenet,
    "googlenet": googlenet,
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "shufflenet-v1": shufflenet_v1,
    "shufflenet-v2": shufflenet_v2,
    "regnet-x": lambda: staged(lambda into, out, stride: Bottleneck(into, out, stride, out // 8)),
    "regnet-y": lambda: staged(RegNetY),
    "dpn": dpn,
    "dla": dla,
    "convnext": convnext,
}


def fresh(name: str, seed: int = 0) -> nn.Module:
    """The network of this name with weights of ``seed`` and batch statistics that are not those of a new one."""
    return seeded(ZOO[name], seed)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What ``make`` makes, so."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
                nn.init.normal_(part.running_mean, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.1)
    return module


@cache
def imported(name: str) -> Checkpoint:
    """The network of this name as it enters; made once, since tracing takes a second."""
    return from_torch(fresh(name), EXAMPLE)
