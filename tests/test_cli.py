"""The command line: what it prints, as tables and as JSON, its exit codes, and errors of one line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image

from manidp import cli, load_model, reference
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.formats.ckpt import write_ckpt
from manidp.formats.conversion import to_ckpt, write_thresholds
from manidp.gating.place import with_gates
from manidp.graph import with_classes
from manidp.graph.macs import ungated_macs
from manidp.hub.find import find_model
from manidp.models import resnet
from manidp.result import Result
from networks import spread_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gated network with random weights that keeps some channels and closes some."""
    graph = with_gates(resnet(8, width=4))
    weights = spread_weights(graph, threshold=0.9)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(Checkpoint(graph, weights, CIFAR10_PREPROCESSING, CIFAR10_CLASSES, {"note": "random"}), path)
    return path


def reference_run(model: Path, images: NDArray[np.uint8]) -> Result:
    checkpoint = load_checkpoint(model)
    return reference.run(checkpoint.graph, checkpoint.weights, checkpoint.preprocessing.apply(images))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate(load_sample().images[:3]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``manidp`` with these arguments, in this process."""
    code = 0
    sys.argv = ["manidp", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_classify_tells_class_cost_and_kept_channels(
    model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "classify", pictures, "--model", model, "--json")
    assert code == 0
    rows = json.loads(out)["images"]
    checkpoint = load_checkpoint(model)
    result = reference_run(model, load_sample().images[:3])
    assert [row["image"] for row in rows] == [str(pictures / f"{i}.png") for i in range(3)]
    assert [row["class"] for row in rows] == [CIFAR10_CLASSES[i] for i in result.logits.argmax(1)]
    assert [row["macs"] for row in rows] == result.macs.tolist()
    assert len(set(result.macs.tolist())) > 1, "the model must treat images differently for this test to mean much"
    dense = ungated_macs(checkpoint.graph)
    for i, row in enumerate(rows):
        assert row["share_of_dense"] == pytest.approx(row["macs"] / dense, abs=1e-4)
        assert row["kept"].keys() == {"stage_1", "stage_2", "stage_3"}
        first = np.concatenate([result.kept[g][i] for g in ("stage_1.0.mb1", "stage_1.0.mb2")])
        assert row["kept"]["stage_1"] == pytest.approx(first.mean(), abs=1e-4)
        shifted = np.exp(result.logits[i] - result.logits[i].max())
        assert row["probability"] == pytest.approx(shifted.max() / shifted.sum(), abs=2e-4)


def test_classify_prints_the_same_as_a_table(
    model: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = json.loads(run(capsys, "classify", pictures, "-m", model, "--json")[1])["images"]
    code, out, _ = run(capsys, "classify", pictures, "-m", model)
    assert code == 0
    for row in rows:
        line = next(line for line in out.splitlines() if row["image"] in line)
        assert f" {row['class']} " in line
        assert f"{row['probability']:.1%}" in line
        assert f"{row['macs'] / 1e6:.2f}" in line


@pytest.fixture(autouse=True)
def no_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # where tests run in several processes, it is set


def test_a_broken_picture_is_reported_and_the_others_are_classified(
    model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "Thumbs.db").write_bytes(b"no picture")
    code, _, err = run(capsys, "classify", pictures, "-m", model)
    assert (code, err) == (0, "manidp: 1 other files in the folders skipped: no pictures by their suffixes\n")
    (pictures / "1.png").write_bytes(b"no picture")
    code, out, err = run(capsys, "classify", pictures, "-m", model)
    assert code == 1
    assert len(re.findall(r"\d\.png", out)) == 2
    assert err.count("\n") == 2
    assert "1.png" in err
    code, out, err = run(capsys, "classify", pictures / "1.png", "-m", model)
    assert (code, out) == (1, "")


def test_without_paths_the_bundled_images_are_classified_with_their_truth(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(run(capsys, "classify", "-m", model, "--sample", 7, "--json")[1])["images"]
    sample = load_sample()
    assert sample.indices is not None
    labels = dict(zip(sample.indices.tolist(), sample.labels.tolist(), strict=True))
    assert len(rows) == 7
    for row in rows:
        assert row["truth"] == sample.classes[labels[int(row["image"].removeprefix("test image "))]]
    every = json.loads(run(capsys, "classify", "-m", model, "--sample", 999, "--json")[1])["images"]
    assert len(every) == 200


def test_evaluate_counts_every_image(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "evaluate", "-m", model, "--json")
    (row,) = json.loads(out)["models"]
    result = reference_run(model, load_sample().images)
    assert code == 0
    assert row["total"] == 200
    assert row["correct"] == (result.logits.argmax(1) == load_sample().labels).sum()
    assert row["mean_macs"] == pytest.approx(result.macs.mean())


def test_evaluate_a_folder_of_classes_beside_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = tmp_path / "other.safetensors"
    other.write_bytes(model.read_bytes())
    class_folders(tmp_path / "set", ("cat", "ship"), 4)
    code, out, _ = run(capsys, "evaluate", "--data", tmp_path / "set", "-m", model, "--beside", other)
    assert code == 0
    assert out.count("of 8") == 2
    assert "other.safetensors" in out


@pytest.fixture(scope="module")
def eight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network without deer and frog, the other classes in the opposite order."""
    ten = load_checkpoint(model)
    kept = [i for i in reversed(range(10)) if ten.classes[i] not in ("deer", "frog")]
    weights = {
        name: np.ascontiguousarray(value[kept]) if name.startswith("classifier.") else value
        for name, value in ten.weights.items()
    }
    path = tmp_path_factory.mktemp("eight") / "eight.safetensors"
    classes = tuple(ten.classes[i] for i in kept)
    save_checkpoint(Checkpoint(with_classes(ten.graph, 8), weights, ten.preprocessing, classes), path)
    return path


def test_models_of_other_classes_are_scored_by_name(
    model: Path, eight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "set", load_checkpoint(eight).classes, 20)
    scores: dict[str, set[int]] = {}
    for first, second in ((eight, model), (model, eight)):
        code, out, err = run(capsys, "evaluate", "--data", tmp_path / "set", "-m", first, "--beside", second, "--json")
        assert code == 0, err
        for row in json.loads(out)["models"]:
            assert row["total"] == 160
            scores.setdefault(row["model"], set()).add(row["correct"])
    sample = load_sample()
    known = np.isin(np.array(sample.classes)[sample.labels], load_checkpoint(eight).classes)
    logits = reference_run(model, sample.images[known]).logits
    among_eight = logits.copy()
    among_eight[:, [sample.classes.index(name) for name in ("deer", "frog")]] = -np.inf
    assert scores == {
        str(model): {(logits.argmax(1) == sample.labels[known]).sum()},
        str(eight): {(among_eight.argmax(1) == sample.labels[known]).sum()},
    }


@pytest.mark.parametrize("command", [["evaluate"], ["report", "out.html"], ["bench"]], ids=lambda words: words[0])
def test_images_of_classes_that_a_model_does_not_know_are_refused(
    command: list[str], eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *command, "-m", eight)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{eight if command[0] != 'report' else 'the network'} knows 'truck', 'ship'," in err
    assert err.endswith("got 'deer', 'frog'\n")
    assert list(tmp_path.iterdir()) == []


def class_folders(folder: Path, classes: tuple[str, ...], count: int) -> None:
    sample = load_sample()
    for name in classes:
        (folder / name).mkdir(parents=True)
        of_class = sample.images[sample.labels == sample.classes.index(name)]
        for i, pixels in enumerate(of_class[:count]):
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_info_shows_graph_provenance_and_digest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    code, out, _ = run(capsys, "info", model, "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert shown["gates"] == 6
    assert shown["provenance"] == {"note": "random"}
    assert sum(layer["macs"] for layer in shown["layers"]) == shown["macs_with_everything_kept"]
    assert list(shown["thresholds"].values()) == pytest.approx([0.9] * 6)
    assert "stage_3.0.mb2" in run(capsys, "info", model)[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "no-such-model"],
        ["classify", "-m", "no-such-model"],
        ["evaluate", "--data", "no-such-folder"],
        ["data", "cifar10", "--source", "no-such-file"],
        ["train", "--data", "no-such-folder", "--out", "out"],
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(
    arguments: list[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = ["-m", model] if arguments[0] == "evaluate" else []
    code, out, err = run(capsys, *arguments, *extra)
    assert (code, out) == (2, "")
    assert err.startswith("manidp: ")
    assert err.count("\n") == 1
    assert "no-such" in err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "classify", "--no-such-option")[0] == 2
    assert run(capsys, "data", "imagenet")[0] == 2


def test_a_reader_that_goes_away_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m manidp classify -m {model} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_fine_tuning_on_a_folder_of_ones_own(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    class_folders(tmp_path / "set", ("frog", "ship", "truck"), 20)
    (tmp_path / "set" / "ship" / "broken.png").write_bytes(b"oops")
    out = tmp_path / "run"
    arguments = [
        "train", "--from", model, "--data", tmp_path / "set", "--out", out, "--holdout", 12, "--threads", 1,
        "--set", "epochs=5", "--set", "batch_size=16", "--set", "learning_rate=0.02", "--set", "keep_rate=0.6",
    ]  # fmt: skip
    code, printed, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    *records, finished = [json.loads(line) for line in printed.splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1]["cross_entropy"] < records[0]["cross_entropy"]
    assert finished["measured"]["total"] == 12
    assert "broken.png" in err
    tuned, parent = load_checkpoint(out / "model.safetensors"), load_checkpoint(model)
    assert tuned.classes == ("frog", "ship", "truck")
    assert [gate.name for gate in tuned.graph.gates] == [gate.name for gate in parent.graph.gates]
    assert tuned.provenance["from"]["name"] == "small"
    assert tuned.provenance["data"]["images"] == 48
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "--resume" in err
    assert run(capsys, *arguments, "--resume")[0] == 0
    rows = json.loads(run(capsys, "classify", tmp_path / "set" / "frog", "-m", out / "model.safetensors", "--json")[1])
    assert {row["class"] for row in rows["images"]} <= {"frog", "ship", "truck"}


def test_training_starts_from_a_name_on_the_hub(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    monkeypatch.setenv("MANIDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    uid = "manidp/1.0/manidp-res20_cifar10"
    class_folders(tmp_path / "set", CIFAR10_CLASSES, 1)
    out = tmp_path / "run"
    settings = ["--set", "epochs=1", "--set", "batch_size=10", "--set", "learning_rate=1e-6", "--set", "distillation=1"]
    arguments = ["--data", tmp_path / "set", "--out", out, "--threads", 1, *settings]
    code, _, err = run(capsys, "train", "--from", uid, "--teacher", uid, *arguments)
    assert code == 0, err
    tuned = load_checkpoint(out / "model.safetensors")
    parent = find_model("manidp-res20")
    origin = {"name": uid, "sha256": parent.sha256}
    assert (tuned.provenance["from"], tuned.provenance["teacher"]) == (origin, [origin])
    weight = "stage_1.0.conv_a.weight"
    assert np.abs(tuned.weights[weight] - parent.checkpoint.weights[weight]).max() < 1e-3
    arguments[3] = tmp_path / "another"
    code, _, err = run(capsys, "train", "--from", "mindspore/1.7/manidp_cifar10", *arguments)
    assert code == 2
    assert "manidp hub add" in err


def test_a_network_is_named_by_its_depth_and_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    class_folders(tmp_path / "set", ("frog", "ship"), 4)
    arguments = ["--data", tmp_path / "set", "--threads", 1, "--set", "epochs=1", "--set", "batch_size=8", "--network"]
    assert run(capsys, "train", *arguments, "resnet-8x2", "--out", tmp_path / "run")[0] == 0
    made = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert made.graph == resnet(8, width=32, num_classes=2)
    for name in ("resnet-8x0", "resnet-8x", "resnet8", "vgg-16"):
        code, _, err = run(capsys, "train", *arguments, name, "--out", tmp_path / name)
        assert code == 2
        assert f"got {name}" in err


def test_training_can_write_tensorboard_events(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'manidp[torch]'")
    class_folders(tmp_path / "set", ("frog", "ship"), 8)
    arguments = ["--from", model, "--data", tmp_path / "set", "--out", tmp_path / "run", "--threads", 1]
    settings = ["--set", "epochs=1", "--set", "batch_size=8", "--set", "keep_rate=0.8"]
    code, _, err = run(capsys, "train", *arguments, *settings, "--tensorboard")
    assert code == 0, err
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert b"cross_entropy" in events.read_bytes()


def test_the_sample_as_files_is_a_folder_to_train_and_evaluate_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "data", "sample", "--to", tmp_path / "set")
    assert code == 0
    assert "200" in out
    sizes = {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "set").iterdir()}
    assert sizes == dict.fromkeys(CIFAR10_CLASSES, 20)
    rows = [json.loads(run(capsys, "evaluate", *extra, "-m", model, "--json")[1])["models"][0]
            for extra in ([], ["--data", tmp_path / "set"])]  # fmt: skip
    for key in ("correct", "total", "mean_macs"):
        assert rows[0][key] == pytest.approx(rows[1][key])
    code, _, err = run(capsys, "data", "sample", "--to", tmp_path / "set")
    assert code == 2
    assert "exists already" in err


def test_convert_there_and_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt, thresholds, back = tmp_path / "x.ckpt", tmp_path / "x.npy", tmp_path / "back.safetensors"
    assert run(capsys, "convert", model, "-o", ckpt, "--thresholds", thresholds)[0] == 0
    assert run(capsys, "convert", ckpt, "-o", back, "--thresholds", thresholds)[0] == 0
    one, two = load_checkpoint(model), load_checkpoint(back)
    assert one.graph == two.graph
    assert all((two.weights[name] == value).all() for name, value in one.weights.items())
    assert two.provenance["converted_from"]["name"] == "x.ckpt"
    code, _, err = run(capsys, "convert", ckpt, "-o", back)
    assert code == 2
    assert "--thresholds" in err
    (tmp_path / "html.ckpt").write_bytes(b"<html></html>")
    assert run(capsys, "convert", tmp_path / "html.ckpt", "-o", tmp_path / "y.safetensors")[0] == 2
    assert not (tmp_path / "y.safetensors").exists()


def beginning(path: Path) -> str:
    head = path.read_bytes()[:9]
    return "safetensors" if head[8:] == b"{" else "ckpt" if head[:1] == b"\n" else "onnx"


def test_what_is_written_is_what_the_suffix_says(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'manidp[onnx]'")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "convert", model, "-o", "x.ckpt", "--thresholds", "x.npy")[0] == 0
    ckpt = Path("x.ckpt").read_bytes()
    for name in ("upper.CKPT", "no_suffix", "wrong.safetensors"):  # known by how it begins
        Path(name).write_bytes(ckpt)
    Path("wrong.ckpt").write_bytes(model.read_bytes())
    known = {"x.ckpt", "upper.CKPT", "no_suffix", "wrong.safetensors"}
    for source in (str(model), "wrong.ckpt", *known):
        for out, kind in (
            ("y.safetensors", "safetensors"), ("y.SafeTensors", "safetensors"), ("y.onnx", "onnx"), ("y.ONNX", "onnx"),
            ("y.ckpt", "ckpt"), ("y.Ckpt", "ckpt"),
        ):  # fmt: skip
            given = ["--thresholds", "x.npy" if source in known else "y.npy"]
            extra = given if source in known or kind == "ckpt" else []
            code, _, err = run(capsys, "convert", source, "-o", out, *extra)
            assert (code, err) == (0, "")
            assert beginning(Path(out)) == kind
            if kind == "ckpt":
                assert Path(out).read_bytes() == ckpt
            Path(out).unlink()
    for out in ("y.pt", "y", "y.onnx.gz", "y.json"):
        code, _, err = run(capsys, "convert", model, "-o", out)
        assert (code, err.count("\n")) == (2, 1)
        assert ".safetensors or .ckpt or .onnx" in err
        assert not Path(out).exists()


def test_no_output_takes_the_place_of_another_or_of_an_input(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.safetensors").write_bytes(model.read_bytes())
    assert run(capsys, "convert", "m.safetensors", "-o", "x.ckpt", "--thresholds", "x.npy")[0] == 0
    Path("there").mkdir()
    Path("link.ckpt").symlink_to("same.ckpt")
    Path("link.html").symlink_to("m.safetensors")
    os.mkfifo("pipe.html")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    for words in (
        ["convert", "m.safetensors", "-o", "same.ckpt", "--thresholds", "same.ckpt"],
        ["convert", "m.safetensors", "-o", "same.ckpt", "--thresholds", "there/../same.ckpt"],
        ["convert", "m.safetensors", "-o", "link.ckpt", "--thresholds", "same.ckpt"],
        ["convert", "m.safetensors", "-o", "./m.safetensors"],
        ["convert", "x.ckpt", "-o", "x.ckpt", "--thresholds", "x.npy"],
        ["convert", "m.safetensors", "-o", "y.ckpt", "--thresholds", "m.safetensors"],
        ["convert", "m.safetensors", "-o", "y.onnx", "--thresholds", "x.npy"],
        ["convert", "m.safetensors", "-o", "absent/y.onnx"],
        ["report", "m.safetensors", "-m", "m.safetensors"],
        ["report", "link.html", "-m", "m.safetensors"],
        ["report", "pipe.html"],
        ["report", "there"],
        ["report", "y.png", "--overview", "y.png"],
        ["report", "y.html", "--overview", "y.jpg"],
        ["bench", "--out", "m.safetensors", "--dense", "m.safetensors"],
        ["bench", "--out", "y.svg", "--plot", "y.svg"],
        ["bench", "--plot", "y.pdf"],
        ["hub", "pack", "--folder", "there", "--mindspore", "./there"],
    ):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), (words, err)
        assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_values_that_are_not_of_the_network_are_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, thresholds = to_ckpt(load_checkpoint(model))
    more = {f"moments.{name}": value for name, value in values.items()}
    write_ckpt({**values, **more}, tmp_path / "o.ckpt")
    write_thresholds(thresholds, tmp_path / "t.npy")
    arguments = ["convert", tmp_path / "o.ckpt", "-o", tmp_path / "o.safetensors", "--thresholds", tmp_path / "t.npy"]
    code, _, err = run(capsys, *arguments)
    assert (code, err.count("\n")) == (0, 1)
    assert f"left out: {len(more)} values" in err
    assert err.endswith(f"{', '.join(list(more)[:3])}, ...\n")
    assert json.loads(run(capsys, *arguments, "--json")[1])["ignored"] == list(more)


def test_the_hub_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    uid = "noah-cvlab/gpu/1.1/manidp_v1.0_cifar10"
    uids = [row["uid"] for row in json.loads(run(capsys, "hub", "list", "manidp", "--json")[1])]
    ours = "manidp/1.0/manidp-res20_cifar10"
    assert {uid, ours} < set(uids)
    assert len(uids) == 9
    measured = load_model("manidp-res20").provenance["measured"]
    assert f"{measured['correct']:,} of {measured['total']:,} right" in " ".join(
        run(capsys, "hub", "show", ours)[1].split()
    )
    assert json.loads(run(capsys, "hub", "show", uid, "--json")[1])["fields"]["accuracy"] == "0.9205"
    assert "manidp-res20" in run(capsys, "hub", "show", uid)[1]
    for command in (["hub", "pull", uid], ["info", uid], ["classify", "-m", uid]):
        code, out, err = run(capsys, *command)
        assert (code, out) == (2, "")
        assert "manidp-res20" in err, "the model that is at hand is named"
        assert "manidp hub add" in err
    stranger = tmp_path / "resnet20.ckpt"
    stranger.write_bytes(b"not the file")
    code, _, err = run(capsys, "hub", "add", stranger)
    assert code == 2
    assert "no card names its sha256" in err
    code, out, _ = run(capsys, "hub", "verify")
    assert code == 0
    assert "1 of 1 files intact" in out
    assert ours in out


def test_our_own_model_by_its_name_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANIDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    uid = "manidp/1.0/manidp-res20_cifar10"
    by_name, by_uid = (json.loads(run(capsys, "info", name, "--json")[1]) for name in ("manidp-res20", uid))
    assert by_name == by_uid
    assert by_uid["sha256"]
    assert run(capsys, "convert", uid, "-o", tmp_path / "x.ckpt", "--thresholds", tmp_path / "x.npy")[0] == 0
    pulled = json.loads(run(capsys, "hub", "pull", uid, "--json")[1])
    assert Path(pulled["file"]).read_bytes() == (tmp_path / "x.ckpt").read_bytes()
    assert "2 of 2 files intact" in run(capsys, "hub", "verify")[1]
    assert run(capsys, "hub", "pack", "-m", uid, "--folder", tmp_path / "out")[0] == 0


def test_what_models_and_cards_say_is_shown_as_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is not taken for the markup of tables, nor for what we say ourselves."""
    odd = "[/x] [bold]:ship:"
    (tmp_path / "me" / "1.0").mkdir(parents=True)
    (tmp_path / "me" / "1.0" / "a.md").write_text(f"# T\n---\nmodel-name: {odd}\nuid: you/1.0/b\nsource: us\n---\n")
    assert odd in run(capsys, "hub", "list", "--source", tmp_path)[1]
    (row,) = (row for row in json.loads(run(capsys, "hub", "list", "me/", "--source", tmp_path, "--json")[1]))
    assert (row["uid"], row["source"]) == ("me/1.0/a", str(tmp_path))
    checkpoint = load_checkpoint(model)
    classes = tuple(f"{odd} {index}" for index in range(10))
    save_checkpoint(replace(checkpoint, classes=classes, provenance={"note": odd}), tmp_path / "odd.safetensors")
    assert odd in run(capsys, "info", tmp_path / "odd.safetensors")[1]
    code, out, err = run(capsys, "classify", "-m", tmp_path / "odd.safetensors", "--sample", 1)
    assert code == 0, err
    assert odd in out


def test_hub_pack_writes_the_bundle(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "hub", "pack", "--mindspore", tmp_path / "bundle", "-m", model, "--name", "small")
    assert code == 0, err
    assert "source=" in out
    assert (tmp_path / "bundle" / "small" / "mindspore_hub_conf.py").exists()


def all_commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, *words, name)


COMMANDS = dict(all_commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_every_text_as_it_is_written(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """To the last bracket: a reader of markup would take the extra in "pip install 'manidp[bench]'" for a style."""
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    shown = "".join(out.split())
    texts = [COMMANDS[words].help, *(getattr(parameter, "help", None) for parameter in COMMANDS[words].params)]
    for text in texts:
        assert "".join((text or "").split()) in shown
    extras = {
        "bench": ["bench"],
        "score": ["score"],
        "serve": ["serve"],
        "report": ["plots"],
        "train": ["torch"],
        "prune": ["torch"],
        "diagnose": ["torch"],
        "calibrate": ["torch"],
        "freeze": ["torch"],
    }
    assert re.findall(r"pip install 'manidp\[(\w+)\]'", " ".join(out.split())) == extras.get(" ".join(words), [])


def test_freeze_leaves_the_gates_that_are_not_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = list(load_checkpoint(model).graph.gate_channels)
    out = tmp_path / "frozen.safetensors"
    code, _, err = run(capsys, "freeze", model, "-o", out, "--no-statistics", "--gates", "*.mb1", "--gates", gates[0])
    assert (code, err) == (0, "")
    assert list(load_checkpoint(out).graph.gate_channels) == [gate for gate in gates if not gate.endswith(".mb1")]
    code, out_, err = run(capsys, "freeze", model, "-o", out, "--gates", "conv*")
    assert (code, out_) == (2, "")
    assert f"--gates conv*: no gate has such a name; there are {gates[0]}" in err


@pytest.mark.parametrize("command", [["freeze"], ["calibrate", "--budget", "50%"]])
def test_what_is_made_of_a_model_has_a_place_before_the_work_begins(
    command: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(model.read_bytes())
    code, out, err = run(capsys, *command, own, "-o", own)
    assert (code, out) == (2, "")
    assert "is read as well; it would be lost" in err
    assert own.read_bytes() == model.read_bytes()
    code, out, err = run(capsys, *command, own, "-o", tmp_path / "none" / "new.safetensors")
    assert (code, out) == (2, "")
    assert "there is no folder" in err
