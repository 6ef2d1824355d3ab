"""A network that sees nothing but through its gates: what each change of them must cost is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from manidp import cli
from manidp.data.folders import save_folder
from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.errors import GraphError
from manidp.formats.checkpoint import Checkpoint, save_checkpoint
from manidp.gating.manidp import head
from manidp.graph import Conv, GlobalPool, Graph, Input, Linear, Multiply
from manidp.graph.macs import gate_macs
from manidp.torch.diagnose import diagnose

CLASSES = ("bright", "dark")
GRAPH = Graph(
    (
        Input(name="image", dims=(3, 4, 4)),
        *head("only.gate", "image", 2, 2),
        Conv(name="only.conv", inputs=("image",), channels=2, bias=True),
        Multiply(name="only.gated", inputs=("only.conv", "only.gate")),
        GlobalPool(name="pool", inputs=("only.gated",)),
        Linear(name="classifier", inputs=("pool",), features=2, bias=False),
    ),
    "classifier",
)


def eyes() -> Checkpoint:
    """Its convolution makes ones of every image; the gate opens channel 0 for bright images and 1 for dark ones."""
    weights = {name: np.zeros(shape, np.float32) for name, shape in GRAPH.parameters.items()}
    weights["only.gate.fc1.weight"][:] = [[1, 1, 1], [-1, -1, -1]]
    weights["only.gate.fc2.weight"][:] = weights["classifier.weight"][:] = np.eye(2)
    weights["only.conv.bias"][:] = 1
    return Checkpoint(GRAPH, weights, Preprocessing((0.5,) * 3, (0.25,) * 3, (4, 4)), CLASSES)


def image_set(count: int = 20) -> ImageSet:
    """Bright and dark in turns."""
    labels = np.arange(count, dtype=np.int64) % 2
    shades = np.where(labels == 0, 220, 30)[:, None, None, None] + np.arange(16).reshape(1, 4, 4, 1)
    return ImageSet(np.broadcast_to(shades, (count, 4, 4, 3)).astype(np.uint8), labels, CLASSES)


def test_only_what_the_gates_tell_apart_is_lost_when_they_are_changed() -> None:
    images = image_set()
    mostly_bright = images.images[[0, 2, 4, 1]]
    found = diagnose(eyes(), mostly_bright, images)
    assert (found.correct, found.total, found.estimated_on) == (20, 20, 4)
    assert {one.name: one.correct for one in found.variants} == {
        "as it is": 20, "frozen to the majority": 10, "majority within the predicted class": 20,
        "gates of another image": 0,
    }  # fmt: skip
    one_channel = gate_macs(GRAPH) + 3 * 9 * 16 + 4
    assert found.mean_macs == found.macs_5 == found.macs_95 == one_channel
    half = one_channel - 3 * 9 * 16 / 2  # frozen, a dark image's score of 0 still closes the bright channel
    assert [one.mean_macs for one in found.variants] == [one_channel, half, one_channel, one_channel]
    assert found.differing == {"only.gate": 0.5}
    assert found.differing_by_stage == {"only": 0.5}


def test_a_network_without_gates_is_refused() -> None:
    dense = Graph((GRAPH.input, GlobalPool(name="pool", inputs=("image",)),
                   Linear(name="classifier", inputs=("pool",), features=2)), "classifier")  # fmt: skip
    weights = {name: np.zeros(shape, np.float32) for name, shape in dense.parameters.items()}
    with pytest.raises(GraphError, match="this network has none"):
        diagnose(Checkpoint(dense, weights, eyes().preprocessing, CLASSES), image_set().images, image_set())


def test_the_command_says_it_as_json_as_a_table_and_as_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(eyes(), tmp_path / "eyes.safetensors")
    save_folder(image_set(), tmp_path / "data")
    words = ["manidp", "diagnose", str(tmp_path / "eyes.safetensors"), "--data", str(tmp_path / "data")]
    said = []
    for more in (["--json", "--page", str(tmp_path / "page.html")], []):
        monkeypatch.setattr(sys, "argv", words + more)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    facts = json.loads(said[0])
    assert facts["differing_by_stage"] == {"only": 0.5}
    assert facts["variants"][0] == {"name": "as it is", "correct": 20, "mean_macs": facts["mean_macs"]}
    for text in (said[1], (tmp_path / "page.html").read_text()):
        assert all(variant["name"] in text for variant in facts["variants"])
        assert "20 of 20" in text
