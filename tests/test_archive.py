"""Archives that are whole are read as tarfile and zipfile read them; archives that are not cost little and say why."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from manidp.fetch.archive import MAX_MEMBERS, ArchiveError, members

FILES = {
    "a.md": b"one",
    "./b/" + "c" * 90 + "/d.md": bytes(5000),
    "x/" * 70 + "long.md": b"long",
    "e" * 150 + ".md": b"e",
    "ä/名.md": "ä".encode(),
    "empty.md": b"",
    "other.bin": b"not wanted",
}
WANTED = {name: content for name, content in FILES.items() if name.endswith(".md")}


def read(content: bytes, most: int = 2**20, total: int = 2**25) -> dict[str, bytes]:
    return dict(members(io.BufferedReader(io.BytesIO(content)), lambda name: name.endswith(".md"), most, total))


def tarred(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A tar's header that says so, with its checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    block[257:263] = b"ustar\0"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * ord(" "))
    return bytes(block)


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    return header(b"x", len(content), kind) + content + bytes(-len(content) % 512)


def directory(entries: int) -> bytes:
    """A zip that is a directory alone."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0) + b"a.md"
    names = entry * entries
    return b"PK\3\4" + names + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(names), 4, 0)


@pytest.mark.parametrize(
    "content",
    [
        tarred(FILES), tarred(FILES, tarfile.GNU_FORMAT), tarred(FILES, mtime=1.5, uname="名"), zipped(FILES),
        gzip.compress(tarred(FILES)), bz2.compress(tarred(FILES)), lzma.compress(tarred(FILES)),
        zipped(FILES, zipfile.ZIP_STORED), gzip.compress(tarred(FILES)[:3000]) + gzip.compress(tarred(FILES)[3000:]),
    ],
)  # fmt: skip
def test_whole_archives_are_read(content: bytes) -> None:
    assert read(content) == WANTED
    assert read(content, most=2) == {name: content[:2] for name, content in WANTED.items()}


def test_an_old_tar_is_read() -> None:
    files = {"a.md": b"one", "b/c.md": bytes(700)}
    old = b"".join(
        _without_magic(header(name.encode(), len(content), b"\0")) + content + bytes(-len(content) % 512)
        for name, content in files.items()
    )
    assert read(old + bytes(1024)) == files


def _without_magic(block: bytes) -> bytes:
    old = bytearray(block)
    old[257:263] = bytes(6)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    return bytes(old)


def test_what_is_no_ordinary_file_is_passed_over() -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
        odd = tarred({"odd.md": b""}, type=kind, linkname="/etc/passwd")[:-1024].rstrip(b"\0")
        odd += bytes(-len(odd) % 512)
        assert read(odd + tarred({"a.md": b"one"})) == {"a.md": b"one"}


ENDED = bytes(1024)
BOMB = header(b"a.bin", 2**25) + bytes(2**25)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "cut short"),
    "noise": (lambda: bytes(range(256)) * 9, "number is expected"),
    "digits in an extended header": (lambda: extended(b"1" * 311_000) + ENDED, "cannot be read"),
    "digits before an equals sign": (lambda: extended(b"9" * 300_000 + b" a=b\n") + ENDED, "cannot be read"),
    "a record of no length": (lambda: extended(b"0 path=a\n" * 99) + ENDED, "cannot be read"),
    "a record longer than it is": (lambda: extended(b"99 path=a\n") + ENDED, "cannot be read"),
    "a record without end": (lambda: extended(b"9 path=ab") + ENDED, "cannot be read"),
    "records that overlap": (lambda: extended(b"3 " + b"a" * 200_000 + b"=\n") + ENDED, "cannot be read"),
    "many extended headers": (lambda: extended(b"11 path=ab\n" * 40_000) * 9 + ENDED, "extended headers of"),
    "extended headers for ever": (lambda: extended(b"") * 60_000 + ENDED, f"more than {MAX_MEMBERS:,} members"),
    "long names for ever": (lambda: extended(b"a" * 500, b"L") * 9_000 + ENDED, "extended headers of"),
    "a long name without end": (lambda: header(b"x", 2**30, b"L"), "extended headers of 1,073,741,824 bytes; at most"),
    "no members, many of them": (lambda: header(b"a.md", 0) * 40_000 + ENDED, f"more than {MAX_MEMBERS:,} members"),
    "a size that is negative": (lambda: _sized(b"-0000000001\0"), "number is expected"),
    "a size of another base": (lambda: _sized(b"\x80" + b"\xff" * 11), "number is expected"),
    "a size in letters": (lambda: _sized(b"many\x1b[31m   "), r"holds 'many\\x1b\[31m"),
    "a size in a record": (lambda: extended(b"14 size=" + b"9" * 5 + b"\n") + header(b"a.md", 0), "cut short"),
    "a negative size in a record": (lambda: extended(b"11 size=-5\n") + header(b"a.md", 0), "number is expected"),
    "a huge size in a record": (lambda: extended(b"30 size=" + b"9" * 21 + b"\n") + header(b"a", 0), "number is"),
    "a sparse file": (lambda: header(b"a.md", 512, b"S") + b"\xff" * 512, "sparse"),
    "another checksum": (lambda: header(b"a.md", 0).replace(b"a.md", b"b.md"), "another checksum"),
    "a cut member": (lambda: header(b"a.md", 900) + bytes(100), "cut short"),
    "a member of 8 GiB": (lambda: header(b"a.bin", 8**11 - 1) + bytes(9000), "cut short"),
    "gzip of too much": (lambda: gzip.compress(BOMB), "more than 33,554,432 bytes"),
    "bz2 of too much": (lambda: bz2.compress(BOMB, 1), "more than 33,554,432 bytes"),
    "xz of too much": (lambda: lzma.compress(BOMB, preset=0), "more than 33,554,432 bytes"),
    "gzip after the end": (lambda: gzip.compress(ENDED + BOMB), "more than 33,554,432 bytes"),
    "gzip with another checksum": (lambda: gzip.compress(tarred(FILES))[:-8] + bytes(8), "CRC"),
    "gzip cut": (lambda: gzip.compress(tarred(FILES))[:-9], "end"),
    "xz of nothing": (lambda: b"\xfd7zXZ\0" * 9, "error|Corrupt|Unsupported|format"),
    "a zip's directory alone": (lambda: directory(30_000), "20,000 members"),
    "a zip's directory, too large": (lambda: directory(90_000), "a directory of more than 2,097,152 bytes"),
    "a zip of members that are one": (lambda: _overlapping(), "more than 33,554,432 bytes|[Oo]verlap"),
    "a zip that is cut": (lambda: zipped(FILES)[:-5], "not a zip file"),
    "a zip of nothing": (lambda: b"PK", "not a zip file"),
    "a zip in bz2": (lambda: zipped(FILES, zipfile.ZIP_BZIP2), "compression of type 12 is not supported"),
    "a zip in lzma": (lambda: zipped(FILES, zipfile.ZIP_LZMA), "compression of type 14 is not supported"),
    "a zip of other names": (lambda: zipped({"a.md": b"x" * 99}).replace(b"a.md", b"\x1b.md", 1), "differ"),
}  # fmt: skip


def _sized(size: bytes) -> bytes:
    block = bytearray(header(b"a.md", 0))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _overlapping() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.md", bytes(2**20))
        archive.filelist *= 200
    return buffer.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_cost_little_and_are_one_error(name: str) -> None:
    make, said = HOSTILE[name]
    content = make()
    start = time.process_time()
    with pytest.raises(ArchiveError, match=said) as caught:
        read(content, most=2**20 + 1)
    assert time.process_time() - start < 1
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_disk_that_fails_is_an_error_of_the_archive(tmp_path: Any) -> None:
    with pytest.raises(ArchiveError, match="Is a directory"):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            list(members(io.BufferedReader(_Raw(descriptor)), lambda name: True, 9, 9))
        finally:
            os.close(descriptor)


class _Raw(io.RawIOBase):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = os.read(self._descriptor, len(buffer))
        buffer[: len(content)] = content
        return len(content)
