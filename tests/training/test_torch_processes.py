"""Several processes train as one: the same network to the bit in each, the budget met, and a run goes on."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from manidp.errors import TrainingError
from manidp.graph.macs import dense_macs
from manidp.torch.backend import Torch
from manidp.torch.processes import Processes

from .cases import GATED_GRAPH, RECIPE, trained, training

BUDGETED = replace(RECIPE, epochs=3, learning_rate=0.02, macs_budget=0.7 * dense_macs(GATED_GRAPH), augment=True)
EACH = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from manidp.errors import TrainingError
from manidp.torch.backend import Torch
from training.cases import image_set, trained, training
from training.test_torch_processes import BUDGETED, batch_normed

backend, folder = Torch(threads=1), Path(sys.argv[1])
run, records = trained(backend, folder / "whole", BUDGETED)
state = run.learner.state()
run.finish()
told = {"thresholds": [value.hex() for value in run.learner.thresholds().values()], "missed": run.missed(),
        "losses": [record.loss for record in records], "normed": batch_normed(backend._processes)}
run.close()
with training(backend, folder / "halves", BUDGETED) as first:
    next(first.epochs())
    backend.agree(b"")
with training(backend, folder / "halves", BUDGETED, resume=True) as second:
    told["resumed"] = len(list(second.epochs()))
    told["same"] = all((value == state[name]).all() for name, value in second.learner.state().items())
try:
    training(backend, folder / "apart", BUDGETED, data=image_set(seed=backend.rank))
except TrainingError as error:
    told["apart"] = str(error)
save_file(state, folder / f"{backend.rank}.safetensors")
(folder / f"{backend.rank}.json").write_text(json.dumps(told))
"""


def batch_normed(processes: Processes) -> list[list[float]]:
    """A normalisation of 6 images, its gradients, and the moved statistics."""
    from manidp.torch.processes import batch_norm

    chance = torch.Generator().manual_seed(0)
    whole, weight = (torch.randn(6, 3, 2, 2, generator=chance) for _ in range(2))
    gamma, beta = (torch.randn(3, generator=chance, requires_grad=True) for _ in range(2))
    x = whole[processes.share(6)].clone().requires_grad_()
    moving = torch.zeros(3), torch.ones(3)
    if processes.size == 1:
        y = F.batch_norm(x, *moving, gamma, beta, True, 0.3, 1e-5)
    else:
        y = batch_norm(x, gamma, beta, moving, 0.3, 1e-5, processes)
    (y.square() * weight[processes.share(6)]).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and gamma.grad is not None and beta.grad is not None
    gradients = processes.sum(gamma.grad), processes.sum(beta.grad)
    found = processes.rows(y), processes.rows(x.grad), *gradients, *moving
    return [value.flatten().tolist() for value in found]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which two processes trained; they are started as torchrun starts them."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    command = [sys.executable, "-W", "error", "-c", EACH, str(folder)]
    running = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    yield folder


def told(pair: Path) -> list[dict[str, Any]]:
    return [json.loads((pair / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_hold_the_same_to_the_bit_and_meet_the_budget(pair: Path) -> None:
    one, other = told(pair)
    assert one["thresholds"] == other["thresholds"]
    assert any(float.fromhex(value) > 0 for value in one["thresholds"])
    assert one["losses"] == other["losses"]
    assert one["missed"] is other["missed"] is None
    first, second = (load_file(pair / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


def test_together_they_take_the_steps_of_one(pair: Path, tmp_path: Path) -> None:
    """But for rounding, which each step makes larger."""
    _, records = trained(Torch(threads=1), tmp_path, BUDGETED)
    assert told(pair)[0]["losses"] == pytest.approx([record.loss for record in records], rel=1e-3)


def test_a_batch_norm_is_that_of_the_whole_batch(pair: Path) -> None:
    for found, wanted in zip(told(pair)[1]["normed"], batch_normed(Processes()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_to_the_same_bits_with_as_many_processes(pair: Path) -> None:
    for one in told(pair):
        assert (one["resumed"], one["same"]) == (2, True)
    lines = [json.loads(line) for line in (pair / "halves" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["run"]["processes"] == 2
    with pytest.raises(TrainingError, match="processes 2 there, 1 here"):
        training(Torch(threads=1), pair / "halves", BUDGETED, resume=True)


def test_processes_with_different_pictures_are_told_so(pair: Path) -> None:
    for one in told(pair):
        assert one["apart"].startswith("the 2 processes begin with different pictures, models, settings or weights")


def test_what_several_processes_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = Torch(threads=1)
    backend._processes = Processes(3, 0)
    with pytest.raises(TrainingError, match="3 processes share a batch: its size must be a multiple of it; got 16"):
        training(backend, tmp_path, BUDGETED)
    with pytest.raises(TrainingError, match="compiled must be false where several processes train"):
        training(backend, tmp_path, replace(BUDGETED, compiled=True))
