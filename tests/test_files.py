"""Files are written whole or not at all; what killed writers left is removed, what living ones write is not."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manidp.files import filling, replacing

FILLER = """
import sys
from manidp.files import filling
with filling(sys.argv[1]) as folder:
    (folder / "a").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
"""
WRITER = """
import sys
from manidp.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def writer(path: Path, script: str = WRITER) -> subprocess.Popen[str]:
    """Another process, in the middle of writing ``path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_writer_is_swept_up_after_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    killed, living = writer(path), writer(path)
    with killed, living:
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        (tmp_path / ".a.bin.0123456789ab.tmp").write_bytes(b"of an older version, which locked nothing")
        others = [".a.bin.notes.tmp", ".b.bin.0123456789ab.tmp", "a.bin.0123456789ab.tmp"]
        for name in others:
            (tmp_path / name).write_bytes(b"not ours")
        assert len(names(tmp_path)) == 6
        with replacing(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
        (left,) = set(names(tmp_path)) - {"a.bin", *others}  # the living writer's
        assert left.startswith(".a.bin.")
        living.communicate("\n")
    assert path.read_bytes() == b"half"
    assert names(tmp_path) == sorted(["a.bin", *others])


def test_folders_are_filled_whole_or_not_at_all_and_swept_like_files(tmp_path: Path) -> None:
    target = tmp_path / "above" / "folder"
    killed, living = writer(target, FILLER), writer(target, FILLER)
    with killed, living:
        killed.kill()
        killed.wait()
        assert len(names(target.parent)) == 2
        with pytest.raises(ZeroDivisionError), filling(target) as temporary:
            (temporary / "a").write_bytes(b"new")
            raise ZeroDivisionError
        assert len(names(target.parent)) == 1  # the living writer's
        living.communicate("\n")
    assert names(target.parent) == ["folder"]
    assert names(target) == ["a"]
    with pytest.raises(OSError, match="not empty"), filling(target) as temporary:
        (temporary / "b").write_bytes(b"new")
    assert names(target.parent) == ["folder"]
    assert names(target) == ["a"]
    for wrong in (Path("/"), tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(OSError, match="no name of a new folder"), filling(wrong):
            raise AssertionError("nothing may be written")


def test_writers_of_one_file_never_lose_their_own(tmp_path: Path) -> None:
    path, failed = tmp_path / "a", list[BaseException]()

    def write(value: int) -> None:
        try:
            for _ in range(30):
                with replacing(path) as file:
                    file.write(bytes([value]) * 100)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=[value]) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(path.read_bytes())) == 1
    assert names(tmp_path) == ["a"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"), replacing(path):
            raise AssertionError("nothing may be written")
    assert names(tmp_path) == ["folder", "pipe"]
