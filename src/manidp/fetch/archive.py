"""Files in a .zip or .tar file (.gz, .bz2 and .xz too) from outside, within limits; nothing is unpacked to the disk.

A tar is read by the few lines here and not by the standard library's tarfile, whose time for an extended header grows
with the square of its size, which follows such headers by recursion and which builds sparse files of any size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from manidp.errors import quoted

MAX_MEMBERS = 20_000
MAX_HEADER_BYTES = 2**20
"""Of the extended headers before a tar's member, which hold long names, times, owners."""
MAX_DIRECTORY_BYTES = 2 * 2**20
"""Of a zip's directory, which names all its members."""
_BLOCK = 512
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes


class ArchiveError(ValueError):
    """An archive that is broken or exceeds a limit; the message says how, the caller says which archive."""


def members(
    file: io.BufferedReader, wanted: Callable[[str], bool], most: int, total: int, limit: int = MAX_MEMBERS
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted ordinary files, in the archive's order.

    ``most``: bytes read of each, the rest is left out; ``total``: bytes that the archive may have, packed or not;
    ``limit``: members it may have. Time and memory are bounded by that, whatever it holds. Raises ArchiveError.
    """
    try:
        start = file.peek(6)[:6]
        if start.startswith(b"PK"):
            yield from _zipped(file, wanted, most, total, limit)
        else:
            yield from _tarred(_Counted(_unpacked(file, start), total), wanted, most, limit)
    except ArchiveError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, LookupError, struct.error, zlib.error,
            lzma.LZMAError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = error.strerror if isinstance(error, OSError) else None
        raise ArchiveError(reason or quoted(str(error) or type(error).__name__)) from error


class _Counted:
    """Reads from a stream that may unpack to anything, and no more than ``left`` bytes."""

    def __init__(self, stream: io.BufferedIOBase, left: int) -> None:
        self._stream, self._total, self._left = stream, left, left

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ArchiveError(f"it unpacks to more than {self._total:,} bytes")
        return content

    def exactly(self, size: int) -> bytes:
        content = self.read(size)
        if len(content) < size:
            raise ArchiveError("it is cut short")
        return content

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.exactly(min(size, 2**18)))


def _unpacked(file: io.BufferedReader, start: bytes) -> io.BufferedIOBase:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if start == b"\xfd7zXZ\0" else file


def _tarred(stream: _Counted, wanted: Callable[[str], bool], most: int, limit: int) -> Iterator[tuple[str, bytes]]:
    said: dict[bytes, bytes] = {}  # what an extended header says of the next member
    headers = 0
    for _ in range(limit):
        head = stream.exactly(_BLOCK)
        if not head.strip(b"\0"):
            while stream.read(2**18):  # to the end, where the checksum is
                pass
            return
        if _number(head[148:156]) != sum(head[:148]) + 8 * ord(" ") + sum(head[156:]):
            raise ArchiveError("a header has another checksum")
        kind, size = head[156:157], _number(head[124:136])
        if kind in b"xgLK":
            headers += size
            if headers > MAX_HEADER_BYTES:
                raise ArchiveError(f"extended headers of {headers:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            content = stream.exactly(size)
            stream.skip(-size % _BLOCK)
            said |= _extended(content) if kind == b"x" else {b"path": content.rstrip(b"\0")} if kind == b"L" else {}
            continue
        if kind == b"S":
            raise ArchiveError("it holds a sparse file")
        if b"size" in said:
            size = _number(said[b"size"], base=10)
        if kind in _WITHOUT_CONTENT:
            size = 0
        prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
        path = said.get(b"path") or (prefix + b"/" if prefix else b"") + head[:100].partition(b"\0")[0]
        said, headers = {}, 0
        name = path.decode("utf-8", "surrogateescape")
        read = min(size, most) if kind in b"0\0007" and wanted(name) else 0
        content = stream.exactly(read)
        stream.skip(size + -size % _BLOCK - read)
        if kind in b"0\0007" and wanted(name):
            yield name, content
    raise ArchiveError(f"it holds more than {limit:,} members")


def _number(field: bytes, base: int = 8) -> int:
    digits = field.strip(b" \0")
    if len(digits) > 20 or not re.fullmatch(rb"[0-7]*" if base == 8 else rb"[0-9]+", digits):
        raise ArchiveError(f"a header holds {quoted(field[:20].decode('latin-1'))} where a number is expected")
    return int(digits or b"0", base)


def _extended(content: bytes) -> dict[bytes, bytes]:
    """Path and size, where an extended header holds them: records of ``LENGTH KEY=VALUE\\n``, each of LENGTH bytes."""
    said = {}
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 8)
        length = _number(content[at:space], base=10) if space > at else 0
        key, equals, value = content[space + 1 : at + length].partition(b"=")
        if not (0 < length <= len(content) - at and equals and value.endswith(b"\n")):
            raise ArchiveError("an extended header that cannot be read")
        if key in (b"path", b"size"):
            said[key] = value[:-1]
        at += length
    return said


class _Sips:
    """A file that gives at most so many bytes in one piece: zipfile reads a whole directory before it looks at it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size if 0 <= size <= MAX_DIRECTORY_BYTES else MAX_DIRECTORY_BYTES + 1)
        if len(content) > MAX_DIRECTORY_BYTES:
            raise ArchiveError(f"a directory of more than {MAX_DIRECTORY_BYTES:,} bytes")
        return content


def _zipped(
    file: io.BufferedReader, wanted: Callable[[str], bool], most: int, total: int, limit: int
) -> Iterator[tuple[str, bytes]]:
    sips: Any = _Sips(file)
    left = total
    with zipfile.ZipFile(sips) as archive:
        if len(archive.infolist()) > limit:
            raise ArchiveError(f"it holds more than {limit:,} members")
        for member in archive.infolist():
            if member.is_dir() or not wanted(member.filename):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ArchiveError(f"compression of type {member.compress_type} is not supported")
            with archive.open(member) as packed:
                content = packed.read(most)
            left -= len(content)
            if left < 0:
                raise ArchiveError(f"it unpacks to more than {total:,} bytes")
            yield member.filename, content
