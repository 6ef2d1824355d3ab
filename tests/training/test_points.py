"""One network trained for several budgets at once."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from manidp.errors import TrainingError
from manidp.graph import Squareplus
from manidp.graph.macs import dense_macs, ungated_macs
from manidp.torch.backend import Torch
from manidp.torch.convert import network_from
from manidp.torch.losses import distillation_loss
from manidp.training.evaluate import evaluate
from manidp.training.recipe import Recipe
from manidp.training.reopen import begun_anew, reopenable
from training.cases import GATED_GRAPH, PREPROCESSING, RECIPE, fresh, image_set, trained, training

TORCH = Torch("cpu", 1)
POINTS = replace(RECIPE, epochs=3, learning_rate=0.02, macs_budget="60%", points=("40%", "80%", "100%"), reach=0.6)


def test_every_point_meets_its_budget_and_all_of_the_network_is_all(tmp_path: Path) -> None:
    run, records = trained(TORCH, tmp_path, POINTS)
    run.finish()
    assert list(records[-1].points) == ["default", "40%", "80%", "100%"]
    points = run.finished_points()
    assert [point.name for point in points] == ["40%", "80%", "100%"]
    for point in points:
        run.learner.use(point.name)
        macs = evaluate(run.learner.run, image_set(), PREPROCESSING).macs.mean()
        assert macs == point.macs
        if point.name == "100%":
            assert macs == dense_macs(GATED_GRAPH)
        else:
            assert macs / ungated_macs(GATED_GRAPH) == pytest.approx(float(point.name[:-1]) / 100, rel=0.05)
    statistics = [point.values["bn_1.moving_mean"].tobytes() for point in points]
    own = [point.values["stage_3.0.bn_b.moving_variance"].tobytes() for point in points]
    assert len(set(statistics)) == 1  # no gate stands before the stem
    assert len(set(own)) == 3


def test_interrupted_and_resumed_every_point_ends_with_the_same_bits(tmp_path: Path) -> None:
    trained(TORCH, tmp_path / "whole", POINTS)
    with training(TORCH, tmp_path / "parts", POINTS) as run:
        list(islice(run.epochs(), 2))
    trained(TORCH, tmp_path / "parts", POINTS, resume=True)
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert {name.split("/")[0] for name in one} == {"network", "average", "momentum", "points"}
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name


def test_a_step_trains_the_largest_the_smallest_and_each_between_as_often(tmp_path: Path) -> None:
    with training(TORCH, tmp_path, POINTS) as run:
        steps = list(islice(run._sandwich(0), 6))
    assert {step[:2] for step in steps} == {("100%", "40%")}
    assert sorted(step[2] for step in steps) == ["80%"] * 3 + ["default"] * 3


def test_the_largest_follows_the_teacher_and_the_others_the_two_of_them() -> None:
    start, teacher = reopenable(fresh(TORCH, GATED_GRAPH)), fresh(TORCH, seed=1)
    recipe = replace(POINTS, distillation=1.0, momentum=0.0, lambda_similarity=0.0).resolved(start.graph)
    learner = TORCH.learner(start, image_set(), recipe, [teacher])
    learner.use("40%")
    learner.set_thresholds(dict.fromkeys(learner.thresholds(), 2.0))  # closes everything
    batch = next(iter(learner.batches(0)))
    with torch.no_grad():
        wanted = network_from(teacher)(batch[0]).logits
        networks = [network_from(start).train() for _ in range(2)]
        networks[1].load_state_dict(
            {name: torch.full_like(value, 2.0) if name.endswith(".threshold") else value
             for name, value in networks[1].state_dict().items()}
        )  # fmt: skip
        led, follows = (network(batch[0]).logits for network in networks)
    before = learner.state()
    first, second = learner.step(batch, learning_rate=0.1, limit=0.0, points=("100%", "40%"))
    torch.testing.assert_close(first.losses[0], distillation_loss(led, wanted, recipe.temperature))
    torch.testing.assert_close(second.losses[0], distillation_loss(follows, (led + wanted) / 2, recipe.temperature))
    after = learner.state()
    changed = {name for name in before if after[name].tobytes() != before[name].tobytes()}
    assert "points/0/bn_1.moving_mean" in changed
    assert "points/2/bn_1.moving_mean" in changed
    assert not {name for name in changed if name.startswith("points/1/") or name == "network/bn_1.moving_mean"}


def test_a_gate_made_reopenable_decides_the_same_and_its_scores_are_above_zero() -> None:
    start = fresh(TORCH, GATED_GRAPH)
    chance = np.random.default_rng(0)
    for name in sorted(start.graph.scorers):
        start.weights[f"{name}.bias"][:] = chance.normal(0, 1, start.weights[f"{name}.bias"].shape)
    for name in start.graph.thresholds:
        start.weights[name][...] = 0.25
    soft = reopenable(start)
    assert sum(isinstance(node, Squareplus) for node in soft.graph.nodes) == len(start.graph.gates)
    before, after = (network_from(one).eval()(torch.zeros(1, 3, 8, 8)).records for one in (start, soft))
    for name in before:
        assert torch.equal(before[name].gate > 0, after[name].gate > 0)
        assert (after[name].saliency > 0).all()
    first = next(iter(before))
    closed = ~(before[first].gate > 0).any(0).numpy()
    assert 0 < closed.sum() < len(closed)
    seen = {first: after[first].saliency.detach().numpy()}
    new = begun_anew(soft.graph, soft.weights, {n: v + 7 for n, v in soft.weights.items()}, seen)
    differ = {name for name in new if new[name].tobytes() != soft.weights[name].tobytes()}
    conv = next(node.name for node in soft.graph.nodes if soft.graph.wanted_by.get(node.name) == first)
    assert f"{conv}.weight" in differ
    assert np.array_equal(np.flatnonzero((new[f"{conv}.weight"] != soft.weights[f"{conv}.weight"]).any((1, 2, 3))),
                          np.flatnonzero(closed))  # fmt: skip
    assert all(name.startswith((conv.rpartition(".")[0], first)) for name in differ)


def test_a_run_from_a_model_with_points_keeps_what_its_own_budget_closes(tmp_path: Path) -> None:
    start = fresh(TORCH, GATED_GRAPH)
    gate = start.graph.gates[0].name
    start.weights[f"{gate}.threshold"][...] = 2.0  # closes channels that all score 1
    start.weights[f"{gate}.fc2.bias"][0] = 3.0
    conv = next(f"{n.name}.weight" for n in start.graph.nodes if start.graph.wanted_by.get(n.name) == gate)
    start.weights[conv][:] = 0.5
    for name, model, same in (("first", start, False), ("next", reopenable(start), True)):
        with training(TORCH, tmp_path / name, POINTS, start=model) as run:
            assert (run.learner.state()[f"network/{conv}"][1:] == 0.5).all() == same


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(keep_rate=0.6, points=("50%",)), "points are budgets beside macs_budget"),
        (Recipe(macs_budget="60%", points=("50%", "50.0%")), "different budgets"),
        (Recipe(macs_budget="60%", points=("60%",)), "other than macs_budget"),
        (Recipe(macs_budget="60%", points=("300%",)), "all open"),
        (Recipe(macs_budget="60%", points=("many",)), "points must be a number, perhaps followed by"),
        (Recipe(macs_budget="60%", points="50%"), "points must be a list"),  # type: ignore[arg-type]
    ],
)
def test_points_that_cannot_be_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        recipe.resolved(GATED_GRAPH)
