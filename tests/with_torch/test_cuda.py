"""On a GPU a checkpoint gives what the engine gives, and trains. The laws of training run there too: tests/training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import manidp.torch
from manidp.data.images import ImageSet, load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES
from manidp.engine.engine import Engine
from manidp.torch.backend import Torch
from manidp.torch.inference import TorchEngine, exact
from manidp.training.loop import Training
from manidp.training.recipe import Recipe
from test_operating_points import IMAGES, pointed

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU here", allow_module_level=True)

SAMPLE = load_sample(100)


@pytest.mark.parametrize("name", ["manidp-res20", "dense-res20"])
def test_results_are_the_engines(name: str) -> None:
    wanted = manidp.load(name).run(SAMPLE.images)
    largest = np.abs(wanted.logits).max()
    came = manidp.torch.load(name, device="cuda").run(SAMPLE.images)
    np.testing.assert_allclose(came.logits, wanted.logits, atol=1e-4 * largest)
    np.testing.assert_array_equal(came.macs, wanted.macs)
    assert all((came.kept[gate] == mask).all() for gate, mask in wanted.kept.items())
    low = manidp.torch.load(name, device="cuda", precision="bfloat16").run(SAMPLE.images)
    assert 1e-4 < np.abs(low.logits - wanted.logits).max() / largest < 0.1
    assert np.mean(low.logits.argmax(1) == wanted.logits.argmax(1)) > 0.95


def test_budgets_and_cascades_are_the_engines() -> None:
    checkpoint = pointed()
    ours, theirs = Engine(checkpoint), TorchEngine(checkpoint, device="cuda")
    how: list[dict[str, Any]] = [{"budget": name} for name in ("p1", "p15", "default")]
    for asked in (*how, {"cascade": ("p1", "default"), "confidence": 0.5}):
        wanted, came = ours.run(IMAGES, **asked), theirs.run(IMAGES, **asked)
        np.testing.assert_allclose(came.logits, wanted.logits, atol=1e-4 * np.abs(wanted.logits).max())
        np.testing.assert_array_equal(came.macs, wanted.macs)


def test_one_step_is_the_processors_within_rounding(tmp_path: Path) -> None:
    start = manidp.load_model("manidp-res20")
    data = ImageSet(SAMPLE.images, SAMPLE.labels, CIFAR10_CLASSES)
    recipe = Recipe(
        epochs=1, batch_size=100, learning_rate=0.01, macs_budget=18.6e6, precision="float32", augment=False
    )
    weights = []
    for device in ("cpu", "cuda"):
        with exact(), Training(Torch(device), start, data, recipe, tmp_path / device) as training:
            list(training.epochs())
            weights.append(training.learner.state())
    for name, value in weights[0].items():  # a map's value near 0 may be cut off on one side alone
        assert np.linalg.norm(weights[1][name] - value) <= 0.05 * np.linalg.norm(value) + 1e-6, name
