"""A torch network of your own: imported, given gates, run by the engine, and back into the module."""

import torch
from torch import nn

import manidp
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.torch.frontend import to_state_dict


def layer(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


module = nn.Sequential(
    layer(3, 16), layer(16, 32, 2), layer(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
)

dense = manidp.from_torch(
    module, torch.zeros(1, 3, 32, 32), preprocessing=CIFAR10_PREPROCESSING, classes=CIFAR10_CLASSES
)
gated = manidp.gate(dense)
for gate, convs in gated.gates.items():
    print(f"{gate}: closes channels of {', '.join(convs)}")
for conv, reason in gated.ungated:
    print(f"{conv}: no gate, since {reason}")

# Untrained gates keep everything; `manidp train --from FILE` trains the network and its gates to a budget.
result = Engine(gated.network).run(load_sample().images)
print(f"{result.macs.mean() / 1e6:.2f} million multiply-adds an image, {result.logits.shape[1]} classes")
module.load_state_dict(to_state_dict(gated.network, module))
