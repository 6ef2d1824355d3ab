"""MindSpore's .ckpt against files that MindSpore wrote, and against files that nobody should write."""

import json
import tempfile
import tracemalloc
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from manidp.errors import CkptError
from manidp.formats.ckpt import BFLOAT16, INT4, TYPES, bfloat16_to_float32, read_ckpt, write_ckpt

DATA = Path(__file__).parent / "data" / "ckpt"  # written by MindSpore 2.10.0; expected.json tells what each holds
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mindspore"


def assert_same(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """Same names in the same order, types, shapes and bits."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


def varint(number: int) -> bytes:
    number %= 2**64
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, content: bytes, length: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(content) if length is None else length) + content


def tensor(dims: tuple[int, ...] = (2,), kind: bytes = b"Float32", content: bytes = bytes(8)) -> bytes:
    return b"".join(b"\x08" + varint(dim) for dim in dims) + field(2, kind) + field(3, content)


def value(name: bytes = b"x", body: bytes | None = None) -> bytes:
    return field(1, field(1, name) + field(2, tensor() if body is None else body))


@pytest.mark.parametrize("stem", ["dtypes", "append"])
def test_values_are_those_that_mindspore_saved(stem: str) -> None:
    expected = json.loads((DATA / "expected.json").read_text())[stem]
    values = read_ckpt(DATA / f"{stem}.ckpt")
    assert list(values) == list(expected)
    for name, entry in expected.items():
        if isinstance(entry, str):
            assert values[name].item() == entry
            continue
        got = values[name]
        assert got.dtype == TYPES[entry["dtype"]] and list(got.shape) == entry["shape"]
        numbers = bfloat16_to_float32(got) if got.dtype == BFLOAT16 else got
        np.testing.assert_array_equal(numbers, np.array(entry["values"], numbers.dtype))


@pytest.mark.parametrize(("stem", "arrays"), [("chunked", "chunked"), ("crc", "small")])
def test_slices_are_joined_and_checksums_verified(stem: str, arrays: str) -> None:
    with np.load(DATA / f"{arrays}.npz") as expected:
        assert_same(read_ckpt(DATA / f"{stem}.ckpt"), dict(expected))


@pytest.mark.parametrize(
    ("stem", "options"), [("dtypes", {}), ("append", {}), ("crc", {"crc": True}), ("chunked", {"slice_bytes": 1024})]
)
def test_writing_what_was_read_gives_mindspores_bytes(stem: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_ckpt(read_ckpt(DATA / f"{stem}.ckpt"), tmp_path / "x.ckpt", **options)
    assert (tmp_path / "x.ckpt").read_bytes() == (DATA / f"{stem}.ckpt").read_bytes()


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden MindSpore network is not beside the project")
def test_a_whole_network_of_mindspores_comes_back_to_the_byte(tmp_path: Path) -> None:
    values = read_ckpt(GOLDEN / "resnet20.ckpt")
    meta = json.loads((GOLDEN / "meta.json").read_text())
    assert [[name, list(v.shape), "Float32"] for name, v in values.items()] == [p[:3] for p in meta["params"]]
    write_ckpt(values, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == (GOLDEN / "resnet20.ckpt").read_bytes()


@pytest.mark.parametrize(
    ("stem", "reason"),
    [
        ("crc_bad", "checksum"),
        ("enc_AES-CBC", "encrypted"),
        ("enc_AES-GCM", "encrypted"),
        ("enc_SM4-CBC", "encrypted"),
        ("truncated", "claims 75 bytes where 58 are left"),
        ("html", "looks like a web page"),
        ("absent", "No such file"),
    ],
)
def test_a_refused_file_is_named_with_the_reason(stem: str, reason: str) -> None:
    with pytest.raises(CkptError, match=reason) as caught:
        read_ckpt(DATA / f"{stem}.ckpt")
    assert f"{stem}.ckpt" in str(caught.value)


LYING = {
    "nothing": (b"", "empty"),
    "content longer than the shape": (value(body=tensor((2,), content=bytes(12))), "holds 12 bytes; .* takes 8"),
    "content shorter than the shape": (value(body=tensor((2,), content=bytes(4))), "holds 4 bytes; .* takes 8"),
    "a shape of 4 exabytes": (value(body=tensor((2**30, 2**30))), "holds 8 bytes; .* takes"),
    "a shape beyond 64 bits": (value(body=tensor((2**40, 2**40))), "impossible shape"),
    "a huge shape made empty by a 0": (value(body=tensor((0, 2**62, 2**62), content=b"")), "impossible shape"),
    "a negative dim": (value(body=tensor((-2, -1))), "impossible shape"),
    "too many dims": (value(body=tensor((1,) * 33, content=bytes(4))), "more than 32 dims"),
    "too many packed dims": (value(body=field(1, b"\1" * 33) + tensor((), content=bytes(4))), "more than 32 dims"),
    "a quarter of a million packed dims": (value(body=field(1, b"\1" * 2**18) + tensor(())), "more than 32 dims"),
    "packed dims of nothing": (value(body=field(1, b"") * 9 + tensor((), content=bytes(4))), "packed dims of 0 bytes"),
    "an unknown type": (value(body=tensor(kind=b"Float8")), "Float8"),
    "a Bool of 2": (value(body=tensor((1,), b"Bool", b"\2")), "Bool values"),
    "a length beyond the file": (field(1, field(1, b"x"), 2**62), "claims 4611686018427387904 bytes"),
    "a length beyond its message": (field(1, field(1, b"x", 60)) + bytes(60), "claims 60 bytes where 1 are left"),
    "an endless number": (b"\x0a" + b"\xff" * 11, "no end"),
    "a number above 64 bits": (b"\x0a" + b"\xff" * 9 + b"\x7f", "no end"),
    "no name": (field(1, field(2, tensor())), "the name is missing"),
    "an empty name": (value(b""), "the name of a value of 0 bytes"),
    "a name of 5 kB": (value(b"x" * 5000), "5000 bytes"),
    "a name that is not UTF-8": (value(b"\xff"), "not printable UTF-8"),
    "a name that moves the cursor": (value(b"\x1b[2J"), "not printable UTF-8"),
    "no tensor": (field(1, field(1, b"x")), "the tensor is missing"),
    "no type": (value(body=field(3, b"")), "the type of 'x' is missing|the type is missing"),
    "no content": (value(body=field(2, b"Float32")), "the content is missing"),
    "two contents": (value(body=tensor() + field(3, bytes(8))), "the content is given twice"),
    "a map tensor": (field(1, field(1, b"x") + field(3, b"")), "map tensor"),
    "an unknown field": (field(1, field(9, b"x")), "unknown field"),
    "a number for a name": (field(1, b"\x08\x01"), "the name .*wire type 0"),
    "one name for two values": (value(b"x") + value(b"y") + value(b"x"), "'x' is given twice"),
    "one slice too many": (value(b"x") + value(b"x"), "holds 16 bytes; .* takes 8"),
    "slices that differ": (value(b"x") + value(b"x", tensor((3,))), "slices of 'x' differ"),
    "a text twice": (value(b"t", tensor((0,), b"str", b"a\0\0\0")) * 2, "text 't' is given twice"),
    "a text that is no UTF-32": (value(b"t", tensor((0,), b"str", b"\xff\xff\xff\xff")), "not a text"),
    "half a character": (value(b"t", tensor((0,), b"str", b"a\0")), "not a text"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_file_is_refused_before_anything_large_is_allocated(case: str) -> None:
    content, reason = LYING[case]
    tracemalloc.start()
    try:
        with pytest.raises(CkptError, match=reason):
            read_ckpt(BytesIO(content))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_number_of_values_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manidp.formats.ckpt.MAX_VALUES", 2)
    assert len(read_ckpt(BytesIO(value(b"a") + value(b"b")))) == 2
    with pytest.raises(CkptError, match="more than 2 values"):
        read_ckpt(BytesIO(value(b"a") + value(b"b") + value(b"c")))


@pytest.mark.parametrize(("lost", "name_last"), [(1, False), (8, False), (1, True), (30, True)])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(lost: int, name_last: bool) -> None:
    class Shrinking(BytesIO):
        def __init__(self, content: bytes, seeks: int) -> None:
            super().__init__(content)
            self.seeks = seeks

        def seek(self, offset: int, whence: int = 0) -> int:
            self.seeks -= 1
            if self.seeks == 0:
                self.truncate(len(content) - lost)
            return super().seek(offset, whence)

    content = value(body=tensor((5,), content=bytes(20))) + value(b"y", tensor(content=b"12345678"))
    if name_last:
        content += field(1, field(2, tensor()) + field(1, b"z"))
    whole = read_ckpt(BytesIO(content))
    refused = 0
    for seeks in range(1, 60):
        try:
            assert_same(read_ckpt(Shrinking(content, seeks)), whole)
        except CkptError:
            refused += 1
    assert 10 < refused < 59


def test_older_files_with_packed_dims_and_scalars_of_dims_0_are_read() -> None:
    packed = field(1, b"\2\3") + tensor((), b"Int8", b"abcdef")
    got = read_ckpt(BytesIO(value(b"packed", packed) + value(b"scalar", tensor((0,), b"Float32", b"\0\0\x20\x40"))))
    assert_same(got, {"packed": np.frombuffer(b"abcdef", "i1").reshape(2, 3), "scalar": np.array(2.5, "<f4")})


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    good = np.zeros(2, np.float32)
    for bad in ({}, {"": good}, {"a\nb": good}, {"x": good.astype(complex)}, {"x": np.array(["a"])}):
        with pytest.raises(CkptError):
            write_ckpt(bad, tmp_path / "x.ckpt")
    with pytest.raises(CkptError, match="absent"):
        write_ckpt({"x": good}, tmp_path / "absent" / "x.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    write_ckpt({"x": np.zeros(2, np.float32)}, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CkptError, match="No space left"):
        write_ckpt({"y": np.ones(2, np.float32)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
ARRAYS = st.sampled_from([t for t in TYPES.values() if t not in (BFLOAT16, INT4)]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=4), st.booleans(), st.sampled_from([8, 24, 2**29]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(values: dict[str, Any], crc: bool, slice_bytes: int) -> None:
    written = _written(values, crc=crc, slice_bytes=slice_bytes)
    assert_same(read_ckpt(BytesIO(written)), values)
    swapped = {name: v.astype(v.dtype.newbyteorder(">")) for name, v in values.items()}
    assert _written(swapped, crc=crc, slice_bytes=slice_bytes) == written


def _written(values: Mapping[str, NDArray[Any]], **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_ckpt(values, Path(folder) / "x.ckpt", **options)
        return (Path(folder) / "x.ckpt").read_bytes()


SOURCES = [path.read_bytes() for path in sorted(DATA.glob("*.ckpt"))]
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from("scid"), st.binary(max_size=12)), max_size=4)


@given(st.sampled_from(SOURCES), EDITS)
@settings(max_examples=400, deadline=None)
def test_damage_is_refused_or_harmless(content: bytes, edits: list[tuple[int, str, bytes]]) -> None:
    """Whatever was cut, overwritten or inserted: a CkptError, or values no larger than the file that can be saved."""
    for where, what, new in edits:
        at = where % (len(content) + 1)
        rest = {"s": content[at + len(new) :], "c": b"", "i": content[at:], "d": content[at + len(new) + 1 :]}[what]
        content = content[:at] + (b"" if what == "d" else new) + rest
    try:
        values = read_ckpt(BytesIO(content))
    except CkptError:
        return
    assert sum(v.nbytes for v in values.values()) <= len(content)
    assert_same(read_ckpt(BytesIO(_written(values))), values)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_after_a_valid_start_is_refused_or_read(noise: bytes) -> None:
    try:
        values = read_ckpt(BytesIO(value() + noise))
    except CkptError:
        return
    assert next(iter(values)) == "x"
