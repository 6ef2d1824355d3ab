"""torch runs any checkpoint as the engine does: pixels, budgets, gates; on a device that is there."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

import manidp.torch
from manidp import cli
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.errors import ImageError, ManiDPError, TrainingError
from manidp.graph.macs import ungated_macs
from manidp.predict import predict
from manidp.torch.backend import Torch
from manidp.torch.inference import TorchEngine
from test_operating_points import IMAGES, pointed


def test_pixels_gates_and_multiply_adds_are_the_engines() -> None:
    images = load_sample(12).images
    ours, theirs = manidp.load("manidp-res20"), manidp.torch.load("manidp-res20", threads=1)
    wanted, came = ours.run(images), theirs.run(images)
    np.testing.assert_allclose(came.logits, wanted.logits, atol=1e-4 * np.abs(wanted.logits).max())
    np.testing.assert_array_equal(came.macs, wanted.macs)
    assert all((came.kept[gate] == mask).all() for gate, mask in wanted.kept.items())
    assert [one.label for one in predict(theirs, images)] == [one.label for one in predict(ours, images)]
    assert theirs.run(images[:0]).logits.shape == (0, 10)
    low = manidp.torch.load("manidp-res20", precision="bfloat16", threads=1).run(images)
    assert 1e-4 < np.abs(low.logits - wanted.logits).max() / np.abs(wanted.logits).max() < 0.1
    dense = manidp.torch.load("dense-res20", threads=1).run(images)  # has no gates
    assert set(dense.macs) == {ungated_macs(dense.graph)} and not dense.kept


def test_a_budget_is_that_of_its_operating_point() -> None:
    checkpoint = pointed()
    ours, theirs = Engine(checkpoint), TorchEngine(checkpoint, threads=1)
    for budget in ("p1", "p15", "default"):
        wanted, came = ours.run(IMAGES, budget=budget), theirs.run(IMAGES, budget=budget)
        np.testing.assert_allclose(came.logits, wanted.logits, atol=1e-4 * np.abs(wanted.logits).max())
        np.testing.assert_array_equal(came.macs, wanted.macs)
    with pytest.raises(ImageError, match="not finite"):
        theirs.run(np.full_like(IMAGES, np.nan))


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["manidp", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_the_command_line_runs_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for backend in ("engine", "torch"):
        code, out, _ = said(monkeypatch, capsys, "classify", "--sample=5", "--json", f"--backend={backend}")
        assert not code
        told.append(json.loads(out)["images"])
    for ours, theirs in zip(*told, strict=True):
        assert theirs | {"probability": 0} == ours | {"probability": 0}


def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in (
        (("--backend=torch", "--device=cuda"), "device cuda: PyTorch finds no GPU here"),
        (("--device=cuda",), "the engine runs on cpu, not on cuda; add --backend torch"),
        (("--backend=torch", "--device=tpu"), "device must be cpu or cuda; got 'tpu'"),
        (("--backend=jax",), "--backend is engine or torch; got jax"),
        (("--backend=torch", "--precision=float16"), "precision of torch is float32 or bfloat16"),
    ):
        for command in ("classify", "evaluate"):
            code, _, err = said(monkeypatch, capsys, command, *words)
            assert code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(ManiDPError, match="finds no GPU here"):
        manidp.torch.load("dense-res20", device="cuda")
    with pytest.raises(TrainingError, match="finds no GPU here"):
        Torch("cuda")
