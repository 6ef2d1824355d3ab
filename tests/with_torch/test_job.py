"""`manidp train` as a whole: classes by name, budgets in units, a holdout by class, what is refused, how it ends."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from manidp import cli
from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.engine.engine import Engine
from manidp.errors import TrainingError
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.graph.macs import dense_macs, macs_per_image, ungated_macs
from manidp.models import resnet
from manidp.torch.backend import Torch
from manidp.torch.network import Network
from manidp.training.job import Finished, Job, run_job, split
from manidp.training.recipe import Recipe, parse_setting, read_recipe
from manidp.training.state import EpochRecord

PREPROCESSING = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
GATED = with_gates(resnet(20))
TINY = ("epochs=1", "batch_size=4", "learning_rate=1e-6", "keep_rate=0.6")


def model(path: Path, classes: tuple[str, ...] = ("frog", "ship")) -> str:
    graph = with_gates(resnet(8, num_classes=len(classes), width=8, image=(3, 8, 8)))
    save_checkpoint(Checkpoint(graph, Network(graph, seed=7).weights(), PREPROCESSING, classes), path)
    return str(path)


def pictures(folder: Path, **counts: int) -> Path:
    chance = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def job(tmp_path: Path) -> Job:
    data = pictures(tmp_path / "data", frog=6, ship=6)
    return Job(data=data, out=tmp_path / "run", start=model(tmp_path / "m.safetensors"), settings=TINY, threads=1)


def run(job: Job) -> Iterator[str | EpochRecord | Finished]:
    return run_job(job, Torch)


def finished(job: Job) -> tuple[Checkpoint, Finished, list[str]]:
    *events, last = run(job)
    assert isinstance(last, Finished)
    return load_checkpoint(last.file), last, [event for event in events if isinstance(event, str)]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_holdout_is_in_proportion_and_takes_no_class_whole(data: st.DataObject, sizes: list[int]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    places = np.stack(np.divmod(np.arange(len(labels)), 256), axis=1)  # an image's first pixel is its place
    pixels = np.pad(places, ((0, 0), (0, 1))).astype(np.uint8)[:, None, None, :]
    images = ImageSet(pixels, labels, tuple(map(str, range(len(sizes)))))
    most = sum(sizes) - len(sizes)
    with pytest.raises(TrainingError, match=f"at most {most} can be held out"):
        split(images, most + 1)
    count = data.draw(st.integers(0, most))
    stay, held = split(images, count)
    assert isinstance(stay, ImageSet) and isinstance(held, ImageSet)
    found = np.concatenate([stay.images, held.images])[:, 0, 0].astype(int) @ [256, 1, 0]
    assert sorted(found) == list(range(len(labels)))
    assert len(held) == count
    shares = np.bincount(held.labels, minlength=len(sizes))
    assert (np.bincount(stay.labels, minlength=len(sizes)) >= 1).all()
    if min(sizes) * (len(labels) - count) >= len(labels):  # nobody's part is more than what it can spare
        assert (np.abs(shares - count * np.array(sizes) / len(labels)) < 1).all()
    assert split(images, count)[1].sha256() == held.sha256()


def test_the_figures_are_of_the_held_out_pictures(job: Job) -> None:
    checkpoint, last, _ = finished(replace(job, holdout=4))
    assert checkpoint.provenance["data"]["images"] == 8
    assert last.measured is not None
    assert last.measured["total"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": Path("data"), "holdout": 2}, "--test and --holdout"),
        ({"holdout": 11}, "cannot hold out 11 of 12 images: at least one of each of the 2 classes .*at most 10"),
        ({"holdout": -1}, "got -1"),
        ({"threads": 0}, "threads must lie between 1 and"),
        ({"threads": 10**12}, "threads must lie between 1 and"),
        ({"settings": (*TINY, "epochs=1e400")}, "epochs must be int; got inf"),
        ({"settings": (*TINY, "epochs=nan")}, "epochs must be int; got nan"),
        ({"settings": (*TINY, "epochs=true")}, "epochs must be int; got True"),
        ({"settings": (*TINY, "momentum=inf")}, "momentum must lie between 0 and 1; got inf"),
        ({"settings": (*TINY, "seed=-1")}, "seed must lie between 0 and 4.29497e"),
        ({"settings": (*TINY, f"seed={10**400}")}, r"seed must lie .*10000000.*\(401 characters\)"),
        ({"settings": (*TINY, f"seed=0x{'f' * 9000}")}, "seed must lie .*got a huge int"),
        ({"settings": (*TINY, f"seed={'1' * 9000}")}, r"seed must be int; got '1111.*\(9,002 characters\)"),
        ({"settings": (*TINY, "seed=" + "[" * 9000)}, "seed must be int"),
        ({"settings": (*TINY, "momentum=[0.9]")}, r"momentum must be float; got \[0\.9\]"),
        ({"settings": (*TINY, "compiled=1")}, "compiled must be bool"),
        ({"settings": (*TINY, "x" * 9000 + "=1")}, "unknown setting 'xxx"),
        ({"settings": (*TINY, "keep_rate=60")}, "keep_rate must lie above 0 and at most 1; got 60"),
        ({"settings": (*TINY, "keep_rate=0")}, "keep_rate must lie above 0"),
        ({"settings": (*TINY, "keep_rate=60M")}, "keep_rate must be a number, perhaps followed by %; got '60M'"),
        ({"settings": (*TINY, "precision=float16")}, "precision must be auto or bfloat16 or float32"),
        ({"data": Path("nowhere")}, "nowhere"),
        ({"test": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(
    change: dict[str, Any], message: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(job, **change)
    options = [f"--set={one}" for one in job.settings] + ([f"--test={job.test}"] if job.test else [])
    more = [f"--from={job.start}", f"--threads={job.threads}", *([f"--holdout={job.holdout}"] if job.holdout else [])]
    code, err = command(capsys, f"--data={job.data}", f"--out={job.out}", *options, *more)
    assert code == 2
    assert not job.out.exists()
    if change.get("holdout") != -1:  # the command line says this one itself
        assert err.startswith("manidp: ")
        assert err.count("\n") == 1
        assert len(err) < 500
        with pytest.raises(Exception, match=message):
            list(run(job))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    sys.argv = ["manidp", "train", *map(str, arguments)]
    code: object = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def test_a_folder_that_can_be_none_is_one_line(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    for out, message in (
        ("file", "got a file"),
        ("link", "a symbolic link that leads nowhere"),
        ("file/a", "Not a dir"),
    ):
        with pytest.raises(TrainingError, match=message):
            list(run(replace(job, out=tmp_path / out)))
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_recipes_that_are_none_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    contents = [
        "[" * 100_000,
        "a = " + "[" * 100_000,
        "seed = " + "1" * 9000,
        "\0",
        "epochs = 3\n" + "#" * 2**20,
        "[a]\nb = 1",
    ]
    for content in contents:
        path.write_text(content)
        with pytest.raises(TrainingError) as caught:
            read_recipe(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    path.write_bytes(b"\xff")
    for wrong in (path, tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(TrainingError, match=r"not TOML|cannot be read"):
            read_recipe(wrong)


def test_budgets_are_read_in_units() -> None:
    wanted = {
        "18.6M": 18.6e6, "18.6e6": 18.6e6, "18600000": 18.6e6, "18600k": 18.6e6, "0.0186G": 18.6e6, " 18.6 M ": 18.6e6,
        "54%": 0.54 * ungated_macs(GATED), "100%": ungated_macs(GATED),
    }  # fmt: skip
    for text, macs in wanted.items():
        recipe = Recipe(**parse_setting(f"macs_budget={text}")).resolved(GATED)
        assert recipe.macs_budget == pytest.approx(macs), text
    assert Recipe(keep_rate="60%").resolved(GATED).keep_rate == pytest.approx(0.6)
    for text in ("M", "18,6M", "18.6 MB", "1e999M", "-3M", "54%%", "18.6m", "nan", ""):
        with pytest.raises(TrainingError, match="macs_budget must"):
            Recipe(macs_budget=text).resolved(GATED)


def test_a_budget_is_one_that_the_network_can_take() -> None:
    closed = {gate: np.zeros((1, count), bool) for gate, count in GATED.gate_channels.items()}
    least, most = int(macs_per_image(GATED, closed)[0]), dense_macs(GATED)
    for budget in (least, most):
        assert Recipe(macs_budget=budget).resolved(GATED).macs_budget == budget
    message = r"can take 0\.7671M \(all gates closed\) to 40\.88M \(all open; 40\.81M without gates\); got "
    for wrong in (18.64, least - 1, most + 1, "101%", "1%", 1e9):
        with pytest.raises(TrainingError, match=message):
            Recipe(macs_budget=wrong).resolved(GATED)


def test_gates_of_constant_masks_are_not_trained() -> None:
    nodes = [replace(node, rule="constant") if node in GATED.gates else node for node in GATED.nodes]
    with pytest.raises(TrainingError, match=r"only gates with thresholds can be trained; those of 'stage_1\.0\.mb1'"):
        Recipe(keep_rate=0.6).resolved(Graph(tuple(nodes), GATED.output))


def test_a_budget_that_is_missed_is_told_and_the_model_is_there(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Gates that were not trained are alike for all images: all of a gate's channels are open, or none."""
    options = ["epochs=1", "batch_size=4", "learning_rate=1e-9", "precision=float32"]
    arguments = [f"--data={job.data}", f"--from={job.start}", *(f"--set={one}" for one in options)]
    code, err = command(capsys, *arguments, f"--out={job.out}", "--set=macs_budget=60%")
    assert code == 1
    assert "multiply-adds is missed by" in err
    made = load_checkpoint(job.out / "model.safetensors")
    assert made.provenance["recipe"]["macs_budget"] == pytest.approx(0.6 * ungated_macs(made.graph))
    code, err = command(capsys, *arguments, f"--out={job.out}-open", f"--set=macs_budget={dense_macs(made.graph)}")
    assert code == 0, err


@pytest.mark.parametrize("more", [(), ("macs_budget=50%",)])
def test_trained_on_gates_keep_the_shares_that_they_had(job: Job, more: tuple[str, ...]) -> None:
    options = ("epochs=3", "reach=0.7", "batch_size=4", "learning_rate=1e-4", "precision=float32", "augment=false")
    first, _, _ = finished(replace(job, settings=(*options, "macs_budget=60%", "shares=taylor")))
    again = replace(job, start=str(job.out / "model.safetensors"), out=Path(f"{job.out}-on"))
    second, _, _ = finished(replace(again, settings=(*options, *more)))
    assert second.provenance["recipe"]["shares"] == "taylor"
    images = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    shares = []
    for made in (first, second):
        with Engine(made) as engine:
            shares.append(np.array([own.mean() for own in engine.run(images).kept.values()]))
    assert np.ptp(shares[0]) > 0.25
    assert np.corrcoef(shares)[0, 1] > 0.7
    plain, _, _ = finished(replace(again, settings=(*options, "keep_rate=0.5"), out=Path(f"{job.out}-rate")))
    assert plain.provenance["recipe"]["shares"] == "even"


def test_classes_are_matched_by_name(job: Job, tmp_path: Path) -> None:
    turned = model(tmp_path / "turned.safetensors", ("ship", "frog"))
    checkpoint, _, _ = finished(replace(job, start=turned, test=pictures(tmp_path / "test", ship=3)))
    assert checkpoint.classes == ("ship", "frog")
    weight, before = checkpoint.weights["classifier.weight"], load_checkpoint(turned).weights["classifier.weight"]
    assert np.abs(weight - before).max() < 1e-3
    other = model(tmp_path / "other.safetensors", ("cat", "dog"))
    checkpoint, _, messages = finished(replace(job, start=other, out=tmp_path / "other"))
    assert checkpoint.classes == ("frog", "ship")
    assert np.abs(checkpoint.weights["classifier.weight"] - before).max() > 1e-2
    assert "the classifier starts anew: other knows other classes than the data" in messages
    for test in (pictures(tmp_path / "cats", cat=1, frog=1), pictures(tmp_path / "none")):
        test.mkdir(exist_ok=True)
        with pytest.raises(Exception, match="expected subfolders named after classes"):
            list(run(replace(job, out=tmp_path / "no", test=test)))
    distil = (*TINY, "distillation=0.5")
    for teacher in (turned, other):
        with pytest.raises(TrainingError, match="must know the data's classes, in this order"):
            list(run(replace(job, out=tmp_path / "no", teachers=(teacher,), settings=distil)))


def test_a_run_is_known_by_the_files_of_its_models(job: Job, tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher.safetensors")
    job = replace(job, teachers=(teacher,), settings=(*TINY, "distillation=0.5"))
    finished(job)
    job = replace(job, resume=True)
    (tmp_path / "copy.safetensors").write_bytes(Path(teacher).read_bytes())
    finished(replace(job, teachers=(str(tmp_path / "copy.safetensors"),)))  # the file counts, not its name
    loaded = load_checkpoint(teacher)
    save_checkpoint(replace(loaded, provenance={"note": "another"}), teacher)
    with pytest.raises(TrainingError, match=r"another run: origin teachers \['[0-9a-f]{60}"):
        list(run(job))
    with pytest.raises(TrainingError, match=r"another run: origin from '[0-9a-f]{64}' there, '[0-9a-f]{64}' here"):
        list(run(replace(job, start=teacher, teachers=(str(tmp_path / "copy.safetensors"),))))


INTERRUPTED = """
import os, signal, threading, time
from manidp.cli import main
from manidp.training.loop import Training
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by those that a shell starts in the background
epochs = Training.epochs
def some(self):
    for number, record in enumerate(epochs(self)):
        if number == 0:  # comes at some moment of the epochs that follow,
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        if number == 13:  # at the latest here, however slow this machine is
            time.sleep(30)
        yield record
Training.epochs = some
main()
"""


def test_interrupted_it_ends_with_130_and_one_line_and_goes_on_to_the_same_bits(job: Job, tmp_path: Path) -> None:
    job = replace(job, settings=(*TINY, "epochs=15", "precision=float32"))
    arguments = [f"--data={job.data}", f"--from={job.start}", *(f"--set={one}" for one in job.settings), "--threads=1"]
    log = job.out / "log.jsonl"
    command = [sys.executable, "-c", INTERRUPTED, "train", f"--out={job.out}", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "manidp: interrupted\n"
    assert 2 <= len(log.read_text().splitlines()) < 16, "interrupted too late to show anything"
    whole = replace(job, out=tmp_path / "whole")
    finished(replace(job, resume=True))
    finished(whole)
    for name in ("state.safetensors", "model.safetensors"):
        one, two = (load_file(folder / name) for folder in (job.out, whole.out))
        assert one.keys() == two.keys()
        assert all(value.numpy().tobytes() == two[key].numpy().tobytes() for key, value in one.items())
    records = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert [record["epoch"] for record in records] == list(range(15))
