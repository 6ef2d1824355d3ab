"""``manidp prune``: a user's file and weights to a gated model; what is read of weights; larger pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import manidp
from manidp import cli
from manidp.data.folders import load_folder
from manidp.data.labelled import load_labelled
from manidp.data.preprocessing import Preprocessing
from manidp.engine.engine import Engine
from manidp.errors import FrontendError, TrainingError
from manidp.formats.checkpoint import load_checkpoint
from manidp.graph.macs import ungated_macs
from manidp.torch import prune
from manidp.torch.frontend import to_state_dict
from manidp.torch.userfile import load_weights, module_of
from manidp.training.recipe import Recipe

NET = """
from torch import nn

def layer(read, made, stride=1):
    return nn.Sequential(nn.Conv2d(read, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU())

def make():
    return nn.Sequential(
        layer(3, 8, 2), layer(8, 24), layer(24, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))

def made_of_code():
    return open
"""
QUICK = ("epochs=2", "batch_size=8", "learning_rate=0.01", "precision=float32")


def pictures(folder: Path, size: int, count: int = 12) -> Path:
    """Bright above, bright below."""
    chance = np.random.default_rng(0)
    for number in range(2 * count):
        name, bright = ("above", slice(0, size // 2)) if number % 2 else ("below", slice(size // 2, size))
        pixels = chance.integers(0, 150, (size, size, 3), np.uint8)
        pixels[bright] += 100
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["manidp", "prune", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_a_file_with_weights_becomes_a_gated_model_of_the_budget(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = module_of(f"{net}:make")
    torch.save({"epoch": 3, "net": {f"module.{name}": value for name, value in module.state_dict().items()}},
               tmp_path / "w.pth")  # fmt: skip
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    for part, count in (("train", 12), ("val", 3)):
        pictures(tmp_path / "data" / part, 16, count)
    words = (f"{net}:make", f"--data={tmp_path / 'data'}", "--budget=0.6", f"--out={tmp_path / 'run'}", "--mean=0.5",
             "--std=0.25,0.25,0.3", "--threads=1", "--json", *(f"--set={one}" for one in QUICK))  # fmt: skip
    code, out, err = said(monkeypatch, capsys, *words, f"--weights={tmp_path / 'w.pth'}")
    last = json.loads(out.splitlines()[-1])
    assert code == (1 if last["missed"] else None), err  # two epochs may be too few for gates that differ
    assert f"net.py:make as it is: {last['before']['correct']} of 6 right" in err
    assert last["measured"]["total"] == last["before"]["total"] == 6 and last["measured"]["data"] == "data/val"
    dense, gated = (load_checkpoint(tmp_path / "run" / f"{name}.safetensors") for name in ("dense", "model"))
    assert dense.classes == gated.classes == ("above", "below")
    assert gated.preprocessing == Preprocessing((0.5,) * 3, (0.25, 0.25, 0.3), (16, 16))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in to_state_dict(dense, module).items())
    module.load_state_dict(to_state_dict(gated, module))
    recipe = gated.provenance["recipe"]
    assert recipe["macs_budget"] == pytest.approx(0.6 * ungated_macs(dense.graph)) and recipe["distillation"] == 0.5
    assert gated.provenance["teacher"] == [gated.provenance["from"]]
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, _ = said(monkeypatch, capsys, *words, "--resume", f"--weights={tmp_path / 'w.safetensors'}")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before, "the same weights are the same run"
    changed = {name: value + 1 for name, value in module.state_dict().items()}
    save_file(changed, tmp_path / "w.safetensors")
    code, _, err = said(monkeypatch, capsys, *words, "--resume", f"--weights={tmp_path / 'w.safetensors'}")
    assert code == 2 and "is of another run: origin from" in err


def test_from_python_larger_pictures_are_trained_to_the_same_bits_and_meet_the_budget(
    net: Path, tmp_path: Path
) -> None:
    size = (72, 72)
    data, _ = load_labelled(pictures(tmp_path / "data", 80), size)
    torch.manual_seed(0)
    dense = manidp.from_torch(module_of(f"{net}:make"), torch.zeros(1, 3, *size), classes=data.classes)
    recipe = Recipe(epochs=6, batch_size=8, learning_rate=0.02, precision="float32", distillation=0.5, reach=0.5)
    whole = prune(dense, data, 0.6, tmp_path / "whole", recipe=recipe, threads=1)
    with pytest.raises(KeyboardInterrupt):
        prune(dense, data, 0.6, tmp_path / "parts", recipe=recipe, threads=1, report=interrupted)
    again = prune(dense, data, 0.6, tmp_path / "parts", recipe=recipe, threads=1, resume=True)
    assert all(np.array_equal(value, again.weights[name]) for name, value in whole.weights.items())
    images, _ = load_folder(tmp_path / "data", size)
    macs = Engine(whole).run(images.images).macs.mean()
    assert macs == pytest.approx(0.6 * ungated_macs(dense.graph), rel=0.01)


def interrupted(record: Any) -> None:
    if record.epoch == 1:
        raise KeyboardInterrupt


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("/tmp/executed-by-a-pickle", "w")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Evil(), "nothing in it is executed"),
        ({"state_dict": Evil()}, "nothing in it is executed"),
        ([1, 2], "expected a state_dict, names and tensors; got a list"),
        ({"epoch": 3}, "got a dict of epoch"),
        ({"0.0.weight": torch.zeros(1)}, "missing: 0.1.weight.*of another shape: 0.0.weight"),
        (b"no file of torch.save", "w.pth: "),
    ],
)
def test_weights_that_are_none_are_one_line(given: Any, message: str, net: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    if isinstance(given, bytes):
        path.write_bytes(given)
    else:
        torch.save(given, path)
    with pytest.raises(FrontendError, match=message) as caught:
        load_weights(module_of(f"{net}:make"), path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not Path("/tmp/executed-by-a-pickle").exists()


def test_what_does_not_fit_is_told(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "data", 16, 1)
    pictures(tmp_path / "more", 16, 1)
    Image.new("RGB", (16, 16)).save(tmp_path / "more" / "below" / "x.png")
    (tmp_path / "more" / "third").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "more" / "third" / "x.png")
    out = f"--out={tmp_path / 'run'}"
    for words, message in (
        (("--data=more", "--budget=0.5"), "makes 2 logits, and the data has 3 classes"),
        (("--data=data", "--budget=half"), "budget must be a number"),
        (("--data=data", "--budget=0.01"), "this network can take"),
        (("--data=data", "--budget=0.5", "--mean=a"), "--mean is one number, or three"),
        (("--data=data", "--budget=0.5", "--input=1x16x16"), "RGB"),
        (("--data=data", "--budget=0.5", "--weights=none.pth"), "none.pth: cannot be read: No such file"),
        (("--data=none", "--budget=0.5"), "none: No such file"),
    ):
        monkeypatch.chdir(tmp_path)
        code, _, err = said(monkeypatch, capsys, f"{net}:make", *words, out)
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
    data, _ = load_folder(tmp_path / "data", (16, 16))
    dense = manidp.from_torch(module_of(f"{net}:make"), torch.zeros(1, 3, 16, 16))
    with pytest.raises(TrainingError, match="from_torch takes classes="):
        prune(dense, data, 0.5, tmp_path / "run")
