"""Losses, gradients and steps as torch has them; the laws of training are in tests/training."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp import cli
from manidp.data.folders import save_folder
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_PREPROCESSING
from manidp.errors import TrainingError
from manidp.formats.checkpoint import load_checkpoint
from manidp.gating.place import with_gates
from manidp.hub.bundle import description
from manidp.mindspore.backend import Loss, MindSpore, TrainingStep
from manidp.mindspore.convert import weights
from manidp.mindspore.losses import similarity_loss
from manidp.mindspore.network import Network
from manidp.models import resnet
from manidp.training.importance import score_biases
from manidp.training.job import Job, run_job
from manidp.training.recipe import Recipe
from manidp.training.schedule import learning_rate
from manidp.training.start import start_of
from networks import small_gated

# Made by tests/with_torch/test_training_step.py.
RECORD = Path(__file__).parents[1] / "data" / "training-step.safetensors"
RECIPE = Recipe(learning_rate=0.05, weight_decay=5e-2, lambda_sparsity=0.5, lambda_similarity=30.0)
STEPS = 4
GRAPH = small_gated(width=4, classes=4)
MINDSPORE = MindSpore()
Array = NDArray[np.float32]
Arrays = dict[str, Array]


@pytest.fixture
def recorded() -> Arrays:
    return load_file(RECORD)


def network_of(recorded: Arrays) -> Network:
    network = Network(description(GRAPH), [float(recorded[f"weights/{gate.name}.threshold"]) for gate in GRAPH.gates])
    for parameter in network.get_parameters():
        parameter.set_data(mindspore.Tensor(recorded[f"weights/{parameter.name}"]))
    return network


def batch(recorded: Arrays) -> tuple[object, ...]:
    labels = mindspore.Tensor(recorded["labels"].astype(np.int32))
    return mindspore.Tensor(recorded["images"]), labels, mindspore.Tensor(recorded["limit"]), mindspore.Tensor([0.0])


def assert_close(came: Array, expected: Array, name: str) -> None:
    """Within 1e-4 of the greatest value."""
    np.testing.assert_allclose(came, expected, rtol=0, atol=1e-4 * abs(expected).max() + 1e-7, err_msg=name)


def test_losses_and_gradients_are_those_of_torch(mode: str, recorded: Arrays) -> None:
    network = network_of(recorded)
    loss = Loss(network, RECIPE)
    loss.set_train(True)
    parameters = network.trainable_params()
    (_, losses, *_), gradients = mindspore.value_and_grad(loss, None, parameters, has_aux=True)(*batch(recorded))
    total, cross_entropy, _, sparsity, similarity = losses.asnumpy()
    np.testing.assert_allclose([total, cross_entropy, sparsity, similarity], recorded["losses"], rtol=1e-5)
    assert {f"gradient/{p.name}" for p in parameters} == {name for name in recorded if name.startswith("gradient/")}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_close(gradient.asnumpy(), recorded[f"gradient/{parameter.name}"], parameter.name)


def test_a_row_of_zeros_is_like_no_other_and_not_unlike_itself() -> None:
    saliency, feature = mindspore.Tensor([[0.0, 0], [1, 0]]), mindspore.Tensor([[1.0, 0], [0, 1]])
    assert float(similarity_loss([saliency], [feature])) == 0
    assert float(similarity_loss([feature], [mindspore.ops.ones((2, 2))])) == pytest.approx(0.5)


def test_the_direction_of_a_branch_that_begins_with_zeros_is_not_trained() -> None:
    feature = mindspore.ops.eye(3, 4)
    gradient = mindspore.grad(lambda feature: similarity_loss([mindspore.ops.ones((3, 4))], [feature]))
    assert float(gradient(feature).abs().max()) > 0.1
    assert float(gradient(1e-5 * feature).abs().max()) == 0


def test_gates_are_those_of_torch(recorded: Arrays) -> None:
    network = network_of(recorded)
    network.set_train(True)
    logits, records = network.records(batch(recorded)[0])
    assert_close(logits.asnumpy(), recorded["logits"], "logits")
    for name, (saliency, gate, feature) in zip(network.gate_names, records, strict=True):
        assert_close(saliency.asnumpy(), recorded[f"saliency/{name}"], name)
        assert_close(gate.asnumpy(), recorded[f"gate/{name}"], name)
        assert_close(feature.asnumpy(), recorded[f"feature/{name}"], name)


def test_two_steps_end_where_those_of_torch_end(mode: str, recorded: Arrays) -> None:
    network = network_of(recorded)
    step = TrainingStep(network, RECIPE, GRAPH.heads)
    step.set_train(True)
    for number in range(2):
        rate = learning_rate(number, STEPS, peak=RECIPE.learning_rate)
        step(*batch(recorded), mindspore.Tensor(rate, mindspore.float32))
    after = weights(network)
    assert {f"after/{name}" for name in after} == {name for name in recorded if name.startswith("after/")}
    for name, value in after.items():
        assert_close(value, recorded[f"after/{name}"], name)


def test_importance_is_the_factor_times_its_gradient_squared(recorded: Arrays) -> None:
    step = TrainingStep(network_of(recorded), RECIPE, GRAPH.heads, score_biases(GRAPH))
    step.set_train(True)
    made = step(*batch(recorded), mindspore.Tensor(0.0, mindspore.float32))
    gates = [gate.name for gate in GRAPH.gates]
    assert len(made) == 1 + 2 * len(gates)
    for name, found in zip(gates, made[1 + len(gates) :], strict=True):
        factor = recorded[f"gate/{name}"].mean(0)
        assert_close(found.asnumpy(), (factor * recorded[f"gradient/{name}.fc2.bias"]) ** 2, name)


def test_compiled_it_does_the_same_and_thresholds_can_still_be_set() -> None:
    data = load_sample().take(np.arange(8))
    start = start_of(MINDSPORE, with_gates(resnet(8, width=4)), None, CIFAR10_PREPROCESSING, data.classes, 0)
    recipe = replace(RECIPE, batch_size=8, keep_rate=0.5, lambda_similarity=1.0)
    ended = []
    for compiled in (False, True):
        learner = MINDSPORE.learner(start, data, replace(recipe, precision="float32", compiled=compiled))
        for batch, threshold in zip([*learner.batches(0), *learner.batches(1)], (0.0, 0.9), strict=True):
            learner.set_thresholds(dict.fromkeys(learner.thresholds(), threshold))
            learner.step(batch, learning_rate=0.05, limit=2.0)
        ended.append(learner.state())
    for name, value in ended[0].items():
        assert_close(ended[1][name], value, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "with MindSpore device must be cpu; got cuda"),
        ({"threads": 2}, "leave --threads out and set OMP_NUM_THREADS=2"),
        ({"settings": ("precision=bfloat16", "epochs=1")}, "with MindSpore precision must be float32; got bfloat16"),
    ],
)
def test_what_mindspore_cannot_do_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder(load_sample().take(np.arange(4)), tmp_path / "data")
    job = Job(data=tmp_path / "data", out=tmp_path / "run")
    with pytest.raises(TrainingError, match=message) as caught:
        list(run_job(replace(job, **change), MindSpore))
    assert "\n" not in str(caught.value)


def test_the_command_trains_to_a_budget_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(load_sample().take(np.arange(0, 200, 10)), tmp_path / "data")
    settings = ["--set", "epochs=1", "--set", "batch_size=10", "--set", "macs_budget=99%"]
    options = ["--backend", "mindspore", "--network", "resnet-8", "--gates", "--json", *settings]
    arguments = ["--data", tmp_path / "data", "--out", tmp_path / "run", *options]
    for more in ([], ["--resume"]):
        sys.argv = ["manidp", "train", *map(str, arguments), *more]
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    made = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert made.provenance["made_with"]["mindspore"] == mindspore.__version__
    assert made.classes == tuple(sorted(folder.name for folder in (tmp_path / "data").iterdir()))
