"""A run goes on only as itself: other data, settings or models, foreign files and second holders are one line each."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.models import resnet
from manidp.training.backend import Backend
from manidp.training.loop import Training
from manidp.training.recipe import Recipe
from manidp.training.start import start_of

from .cases import GATED_GRAPH, PREPROCESSING

RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=0.01, ema=0.5, keep_rate=0.6, precision="float32")
ORIGIN = {"from": "a" * 64, "teachers": []}


def image_set(seed: int = 0, classes: tuple[str, ...] = ("frog", "ship")) -> ImageSet:
    chance = np.random.default_rng(seed)
    return ImageSet(chance.integers(0, 256, (16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int64) % 2, classes)


def training(
    backend: Backend,
    folder: Path,
    recipe: Recipe = RECIPE,
    data: ImageSet | None = None,
    preprocessing: Preprocessing = PREPROCESSING,
    origin: Mapping[str, Any] = ORIGIN,
    graph: Graph = GATED_GRAPH,
) -> Training:
    data = data or image_set()
    start = start_of(backend, graph, None, preprocessing, data.classes, 0)
    return Training(backend, start, data, recipe, folder, origin=origin, resume=True)


def train(backend: Backend, folder: Path, recipe: Recipe = RECIPE, epochs: int = 9) -> None:
    with training(backend, folder, recipe) as run:
        for _, _ in zip(range(epochs), run.epochs(), strict=False):
            pass


@pytest.fixture(scope="session")
def begun(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a run after one of its two epochs."""
    folder = tmp_path_factory.mktemp("begun")
    train(backend, folder, epochs=1)
    return (folder / "state.safetensors").read_bytes()


def refused(backend: Backend, folder: Path, message: str, **options: Any) -> None:
    """One line that says so, and the state as it was."""
    before = (folder / "state.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=message) as caught:
        training(backend, folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert (folder / "state.safetensors").read_bytes() == before


def test_a_run_goes_on_only_as_itself(backend: Backend, begun: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(begun)
    refused(
        backend, tmp_path, r"another run: data sha256 '[0-9a-f]{64}' there, '[0-9a-f]{64}' here$", data=image_set(1)
    )
    classes = r"another run: data classes \['frog', 'ship'\] there, \['cat', 'dog'\] here$"
    refused(backend, tmp_path, classes, data=image_set(classes=("cat", "dog")))
    refused(backend, tmp_path, "data images 16 there, 8 here", data=image_set().take(np.arange(8)))
    refused(
        backend, tmp_path, "another run: origin from 'aaa.*' there, None here$", origin={"from": None, "teachers": []}
    )
    refused(backend, tmp_path, r"origin teachers \[\] there, \['b'\] here$", origin=ORIGIN | {"teachers": ["b"]})
    refused(backend, tmp_path, "preprocessing mean", preprocessing=replace(PREPROCESSING, mean=(0.4, 0.5, 0.5)))
    refused(
        backend,
        tmp_path,
        "recipe epochs 2 there, 3 here; recipe seed 0 there, 1 here",
        recipe=replace(RECIPE, epochs=3, seed=1),
    )
    refused(backend, tmp_path, "another graph", graph=with_gates(resnet(14, num_classes=2, width=8, image=(3, 8, 8))))
    train(backend, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def edited(
    state: bytes, tmp_path: Path, tensors: Callable[[dict[str, Any]], object], meta: Callable[[dict[str, Any]], object]
) -> bytes:
    path = tmp_path / "edited.safetensors"
    path.write_bytes(state)
    values = load_file(path)
    with safe_open(path, framework="np") as file:
        described = json.loads(file.metadata()["manidp"])
    tensors(values)
    meta(described)
    save_file(values, path, {"manidp": json.dumps(described)})
    return path.read_bytes()


WEIGHT = "network/classifier.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda t: t.pop(WEIGHT), "missing or unknown: 'network/classifier.weight'"),
    "no average": (lambda t: [t.pop(n) for n in list(t) if n.startswith("average/")], "missing or unknown"),
    "no momentum": (lambda t: [t.pop(n) for n in list(t) if n.startswith("momentum/")], "missing or unknown"),
    "extra": (lambda t: t.update(more=np.zeros(1, np.float32)), "missing or unknown: 'more'"),
    "shape": (
        lambda t: t.update({WEIGHT: np.ascontiguousarray(t[WEIGHT].T)}),
        r"must be F32 \[2, 32\]; got F32 \[32, 2\]",
    ),
    "type": (lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.float64)}), r"must be F32 .* got F64"),
    "nan": (lambda t: t[WEIGHT].fill(np.nan), "'network/classifier.weight' holds NaN or infinity"),
    "inf": (lambda t: t["average/classifier.bias"].fill(np.inf), "holds NaN or infinity"),
}
METAS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "older": (lambda m: m.pop("version"), "an older manidp began, .* in another folder"),
    "newer": (lambda m: m.update(version=4), "expected a state of version 3; got 4"),
    "no records": (lambda m: m.pop("records"), "it lacks 'records'"),
    "records": (lambda m: m.update(records={}), "damaged"),
    "record": (lambda m: m.update(records=[None]), "record 0 must hold"),
    "more epochs": (lambda m: m.update(records=[m["records"][0] | {"epoch": e} for e in range(3)]), "3 epochs of 2"),
    "fields": (lambda m: m["records"][0].update(more=1), "record 0 must hold"),
    "text": (lambda m: m["records"][0].update(loss="1"), "loss is '1'"),
    "bool": (lambda m: m["records"][0].update(loss=True), "loss is True"),
    "epoch": (lambda m: m["records"][0].update(epoch=1), "record 0 is of epoch 1"),
    "json's nan": (lambda m: m["records"][0].update(loss=float("nan")), "holds NaN"),
    "huge": (lambda m: m["records"][0].update(loss=10**400), r"loss is 1000.*\(401 characters\)"),
    "rate": (lambda m: m.update(rates={"default": [1]}), r"rate is \[1\]"),
    "run": (lambda m: m.update(run=[]), "damaged"),
    "parts of the run": (lambda m: m.update(run={"recipe": None, "data": 3}), "another run: .*another graph; another"),
    "backend": (lambda m: m["run"].update(backend="other"), r"another run: backend 'other' there, '\w+' here$"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_the_runs_are_refused(backend: Backend, kind: str, begun: bytes, tmp_path: Path) -> None:
    change, message = TENSORS[kind]
    (tmp_path / "state.safetensors").write_bytes(edited(begun, tmp_path, change, lambda m: None))
    refused(backend, tmp_path, message)


@pytest.mark.parametrize("kind", METAS)
def test_a_description_that_is_not_a_runs_is_refused(backend: Backend, kind: str, begun: bytes, tmp_path: Path) -> None:
    change, message = METAS[kind]
    (tmp_path / "state.safetensors").write_bytes(edited(begun, tmp_path, lambda t: None, change))
    refused(backend, tmp_path, message)


def test_files_that_are_no_states_are_refused(backend: Backend, begun: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    nested = tmp_path / "nested.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, nested, {"manidp": "[" * 100_000})
    other = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, other)
    null = tmp_path / "null.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, null, {"manidp": "null"})
    texts = [b"", b"\0" * 1000, b"{}", begun[:100], begun[: len(begun) // 2], begun[:-1], begun + b"more"]
    for content in (*texts, *(file.read_bytes() for file in (nested, other, null))):
        path.write_bytes(content)
        refused(backend, tmp_path, "damaged, or not the state of a run")
    path.unlink()
    makers: list[Callable[[], object]] = [path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere")]
    for make in makers:
        make()
        with pytest.raises(TrainingError, match=r"state\.safetensors: cannot be read"):
            training(backend, tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_whatever_byte_is_changed_a_run_goes_on_or_is_refused(backend: Backend, begun: bytes, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    header = int.from_bytes(begun[:8], "little") + 8
    for number in range(60):
        content = bytearray(begun)
        content[chance.integers(0, header if number % 3 else len(begun))] = chance.integers(0, 256)
        (tmp_path / "state.safetensors").write_bytes(content)
        try:
            training(backend, tmp_path).close()
        except TrainingError as error:
            assert "\n" not in str(error)


def test_the_folder_is_one_process_at_a_time(backend: Backend, tmp_path: Path) -> None:
    with training(backend, tmp_path), pytest.raises(TrainingError, match="another process trains there now"):
        training(backend, tmp_path)
    training(backend, tmp_path).close()
    script = "import filelock as f, sys; f = f.FileLock(sys.argv[1]); f.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(backend, tmp_path, "another process trains there now")
        holder.kill()
    train(backend, tmp_path)  # the lock went with its holder


def test_what_killed_saves_left_is_gone_at_the_next_start(backend: Backend, tmp_path: Path) -> None:
    train(backend, tmp_path)
    for name in ("state.safetensors", "log.jsonl", "model.safetensors"):
        (tmp_path / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    training(backend, tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.jsonl", "state.safetensors"]


def test_a_full_disk_is_one_line_and_the_last_good_epoch_goes_on(
    backend: Backend, begun: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[IO[bytes]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        yield

    whole, broken, new = tmp_path / "whole", tmp_path / "broken", tmp_path / "new"
    train(backend, whole)
    broken.mkdir()
    (broken / "state.safetensors").write_bytes(begun)
    with training(backend, broken) as run, monkeypatch.context() as patched:
        patched.setattr("manidp.training.state.replacing", full)
        with pytest.raises(TrainingError) as caught:
            list(run.epochs())
        with pytest.raises(TrainingError, match=r"state\.safetensors: cannot be written: .*; nothing was trained yet$"):
            training(backend, new)
    state = broken / "state.safetensors"
    assert (
        str(caught.value) == f"{state}: cannot be written: No space left on device; {state} holds the last good epoch"
    )
    assert state.read_bytes() == begun
    train(backend, broken)
    one, two = (load_file(folder / "state.safetensors") for folder in (whole, broken))
    assert one.keys() == two.keys()
    assert all((value == two[name]).all() for name, value in one.items())


def test_weights_that_are_not_finite_are_never_saved(backend: Backend, begun: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(begun)

    def spoil(done: int, total: int | None) -> None:
        if done == total:
            run.learner.load(run.learner.state() | {"network/classifier.bias": np.full(2, np.inf, np.float32)})

    with training(backend, tmp_path) as run:
        run.progress = spoil
        with pytest.raises(
            TrainingError, match=r"'network/classifier\.bias' is not finite after epoch 1; .* last good"
        ):
            list(run.epochs())
    assert (tmp_path / "state.safetensors").read_bytes() == begun
