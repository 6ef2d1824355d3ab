"""Files and folders written whole or not at all, and digests of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` at the end of the block, and never does if the block fails.

    What is written goes to a temporary file beside ``path``, reaches the disk, and is renamed: whoever reads ``path``
    sees the old file or the new one, whole. What killed writers of ``path`` left there is removed. Raises OSError, also
    where ``path`` is something else than a file: a folder, a pipe, a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is there already and is not a regular file", str(path))
    sweep(path)
    temporary, file = _temporary(path)
    with file:  # open, and so locked, until it has its name
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """A folder that becomes ``folder``, new or empty, at the end of the block, and never does if the block fails.

    Folders above it are made. What killed writers of ``folder`` left there is removed. Raises OSError.
    """
    folder = Path(folder).absolute()
    try:
        named = folder.name and b"\0" not in os.fsencode(folder)
    except UnicodeEncodeError:  # half of a surrogate pair
        named = False
    if not named:
        raise OSError(errno.EINVAL, "is no name of a new folder", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    while True:
        temporary = _beside(folder)
        temporary.mkdir()
        with _locked(temporary, os.O_RDONLY, wait=True):
            if not temporary.exists():
                continue  # swept between its making and its locking
            try:
                yield temporary
                os.replace(temporary, folder)  # takes the place of an empty folder, of no other
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            break
    sync_folder(folder.parent)


def sweep(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of ``path`` left beside it, and nobody else's.

    A living writer holds a lock on what it writes, which the system frees when the process ends. Where the file system
    has no locks, nothing is removed.
    """
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not ours.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    with _locked(entry.path, os.O_RDONLY, wait=False):
                        shutil.rmtree(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    with _locked(entry.path, os.O_RDWR, wait=False):  # locks of network disks want to write
                        os.unlink(entry.path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file for ``path``, open and locked."""
    while True:
        temporary = _beside(path)
        file = open(temporary, "xb")  # noqa: SIM115 - not tempfile: its files are private, the result is an ordinary one
        with contextlib.suppress(OSError):  # no locks here: then nobody can sweep either
            _lock(file.fileno(), wait=True)
        if os.path.lexists(temporary):
            return temporary, file
        file.close()  # swept between its making and its locking


@contextlib.contextmanager
def _locked(path: str | Path, flags: int, *, wait: bool) -> Iterator[None]:
    """A lock on a file or folder. Without ``wait``: raises OSError if another has it, or where there are no locks."""
    if sys.platform == "win32":  # where nothing that is open can be removed anyway, and no folder be opened
        yield
        return
    descriptor = os.open(path, flags | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(*((OSError,) if wait else ())):
            _lock(descriptor, wait=wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> None:
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def open_regular(path: str | Path, *, follow: bool = True) -> BufferedReader:
    """A regular file, open to read. Raises OSError, at once, for all else: a pipe or a device could make us wait.

    ``follow``: whether ``path`` itself may be a symbolic link.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256_of(path: str | Path, *, follow: bool = True) -> str:
    """The digest of a regular file, in lower-case hex; ``follow`` as for :func:`open_regular`. Raises OSError."""
    with open_regular(path, follow=follow) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system lets folders be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
