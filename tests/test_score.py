"""`manidp score`: every image once, whatever holds it, whatever is broken, and whenever it was killed."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manidp import cli
from manidp.data.pictures import decode_picture
from manidp.data.preprocessing import Preprocessing
from manidp.engine.engine import Engine
from manidp.errors import ManiDPError, ScoreError
from manidp.formats.checkpoint import Checkpoint, Found, OperatingPoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Activation, BatchNorm, Conv, GlobalPool, Graph, Input, Linear
from manidp.hub.find import find_model
from manidp.predict import predict
from manidp.score import scorer
from manidp.score.run import Scored, here, score
from manidp.score.sources import ROWS, open_source
from networks import spread_weights

pa = pytest.importorskip("pyarrow", reason="scores are written with pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A tiny gated network with random weights and a second operating point."""
    graph = with_gates(
        Graph(
            (
                Input(name="image", dims=(3, 8, 8)),
                Conv(name="conv_1", inputs=("image",), channels=8),
                BatchNorm(name="bn_1", inputs=("conv_1",)),
                Activation(name="relu_1", inputs=("bn_1",), kind="relu"),
                Conv(name="conv_2", inputs=("relu_1",), channels=8),
                GlobalPool(name="pool", inputs=("conv_2",)),
                Linear(name="classifier", inputs=("pool",), features=3),
            ),
            "classifier",
        )
    )
    weights = spread_weights(graph, threshold=1.05)
    closed = {name: np.asarray(9, np.float32) for name in graph.thresholds}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
    points = (OperatingPoint("closed", closed, macs=1.0),)
    save_checkpoint(Checkpoint(graph, weights, preprocessing, ("a", "b", "c"), {}, points), path)
    return find_model(path)


@functools.cache
def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 10 + 4 * (number % 60), (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=0)
    return file.getvalue()


PICTURES = {f"{'xy'[n % 2]}/{n:03d}.png": png(n) for n in range(30)}


def folder(path: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def tar(path: Path, files: dict[str, bytes]) -> str:
    """As WebDataset writes shards: a label beside each picture, times with fractions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            for member, held in ((name, content), (os.path.splitext(name)[0] + ".cls", b"1")):
                info = tarfile.TarInfo(member)
                info.size, info.mtime = len(held), 1.5
                archive.addfile(info, io.BytesIO(held))
    path.write_bytes(gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue())
    return str(path)


def parquet(path: Path, files: dict[str, bytes]) -> str:
    pq.write_table(pa.table({"picture": list(files.values()), "name": list(files)}), path, row_group_size=7)
    return str(path)


def hugging_face(path: Path, files: dict[str, bytes]) -> str:
    pictures = [{"bytes": content, "path": name} for name, content in files.items()]
    pq.write_table(pa.table({"image": pictures, "label": range(len(files))}), path)
    return str(path)


def scored(model: Found, source: str, out: Path, **options: Any) -> tuple[list[dict[str, Any]], Scored]:
    told = score(model, open_source(source), out, **options)
    return sorted(pq.read_table(out).to_pylist(), key=lambda row: str(row["key"])), told


def keys_of_rows(files: dict[str, bytes]) -> list[str]:
    return [str(row) for row in range(len(files))]


@pytest.mark.parametrize(
    ("make", "name", "keys"),
    [
        (folder, "pictures", list), (tar, "a.tar", list), (tar, "a.tar.gz", list), (parquet, "a.parquet", keys_of_rows),
        (hugging_face, "b.parquet", keys_of_rows),
    ],
)  # fmt: skip
def test_whatever_holds_them_the_rows_are_the_predictions(
    make: Callable[[Path, dict[str, bytes]], str], name: str, keys: Callable[[Any], list[str]], model: Found,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = make(tmp_path / name, PICTURES)
    pixels = np.stack([decode_picture(content, (8, 8)) for content in PICTURES.values()])
    prefix = "" if make is folder else f"{name}/"
    macs: dict[str, set[int]] = {}
    for budget in ("default", "closed"):
        rows, told = scored(model, source, tmp_path / f"out-{budget}", budget=budget, threads=2)
        wanted = [
            {
                "key": prefix + key, "class": found.label, "probability": found.probability, "macs": found.macs,
                "budget": budget, "error": None,
            }
            for key, found in zip(keys(PICTURES), predict(Engine(model.checkpoint), pixels, budget=budget), strict=True)
        ]  # fmt: skip
        assert rows == sorted(wanted, key=lambda row: str(row["key"]))
        macs[budget] = {row["macs"] for row in rows}
        assert (told.images, told.errors, told.before) == (30, 0, 0)
    assert len(macs["default"]) > 1
    assert max(macs["closed"]) < min(macs["default"])
    schema = pq.read_schema(next((tmp_path / "out-default").glob("*.parquet")))
    assert schema.names == ["key", "class", "probability", "macs", "budget", "error"]


def test_a_folder_of_shards_and_a_pattern_are_the_same_source(model: Found, tmp_path: Path) -> None:
    names = list(PICTURES)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        tar(tmp_path / "shards" / f"{number}.tar", {name: PICTURES[name] for name in names[number::3]})
    rows, _ = scored(model, str(tmp_path / "shards"), tmp_path / "out")
    assert [row["key"] for row in rows] == [
        f"{i}/{name}".replace("/", ".tar/", 1) for i in range(3) for name in sorted(names[i::3])
    ]
    again, told = scored(model, str(tmp_path / "shards" / "*.tar"), tmp_path / "out")
    assert again == rows
    assert told.before == told.images == 30


def test_many_images_are_parts_of_equal_size(model: Found, tmp_path: Path) -> None:
    count = 2 * ROWS
    seen: list[tuple[int, int | None]] = []
    source = parquet(tmp_path / "a.parquet", {str(n): png(n % 50) for n in range(count)})
    rows, _ = scored(model, source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert {row["key"] for row in rows} == {f"a.parquet/{n}" for n in range(count)}
    assert len(rows) == count
    size = os.path.getsize(source)
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert files == ["000000-000000.parquet", "000000-000001-end.parquet"]


LYING = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0" + bytes(4)
BROKEN = {
    "empty.png": (b"", "an empty file"),
    "text.jpg": (b"not a picture", "not a readable JPEG"),
    "cut.png": (PICTURES["x/000.png"][:-100], "truncated|cut|broken"),
    "lying.png": (LYING, "not a readable|pixels"),
}


@pytest.mark.parametrize(("make", "name"), [(folder, "pictures"), (tar, "a.tar"), (parquet, "a.parquet")])
def test_broken_pictures_are_recorded_with_their_reason(
    make: Callable[[Path, dict[str, bytes]], str], name: str, model: Found, tmp_path: Path
) -> None:
    files = {**{name: content for name, (content, _) in BROKEN.items()}, "good.png": png(1)}
    rows, told = scored(model, make(tmp_path / name, files), tmp_path / "out")
    assert (told.images, told.errors) == (5, 4)
    found = dict(zip(files if make is parquet else sorted(files), rows, strict=True))
    assert found.pop("good.png")["class"] in ("a", "b", "c")
    for broken, row in found.items():
        assert (row["class"], row["probability"], row["macs"]) == (None, None, None)
        assert re.search(BROKEN[broken][1], row["error"]), row


def test_what_cannot_be_read_in_a_folder_is_a_row(model: Found, tmp_path: Path) -> None:
    source = folder(tmp_path / "pictures", {"a.png": png(1)})
    (tmp_path / "pictures" / "gone").symlink_to("nowhere")
    (tmp_path / "pictures" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    rows, _ = scored(model, source, tmp_path / "out")
    assert {row["key"]: row["error"] for row in rows} == {
        "a.png": None, "gone": "a link that leads nowhere", "gone.png": "No such file or directory",
        "pipe.png": "not a regular file",
    }  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from manidp import files
from manidp.graph import Activation, BatchNorm, Conv, GlobalPool, Graph, Input, Linear
from manidp.hub.find import find_model
from manidp.score.run import score
from manidp.score.sources import open_source
left, replace = int(sys.argv[4]), os.replace
def last(source, target):
    global left
    if str(target).endswith(".parquet"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = last
score(find_model(sys.argv[1]), open_source(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_it_goes_on_and_each_image_is_there_once(model: Found, tmp_path: Path) -> None:
    """Killed when its second part is written but has no name yet; two shards of three parts and of one."""
    (tmp_path / "shards").mkdir()
    many = {f"{n:05d}.png": png(n % 50) for n in range(2 * ROWS + 9)}
    tar(tmp_path / "shards" / "0.tar", many)
    tar(tmp_path / "shards" / "1.tar", PICTURES)
    source, out = str(tmp_path / "shards"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model.path), source, str(out), "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob(".*.tmp"))) == 1
    kept = {path.name: path.stat().st_ino for path in out.glob("*.parquet")}
    rows, told = scored(model, source, out)
    assert told.before == ROWS
    assert len(kept) == 1
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert not list(out.glob(".*.tmp"))
    assert [row["key"] for row in rows] == sorted([*(f"0.tar/{n}" for n in many), *(f"1.tar/{n}" for n in PICTURES)])
    found = predict(Engine(model.checkpoint), np.stack([decode_picture(png(n), (8, 8)) for n in range(50)]))
    for n, row in enumerate(rows[: len(many)]):
        assert (row["class"], row["probability"], row["macs"]) == (
            found[n % 50].label, found[n % 50].probability, found[n % 50].macs,
        )  # fmt: skip


def test_results_of_another_run_are_not_added_to(model: Found, tmp_path: Path) -> None:
    source = folder(tmp_path / "pictures", {"a.png": png(1), "b.png": png(2)})
    out = tmp_path / "out"
    scored(model, source, out)
    with pytest.raises(ScoreError, match="another run: budget 'default' there, 'closed' here; choose another folder"):
        scored(model, source, out, budget="closed")
    (tmp_path / "pictures" / "c.png").write_bytes(png(3))
    with pytest.raises(ScoreError, match="another run: source '"):
        scored(model, source, out)
    (tmp_path / "pictures" / "c.png").unlink()
    (tmp_path / "pictures" / "b.png").write_bytes(png(2) + b" ")
    with pytest.raises(ScoreError, match="another run: source '"):
        scored(model, source, out)
    for spoiled in (b"{", b"[]", b"[" * 60_000):
        (out / "_run.json").write_bytes(spoiled)
        with pytest.raises(ScoreError, match=r"_run\.json: .*begin anew in another folder"):
            scored(model, source, out)
    (out / "_run.json").unlink()
    with pytest.raises(ScoreError, match="expected a new folder or one of results; it holds other files"):
        scored(model, source, out)
    with pytest.raises(ScoreError, match="results are a folder of Parquet files; this is a file"):
        scored(model, source, tmp_path / "pictures" / "a.png")


def test_one_process_at_a_time_writes(model: Found, tmp_path: Path) -> None:
    source = folder(tmp_path / "pictures", PICTURES)
    raised: list[str] = []

    def meanwhile(done: int, total: int | None) -> None:
        if not raised:
            with pytest.raises(ScoreError, match="another process writes results there") as caught:
                scored(model, source, tmp_path / "out")
            raised.append(str(caught.value))

    scored(model, source, tmp_path / "out", progress=meanwhile)
    assert len(raised) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such file or folder, and no file fits it as a pattern$"),
        ("{0..9}.tar", "braces are not expanded here"),
        ("empty", "no pictures and no .tar or .parquet files here"),
        ("both", r"holds pictures \(a.png\) and shards \(a.tar\); say which shards by a pattern"),
        ("kinds", "expected a folder of pictures, .tar files or .parquet files; got .*a.parquet, .*a.tar"),
        ("a.txt", "expected a folder of pictures, .tar files or .parquet files; got .*a.txt"),
        ("two.parquet", "expected one column of bytes; those that can hold them: one, two; name one with --column"),
        ("none.parquet", "expected one column of bytes; those that can hold them: none$"),
    ],
)
def test_what_is_no_source_is_told(name: str, message: str, tmp_path: Path) -> None:
    for made in ("empty", "both", "kinds"):
        (tmp_path / made).mkdir()
    for made in ("both/a.png", "both/a.tar", "kinds/a.tar", "kinds/a.parquet", "a.txt"):
        (tmp_path / made).write_bytes(b"x")
    pq.write_table(pa.table({"one": [b"x"], "two": [b"x"], "three": [1]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"three": [1]}), tmp_path / "none.parquet")
    with pytest.raises(ScoreError, match=message):
        open_source(str(tmp_path / name))
    with pytest.raises(ScoreError, match=r"expected a column 'four' of bytes; those that can hold them: one, two$"):
        open_source(str(tmp_path / "two.parquet"), "four")
    assert [content for _, content in next(open_source(str(tmp_path / "two.parquet"), "two").units()).items()] == [b"x"]


def only_item(path: Path) -> tuple[str, Any]:
    [unit] = open_source(str(path)).units()
    [item] = unit.items()
    return item


def test_shards_that_are_broken_keep_what_came_before(tmp_path: Path) -> None:
    whole = Path(tar(tmp_path / "a.tar", PICTURES)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    *read, (key, error) = next(open_source(str(tmp_path / "a.tar")).units()).items()
    assert [name for name, _ in read] == [f"a.tar/{name}" for name in PICTURES][: len(read)]
    assert 10 < len(read) < 20
    assert key == "a.tar"
    assert str(error) == "from here on the shard cannot be read: it is cut short"
    for spoiled in (b"", b"PAR1" + bytes(99) + b"PAR1", b"\xff" * 999):
        (tmp_path / "b.parquet").write_bytes(spoiled)
        key, error = only_item(tmp_path / "b.parquet")
        assert (key, str(error)[:37]) == ("b.parquet", "from row 0 on the shard cannot be rea")


def test_names_in_a_shard_are_keys_and_links_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("../../up.png", tarfile.REGTYPE), ("/etc/link.png", tarfile.SYMTYPE),
                           ("hard.png", tarfile.LNKTYPE), ("a/._hidden.png", tarfile.REGTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert only_item(tmp_path / "a.tar") == ("a.tar/../../up.png", b"")


def test_a_parquet_file_that_expands_costs_the_memory_of_one_value(tmp_path: Path) -> None:
    """4 KiB that stand for 8 GiB: one value of 4 MiB, two thousand times."""
    value = bytes(2**22)
    pictures = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([value], pa.binary()))
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", compression="zstd")
    assert os.path.getsize(tmp_path / "a.parquet") < 2**14
    before = pa.total_allocated_bytes()
    for number, (_, content) in enumerate(next(open_source(str(tmp_path / "a.parquet")).units()).items()):
        assert content == value
        assert pa.total_allocated_bytes() - before < 2**25
        if number == 40:
            break


def test_an_image_that_cannot_be_computed_spoils_no_other(
    model: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = decode_picture(png(7), (8, 8))

    def overflowing(engine: Engine, images: Any, **options: Any) -> Any:
        if (images == bad).all((1, 2, 3)).any():
            raise ManiDPError("the logits of images [0] are not finite")
        return predict(engine, images, **options)

    monkeypatch.setattr(scorer, "predict", overflowing)
    rows, told = scored(model, folder(tmp_path / "pictures", PICTURES), tmp_path / "out")
    assert told.errors == 1
    assert {row["key"] for row in rows if row["error"]} == {"y/007.png"}


def test_threads_that_decode_leave_the_filters_of_warnings_as_they_were() -> None:
    """Pillow warns of what these hold; a warning would be an error here."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P").save(file, "png", transparency=b"\0" * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        failed: list[BaseException] = []

        def decode() -> None:
            try:
                for _ in range(200):
                    decode_picture(file.getvalue(), (8, 8))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=decode) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert list(warnings.filters) == before


def test_the_command_says_what_it_did(
    model: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "pictures", {"a.png": png(1), "b.png": b""})
    arguments = ["manidp", "score", source, "-o", str(tmp_path / "out"), "-m", str(model.path), "--budget", "closed"]

    def said(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    assert re.fullmatch(
        r".*out: 2 images, 1 of them could not be read; 2 in \d+\.\d s, [\d,]+ images/s: decoding \d+\.\d s of "
        r"processor, engine \d+\.\d s\n",
        said(),
    )
    assert said().endswith("out: 2 images, 1 of them could not be read; all were there already\n")
    assert json.loads(said("--json"))["before"] == 2


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["--ray"], None), (["--ray", "-m", "x"], None), (["--ray", "127.0.0.1:6379"], "127.0.0.1:6379"),
        (["--ray=ray://head:10001"], "ray://head:10001"), (["--ray", "local"], "local"),
        (["--workers", "2"], "refused"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_the_address_of_ray_may_be_left_out(
    words: list[str], address: str | None, first: bool, model: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def on_ray(address: str | None, workers: int | None) -> Any:
        asked.append(address)
        return here

    monkeypatch.setattr("manidp.score.cluster.on_ray", on_ray)
    source = folder(tmp_path / "pictures", {"a.png": png(1)})
    words = [str(model.path) if word == "x" else word for word in words]
    rest = [source, "-o", str(tmp_path / "out"), "-m", str(model.path)]
    monkeypatch.setattr(sys, "argv", ["manidp", "score", *(words + rest if first else rest + words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0, asked) == ((2, []) if address == "refused" else (0, [address]))
