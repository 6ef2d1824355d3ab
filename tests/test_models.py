"""The bundled models are what they say: figures as recorded, over every test image, with the saved thresholds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import manidp
from manidp import reference
from manidp.data.images import load_cifar10, load_sample
from manidp.files import sha256_of
from manidp.formats.checkpoint import Checkpoint, bundled, checkpoint_path, load_checkpoint
from manidp.gating.place import with_gates
from manidp.graph.macs import ungated_macs
from manidp.models import resnet

ROOT = Path(__file__).parent.parent
CIFAR10 = ROOT / "cifar10"


def model(name: str) -> Checkpoint:
    return load_checkpoint(checkpoint_path(name))


def test_the_two_models_are_there_and_are_resnet20() -> None:
    assert bundled() == ("dense-res20", "manidp-res20")
    assert model("dense-res20").graph == resnet(20)
    assert model("manidp-res20").graph == with_gates(resnet(20))
    for name in bundled():
        assert checkpoint_path(name).stat().st_size < 1.5e6


def test_the_gated_model_says_where_it_comes_from() -> None:
    provenance = model("manidp-res20").provenance
    dense = {"name": "dense-res20", "sha256": sha256_of(ROOT / "models/dense-res20/first.safetensors")}
    wide = {"name": "resnet-20x2", "sha256": sha256_of(ROOT / "models/resnet-20x2/model.safetensors")}
    assert provenance["teacher"] == [wide, dense]
    assert provenance["from"]["name"] == "manidp-res20-second"
    assert provenance["measured"]["total"] == 10_000
    assert provenance["recipe"]["epochs"] == provenance["training"]["epochs"]


def test_the_card_in_the_catalogue_is_that_of_the_checkpoint() -> None:
    path = ROOT / "models" / "make_cards.py"
    spec = importlib.util.spec_from_file_location("make_cards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file, text in module.contents(module.recorded_date()).items():
        assert file.read_text("utf-8") == text, "the checkpoint is another: make cards"


@pytest.mark.parametrize("name", ["dense-res20", "manidp-res20"])
def test_the_engine_agrees_with_the_reference_on_real_images(name: str) -> None:
    checkpoint, images = model(name), load_sample().images[::10]
    expected = reference.run(checkpoint.graph, checkpoint.weights, checkpoint.preprocessing.apply(images))
    found = manidp.load(name).run(images)
    assert np.abs(found.logits - expected.logits).max() <= 1e-4 * np.abs(expected.logits).max()
    for gate, kept in expected.kept.items():
        assert (found.kept[gate] == kept).all(), gate
    assert (found.macs == expected.macs).all()


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not in ./cifar10; `make data` brings it")
@pytest.mark.parametrize("name", ["dense-res20", "manidp-res20"])
def test_all_test_images_give_the_recorded_figures(name: str) -> None:
    measured = model(name).provenance["measured"]
    test = load_cifar10(CIFAR10)[1]
    result = manidp.load(name, threads=2).run(test.images)
    assert len(test) == measured["total"] == 10_000
    assert (result.logits.argmax(1) == test.labels).sum() == measured["correct"]
    assert result.macs.mean() == pytest.approx(measured["mean_macs"], abs=0.01e6)
    assert measured["dense_macs"] == ungated_macs(model(name).graph) == 40_813_184


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not in ./cifar10; `make data` brings it")
def test_the_bundled_images_are_those_of_the_test_set() -> None:
    test, sample = load_cifar10(CIFAR10)[1], load_sample()
    assert sample.indices is not None
    assert (test.images[sample.indices] == sample.images).all()
    assert (test.labels[sample.indices] == sample.labels).all()
