"""Losses, gradients and steps as torch has them, and a real fine-tuning."""

from pathlib import Path
from typing import Any

import mindspore
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp.data.images import CIFAR10_PREPROCESSING, ImageSet, load_sample
from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.hub.bundle import description
from manidp.mindspore.convert import weights
from manidp.mindspore.losses import similarity_loss
from manidp.mindspore.network import Network
from manidp.mindspore.train import Loss, Recipe, fine_tune, training_step
from manidp.models import resnet

RECORD = Path(__file__).parents[1] / "data" / "training-step.safetensors"  # made by tests/torch/test_training_step.py
RECIPE = Recipe(learning_rate=0.05, weight_decay=5e-2, lambda_sparsity=0.5, lambda_similarity=30.0)
STEPS = 4
Array = NDArray[np.float32]
Arrays = dict[str, Array]


@pytest.fixture
def recorded() -> Arrays:
    return load_file(RECORD)


def network_of(recorded: Arrays) -> Network:
    graph = with_gates(resnet(8, num_classes=4, width=4, image=(3, 8, 8)))
    network = Network(description(graph), [float(recorded[f"weights/{gate.name}.threshold"]) for gate in graph.gates])
    for parameter in network.get_parameters():
        parameter.set_data(mindspore.Tensor(recorded[f"weights/{parameter.name}"]))
    return network


def batch(recorded: Arrays) -> tuple[object, object, object]:
    labels = mindspore.Tensor(recorded["labels"].astype(np.int32))
    return mindspore.Tensor(recorded["images"]), labels, mindspore.Tensor(recorded["limit"])


def assert_close(came: Array, expected: Array, name: str) -> None:
    """Within 1e-4 of the greatest value."""
    np.testing.assert_allclose(came, expected, rtol=0, atol=1e-4 * abs(expected).max() + 1e-7, err_msg=name)


def test_losses_and_gradients_are_those_of_torch(mode: str, recorded: Arrays) -> None:
    network = network_of(recorded)
    loss = Loss(network, RECIPE.lambda_sparsity, RECIPE.lambda_similarity)
    loss.set_train(True)
    parameters = network.trainable_params()
    losses, gradients = mindspore.value_and_grad(loss, None, parameters, has_aux=True)(*batch(recorded))
    total, cross_entropy, _, sparsity, similarity = (value.asnumpy() for value in losses)
    np.testing.assert_allclose([total, cross_entropy, sparsity, similarity], recorded["losses"], rtol=1e-5)
    assert {f"gradient/{p.name}" for p in parameters} == {name for name in recorded if name.startswith("gradient/")}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_close(gradient.asnumpy(), recorded[f"gradient/{parameter.name}"], parameter.name)


def test_a_row_of_zeros_is_like_no_other_and_not_unlike_itself() -> None:
    saliency, feature = mindspore.Tensor([[0.0, 0], [1, 0]]), mindspore.Tensor([[1.0, 0], [0, 1]])
    assert float(similarity_loss([saliency], [feature])) == 0
    assert float(similarity_loss([feature], [mindspore.ops.ones((2, 2))])) == pytest.approx(0.5)


def test_gates_are_those_of_torch(recorded: Arrays) -> None:
    network = network_of(recorded)
    network.set_train(True)
    logits, records = network.records(batch(recorded)[0])
    assert_close(logits.asnumpy(), recorded["logits"], "logits")
    for name, (saliency, gate, feature) in zip(network.gate_names, records, strict=True):
        assert_close(saliency.asnumpy(), recorded[f"saliency/{name}"], name)
        assert_close(gate.asnumpy(), recorded[f"gate/{name}"], name)
        assert_close(feature.asnumpy(), recorded[f"feature/{name}"], name)


def test_two_steps_end_where_those_of_torch_end(recorded: Arrays) -> None:
    network = network_of(recorded)
    step = training_step(network, RECIPE, STEPS)
    step.set_train(True)
    for _ in range(2):
        step(*batch(recorded))
    after = weights(network)
    assert {f"after/{name}" for name in after} == {name for name in recorded if name.startswith("after/")}
    for name, value in after.items():
        assert_close(value, recorded[f"after/{name}"], name)


@pytest.mark.parametrize("mode", ["GRAPH"], indirect=True)
def test_fine_tuning_on_cifar10_images_lowers_the_loss(mode: str) -> None:
    mindspore.set_seed(0)
    network = Network(description(with_gates(resnet(8, width=8))), np.zeros(6))
    before = weights(network)
    recipe = Recipe(epochs=6, batch_size=50, learning_rate=0.05, lambda_similarity=0.1)
    records = list(fine_tune(network, load_sample(), CIFAR10_PREPROCESSING, recipe))
    assert [record.epoch for record in records] == list(range(6))
    assert records[-1].cross_entropy < 0.9 * records[0].cross_entropy
    assert records[-1].loss < records[0].loss
    assert records[0].sparsity == 0 < records[-1].sparsity
    assert not network.training
    after = weights(network)
    assert all(np.any(after[name] != value) for name, value in before.items() if not name.endswith(".threshold"))


def test_a_loss_that_is_not_finite_stops_it() -> None:
    network = Network(description(resnet(8)), [])
    with pytest.raises(TrainingError, match=r"not finite a(t|fter) epoch 0"):
        list(fine_tune(network, load_sample(), CIFAR10_PREPROCESSING, Recipe(batch_size=50, learning_rate=1e3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must lie between 1"),
        ({"epochs": float("inf")}, "epochs must be int; got inf"),
        ({"batch_size": True}, "batch_size must be int; got True"),
        ({"learning_rate": 0.0}, "learning_rate must lie above 0"),
        ({"momentum": float("nan")}, "momentum must lie between 0 and 1; got nan"),
        ({"seed": -1}, "seed must lie between 0"),
        ({"seed": 10**400}, "seed must lie between 0"),
        ({"augment": "yes"}, "augment must be bool"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        next(fine_tune(Network(description(resnet(8)), []), load_sample(), CIFAR10_PREPROCESSING, Recipe(**change)))


def test_data_of_more_classes_is_refused() -> None:
    network = Network(description(resnet(8, num_classes=3)), [])
    with pytest.raises(TrainingError, match="at most 3 classes"):
        next(fine_tune(network, load_sample(), CIFAR10_PREPROCESSING, Recipe()))
    images = ImageSet(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64), ("a",))
    with pytest.raises(TrainingError, match="two or more images"):
        next(fine_tune(network, images, CIFAR10_PREPROCESSING, Recipe()))
