"""MindSpore's network against the reference, on every kind of node, and against the authors' own network."""

import os
from pathlib import Path

import mindspore
import numpy as np
import pytest

import manidp
from hostile.names import like_ours
from manidp.data.images import load_cifar10, load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.formats.checkpoint import bundled, checkpoint_path, load_checkpoint
from manidp.formats.ckpt import read_ckpt, write_ckpt
from manidp.formats.conversion import from_ckpt, to_ckpt
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
)
from manidp.hub.bundle import description
from manidp.mindspore.convert import from_checkpoint, weights
from manidp.mindspore.network import Network
from manidp.models import resnet
from manidp.reference import node_values, run
from networks import ZOO

from .cases import TOLERANCE, assert_close, checkpoint_of, gated_resnet, images_for

CIFAR10 = Path(__file__).parents[2] / "cifar10"
GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mindspore"


class Recorded(mindspore.nn.Cell):  # type: ignore[misc]
    """Makes GRAPH mode compile all that a network can tell."""

    def __init__(self, network: Network) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, images: object) -> object:
        return self.network.records(images)


def test_parameters_have_the_names_of_the_original() -> None:
    checkpoint = checkpoint_of(gated_resnet())
    network = from_checkpoint(checkpoint)
    values, thresholds = to_ckpt(checkpoint)
    assert {p.name: p.shape for p in network.get_parameters()} == {name: v.shape for name, v in values.items()}
    assert {p.name for p in network.trainable_params()} == {name for name in values if ".moving_" not in name}
    np.testing.assert_array_equal(network.thresholds, thresholds)


@pytest.mark.parametrize("graph", like_ours(), ids=lambda graph: ascii(graph.nodes[1].name))
def test_nodes_may_be_called_anything(graph: Graph) -> None:
    checkpoint, images = checkpoint_of(graph), images_for(graph)
    network = from_checkpoint(checkpoint)
    assert weights(network).keys() == checkpoint.weights.keys()
    logits = network(mindspore.Tensor(images)).asnumpy()
    assert_close(logits, run(graph, checkpoint.weights, images).logits)


def test_a_gate_may_scale_a_vector() -> None:
    graph = Graph((
        Input(name="image", dims=(3, 8, 8)),
        GlobalPool(name="pool", inputs=("image",)),
        *head("gate", "image", 3, 2),
        Multiply(name="scaled", inputs=("pool", "gate")),
        Linear(name="out", inputs=("scaled",), features=2),
    ), "out")  # fmt: skip
    checkpoint, images = checkpoint_of(graph), images_for(graph)
    logits, [(_, _, feature)] = from_checkpoint(checkpoint).records(mindspore.Tensor(images))
    assert_close(logits.asnumpy(), run(graph, checkpoint.weights, images).logits)
    assert_close(feature.asnumpy(), images.mean((2, 3)))


def test_a_checkpoint_comes_back_from_a_network() -> None:
    checkpoint = checkpoint_of(gated_resnet())
    back = weights(from_checkpoint(checkpoint))
    assert back.keys() == checkpoint.weights.keys()
    for name, value in checkpoint.weights.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == np.float32


def test_mindspore_loads_what_is_written_for_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(gated_resnet())
    values, thresholds = to_ckpt(checkpoint)
    write_ckpt(values, tmp_path / "x.ckpt")
    network = Network(description(checkpoint.graph), thresholds)
    loaded = mindspore.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert mindspore.load_param_into_net(network, loaded, strict_load=True) == ([], [])
    np.testing.assert_array_equal(weights(network)["classifier.weight"], checkpoint.weights["classifier.weight"])


def test_the_network_is_the_reference(mode: str) -> None:
    checkpoint = checkpoint_of(gated_resnet())
    graph, images = checkpoint.graph, images_for(checkpoint.graph)
    values = node_values(graph, checkpoint.weights, images)
    logits, records = Recorded(from_checkpoint(checkpoint))(mindspore.Tensor(images))
    assert_close(logits.asnumpy(), values[graph.output])
    assert len(records) == len(graph.gates)
    open_and_closed = set()
    for gate, (saliency, factor, feature) in zip(graph.gates, records, strict=True):
        kept = values[gate.name] > 0
        np.testing.assert_array_equal(factor.asnumpy() > 0, kept)
        assert_close(factor.asnumpy(), values[gate.name])
        assert_close(saliency.asnumpy()[kept], values[gate.name][kept])
        assert_close(feature.asnumpy(), values[graph.gated_value(gate)].mean((2, 3)))
        open_and_closed |= set(kept.ravel().tolist())
    assert open_and_closed == {True, False}


def test_global_statistics_are_used_and_kept_in_training() -> None:
    graph = ZOO["BatchNorm, use_global_stats"]
    network, images = from_checkpoint(checkpoint_of(graph)), mindspore.Tensor(images_for(graph))
    before, logits = weights(network), network(images).asnumpy()
    network.set_train(True)
    np.testing.assert_array_equal(network(images).asnumpy(), logits)
    assert all(np.array_equal(value, before[name]) for name, value in weights(network).items())


def test_a_saliency_on_the_threshold_is_closed() -> None:
    graph = Graph((
        Input(name="image", dims=(3, 4, 4)),
        *head("gate", "image", 3, 3, 2.0),
        Multiply(name="gated", inputs=("image", "gate")),
        GlobalPool(name="mean", inputs=("gated",)),
    ), "mean")  # fmt: skip
    limit = np.float32(0.7)
    bias = np.array([limit, np.nextafter(limit, np.float32(1)), 5], np.float32)
    zero = np.zeros((3, 3), np.float32)
    network = Network(description(graph), [float(limit)])
    given = {"gate.fc1.weight": zero, "gate.fc2.weight": zero, "gate.fc2.bias": bias}
    for parameter in network.get_parameters():
        parameter.set_data(mindspore.Tensor(given[parameter.name]))
    _, ((saliency, factor, _),) = network.records(mindspore.ops.ones((1, 3, 4, 4)))
    np.testing.assert_array_equal(saliency.asnumpy(), [[limit, bias[1], 2]])
    np.testing.assert_array_equal(factor.asnumpy(), [[0, bias[1], 2]])


def test_thresholds_must_be_those_of_the_gates() -> None:
    with pytest.raises(ValueError, match="one threshold for each of 6 gates expected"):
        Network(description(gated_resnet()), [0.5])


@pytest.mark.parametrize("name", bundled())
@pytest.mark.parametrize("mode", ["GRAPH"], indirect=True)
def test_the_bundled_models_are_the_reference(name: str, mode: str) -> None:
    checkpoint = load_checkpoint(checkpoint_path(name))
    images = checkpoint.preprocessing.apply(load_sample().images[::4])
    expected = run(checkpoint.graph, checkpoint.weights, images, np.float32).logits
    logits = from_checkpoint(checkpoint)(mindspore.Tensor(images)).asnumpy()
    assert_close(logits, expected)
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not in ./cifar10; `make data` brings it")
@pytest.mark.parametrize("mode", ["GRAPH"], indirect=True)
def test_on_cifar10_it_predicts_what_the_engine_predicts(mode: str) -> None:
    """Every tenth test image, all with MANIDP_ALL_IMAGES=1: the same but for ties.

    A tie is one of the two best classes, or of a saliency with its threshold: there float32 may fall on either side.
    """
    checkpoint = load_checkpoint(checkpoint_path("manidp-res20"))
    images = load_cifar10(CIFAR10)[1].images[:: 1 if os.environ.get("MANIDP_ALL_IMAGES") else 10]
    ours = manidp.load("manidp-res20").run(images)
    network = Recorded(from_checkpoint(checkpoint))
    agree = np.ones(len(images), bool)
    logits = []
    for start in range(0, len(images), 200):
        batch = slice(start, start + 200)
        theirs, records = network(mindspore.Tensor(checkpoint.preprocessing.apply(images[batch])))
        logits.append(theirs.asnumpy())
        for gate, (saliency, factor, _) in zip(checkpoint.graph.gates, records, strict=True):
            differs = (factor.asnumpy() > 0) != ours.kept[gate.name][batch]
            differs[~agree[batch]] = False  # after the first tie an image is another
            threshold = checkpoint.weights[f"{gate.name}.threshold"]
            np.testing.assert_allclose(
                saliency.asnumpy()[differs], threshold, rtol=0, atol=TOLERANCE, err_msg=gate.name
            )
            agree[batch] &= ~differs.any(1)
    assert agree.mean() > 0.995
    came, expected = np.concatenate(logits), ours.logits
    assert_close(came[agree], expected[agree])
    second, best = np.sort(expected, 1)[:, -2:].T
    tied = ~agree | (best - second < 2 * TOLERANCE * abs(expected).max())
    np.testing.assert_array_equal(came.argmax(1)[~tied], expected.argmax(1)[~tied])
    print(f"{len(images)} images: {(~agree).sum()} with a tied gate, {(came.argmax(1) != expected.argmax(1)).sum()} "
          f"predicted otherwise, least margin {(best - second).min():.2g}")  # fmt: skip


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden set at {GOLDEN}")
def test_the_authors_network_comes_out(mode: str) -> None:
    graph = with_gates(resnet(20))
    values, thresholds = read_ckpt(GOLDEN / "resnet20.ckpt"), np.load(GOLDEN / "thres.npy")
    checkpoint, ignored = from_ckpt(values, thresholds, graph, CIFAR10_PREPROCESSING, CIFAR10_CLASSES)
    assert not ignored
    logits, records = Recorded(from_checkpoint(checkpoint))(mindspore.Tensor(np.load(GOLDEN / "input.npy")))
    assert_close(logits.asnumpy(), np.load(GOLDEN / "logits.npy"))
    gates = np.load(GOLDEN / "gates.npz")
    for index, (saliency, factor, _) in enumerate(records):
        np.testing.assert_array_equal(factor.asnumpy() > 0, gates[f"mask_{index:02d}"] > 0)
        assert_close(factor.asnumpy(), gates[f"mask_{index:02d}"])
        assert_close(saliency.asnumpy(), np.maximum(gates[f"fc2_{index:02d}"], 0))
