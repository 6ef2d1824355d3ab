"""Training: learns, meets its target, resumes to the last bit, stops on NaN, refuses what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp.data.images import ImageSet
from manidp.errors import TrainingError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.graph.macs import dense_macs
from manidp.training.backend import Backend, Batch, Learner, below
from manidp.training.evaluate import evaluate
from manidp.training.recipe import Recipe, parse_setting, read_recipe

from .cases import GATED, GATED_GRAPH, GRAPH, PREPROCESSING, RECIPE, fresh, image_set, trained, training


def test_dense_training_learns(backend: Backend, tmp_path: Path) -> None:
    run, records = trained(backend, tmp_path, RECIPE)
    assert [record.epoch for record in records] == [0, 1, 2, 3]
    assert records[-1].cross_entropy < 0.5 * records[0].cross_entropy
    run.finish()
    evaluation = evaluate(run.learner.run, image_set(101, seed=1), PREPROCESSING, batch_size=7)
    assert evaluation.total == 101
    assert len(evaluation.macs) == 101
    assert evaluation.correct > 90


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_budget_is_met_at_the_end_within_one_percent(share: float, backend: Backend, tmp_path: Path) -> None:
    full = dense_macs(GATED_GRAPH)
    recipe = replace(RECIPE, epochs=6, macs_budget=share * full, learning_rate=0.02)
    run, records = trained(backend, tmp_path, recipe)
    run.finish()
    assert records[0].macs == full
    assert records[-1].macs < records[0].macs
    macs = evaluate(run.learner.run, image_set(), PREPROCESSING).macs.mean()
    assert macs == pytest.approx(recipe.macs_budget, rel=0.01)
    assert run.missed() is None


def test_what_is_not_trainable_stays(backend: Backend, tmp_path: Path) -> None:
    fixed = ("conv_1_3x3", "bn_1")
    nodes = (replace(node, trainable=node.name not in fixed) for node in GRAPH.nodes)
    start = fresh(backend, Graph(tuple(nodes), GRAPH.output))
    run, _ = trained(backend, tmp_path, replace(RECIPE, epochs=1, weight_decay=0.1), start=start)
    now = below(run.learner.state(), "network/")
    same = {name for name, value in start.weights.items() if np.array_equal(value, now[name])}
    assert same == {"conv_1_3x3.weight", "bn_1.gamma", "bn_1.beta"}


def test_thresholds_wait_for_the_second_epoch(backend: Backend, tmp_path: Path) -> None:
    run = training(backend, tmp_path, GATED)
    thresholds = []
    for _ in zip(range(2), run.epochs(), strict=False):
        thresholds.append(list(run.learner.thresholds().values()))
    assert thresholds[0] == [0] * len(GATED_GRAPH.gates)
    assert all(value > 0 for value in thresholds[1])


def test_what_finish_returns_is_what_the_network_runs_with(backend: Backend, tmp_path: Path) -> None:
    run, _ = trained(backend, tmp_path, replace(GATED, epochs=2))
    made = Checkpoint(GATED_GRAPH, run.finish(), PREPROCESSING, ("left", "right"))
    other = backend.learner(made, image_set(), run.recipe)
    one, two = (evaluate(learner.run, image_set(), PREPROCESSING) for learner in (run.learner, other))
    assert one.correct == two.correct
    assert (one.macs == two.macs).all()


def test_the_log_has_the_run_and_a_line_an_epoch(backend: Backend, tmp_path: Path) -> None:
    _, records = trained(backend, tmp_path, replace(GATED, epochs=2))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["run"]["recipe"]["keep_rate"] == 0.6
    assert lines[0]["run"]["backend"] == backend.name
    assert [line["epoch"] for line in lines[1:]] == [0, 1]
    assert [line["loss"] for line in lines[1:]] == [record.loss for record in records]


SCRIPT = """
import sys
from pathlib import Path
from training.cases import GATED, backend_of, trained
run, _ = trained(backend_of(sys.argv[2]), Path(sys.argv[1]), GATED, resume=True)
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(backend: Backend, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    name = backend.device if backend.device == "cuda" else backend.name

    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed"), name], env=paths)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        if killed.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert 2 <= len(log.read_text().splitlines()) < 5, "killed too late to show anything"
    for folder in ("killed", "whole"):
        trained(backend, tmp_path / folder, GATED, resume=folder == "killed")
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name


def test_a_folder_in_use_is_not_overwritten_nor_resumed_by_another_run(backend: Backend, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    trained(backend, tmp_path, recipe)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="--resume"):
        trained(backend, tmp_path, recipe)
    with pytest.raises(TrainingError, match=r"another run: recipe learning_rate 0\.05 there, 0\.2 here"):
        trained(backend, tmp_path, replace(recipe, learning_rate=0.2), resume=True)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert trained(backend, tmp_path, recipe, resume=True)[1] == []


def test_nan_stops_with_epoch_and_step_and_the_last_good_state_stays(backend: Backend, tmp_path: Path) -> None:
    run = training(backend, tmp_path, RECIPE)
    epochs = run.epochs()
    next(epochs)
    before = (tmp_path / "state.safetensors").read_bytes()
    state = run.learner.state()
    state["network/classifier.weight"][0, 0] = np.nan
    run.learner.load(state)
    with pytest.raises(TrainingError, match="epoch 1, step 0"):
        next(epochs)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_distillation_follows_the_teacher(backend: Backend, tmp_path: Path) -> None:
    teaching, _ = trained(backend, tmp_path / "teacher", RECIPE)
    teacher = Checkpoint(GRAPH, teaching.finish(), PREPROCESSING, ("left", "right"))
    liar = ImageSet(image_set().images, 1 - image_set().labels, ("left", "right"))
    recipe = replace(RECIPE, distillation=1.0, epochs=6, seed=5)
    student, _ = trained(backend, tmp_path / "s", recipe, data=liar, teachers=[teacher])
    student.finish()
    # Labels were turned round; only the teacher knows better.
    assert evaluate(student.learner.run, image_set(), PREPROCESSING).accuracy > 0.8


def test_distillation_needs_both_a_teacher_and_a_share(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="teacher"):
        training(backend, tmp_path, replace(RECIPE, distillation=0.5))
    with pytest.raises(TrainingError, match="teacher"):
        training(backend, tmp_path, RECIPE, teachers=[fresh(backend)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "gates", "message"),
    [
        ({}, True, "needs a target"),
        ({"keep_rate": 0.5, "macs_budget": 1e6}, True, "needs a target"),
        ({"keep_rate": 0.5}, False, "this one has none"),
        ({"keep_rate": 1.5}, True, "keep_rate must lie above 0 and at most 1; got 1.5"),
        ({"epochs": 0}, False, "epochs must lie between 1"),
        ({"learning_rate": float("nan")}, False, "learning_rate must lie above"),
        ({"precision": "float16"}, False, "bfloat16 or float32"),
        ({"padding_mode": "mirror"}, False, "constant or reflect; got 'mirror'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(
    change: dict[str, Any], gates: bool, message: str, backend: Backend, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        start = fresh(backend, GATED_GRAPH if gates else GRAPH)
        training(backend, tmp_path, replace(RECIPE, **change), start=start)
    assert list(tmp_path.iterdir()) == []


def test_recipe_files_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("epochs = 3\nlearning_rate = 1\nprecision = 'float32'\n")
    assert replace(Recipe(), **read_recipe(path)) == Recipe(epochs=3, learning_rate=1, precision="float32")
    for content, message in {
        "epoch = 3": "unknown setting 'epoch'; known are epochs",
        "epochs = 3.5": "epochs must be int; got 3.5",
        "augment = 1": "augment must be bool",
        "epochs = true": "epochs must be int",
        "epochs = ": "not TOML",
    }.items():
        path.write_text(content)
        with pytest.raises(TrainingError, match=message):
            read_recipe(path)
    assert parse_setting("precision=float32") == {"precision": "float32"}
    assert parse_setting("epochs=7") == {"epochs": 7}
    for wrong in ("epochs", "=3", "a b=3"):
        with pytest.raises(TrainingError, match="NAME=VALUE"):
            parse_setting(wrong)


def test_statistics_are_those_of_augmented_training_images(backend: Backend, tmp_path: Path) -> None:
    run, _ = trained(backend, tmp_path, replace(RECIPE, epochs=1, augment=True))
    found = run.finish()["bn_1.moving_mean"]
    augmented, plain = (
        moving_mean(run.learner, list(batches))
        for batches in (run.learner.batches(run.recipe.epochs), run.learner.plain(64))
    )
    assert found == pytest.approx(augmented, abs=1e-5)
    assert np.abs(found - plain).max() > 0.01


def moving_mean(learner: Learner, batches: list[Batch]) -> NDArray[np.float32]:
    """Of the first batch norm: each batch's own, their average."""
    means = []
    for batch in batches:
        learner.observe(batch, 1.0)
        means.append(learner.state()["network/bn_1.moving_mean"])
    mean: NDArray[np.float32] = np.mean(means, axis=0)
    return mean


@pytest.mark.parametrize("target", ["macs_budget", "keep_rate"])
def test_for_a_budget_thresholds_follow_within_the_epoch_for_a_rate_they_wait_for_its_end(
    target: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manidp.training.loop.FOLLOW", 1)
    seen = []

    def look(done: int, total: int | None) -> None:
        seen.append(tuple(run.learner.thresholds().values()))

    recipe = replace(RECIPE, macs_budget="80%", shares="even") if target == "macs_budget" else GATED
    run = training(backend, tmp_path, recipe, progress=look)
    list(run.epochs())
    steps = run.learner.steps
    of_epochs = [set(seen[start : start + steps]) for start in range(0, len(seen), steps)]
    assert [len(values) for values in of_epochs[:2]] == [1, 1]
    assert all((len(values) > 1) == (target == "macs_budget") for values in of_epochs[2:])


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_a_step_is_no_longer_than_its_gradient_may_be(backend: Backend, bound: float) -> None:
    start, rate = fresh(backend, GATED_GRAPH), 1.0
    plain = replace(GATED, momentum=0.0, weight_decay=0.0).resolved(GATED_GRAPH)
    lengths = []
    for recipe in (plain, replace(plain, clip_norm=bound)):
        learner = backend.learner(start, image_set(), recipe)
        before = learner.state()
        learner.step(next(learner.batches(0)), learning_rate=rate, limit=0.0)
        after = learner.state()
        steps = [after[name] - before[name] for name in before if name.startswith("network/") and "moving" not in name]
        lengths.append(float(np.sqrt(sum(np.square(step, dtype=np.float64).sum() for step in steps))))
    assert 1e-2 < lengths[0] < 1e2
    assert lengths[1] == pytest.approx(min(lengths[0], bound), rel=2e-3)
