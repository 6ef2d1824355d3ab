"""Two training steps on record, so that another backend, in an environment without torch, can be held to the same.

To make the record anew: python tests/with_torch/test_training_step.py
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from manidp.graph import Graph
from manidp.torch.losses import complexity_weights, similarity_loss, sparsity_loss
from manidp.torch.network import Network
from manidp.training.schedule import learning_rate
from networks import small_gated

RECORD = Path(__file__).parents[1] / "data" / "training-step.safetensors"
Arrays = dict[str, NDArray[np.float32]]
LAMBDA_SPARSITY, LAMBDA_SIMILARITY, PEAK, STEPS = 0.5, 30.0, 0.05, 4


def graph() -> Graph:
    return small_gated(width=4, classes=4)


def start() -> Arrays:
    """Weights, a batch of six images, and a limit that some of them stay below."""
    chance = np.random.default_rng(0)
    arrays: Arrays = {}
    for name, shape in graph().parameters.items():
        last = name.rpartition(".")[2]
        if last in ("gamma", "moving_variance") or name.endswith("fc2.bias"):
            value = chance.uniform(0.5, 1.5, shape)
        elif last == "threshold":
            value = np.array(0.9)
        else:
            value = chance.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))
        arrays[f"weights/{name}"] = value.astype(np.float32)
    arrays["images"] = chance.normal(size=(6, 3, 8, 8)).astype(np.float32)
    arrays["labels"] = np.array([0, 1, 2, 3, 0, 1], np.float32)
    arrays["limit"] = np.array(1.2, np.float32)
    return arrays


def computed(given: Arrays) -> Arrays:
    """Losses, gradients and gates of the first step; parameters and statistics after the second."""
    torch.set_num_threads(1)
    network = Network(graph())
    network.load({name: given[f"weights/{name}"] for name in graph().parameters})
    network.train()
    gates = tuple(f"{gate.name}." for gate in graph().gates)
    groups = [
        {"params": [p for n, p in network.named_parameters() if n.startswith(gates)], "weight_decay": 0.0},
        {"params": [p for n, p in network.named_parameters() if not n.startswith(gates)], "weight_decay": 5e-2},
    ]
    optimizer = torch.optim.SGD(groups, lr=PEAK, momentum=0.9, nesterov=True)
    images, labels = torch.from_numpy(given["images"]), torch.from_numpy(given["labels"]).long()
    made: dict[str, torch.Tensor] = {}
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, peak=PEAK)
        output = network(images)
        each = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
        saliencies = [record.saliency for record in output.records.values()]
        features = [record.feature for record in output.records.values()]
        sparsity = sparsity_loss(saliencies, complexity_weights(each, float(given["limit"])))
        similarity = similarity_loss(saliencies, features)
        total = each.mean() + LAMBDA_SPARSITY * sparsity + LAMBDA_SIMILARITY * similarity
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            made["losses"] = torch.stack([total, each.mean(), sparsity, similarity])
            made["logits"] = output.logits
            for name, record in output.records.items():
                made |= {f"saliency/{name}": record.saliency, f"gate/{name}": record.gate}
                made[f"feature/{name}"] = record.feature
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                made[f"gradient/{name}"] = parameter.grad.clone()
        optimizer.step()
    arrays = {name: value.detach().numpy() for name, value in made.items()}
    return arrays | {f"after/{name}": value for name, value in network.weights().items()}


def test_the_record_is_what_torch_computes() -> None:
    record = load_file(RECORD)
    given = start()
    for name, value in given.items():
        np.testing.assert_array_equal(record[name], value, err_msg=name)
    made = computed(given)
    assert record.keys() == given.keys() | made.keys()
    for name, value in made.items():
        np.testing.assert_allclose(value, record[name], rtol=1e-4, atol=1e-5 * abs(record[name]).max(), err_msg=name)


def test_the_record_leaves_nothing_out() -> None:
    record = load_file(RECORD)
    assert all(record["losses"] > 0.001)
    assert all(np.any(value) for name, value in record.items() if name.startswith("gradient/"))
    closed = [np.mean(value == 0) for name, value in record.items() if name.startswith("gate/")]
    assert 0.1 < np.mean(closed) < 0.9


if __name__ == "__main__":
    save_file(start() | computed(start()), RECORD)
