"""Where images to score come from: a folder of pictures, tar shards as WebDataset has them, Parquet with image bytes.

A source is cut into units of work, always the same ones in the same order. Files are read within limits, whatever they
hold; nothing is unpacked to the disk, and names in a shard are keys, never paths.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from manidp.data.folders import is_picture, pictures_below
from manidp.data.pictures import MAX_PICTURE_BYTES
from manidp.errors import ImageError, MissingExtraError, ScoreError, quoted, reason, shown, some
from manidp.fetch.archive import ArchiveError, members
from manidp.files import open_regular

ROWS = 1024  # images in one file of results
TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
_PACKED = 64  # a packed tar may have so many times its size, and 1 GiB
_BUFFER = 2**16  # bytes of a Parquet file that are read at a time, where a page is not larger

Item = tuple[str, bytes | Path | ImageError]
"""An image's key, and its bytes, its file, or why there is none."""


class Unit(Protocol):
    """A part of a source that one worker scores; ``number`` counts the units of a source from 0."""

    @property
    def number(self) -> int: ...

    @property
    def size(self) -> int:
        """How much of ``Source.size`` it is."""
        ...

    def items(self) -> Iterator[Item]:
        """Key and content of each image, in an order that never changes; what cannot be read is an item too."""
        ...


@dataclass(frozen=True)
class Source:
    """What there is to score.

    ``sha256``: of the names and sizes of all files, in lower-case hex; ``size``: pictures of a folder, bytes of shards.
    """

    path: str
    kind: Literal["folder", "tar", "parquet"]
    shards: tuple[str, ...]
    column: str | None
    sha256: str
    size: int

    def units(self) -> Iterator[Unit]:
        """All of it; a folder is walked anew, ``ROWS`` pictures at a time."""
        if self.kind == "folder":
            listed = _listed(self.path)
            for number, entries in enumerate(iter(lambda: tuple(islice(listed, ROWS)), ())):
                yield Listed(number, self.path, entries)
            return
        root = _root(self.path)
        for number, path in enumerate(self.shards):
            key, size = os.path.relpath(path, root), _size(path)
            if self.kind == "tar":
                yield Tar(number, size, path, key)
            else:
                yield Parquet(number, size, path, key, self.column)


def open_source(path: str, column: str | None = None) -> Source:
    """A folder of pictures; a .tar or .parquet file; a folder of such; or a pattern of such, as "shards/*.tar".

    column: of Parquet files, that of the image bytes; by default the only one that can hold them. Raises ScoreError for
    what is none of these, and for a folder without pictures.
    """
    kind, shards = _found(path)
    if kind == "parquet":
        _check_column(shards[0], column)
    elif column is not None:
        raise ScoreError(f"{shown(path)}: only Parquet has columns; got the column {quoted(column, 60)}")
    digest, count, total = hashlib.sha256(kind.encode()), 0, 0
    root = _root(path)
    for name, said in _listed(path) if kind == "folder" else ((os.path.relpath(path, root), None) for path in shards):
        size = _size(os.path.join(root, name))
        digest.update(f"{name!r} {said} {size}\n".encode())
        count += 1
        total += size
    if not count:
        raise ScoreError(f"{shown(path)}: {_NOTHING}")
    shards = tuple(map(os.path.abspath, shards))
    return Source(os.path.abspath(path), kind, shards, column, digest.hexdigest(), count if kind == "folder" else total)


def _size(path: str) -> int:
    """Bytes; 0 for what cannot be read, which is told where it is read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


_NOTHING = "no pictures and no .tar or .parquet files here; shards in folders below are given by a pattern, '*/*.tar'"


def _found(path: str) -> tuple[Literal["folder", "tar", "parquet"], tuple[str, ...]]:
    """The kind of a source, and its shards."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        shards = [os.path.join(path, name) for name in names if _shard(name)]
        if not shards:
            return "folder", ()
        if pictures := [name for name in names if is_picture(name)]:
            both = f"pictures ({some(pictures, 1)}) and shards ({some(map(os.path.basename, shards), 1)})"
            raise ScoreError(f"{shown(path)}: holds {both}; say which shards by a pattern, such as '*.tar'")
    elif os.path.lexists(path):
        shards = [path]
    else:
        shards = sorted(glob.glob(path, recursive=True))
        if not shards:
            braces = "; braces are not expanded here" if "{" in path else ""
            raise ScoreError(f"{shown(path)}: no such file or folder, and no file fits it as a pattern{braces}")
    kinds = {_shard(shard) for shard in shards}
    if len(kinds) > 1 or None in kinds:
        raise ScoreError(
            f"{shown(path)}: expected a folder of pictures, .tar files or .parquet files; got {some(shards)}"
        )
    return kinds.pop() or "tar", tuple(shards)


def _shard(name: str) -> Literal["tar", "parquet"] | None:
    name = name.lower()
    return "tar" if name.endswith(TAR) else "parquet" if name.endswith(PARQUET) else None


def _root(path: str) -> str:
    """The folder that the keys of shards begin below."""
    if os.path.isdir(path):
        return path
    while not os.path.lexists(path) and glob.has_magic(path):
        path = os.path.dirname(path)
    return path if os.path.isdir(path) else os.path.dirname(path) or os.curdir


def _listed(folder: str) -> Iterator[tuple[str, str | None]]:
    """The path from the folder of each picture in it and below, and of what cannot be read, with the reason."""
    for _, path, said in pictures_below([Path(folder)]):
        if path is not None:
            yield os.path.relpath(path, folder), said


@dataclass(frozen=True)
class Listed:
    """Some files of a folder: of each its path from there, and why it cannot be read, None for a picture."""

    number: int
    folder: str
    entries: tuple[tuple[str, str | None], ...]

    @property
    def size(self) -> int:
        return len(self.entries)

    def items(self) -> Iterator[Item]:
        for name, said in self.entries:
            yield name, Path(self.folder, name) if said is None else ImageError(said)


@dataclass(frozen=True)
class Tar:
    """A tar shard, plain or packed: its members that are ordinary files with a picture's name."""

    number: int
    size: int
    path: str
    key: str

    def items(self) -> Iterator[Item]:
        total = self.size if self.path.lower().endswith(".tar") else _PACKED * self.size + 2**30
        try:
            with open_regular(self.path) as file:
                for name, content in members(file, _wanted, MAX_PICTURE_BYTES + 1, total, limit=total):
                    yield f"{self.key}/{name}", content
        except (ArchiveError, OSError) as error:
            yield self.key, ImageError(f"from here on the shard cannot be read: {reason(error)}")


def _wanted(name: str) -> bool:
    return is_picture(name) and not os.path.basename(name).startswith(".")


@dataclass(frozen=True)
class Parquet:
    """A Parquet file: one column, of bytes or of a struct with the field ``bytes``, as Hugging Face's data sets have.

    Read row by row: a hostile file can make one row no larger than a page, which by the format has at most 2 GiB.
    """

    number: int
    size: int
    path: str
    key: str
    column: str | None

    def items(self) -> Iterator[Item]:
        pq = parquet()
        row = 0
        try:
            with open_regular(self.path) as raw, pq.ParquetFile(raw, pre_buffer=False, buffer_size=_BUFFER) as file:
                column = _column(file.schema_arrow, self.column)
                for batch in file.iter_batches(batch_size=1, columns=[column], use_threads=False):
                    for value in batch.column(0).to_pylist():
                        content = value.get("bytes") if isinstance(value, dict) else value
                        yield f"{self.key}/{row}", ImageError("no bytes: null") if content is None else content
                        row += 1
        except Exception as error:  # a broken file makes errors of many kinds
            yield self.key, ImageError(f"from row {row:,} on the shard cannot be read: {reason(error)}")


def _check_column(path: str, wanted: str | None) -> None:
    """Raises ScoreError where a Parquet file can be read, but the column to read cannot be told."""
    pq = parquet()
    try:
        with open_regular(path) as raw, pq.ParquetFile(raw) as file:
            _column(file.schema_arrow, wanted)
    except ImageError as error:
        raise ScoreError(f"{shown(path)}: {error}") from error
    except Exception:  # told in the results, as of any other shard
        return


def _column(schema: Any, wanted: str | None) -> str:
    """The column to read, as Parquet names it. Raises ImageError."""
    able = {name: leaf for name, kind in zip(schema.names, schema.types, strict=True) if (leaf := _leaf(name, kind))}
    if wanted is None and len(able) == 1:
        return next(iter(able.values()))
    if wanted not in able:
        raise ImageError(
            f"expected {'one column' if wanted is None else f'a column {quoted(wanted, 60)}'} of bytes; those that can "
            f"hold them: {some(able) or 'none'}" + ("; name one with --column" if wanted is None and able else "")
        )
    return able[wanted]


def _leaf(name: str, kind: Any) -> str | None:
    types = _types()
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return f"{name}.bytes" if place >= 0 and _leaf(name, kind.field(place).type) == name else None
    if types.is_dictionary(kind):
        kind = kind.value_type
    return name if types.is_binary(kind) or types.is_large_binary(kind) else None


def parquet() -> Any:
    """pyarrow.parquet. Raises MissingExtraError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("scores are written with pyarrow: pip install 'manidp[score]'") from error
    return pyarrow.parquet


def _types() -> Any:
    import pyarrow.types

    return pyarrow.types
