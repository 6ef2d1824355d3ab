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
from typing import IO, Any, Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manidp.data.images import ImageSet, Preprocessing
from manidp.errors import TrainingError
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.models import resnet
from manidp.torch.network import Network
from manidp.torch.train import Training, native_precision
from manidp.training.recipe import Recipe

PREPROCESSING = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
GRAPH = with_gates(resnet(8, num_classes=2, width=8, image=(3, 8, 8)))
RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=0.01, ema=0.5, keep_rate=0.6, precision="float32")
ORIGIN = {"from": "a" * 64, "teachers": []}


def image_set(seed: int = 0, classes: tuple[str, ...] = ("frog", "ship")) -> ImageSet:
    chance = np.random.default_rng(seed)
    return ImageSet(chance.integers(0, 256, (16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int64) % 2, classes)


def training(
    folder: Path,
    recipe: Recipe = RECIPE,
    data: ImageSet | None = None,
    preprocessing: Preprocessing = PREPROCESSING,
    origin: Mapping[str, Any] = ORIGIN,
    graph: Graph = GRAPH,
) -> Training:
    data = data or image_set()
    return Training(Network(graph), data, preprocessing, recipe, folder, origin=origin, resume=True)


def train(folder: Path, recipe: Recipe = RECIPE, epochs: int = 9) -> None:
    with training(folder, recipe) as run:
        for _, _ in zip(range(epochs), run.epochs(), strict=False):
            pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a run after one of its two epochs."""
    folder = tmp_path_factory.mktemp("begun")
    train(folder, epochs=1)
    return (folder / "state.safetensors").read_bytes()


def refused(folder: Path, message: str, **options: Any) -> None:
    """One line that says so, and the state as it was."""
    before = (folder / "state.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=message) as caught:
        training(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert (folder / "state.safetensors").read_bytes() == before


def test_a_run_goes_on_only_as_itself(begun: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(begun)
    refused(tmp_path, r"another run: data sha256 '[0-9a-f]{64}' there, '[0-9a-f]{64}' here$", data=image_set(1))
    classes = r"another run: data classes \['frog', 'ship'\] there, \['cat', 'dog'\] here$"
    refused(tmp_path, classes, data=image_set(classes=("cat", "dog")))
    refused(tmp_path, "data images 16 there, 8 here", data=image_set().take(np.arange(8)))
    refused(tmp_path, "another run: origin from 'aaa.*' there, None here$", origin={"from": None, "teachers": []})
    refused(tmp_path, r"origin teachers \[\] there, \['b'\] here$", origin=ORIGIN | {"teachers": ["b"]})
    refused(tmp_path, "preprocessing mean", preprocessing=replace(PREPROCESSING, mean=(0.4, 0.5, 0.5)))
    refused(
        tmp_path, "recipe epochs 2 there, 3 here; recipe seed 0 there, 1 here", recipe=replace(RECIPE, epochs=3, seed=1)
    )
    refused(tmp_path, "another graph", graph=with_gates(resnet(14, num_classes=2, width=8, image=(3, 8, 8))))
    train(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def edited(
    state: bytes, tmp_path: Path, tensors: Callable[[dict[str, Any]], object], meta: Callable[[dict[str, Any]], object]
) -> bytes:
    path = tmp_path / "edited.safetensors"
    path.write_bytes(state)
    values = load_file(path)
    with safe_open(path, framework="pt") as file:
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
    "extra": (lambda t: t.update(more=torch.zeros(1)), "missing or unknown: 'more'"),
    "shape": (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), r"must be F32 \[2, 32\]; got F32 \[32, 2\]"),
    "type": (lambda t: t.update({WEIGHT: t[WEIGHT].double()}), r"must be F32 .* got F64"),
    "nan": (lambda t: t[WEIGHT].fill_(float("nan")), "'network/classifier.weight' holds NaN or infinity"),
    "inf": (lambda t: t["average/classifier.bias"].fill_(float("inf")), "holds NaN or infinity"),
}
METAS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "older": (lambda m: m.pop("version"), "an older manidp began, .* in another folder"),
    "newer": (lambda m: m.update(version=3), "expected a state of version 2; got 3"),
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
    "rate": (lambda m: m.update(rate=[1]), r"rate is \[1\]"),
    "run": (lambda m: m.update(run=[]), "damaged"),
    "parts of the run": (lambda m: m.update(run={"recipe": None, "data": 3}), "another run: another graph; another"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_the_runs_are_refused(kind: str, begun: bytes, tmp_path: Path) -> None:
    change, message = TENSORS[kind]
    (tmp_path / "state.safetensors").write_bytes(edited(begun, tmp_path, change, lambda m: None))
    refused(tmp_path, message)


@pytest.mark.parametrize("kind", METAS)
def test_a_description_that_is_not_a_runs_is_refused(kind: str, begun: bytes, tmp_path: Path) -> None:
    change, message = METAS[kind]
    (tmp_path / "state.safetensors").write_bytes(edited(begun, tmp_path, lambda t: None, change))
    refused(tmp_path, message)


def test_files_that_are_no_states_are_refused(begun: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    nested = tmp_path / "nested.safetensors"
    save_file({"a": torch.zeros(1)}, nested, {"manidp": "[" * 100_000})
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    null = tmp_path / "null.safetensors"
    save_file({"a": torch.zeros(1)}, null, {"manidp": "null"})
    texts = [b"", b"\0" * 1000, b"{}", begun[:100], begun[: len(begun) // 2], begun[:-1], begun + b"more"]
    for content in (*texts, *(file.read_bytes() for file in (nested, other, null))):
        path.write_bytes(content)
        refused(tmp_path, "damaged, or not the state of a run")
    path.unlink()
    makers: list[Callable[[], object]] = [path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere")]
    for make in makers:
        make()
        with pytest.raises(TrainingError, match=r"state\.safetensors: cannot be read"):
            training(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_whatever_byte_is_changed_a_run_goes_on_or_is_refused(begun: bytes, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    header = int.from_bytes(begun[:8], "little") + 8
    for number in range(60):
        content = bytearray(begun)
        content[chance.integers(0, header if number % 3 else len(begun))] = chance.integers(0, 256)
        (tmp_path / "state.safetensors").write_bytes(content)
        try:
            training(tmp_path).close()
        except TrainingError as error:
            assert "\n" not in str(error)


def test_the_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    with training(tmp_path), pytest.raises(TrainingError, match="another process trains there now"):
        training(tmp_path)
    training(tmp_path).close()
    script = "import filelock as f, sys; f = f.FileLock(sys.argv[1]); f.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(tmp_path, "another process trains there now")
        holder.kill()
    train(tmp_path)  # the lock went with its holder


def test_what_killed_saves_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    train(tmp_path)
    for name in ("state.safetensors", "log.jsonl", "model.safetensors"):
        (tmp_path / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    training(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.jsonl", "state.safetensors"]


def test_a_full_disk_is_one_line_and_the_last_good_epoch_goes_on(
    begun: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[IO[bytes]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        yield

    whole, broken, new = tmp_path / "whole", tmp_path / "broken", tmp_path / "new"
    train(whole)
    broken.mkdir()
    (broken / "state.safetensors").write_bytes(begun)
    with training(broken) as run, monkeypatch.context() as patched:
        patched.setattr("manidp.torch.state.replacing", full)
        with pytest.raises(TrainingError) as caught:
            list(run.epochs())
        with pytest.raises(TrainingError, match=r"state\.safetensors: cannot be written: .*; nothing was trained yet$"):
            training(new)
    state = broken / "state.safetensors"
    assert (
        str(caught.value) == f"{state}: cannot be written: No space left on device; {state} holds the last good epoch"
    )
    assert state.read_bytes() == begun
    train(broken)
    one, two = (load_file(folder / "state.safetensors") for folder in (whole, broken))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_weights_that_are_not_finite_are_never_saved(begun: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(begun)

    def spoil(done: int, total: int | None) -> None:
        if done == total:
            with torch.no_grad():
                run.network.state_dict()["classifier.bias"].fill_(float("inf"))

    with training(tmp_path) as run:
        run.progress = spoil
        with pytest.raises(
            TrainingError, match=r"'network/classifier\.bias' is not finite after epoch 1; .* last good"
        ):
            list(run.epochs())
    assert (tmp_path / "state.safetensors").read_bytes() == begun


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_the_precision_is_the_processors(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    able = dict.fromkeys(("avx2", "avx512_bf16", "amx_bf16", "bf16"), False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert native_precision("cpu") == "float32"
    able[flag] = True
    assert native_precision("cpu") == "bfloat16"
    assert native_precision("cpu") == "bfloat16"


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_a_run_keeps_the_precision_it_began_with(
    first: Literal["float32", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Literal["float32", "bfloat16"] = "bfloat16" if first == "float32" else "float32"
    chosen, automatic = [first], replace(RECIPE, precision="auto")
    monkeypatch.setattr("manidp.torch.train.native_precision", lambda device: chosen[0])
    train(tmp_path, automatic, epochs=1)
    chosen[0] = other
    with training(tmp_path, automatic) as run:
        assert run.recipe.precision == first
        assert run.run["recipe"]["precision"] == first
    training(tmp_path, replace(RECIPE, precision=first)).close()
    refused(tmp_path, f"recipe precision '{first}' there, '{other}' here", recipe=replace(RECIPE, precision=other))
