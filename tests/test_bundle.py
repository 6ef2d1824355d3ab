"""What is packed for MindSpore users, without MindSpore; tests/with_mindspore loads it."""

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manidp.data.preprocessing import Preprocessing
from manidp.errors import HubError
from manidp.formats.checkpoint import Checkpoint
from manidp.formats.ckpt import read_ckpt
from manidp.formats.conversion import from_ckpt, read_thresholds
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.graph.macs import ungated_macs
from manidp.hub.bundle import NETWORK, description, pack
from manidp.hub.card import card_faults, read_card
from manidp.models import resnet

MEASURED: dict[str, Any] = {
    "data": "CIFAR-10 test images",
    "correct": 9205,
    "total": 10000,
    "mean_macs": 180_000.0,
}
PROVENANCE: dict[str, object] = {"measured": MEASURED, "data": {"name": "CIFAR-10 training images"}}


def checkpoint_of(graph: Graph, provenance: dict[str, object] | None = None) -> Checkpoint:
    chance = np.random.default_rng(0)
    weights = {name: chance.random(shape, np.float32) for name, shape in graph.parameters.items()}
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (16, 16))
    return Checkpoint(graph, weights, preprocessing, tuple("abcd"), provenance or {})


@pytest.fixture
def checkpoint() -> Checkpoint:
    return checkpoint_of(with_gates(resnet(8, num_classes=4, width=4, image=(3, 16, 16))), PROVENANCE)


def test_a_bundle_holds_the_whole_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    card = pack(checkpoint, tmp_path / "new" / "out", "manidp-res8")
    folder = card.parent / "manidp_res8"
    values, thresholds = read_ckpt(card.with_suffix(".ckpt")), read_thresholds(folder / "thresholds.npy")
    back, ignored = from_ckpt(values, thresholds, checkpoint.graph, checkpoint.preprocessing, checkpoint.classes)
    assert not ignored
    for name, value in checkpoint.weights.items():
        np.testing.assert_array_equal(back.weights[name], value)
    described = json.loads((folder / "network.json").read_text())
    assert described == json.loads(json.dumps(description(checkpoint.graph)))
    assert {f"{node['name']}.{name}": tuple(shape) for node in described["nodes"] for name, shape in
            node["parameters"].items()} == checkpoint.graph.parameters  # fmt: skip


def test_the_card_is_one_the_hub_takes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = pack(checkpoint, tmp_path / "out", "manidp-res8", home="https://host.com/me/models/tree/main")
    assert card_faults(path.read_bytes(), "card") == ()
    card = read_card(path)
    assert path.name == "manidp_res8.md"
    assert card.fields["repo-link"] == "https://host.com/me/models/tree/main/manidp_res8"
    assert (card.fields["accuracy"], card.fields["train-dataset"]) == ("0.9205", "cifar10")
    text = " ".join(card.body.split())
    fewer = 1 - MEASURED["mean_macs"] / ungated_macs(checkpoint.graph)
    assert "9,205 of 10,000 right (92.05%) on CIFAR-10 test images" in text
    assert f"0.180 M multiply-adds an image on average ({fewer:.1%} fewer than without gates)" in text
    assert 'mindspore_hub.load("manidp_res8.md", source="local")' in text
    (asset,) = card.assets
    assert asset.link.endswith("/manidp_res8.ckpt")
    assert asset.sha256 == hashlib.sha256((path.parent / "manidp_res8.ckpt").read_bytes()).hexdigest()


@pytest.mark.parametrize("measured", [None, [], {**MEASURED, "correct": "all"}, {**MEASURED, "total": 0}])
def test_a_card_has_no_figures_but_recorded_ones(measured: object, tmp_path: Path) -> None:
    card = read_card(pack(checkpoint_of(resnet(8, num_classes=4, image=(3, 16, 16)), {"measured": measured}),
                          tmp_path / "out", "dense"))  # fmt: skip
    assert "not on record" in card.body
    assert not card.fields.keys() & {"accuracy", "train-dataset"}


def test_the_code_in_it_stands_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = pack(checkpoint, tmp_path / "out", "manidp-res8").parent / "manidp_res8"
    (module,) = folder.glob("manidp_network_*.py")
    assert module.read_bytes() == NETWORK.read_bytes()
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    assert imported - set(sys.stdlib_module_names) == {"mindspore", "numpy", module.stem}


@pytest.mark.parametrize("name", ["", "Res20", "res 20", "../res20", "res.20", "-res", "res--20", "res20-cn"])
def test_a_name_the_hub_cannot_take_is_refused(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="name"):
        pack(checkpoint, tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_left_half_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(HubError, match="a new folder or an empty one is needed"):
        pack(checkpoint, out, "manidp-res8")
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(Exception, match="would be refused"):
        pack(checkpoint, tmp_path / "other", "manidp-res8", home="ftp://nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "mine").unlink()
    assert pack(checkpoint, out, "manidp-res8").is_file()


def test_without_mindspore_the_extra_is_named_and_nothing_is_left_behind() -> None:
    probe = """
import os, sys
sys.modules['mindspore'] = None
before = dict(os.environ)
try:
    import manidp.mindspore
finally:
    assert dict(os.environ) == before
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode
    last = done.stderr.splitlines()[-1]
    assert "MissingExtraError" in last and "pip install 'manidp[mindspore]' 'numpy<2'" in last
