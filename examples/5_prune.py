"""Prune: a torch network of your own, given gates and trained to half of its multiply-adds, itself the teacher."""

from tempfile import TemporaryDirectory

import torch
from torch import nn

import manidp
import manidp.torch
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.graph.macs import ungated_macs
from manidp.training.recipe import Recipe

module = nn.Sequential(  # stands for yours, with its trained weights
    nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip

data = load_sample()  # of your own: load_labelled("pictures", (224, 224))[0]
dense = manidp.from_torch(module, torch.zeros(1, 3, 32, 32), classes=data.classes)  # preprocessing=
recipe = Recipe(epochs=8, batch_size=25, learning_rate=0.02, distillation=0.5)  # without recipe=: 60 epochs
with TemporaryDirectory() as folder:  # one of your own keeps the log, and the state for resume=True
    pruned = manidp.torch.prune(dense, data, 0.5, folder, recipe=recipe, threads=1)

with Engine(pruned) as engine:
    macs = engine.run(data.images).macs.mean()
print(f"{macs / ungated_macs(dense.graph):.1%} of the multiply-adds, gates included")
