"""Freeze a gated network: what would it say if every image kept the same channels?"""

import numpy as np

import manidp
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.static import freeze

sample = load_sample()
dynamic = manidp.load_model("manidp-res20")
static = freeze(dynamic, sample.images)  # an ordinary dense checkpoint, without the closed channels


def told(name: str, checkpoint: Checkpoint) -> None:
    """Accuracy and multiply-adds on the bundled images."""
    result = Engine(checkpoint).run(sample.images)
    right = int((result.logits.argmax(axis=1) == sample.labels).sum())
    print(f"{name}: {right} of {len(sample)} right, {np.mean(result.macs) / 1e6:.2f} million multiply-adds")


told("dynamic", dynamic)
told("static, not trained again", static)
