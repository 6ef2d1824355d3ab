"""Batch statistics of points that are added without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import manidp
from manidp import cli
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import BatchNorm
from manidp.graph.macs import ungated_macs
from manidp.models import resnet
from manidp.torch.backend import Torch
from manidp.training.calibrate import calibrate
from manidp.training.statistics import estimated
from networks import spread_weights

IMAGES = load_sample().images[::5]


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    return calibrate(manidp.load_model("manidp-res20"), IMAGES, 0.4, backend=Torch(threads=1))


def test_a_point_has_the_statistics_that_the_network_has_at_its_thresholds(calibrated: Checkpoint) -> None:
    norms = {node.name for node in calibrated.graph.nodes if isinstance(node, BatchNorm)}
    (point,) = calibrated.points
    assert point.values.keys() == {*calibrated.graph.thresholds} | {
        f"{norm}.{part}" for norm in norms for part in ("moving_mean", "moving_variance")
    }
    for name, value in estimated(Torch(threads=1), calibrated.at("40%"), IMAGES).items():
        np.testing.assert_array_equal(value, point.values[name], err_msg=name)


def test_it_takes_its_budget(calibrated: Checkpoint) -> None:
    result = Engine(calibrated).run(IMAGES, budget="40%")
    assert result.macs.mean() == pytest.approx(0.4 * ungated_macs(calibrated.graph), rel=0.01)


def test_a_frozen_model_has_statistics_of_its_own_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = with_gates(resnet(8, width=4))
    weights = spread_weights(graph, 1.0)
    gated, new, old = (tmp_path / f"{name}.safetensors" for name in ("gated", "new", "old"))
    save_checkpoint(Checkpoint(graph, weights, CIFAR10_PREPROCESSING, CIFAR10_CLASSES), gated)
    for out, options in ((new, []), (old, ["--no-statistics"])):
        monkeypatch.setattr("sys.argv", ["manidp", "freeze", str(gated), "-o", str(out), *options])
        with pytest.raises(SystemExit, match=r"^$|^0$"):
            cli.main()
    first, second = load_checkpoint(new).weights, load_checkpoint(old).weights
    changed = {name for name, value in first.items() if not np.array_equal(value, second[name])}
    assert changed == {name for name in first if name.endswith(("moving_mean", "moving_variance"))}
