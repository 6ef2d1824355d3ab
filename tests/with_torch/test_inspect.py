"""``manidp inspect``: a user's own file, what is in it and what is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from manidp import cli

NET = """
import torch
from torch import nn
from parts import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3), nn.ReLU())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

class Strange(Net):
    def forward(self, x):
        return self.head(torch.fft.fft(self.body(x)).angle().prod(3).prod(2))

def broken():
    return nn.Linear(1, 1) + 1

def make(): return Net()
def strange(): return Strange()
def number(): return 3
made = Net()
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text("WIDTH = 12\n")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["manidp", "inspect", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_layers_costs_and_reasons(
    net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(monkeypatch, capsys, f"{net}:make", "--input", "3x20x16", "--json")
    facts = json.loads(out)
    assert not code and facts["input"] == [3, 20, 16] and facts["classes"] == 5
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert layers["body.2"]["shape"] == [12, 18, 14] and layers["body.2"]["macs"] == 12 * 12 * 9 * 18 * 14
    assert layers["body.2"]["gate"] == "body.mb1" and "reads the image" in layers["body.0"]["why_not"]
    assert facts["macs_of_gates"] == 2 * 12 * 12
    code, out, _ = said(monkeypatch, capsys, f"{net}:made", "--input", "3x20x16")
    assert not code and "body.mb1" in out and "1 gates could close" in out and "none: it reads" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{}:strange", "--input", "3x20x16"), "cannot be imported"),
        (("{}:broken", "--input", "3x20x16"), "net.py, line 20: TypeError"),
        (("{}:number", "--input", "3x20x16"), "makes a int; a torch.nn.Module is needed"),
        (("{}:nothing", "--input", "3x20x16"), "has no 'nothing'"),
        (("{}x:make", "--input", "3x20x16"), "expected FILE.py:NAME"),
        (("no.py:make", "--input", "3x20x16"), "no.py: no such file"),
        (("{}:make", "--input", "20x16"), "--input is channels x height x width, such as 3x224x224; got '20x16'"),
        (("{}:make", "--input", "1x20x16"), "batch of RGB images"),
    ],
)
def test_what_is_wrong_is_told(
    words: tuple[str, ...], message: str, net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, complaints = said(monkeypatch, capsys, *(word.format(net) for word in words))
    assert code == 2 and message in " ".join(complaints.split())
    if "strange" in words[0]:
        assert "net.py:17" in complaints and complaints.count("\n") == 4  # three ops, and the line that counts them
