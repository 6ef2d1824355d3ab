"""Training: learns, meets its target, resumes to the last bit, stops on NaN, refuses what does not fit."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from manidp.data.images import ImageSet, Preprocessing
from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.graph import Activation, Add, BatchNorm, Conv, GlobalPool, Graph, Input, Linear
from manidp.models import resnet
from manidp.torch.losses import distillation_loss
from manidp.torch.network import Network
from manidp.torch.state import EpochRecord
from manidp.torch.train import Training, evaluate
from manidp.training.recipe import Recipe, parse_setting, read_recipe

PREPROCESSING = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
GRAPH = resnet(8, num_classes=2, width=8, image=(3, 8, 8))
SHORT = Graph(
    (
        Input(name="image", dims=(3, 8, 8)),
        Conv(name="conv_1", inputs=("image",), channels=8),
        BatchNorm(name="bn_1", inputs=("conv_1",)),
        Activation(name="relu_1", inputs=("bn_1",), kind="relu"),
        Conv(name="conv_2", inputs=("relu_1",), channels=8),
        Add(name="sum", inputs=("conv_2", "relu_1")),
        GlobalPool(name="pool", inputs=("sum",)),
        Linear(name="classifier", inputs=("pool",), features=2),
    ),
    "classifier",
)
RECIPE = Recipe(epochs=4, batch_size=32, learning_rate=0.05, ema=0.9, precision="float32")
GATED = replace(RECIPE, keep_rate=0.6)  # with an average, momentum and thresholds to carry over


def image_set(count: int = 160, seed: int = 0) -> ImageSet:
    """Two classes that a network can tell: bright on the left, bright on the right."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 2
    images = generator.integers(0, 156, (count, 8, 8, 3), dtype=np.uint8)
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    return ImageSet(images, labels, ("left", "right"))


def trained(folder: Path, recipe: Recipe, gates: bool = False, **options: object) -> tuple[Training, list[EpochRecord]]:
    recipe = replace(recipe, augment=False)  # a flip would swap the classes
    network = Network(with_gates(GRAPH) if gates else GRAPH, seed=recipe.seed)
    training = Training(network, image_set(), PREPROCESSING, recipe, folder, **options)  # type: ignore[arg-type]
    return training, list(training.epochs())


def test_dense_training_learns(tmp_path: Path) -> None:
    training, records = trained(tmp_path, RECIPE)
    assert [record.epoch for record in records] == [0, 1, 2, 3]
    assert records[-1].cross_entropy < 0.5 * records[0].cross_entropy
    training.finish()
    evaluation = evaluate(training.network, image_set(101, seed=1), PREPROCESSING, batch_size=7)
    assert evaluation.total == 101
    assert len(evaluation.macs) == 101
    assert evaluation.correct > 90


def test_a_budget_is_met_at_the_end_within_one_percent(tmp_path: Path) -> None:
    full = 0.0
    for share in (0.8, 0.5):
        folder = tmp_path / str(share)
        network = Network(with_gates(GRAPH))
        full = full or float(evaluate(network, image_set(), PREPROCESSING).macs.mean())
        recipe = replace(RECIPE, epochs=6, macs_budget=share * full, learning_rate=0.02, augment=False)
        training = Training(network, image_set(), PREPROCESSING, recipe, folder)
        records = list(training.epochs())
        training.finish()
        assert records[0].macs == pytest.approx(full)
        assert records[-1].macs < records[0].macs
        macs = evaluate(training.network, image_set(), PREPROCESSING).macs.mean()
        assert macs == pytest.approx(recipe.macs_budget, rel=0.01)


def test_thresholds_wait_for_the_second_epoch_and_then_follow_the_rule(tmp_path: Path) -> None:
    network = Network(with_gates(GRAPH))
    training = Training(network, image_set(), PREPROCESSING, replace(GATED, augment=False), tmp_path)
    epochs = training.epochs()
    thresholds = []
    for _ in range(3):
        next(epochs)
        thresholds.append([float(v) for n, v in network.state_dict().items() if n.endswith("threshold")])
    assert thresholds[0] == [0] * len(network.graph.gates)
    assert all(value > 0 for value in thresholds[1])


def test_what_finish_returns_is_what_the_network_runs_with(tmp_path: Path) -> None:
    training, _ = trained(tmp_path, GATED, gates=True)
    weights = training.finish()
    other = Network(with_gates(GRAPH))
    other.load(weights)
    one, two = (evaluate(network, image_set(), PREPROCESSING) for network in (training.network, other))
    assert one.correct == two.correct
    assert (one.macs == two.macs).all()


def test_the_log_has_the_run_and_a_line_an_epoch(tmp_path: Path) -> None:
    _, records = trained(tmp_path, GATED, gates=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["run"]["recipe"]["keep_rate"] == 0.6
    assert [line["epoch"] for line in lines[1:]] == [0, 1, 2, 3]
    assert [line["loss"] for line in lines[1:]] == [record.loss for record in records]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from test_train import GATED, trained
trained(Path(sys.argv[1]), GATED, gates=True, resume=True)
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))

    killed = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed")])
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        if killed.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert 2 <= len(log.read_text().splitlines()) < 5, "killed too late to show anything"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder in ("killed", "whole"):
            trained(tmp_path / folder, GATED, gates=True, resume=folder == "killed")
    finally:
        torch.set_num_threads(threads)
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name


def test_a_folder_in_use_is_not_overwritten_nor_resumed_by_another_run(tmp_path: Path) -> None:
    trained(tmp_path, RECIPE)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="--resume"):
        trained(tmp_path, RECIPE)
    with pytest.raises(TrainingError, match=r"another run: recipe learning_rate 0\.05 there, 0\.2 here"):
        trained(tmp_path, replace(RECIPE, learning_rate=0.2), resume=True)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert trained(tmp_path, RECIPE, resume=True)[1] == []


def test_nan_stops_with_epoch_and_step_and_the_last_good_state_stays(tmp_path: Path) -> None:
    network = Network(GRAPH)
    training = Training(network, image_set(), PREPROCESSING, replace(RECIPE, augment=False), tmp_path)
    epochs = training.epochs()
    next(epochs)
    before = (tmp_path / "state.safetensors").read_bytes()
    with torch.no_grad():
        network.state_dict()["classifier.weight"][0, 0] = float("nan")
    with pytest.raises(TrainingError, match="epoch 1, step 0"):
        next(epochs)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_distillation_follows_the_teacher(tmp_path: Path) -> None:
    teacher, _ = trained(tmp_path / "teacher", RECIPE)
    teacher.finish()
    liar = ImageSet(image_set().images, 1 - image_set().labels, ("left", "right"))
    recipe = replace(RECIPE, distillation=1.0, augment=False, epochs=6)
    student = Training(Network(GRAPH, seed=5), liar, PREPROCESSING, recipe, tmp_path / "s", teachers=[teacher.network])
    list(student.epochs())
    student.finish()
    # Labels were turned round; only the teacher knows better.
    assert evaluate(student.network, image_set(), PREPROCESSING).accuracy > 0.8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile itself uses what torch deprecates
def test_a_compiled_training_does_what_a_plain_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(sys.modules[__name__], "GRAPH", SHORT)  # compiling takes long for each layer
    recipe = replace(GATED, epochs=1)
    plain, [expected] = trained(tmp_path / "plain", recipe, gates=True)
    compiled, [record] = trained(tmp_path / "compiled", replace(recipe, compiled=True), gates=True)
    assert record.loss == pytest.approx(expected.loss, rel=1e-3)
    wanted = plain.network.weights()
    for name, value in compiled.network.weights().items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-3, err_msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_compiler_it_is_said_how_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules[__name__], "GRAPH", SHORT)
    with pytest.raises(TrainingError, match=r"torch\.compile failed: .*no-such-compiler.*compiled=false"):
        trained(tmp_path / "run", replace(RECIPE, compiled=True))


def test_of_several_teachers_the_mean_is_followed(tmp_path: Path) -> None:
    teachers = [Network(GRAPH, seed=seed) for seed in (1, 2)]
    training, _ = trained(tmp_path, replace(RECIPE, distillation=1.0, precision="float32"), teachers=teachers)
    images = torch.from_numpy(PREPROCESSING.apply(image_set().images[:8]))
    labels = torch.from_numpy(image_set().labels[:8])
    with torch.no_grad():
        output = training.network(images)
        mean = (teachers[0](images).logits + teachers[1](images).logits) / 2
        wanted = distillation_loss(output.logits, mean, RECIPE.temperature)
        found = training._loss(output, images, labels)[0]
    torch.testing.assert_close(found, wanted)


def test_distillation_needs_both_a_teacher_and_a_share(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="teacher"):
        trained(tmp_path, replace(RECIPE, distillation=0.5))
    with pytest.raises(TrainingError, match="teacher"):
        trained(tmp_path, RECIPE, teachers=[Network(GRAPH)])
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
    change: dict[str, float], gates: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path, replace(RECIPE, **change), gates=gates)  # type: ignore[arg-type]
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


def as_pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """What the network reads, (B, 3, H, W), back as uint8 (B, H, W, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    pixels: NDArray[np.uint8] = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def test_crops_and_flips_only_move_pixels(tmp_path: Path) -> None:
    training = Training(Network(GRAPH), image_set(), PREPROCESSING, RECIPE, tmp_path)
    plain = {tuple(p) for image in image_set().images for p in image.reshape(-1, 3)} | {(0, 0, 0)}
    batches = list(training.images.epoch(0))
    assert sum(len(labels) for _, labels in batches) == 160
    moved = 0
    for images, _ in batches:
        pixels = as_pixels(images)
        assert {tuple(p) for image in pixels[:4] for p in image.reshape(-1, 3)} <= plain
        moved += sum(not (pixels[i] == image_set().images).all((1, 2, 3)).any() for i in range(len(pixels)))
    assert moved > 120
    assert torch.equal(batches[0][0], next(iter(training.images.epoch(0)))[0])
    assert not torch.equal(batches[0][0], next(iter(training.images.epoch(1)))[0])


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_beyond_its_border_an_image_is_black_or_mirrored(mode: Literal["constant", "reflect"], tmp_path: Path) -> None:
    recipe = replace(RECIPE, padding_mode=mode)
    training = Training(Network(GRAPH), image_set(), PREPROCESSING, recipe, tmp_path)
    pad = [(0, 0), (4, 4), (4, 4), (0, 0)]
    crops = {
        padded[y : y + 8, x : x + 8][:, ::step].tobytes()
        for padded in np.pad(image_set().images, pad, mode)
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    for images, _ in training.images.epoch(0):
        for pixels in as_pixels(images):
            assert pixels.tobytes() in crops


def test_statistics_are_those_of_augmented_training_images(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    training = Training(Network(GRAPH), image_set(), PREPROCESSING, recipe, tmp_path)
    list(training.epochs())
    weights = training.finish()
    stem = torch.from_numpy(weights["conv_1_3x3.weight"])
    means, plain = [], []
    for images, _ in training.images.epoch(recipe.epochs):
        means.append(torch.nn.functional.conv2d(images, stem, padding=1).mean((0, 2, 3)))
    for images, _ in training.images.plain(160):
        plain.append(torch.nn.functional.conv2d(images, stem, padding=1).mean((0, 2, 3)))
    found = weights["bn_1.moving_mean"]
    assert found == pytest.approx(torch.stack(means).mean(0).numpy(), abs=1e-5)
    assert np.abs(found - torch.stack(plain).mean(0).numpy()).max() > 0.01


@pytest.mark.parametrize("target", ["macs_budget", "keep_rate"])
def test_for_a_budget_thresholds_follow_within_the_epoch_for_a_rate_they_wait_for_its_end(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manidp.torch.train.FOLLOW", 2)
    network = Network(with_gates(GRAPH))
    seen = []

    def look(done: int, total: int | None) -> None:
        seen.append(tuple(float(value) for name, value in network.state_dict().items() if name.endswith("threshold")))

    recipe = replace(RECIPE, augment=False, macs_budget="80%") if target == "macs_budget" else GATED
    recipe = replace(recipe, augment=False)
    steps = len(image_set()) // recipe.batch_size
    training = Training(network, image_set(), PREPROCESSING, recipe, tmp_path, progress=look)
    list(training.epochs())
    of_epochs = [set(seen[start : start + steps]) for start in range(0, len(seen), steps)]
    assert [len(values) for values in of_epochs[:2]] == [1, 1]
    assert all((len(values) > 1) == (target == "macs_budget") for values in of_epochs[2:])
