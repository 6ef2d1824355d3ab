"""Every option of every command, given rubbish: exit code 0, 1 or 2, one line on stderr if 2, never a traceback."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from manidp import cli
from manidp.bench import measure
from manidp.bench.measure import random_checkpoint
from manidp.data import images
from manidp.data.images import load_sample
from manidp.engine import engine
from manidp.formats.checkpoint import Checkpoint, OperatingPoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.models import resnet
from manidp.training.diagnosis import Diagnosis, Variant

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "benchmarks" / "bench.json").read_text())
RECORD |= {"modes": RECORD["modes"][:1], "growth": []}
RUBBISH = {
    "empty": "",
    "blank": "   ",
    "absent": "absent/deep/x",
    "folder": "folder",
    "empty file": "nothing",
    "text": "text.txt",
    "zeros": "zeros.ckpt",
    "pipe": "pipe",
    "device": "/dev/null",
    "of nobody": "~nobody-here/x",
    "NUL": "a\0b",
    "bytes": "\udcff\udcfe.png",
    "controls": "\x1b[31m[bold]\n\u202e",
    "long name": "x" * 300,
    "long path": "x/" * 3000,
    "minus one": "-1",
    "zero": "0",
    "huge": "9" * 400,
    "float": "1.5",
    "infinite": "1e999",
    "NaN": "nan",
    "address": "http://[",
    "assignment": "epochs=",
    "unknown setting": "x=1",
}
# What makes each command work; "new" stands for a path that is not there yet.
WORKING: dict[str, dict[str, list[str]]] = {
    "": {},
    "classify": {"paths": ["set/cat"], "model": ["m.safetensors"]},
    "evaluate": {"data": ["set"], "model": ["m.safetensors"]},
    "calibrate": {"model": ["m.safetensors"], "out": ["new.safetensors"], "budget": ["50%"], "data": ["set"]},
    "freeze": {"model": ["m.safetensors"], "out": ["new.safetensors"], "data": ["set"]},
    "data": {"name": ["sample"], "to": ["new"]},
    "info": {"checkpoint": ["m.safetensors"]},
    "train": {"data": ["set"], "out": ["new"], "start": ["dense.safetensors"], "threads": ["1"],
              "settings": ["epochs=1", "batch_size=4", "precision=float32", "learning_rate=0.01"]},
    "convert": {"source": ["m.safetensors"], "out": ["new.ckpt"], "thresholds": ["new.npy"]},
    "report": {"out": ["new.html"], "model": ["m.safetensors"], "beside": ["dense.safetensors"], "data": ["set"]},
    "diagnose": {"model": ["m.safetensors"], "data": ["set"]},
    "bench": {"model": ["m.safetensors"], "dense": ["dense.safetensors"], "data": ["set"]},
    "prune": {"network": ["net.py:make"], "data": ["set"], "budget": ["50%"], "out": ["new"], "threads": ["1"],
              "settings": ["epochs=1", "batch_size=4", "precision=float32", "compiled=false"]},
    "score": {"source": ["set"], "model": ["m.safetensors"], "out": ["new"]},
    "serve": {"model": ["m.safetensors"], "threads": ["1"]},
    "inspect": {"network": ["net.py:make"], "size": ["3x32x32"]},
    "hub": {},
    "hub list": {},
    "hub show": {"uid": ["manidp/1.0/manidp-res20_cifar10"]},
    "hub pull": {"uid": ["manidp/1.0/manidp-res20_cifar10"]},
    "hub add": {"file": ["m.safetensors"]},
    "hub verify": {},
    "hub pack": {"model": ["m.safetensors"], "folder": ["new"]},
}  # fmt: skip


def all_commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, (*words, name))


COMMANDS = dict(all_commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rubbish")
    sample, dense = load_sample(), resnet(8, width=4, num_classes=2)
    for name, graph in (("m", with_gates(dense)), ("dense", dense)):
        save_checkpoint(replace(random_checkpoint(graph), classes=("cat", "dog")), root / f"{name}.safetensors")
    for label in ("cat", "dog"):
        (root / "set" / label).mkdir(parents=True)
        for number, pixels in enumerate(sample.images[sample.labels == sample.classes.index(label)][:4]):
            Image.fromarray(pixels).save(root / "set" / label / f"{number}.png")
    (root / "net.py").write_text("""
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
""")
    (root / "folder").mkdir()
    (root / "nothing").touch()
    (root / "text.txt").write_text("= not [what = anybody\nexpects")
    (root / "zeros.ckpt").write_bytes(bytes(1000))
    os.mkfifo(root / "pipe")
    return root


def words(name: str, given: dict[str, list[str]]) -> list[str]:
    """The command line of a command, its parameters given by their names."""
    line = name.split()
    options, arguments = [], []
    for parameter in COMMANDS[name].params:
        for value in given.get(parameter.name, []):
            if parameter.param_type_name == "argument":
                arguments.append(value)
            else:
                options += [parameter.opts[0], value]
    return [*line, *options, "--", *arguments] if arguments else [*line, *options]


@functools.cache
def importing() -> Any:
    from manidp.torch.userfile import imported

    return functools.cache(imported)


ENGINES: dict[tuple[int, int], engine.Engine] = {}


def compiled(checkpoint: Checkpoint, make: Any = engine.Engine, **options: Any) -> engine.Engine:
    size = len(checkpoint.graph.nodes), len(checkpoint.points)
    if options not in ({}, {"threads": 1, "precision": "float32"}):
        made: engine.Engine = make(checkpoint, **options)
        return made
    if size not in ENGINES:
        ENGINES[size] = make(checkpoint)
    return ENGINES[size]


def prepare(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("train", "diagnose", "prune", "calibrate", "freeze"):
        pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    if name == "report":
        charts = pytest.importorskip(
            "manidp.report.charts", reason="reports need matplotlib: pip install 'manidp[plots]'"
        )
        monkeypatch.setattr("manidp.report.page._page", lambda *_: "a page")
        monkeypatch.setattr(charts, "_overview", lambda *_: charts.Figure())
    if name == "calibrate":  # what takes long in it is tested apart (test_calibrate.py)
        points = (OperatingPoint("50%", {}, 1.0),)
        monkeypatch.setattr(
            "manidp.training.calibrate.calibrate", lambda found, *_, **__: replace(found, points=points)
        )
    if name == "freeze":
        monkeypatch.setattr("manidp.training.statistics.estimated", lambda *_: {})
    if name == "diagnose":  # so is this (with_torch/test_diagnose.py)
        found = Diagnosis(4, 2, 1.0, 1.0, 1.0, 2, {"gate": 0.5}, {"gate": 0.5}, (Variant("as it is", 2, 1.0),), 4)
        monkeypatch.setattr("manidp.torch.diagnose.diagnose", lambda *_: found)
    if name == "prune":  # an import takes half a second: once for all options that do not change it
        monkeypatch.setattr("manidp.torch.userfile.imported", importing())
    if name == "score":
        pytest.importorskip("pyarrow", reason="scoring needs pyarrow: pip install 'manidp[score]'")
        monkeypatch.setattr("manidp.score.scorer.Engine", compiled)
        monkeypatch.setattr("manidp.score.cluster.on_ray", lambda *_: importlib.import_module("manidp.score.run").here)
    if name == "serve":
        pytest.importorskip("fastapi", reason="serving needs FastAPI: pip install 'manidp[serve]'")
        monkeypatch.setattr("manidp.serve.server.serve", lambda *_: None)
    monkeypatch.chdir(place)
    for variable, value in {"MANIDP_OFFLINE": "1", "MANIDP_CACHE": str(place / "cache")}.items():
        monkeypatch.setenv(variable, value)
    # What takes long and is not what is tested: building the tree of commands, compiling, measuring.
    monkeypatch.setattr(sys.modules["manidp.cli.app"], "app", COMMANDS[""])
    monkeypatch.setattr(engine, "Engine", compiled)
    few = load_sample().take(np.arange(0, 200, 50))
    monkeypatch.setattr(images, "load_sample", lambda: few)
    monkeypatch.setattr(measure, "bench", lambda *_, **__: RECORD)


def sweep(place: Path) -> None:
    for new in place.glob("new*"):
        shutil.rmtree(new) if new.is_dir() else new.unlink()


def cases() -> list[tuple[str, str]]:
    return [
        (name, str(parameter.name))
        for name, command in COMMANDS.items()
        for parameter in command.params
        if not getattr(parameter, "is_flag", False)
    ]


def test_files_may_have_names_that_are_no_unicode(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    monkeypatch.chdir(place)
    odd = os.fsdecode(b"\xffodd")
    shutil.copytree("set", odd)
    shutil.copy("dense.safetensors", f"{odd}.safetensors")
    for line in (
        words("train", {**WORKING["train"], "data": [odd], "start": [f"{odd}.safetensors"], "out": [f"{odd}-run"]}),
        words("convert", {**WORKING["convert"], "out": [f"{odd}.ckpt"]}),
        ["convert", f"{odd}.ckpt", "--thresholds", "new.npy", "-o", "back.safetensors"],
        ["info", "back.safetensors"],
        ["info", f"{odd}-run"],
    ):
        monkeypatch.setattr(sys, "argv", ["manidp", *line])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_line_that_works(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else rubbish would not come far."""
    assert set(WORKING) == set(COMMANDS)
    prepare(name, place, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["manidp", *words(name, WORKING[name])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    codes = {"hub add": (2,), "prune": (0, 1)}  # no card names the file; one epoch may miss the budget
    assert (stop.value.code or 0) in codes.get(name, (0,)), capsys.readouterr().err
    sweep(place)


@pytest.mark.parametrize(("name", "parameter"), cases())
def test_rubbish_is_one_line(
    name: str, parameter: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(name, place, monkeypatch)
    signal.signal(signal.SIGALRM, hangs)
    for kind, rubbish in RUBBISH.items():
        arguments = words(name, {**WORKING[name], parameter: [rubbish]})
        monkeypatch.setattr(sys, "argv", ["manidp", *arguments])
        signal.alarm(30)
        try:
            cli.main()
            code: Any = None
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            pytest.fail(f"{kind}: {arguments}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        err = capsys.readouterr().err
        assert code in (0, 1, 2), (kind, arguments)
        assert "Traceback" not in err, (kind, arguments)
        if code == 2:
            assert err.startswith("manidp: "), (kind, arguments, err)
            assert err.count("\n") == 1, (kind, arguments, err)
        sweep(place)


class Hangs(BaseException):
    """No command takes it for an error of its own."""


def hangs(_: int, frame: types.FrameType | None) -> None:
    raise Hangs(frame)
