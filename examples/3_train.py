"""Train: bring a gated network to a smaller budget, 40 % of the multiply-adds of the dense one."""

from tempfile import TemporaryDirectory

import numpy as np

import manidp
import manidp.torch
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.graph.macs import ungated_macs
from manidp.training.recipe import Recipe

sample = load_sample().take(np.arange(0, 200, 2))  # 100 images are far too few for more than a look
model = manidp.load_model("manidp-res20")  # a dense one gets gates with gates=True
recipe = Recipe(epochs=3, batch_size=20, learning_rate=0.001, macs_budget="40%")
with TemporaryDirectory() as folder:  # one of your own keeps the log, and the state for resume=True
    smaller = manidp.torch.train(
        model, sample, recipe, folder, threads=1,
        report=lambda epoch: print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, {epoch.macs:.3g} multiply-adds"),
    )  # fmt: skip

with Engine(smaller) as engine:
    result = engine.run(sample.images)
right = int((result.logits.argmax(axis=1) == sample.labels).sum())
print(f"{right} of {len(sample)} of its own training images right")
print(f"{np.mean(result.macs) / ungated_macs(smaller.graph):.1%} of the multiply-adds of the dense network")
