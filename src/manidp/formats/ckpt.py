"""MindSpore's ``.ckpt``, read and written without MindSpore.

The format (protobuf, proto2): a file is a run of values, each a name and a tensor::

    Checkpoint { repeated Value value = 1; }
    Value { required string tag = 1; TensorProto tensor = 2; }
    TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

Content is little-endian and in C order. A scalar has no dims (in older files one dim of 0). A long tensor is cut into
consecutive values of one tag. A file may end in a checksum of everything before it. A ``str`` has one dim of 0 and
UTF-32 content.

NumPy has no bfloat16 and no packed 4-bit integers. Such tensors come as arrays of the structured types ``BFLOAT16``
and ``INT4``, which carry the bits untouched; ``bfloat16_to_float32`` gives the numbers.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.errors import CkptError, quoted
from manidp.files import open_regular, replacing
from manidp.formats.signatures import HEAD, looks_like

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""The upper half of a float32, as bits."""
INT4 = np.dtype([("int4", "u1")])
"""Two 4-bit integers in a byte, as bits; dims count the bytes."""

TYPES: Mapping[str, np.dtype[Any]] = {
    "Int8": np.dtype("i1"), "Int16": np.dtype("<i2"), "Int32": np.dtype("<i4"), "Int64": np.dtype("<i8"),
    "UInt8": np.dtype("u1"), "UInt16": np.dtype("<u2"), "UInt32": np.dtype("<u4"), "UInt64": np.dtype("<u8"),
    "Float16": np.dtype("<f2"), "Float32": np.dtype("<f4"), "Float64": np.dtype("<f8"),
    "Bool": np.dtype("?"), "BFloat16": BFLOAT16, "Int4": INT4,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TYPES.items()}

SLICE_BYTES = 512 * 2**20
MAX_VALUES = 100_000
MAX_NAME_BYTES = 4096
MAX_DIMS = 32

_ENCRYPTED = {(0x7F3A5ED8 + n).to_bytes(4, "little") for n in range(3)}
_CRC_MARK = b"crc_num"
_CRC_TRAILER = len(_CRC_MARK) + 10  # the mark, then the crc32 of everything before it, big-endian in ten bytes
_VARINT, _BYTES = 0, 2  # the two wire types in use
_VALUE_FIELDS = {1: "the name", 2: "the tensor", 3: "the map tensor"}
_TENSOR_FIELDS = {1: "dims", 2: "the type", 3: "the content"}


def read_ckpt(source: str | Path | BufferedIOBase) -> dict[str, NDArray[Any]]:
    """Every value of a .ckpt under its name, in file order; texts are 0-d arrays of type ``<U``.

    ``source`` is a path or an open seekable binary file. No value is allocated before its length was checked against
    its shape and against the file. Raises CkptError with the reason for what is encrypted, truncated, lying, damaged
    (checksum) or no .ckpt at all, and for a file that cannot be opened.
    """
    if isinstance(source, (str, Path)):
        try:
            with open_regular(source) as file:
                return _read(file, str(source))
        except OSError as error:
            raise CkptError(f"cannot read '{source}': {error.strerror or error}") from error
    return _read(source, str(getattr(source, "name", "the file")))


def write_ckpt(
    values: Mapping[str, NDArray[Any]], path: str | Path, *, crc: bool = False, slice_bytes: int = SLICE_BYTES
) -> None:
    """Write values as MindSpore does, to the byte: whole or not at all. ``crc`` appends the checksum.

    The order of ``values`` is the order in the file. Raises CkptError for a name or type that the format cannot hold,
    and when the file cannot be written.
    """
    records = [(_name(name), *_encoded(name, np.asarray(value))) for name, value in values.items()]
    if not records:
        raise CkptError(f"nothing to write to '{path}': a .ckpt holds at least one value")
    checksum = 0
    try:
        with replacing(path) as file:
            for tag, head, content in records:
                for start in range(0, max(len(content), 1), slice_bytes):
                    piece = content[start : start + slice_bytes]
                    tensor = head + b"\x1a" + _varint(len(piece))
                    value = b"\x0a" + _varint(len(tag)) + tag + b"\x12" + _varint(len(tensor) + len(piece)) + tensor
                    for part in (b"\x0a" + _varint(len(value) + len(piece)) + value, piece):
                        checksum = zlib.crc32(part, checksum)
                        file.write(part)
            if crc:
                file.write(_CRC_MARK + checksum.to_bytes(10, "big"))
    except OSError as error:
        raise CkptError(f"cannot write '{path}': {error.strerror or error}") from error


def bfloat16_to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers in an array of type ``BFLOAT16``, exactly."""
    return (values["bfloat16"].astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Span:
    """Bytes ``start`` to ``end`` of a file, not yet read."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class _Piece:
    """One value of the file: a whole tensor, or one slice of it."""

    name: str
    kind: str
    dims: tuple[int, ...]
    content: _Span


class _Reader:
    """A file of known size, read by position; every failure names the file, the reason and the place."""

    def __init__(self, file: BufferedIOBase, name: str) -> None:
        self.file = file
        self.name = name
        self.size = file.seek(0, os.SEEK_END)

    def fail(self, reason: str, at: int) -> CkptError:
        return CkptError(f"'{self.name}' cannot be read as a MindSpore .ckpt: {reason} (byte {at} of {self.size})")

    def bytes(self, span: _Span) -> bytes:
        self.file.seek(span.start)
        data = self.file.read(span.length)
        if len(data) != span.length:
            raise self.fail("the file became shorter while it was read", span.start)
        return data

    def array(self, spans: Sequence[_Span], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The elements in all spans, one after the other."""
        data = np.empty(sum(span.length for span in spans) // dtype.itemsize, dtype)
        at = 0
        room = data.view(np.uint8).data
        for span in spans:
            self.file.seek(span.start)
            if self.file.readinto(room[at : at + span.length]) != span.length:
                raise self.fail("the file became shorter while it was read", span.start)
            at += span.length
        return data

    def varint(self, start: int, end: int) -> tuple[int, int]:
        """The number at ``start`` and the position after it."""
        number = 0
        for index, byte in enumerate(self.bytes(_Span(start, min(start + 10, end)))):
            number |= (byte & 0x7F) << 7 * index
            if byte < 0x80 and number < 2**64:
                return number, start + index + 1
        raise self.fail("a number has no end: cut short or damaged", start)

    def fields(self, message: _Span, known: Mapping[int, str]) -> Iterator[tuple[int, int | _Span]]:
        """Number and value of each field of a message; ``known`` names the fields that it may have."""
        at = message.start
        while at < message.end:
            key, after = self.varint(at, message.end)
            label = known.get(key >> 3)
            if label is None or key & 7 not in (_VARINT, _BYTES) or (key & 7 == _VARINT and label != "dims"):
                raise self.fail(f"{label or 'an unknown field'} (number {key >> 3}, wire type {key & 7})", at)
            number, after = self.varint(after, message.end)
            if key & 7 == _VARINT:
                yield key >> 3, number
            else:
                left = message.end - after
                if number > left:
                    raise self.fail(f"{label} claims {number} bytes where {left} are left: cut short or damaged", at)
                yield key >> 3, _Span(after, after + number)
                after += number
            at = after

    def text(self, span: _Span, label: str) -> str:
        if not 0 < span.length <= MAX_NAME_BYTES:
            raise self.fail(f"{label} of {span.length} bytes; 1 to {MAX_NAME_BYTES} are expected", span.start)
        with contextlib.suppress(UnicodeDecodeError):
            text = self.bytes(span).decode("utf-8")
            if text.isprintable():
                return text
        raise self.fail(f"{label} is not printable UTF-8", span.start)

    def numbers(self, packed: _Span) -> Iterator[int]:
        at = packed.start
        while at < packed.end:
            number, at = self.varint(at, packed.end)
            yield number

    def piece(self, value: _Span) -> _Piece:
        """One value of the file, its content not yet read."""
        parts: dict[str, _Span] = {}
        dims: list[int] = []
        for number, part in self.fields(value, _VALUE_FIELDS):
            self._put(parts, _VALUE_FIELDS[number], part)
        if "the map tensor" in parts:
            raise self.fail("it holds a map tensor, which only MindSpore can read", value.start)
        name = self.text(self._need(parts, "the name", value), "the name of a value")
        tensor = self._need(parts, "the tensor", value)
        for number, part in self.fields(tensor, _TENSOR_FIELDS):
            if number != 1:
                self._put(parts, _TENSOR_FIELDS[number], part)
            elif isinstance(part, int):
                dims.append(part)
            elif part.length:
                dims.extend(islice(self.numbers(part), MAX_DIMS + 1))
            else:
                raise self.fail(f"{quoted(name, 100)} has packed dims of 0 bytes", part.start)
            if len(dims) > MAX_DIMS:
                raise self.fail(f"{quoted(name, 100)} has more than {MAX_DIMS} dims", tensor.start)
        kind = self.text(self._need(parts, "the type", tensor), f"the type of {quoted(name, 100)}")
        return _Piece(name, kind, tuple(dims), self._need(parts, "the content", tensor))

    def _put(self, parts: dict[str, _Span], label: str, part: int | _Span) -> None:
        assert isinstance(part, _Span)
        if label in parts:
            raise self.fail(f"{label} is given twice", part.start)
        parts[label] = part

    def _need(self, parts: Mapping[str, _Span], label: str, message: _Span) -> _Span:
        if label not in parts:
            raise self.fail(f"{label} is missing", message.start)
        return parts[label]

    def body(self) -> _Span:
        """The values, without the checksum, which is verified if there is one; refuses what is no .ckpt at all."""
        start = self.bytes(_Span(0, min(self.size, HEAD)))
        if not start:
            raise self.fail("it is empty", 0)
        if start[:4] in _ENCRYPTED:
            raise self.fail("it is encrypted; decrypt it with MindSpore and save it without a key", 0)
        if start[:1] != b"\x0a":
            raise self.fail(f"it looks like {looks_like(start) or f'no .ckpt: it begins with {start[:16]!r}'}", 0)
        end = self.size - _CRC_TRAILER
        if end < 0 or not (trailer := self.bytes(_Span(end, self.size))).startswith(_CRC_MARK):
            return _Span(0, self.size)
        expected = int.from_bytes(trailer[len(_CRC_MARK) :], "big")
        checksum = 0
        for at in range(0, end, 2**20):
            checksum = zlib.crc32(self.bytes(_Span(at, min(at + 2**20, end))), checksum)
        if checksum != expected:
            raise self.fail(f"its checksum is {expected:08x}, but its bytes give {checksum:08x}: damaged", end)
        return _Span(0, end)

    def pieces(self) -> Iterator[_Piece]:
        for count, (_, value) in enumerate(self.fields(self.body(), {1: "a value"})):
            assert isinstance(value, _Span)
            if count == MAX_VALUES:
                raise self.fail(f"it holds more than {MAX_VALUES} values", value.start)
            yield self.piece(value)

    def value(self, pieces: Sequence[_Piece]) -> NDArray[Any]:
        """The array that consecutive pieces of one name make."""
        first = pieces[0]
        at = first.content.start
        length = sum(piece.content.length for piece in pieces)
        if any((piece.kind, piece.dims) != (first.kind, first.dims) for piece in pieces):
            raise self.fail(f"the slices of {quoted(first.name, 100)} differ in type or shape", at)
        if first.kind == "str":
            if len(pieces) > 1:
                raise self.fail(f"the text {quoted(first.name, 100)} is given twice", at)
            return self.string(first)
        dtype = TYPES.get(first.kind)
        if dtype is None:
            raise self.fail(
                f"{quoted(first.name, 60)} has the type {quoted(first.kind, 40)}; known are {', '.join(TYPES)} and str",
                at,
            )
        scalar = first.dims == (0,) and length == dtype.itemsize
        shape = () if scalar else first.dims
        if math.prod(dim or 1 for dim in shape) * dtype.itemsize >= 2**63:
            raise self.fail(f"{quoted(first.name, 100)} has the impossible shape {shape}", at)
        expected = math.prod(shape) * dtype.itemsize
        if length != expected:
            raise self.fail(
                f"{quoted(first.name, 100)} holds {length} bytes; {first.kind} {shape} takes {expected}", at
            )
        data = self.array([piece.content for piece in pieces], dtype)
        if first.kind == "Bool" and data.view(np.uint8).max(initial=0) > 1:
            raise self.fail(f"{quoted(first.name, 100)} holds Bool values other than 0 and 1", at)
        return data.reshape(shape)

    def string(self, piece: _Piece) -> NDArray[Any]:
        content = self.bytes(piece.content)
        try:
            characters = len(content.decode("utf-32-le"))
        except UnicodeDecodeError:
            characters = 0
        if piece.dims != (0,) or not characters:
            raise self.fail(
                f"{quoted(piece.name, 100)} is not a text of UTF-32 characters with dims [0]", piece.content.start
            )
        return np.frombuffer(content, np.dtype(f"<U{characters}")).reshape(())


def _read(file: BufferedIOBase, name: str) -> dict[str, NDArray[Any]]:
    reader = _Reader(file, name)
    values: dict[str, NDArray[Any]] = {}
    for key, group in groupby(reader.pieces(), lambda piece: piece.name):
        pieces = tuple(group)
        if key in values:
            raise reader.fail(f"{quoted(key, 100)} is given twice", pieces[0].content.start)
        values[key] = reader.value(pieces)
    return values


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _name(name: str) -> bytes:
    tag = name.encode("utf-8", "replace")
    if not 0 < len(tag) <= MAX_NAME_BYTES or not name.isprintable():  # lone surrogates are not printable either
        raise CkptError(f"a name in a .ckpt is 1 to {MAX_NAME_BYTES} bytes of printable text; got {quoted(name)}")
    return tag


def _encoded(name: str, value: NDArray[Any]) -> tuple[bytes, memoryview]:
    """A TensorProto up to its content, and the content."""
    if value.dtype.kind == "U" and value.ndim == 0:
        kind, dims = "str", (0,)
        value = value.astype(value.dtype.newbyteorder("<"))
    else:
        dtype = value.dtype.newbyteorder("<")
        if dtype not in _NAMES or value.ndim > MAX_DIMS:
            raise CkptError(f"{quoted(name, 100)} is of type {value.dtype} and shape {value.shape}; a .ckpt holds 0-d "
                            f"texts and {', '.join(TYPES)} of at most {MAX_DIMS} dims")  # fmt: skip
        kind, dims = _NAMES[dtype], value.shape
        value = value.astype(dtype, copy=False)
    head = b"".join(b"\x08" + _varint(dim) for dim in dims) + b"\x12" + _varint(len(kind)) + kind.encode()
    return head, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
