"""Train: give a dense network gates, and teach them to spend 60 % of its multiply-adds."""

from tempfile import TemporaryDirectory

import numpy as np

import manidp
import manidp.torch
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.graph.macs import ungated_macs
from manidp.training.recipe import Recipe

sample = load_sample()  # 200 images are far too few for more than a look
dense = manidp.load_model("dense-res20")
recipe = Recipe(epochs=4, batch_size=20, learning_rate=0.002, macs_budget="60%")
with TemporaryDirectory() as folder:  # one of your own keeps the log, and the state for resume=True
    gated = manidp.torch.train(
        dense, sample, recipe, folder, gates=True,
        report=lambda epoch: print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, {epoch.macs:.3g} multiply-adds"),
    )  # fmt: skip

with Engine(gated) as engine:
    result = engine.run(sample.images)
right = int((result.logits.argmax(axis=1) == sample.labels).sum())
print(f"{right} of {len(sample)} of its own training images right")
print(f"{np.mean(result.macs) / ungated_macs(gated.graph):.1%} of the multiply-adds of the dense network")
