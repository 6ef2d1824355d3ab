"""Images: what a picture becomes, what is refused, and that one bad file does not stop the others."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manidp.data.folders import load_folder, load_pictures
from manidp.data.images import (
    CIFAR10_SHA1,
    ImageSet,
    draw_sample,
    holds_cifar10,
    load_cifar10,
    load_image_set,
    load_sample,
    save_image_set,
)
from manidp.data.pictures import MAX_PICTURE_BYTES, PICTURE_SUFFIXES, decode_picture, load_picture
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING, Preprocessing
from manidp.errors import ImageError

CIFAR10 = Path(__file__).parent.parent / "cifar10"


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, picture: Any, **options: Any) -> Path:
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG written from its definition; ``pixels`` are the rows, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


# Preprocessing and image sets ----------------------------------------------------------------------------------------


def test_preprocessing_is_the_formula_rounded_once() -> None:
    images = noise(3, 32, 32, 3)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = ((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    planes = CIFAR10_PREPROCESSING.apply(images)
    assert planes.dtype == np.float32
    np.testing.assert_array_equal(planes, expected)
    assert CIFAR10_PREPROCESSING.apply(images[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "images",
    [noise(32, 32, 3), noise(1, 32, 31, 3), noise(1, 3, 32, 32), noise(1, 32, 32, 4), np.zeros((1, 32, 32, 3))],
    ids=["no batch", "other size", "planes first", "four channels", "float"],
)
def test_preprocessing_refuses_other_arrays(images: Any) -> None:
    with pytest.raises(ImageError, match=r"expected images of uint8 \(N, 32, 32, 3\)"):
        CIFAR10_PREPROCESSING.apply(images)


@pytest.mark.parametrize(
    ("mean", "std", "size"),
    [
        ((0.5,), (0.2, 0.2, 0.2), (32, 32)),
        ((0.5, 0.5, 0.5), (0.2, 0.0, 0.2), (32, 32)),
        ((0.5, float("nan"), 0.5), (0.2, 0.2, 0.2), (32, 32)),
        ((0.5, 0.5, 0.5), (0.2, 0.2, float("inf")), (32, 32)),
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (0, 32)),
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (32, 32, 3)),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(mean: Any, std: Any, size: Any) -> None:
    with pytest.raises(ImageError, match="preprocessing needs"):
        Preprocessing(mean, std, size)


@pytest.mark.parametrize(
    ("images", "labels", "indices"),
    [
        (noise(2, 4, 4, 3).astype(np.float32), np.array([0, 1]), None),
        (noise(2, 4, 4), np.array([0, 1]), None),
        (noise(2, 4, 4, 3), np.array([0]), None),
        (noise(2, 4, 4, 3), np.array([0, 1], np.int32), None),
        (noise(2, 4, 4, 3), np.array([0, 2]), None),
        (noise(2, 4, 4, 3), np.array([-1, 0]), None),
        (noise(2, 4, 4, 3), np.array([0, 1]), np.array([5])),
    ],
)
def test_image_set_that_cannot_be_is_refused(images: Any, labels: Any, indices: Any) -> None:
    with pytest.raises(ImageError, match="expected"):
        ImageSet(images, labels, ("a", "b"), indices)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[ImageSet, ImageSet]:
    """The real CIFAR-10, (train, test)."""
    if not (CIFAR10 / "test_batch.bin").exists():
        pytest.skip("CIFAR-10 is not here: manidp data cifar10")
    return load_cifar10(CIFAR10)


def test_cifar10_is_the_published_one(real: tuple[ImageSet, ImageSet]) -> None:
    train, test = real
    assert train.images.shape == (50_000, 32, 32, 3)
    assert test.images.shape == (10_000, 32, 32, 3)
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(train.labels).tolist() == [5_000] * 10
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    assert train.classes == test.classes == CIFAR10_CLASSES
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(train.images[..., channel].ravel(), minlength=256) for channel in range(3)])
    mean = counts @ values / counts.sum(axis=1)
    std = np.sqrt(counts @ values**2 / counts.sum(axis=1) - mean**2)
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-9)


def test_cifar10_records_are_a_label_and_three_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = {name: noise(4, 3_073, seed=n) for n, name in enumerate(CIFAR10_SHA1)}
    for name, batch in batches.items():
        batch[:, 0] %= 10
        (tmp_path / name).write_bytes(batch.tobytes())
        monkeypatch.setitem(CIFAR10_SHA1, name, hashlib.sha1(batch.tobytes()).hexdigest())
    train, test = load_cifar10(tmp_path)
    record = batches["data_batch_3.bin"][1]  # image 9 of the training set
    assert train.labels[9] == record[0]
    assert train.images[9, 5, 7].tolist() == [record[1 + 5 * 32 + 7 + plane * 1_024] for plane in range(3)]
    assert len(train) == 20
    assert len(test) == 4


def test_cifar10_that_is_missing_or_altered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"data_batch_1.bin: No such file or directory; `manidp data cifar10`"):
        load_cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(10_000 * 3_073))
    with pytest.raises(ImageError, match=r"data_batch_1.bin: expected SHA-1 aadd24acce27"):
        load_cifar10(tmp_path)


def test_bundled_sample_is_balanced() -> None:
    sample = load_sample()
    assert sample.images.shape == (200, 32, 32, 3)
    assert sample.classes == CIFAR10_CLASSES
    assert np.bincount(sample.labels).tolist() == [20] * 10
    assert sample.indices is not None
    assert (np.diff(sample.indices) > 0).all()
    assert 0 <= sample.indices[0] < sample.indices[-1] < 10_000


def test_bundled_sample_is_drawn_from_the_test_set(real: tuple[ImageSet, ImageSet]) -> None:
    _, test = real
    sample = load_sample()
    drawn = test.take(draw_sample(test, per_class=20, seed=0))
    np.testing.assert_array_equal(sample.indices, drawn.indices)
    np.testing.assert_array_equal(sample.images, drawn.images)
    np.testing.assert_array_equal(sample.labels, drawn.labels)


def test_sample_larger_than_a_class_is_refused() -> None:
    images = ImageSet(noise(3, 2, 2, 3), np.array([0, 0, 1]), ("cat", "dog"))
    with pytest.raises(ImageError, match="cannot draw 2 images of class 'dog': there are 1"):
        draw_sample(images, per_class=2, seed=0)


# A single picture ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 9),
    suffix=st.sampled_from(["png", "webp", "bmp", "tiff", "TIF"]),
)
def test_picture_of_the_size_keeps_every_pixel(height: int, width: int, seed: int, suffix: str) -> None:
    pixels = noise(height, width, 3, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"x.{suffix}", pixels, lossless=True)
        loaded = load_picture(path, (height, width))
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, pixels)


def test_jpeg_of_the_size_is_what_it_decodes_to(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jpg", noise(32, 48, 3), quality=90)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(load_picture(path, (32, 48)), np.asarray(picture))


# EXIF 2.3, tag 0x0112: the visual sides on which the stored row 0 and the stored column 0 lie.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "tiff"])
def test_picture_is_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.kron(noise(2, 3, 3), np.ones((16, 16, 1), np.uint8))
    row, column = SIDES[orientation]
    stored = upright
    if "bottom" in (row, column):
        stored = stored[::-1]
    if "right" in (row, column):
        stored = stored[:, ::-1]
    if row in ("left", "right"):
        stored = stored.transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / f"x.{suffix}", stored, exif=exif, lossless=True, quality=100, subsampling=0)
    loaded = load_picture(path, (32, 48))
    np.testing.assert_allclose(loaded, upright, atol=4 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_garbage_for_exif_does_no_harm(tmp_path: Path, exif: bytes) -> None:
    pixels = noise(8, 8, 3)
    np.testing.assert_array_equal(load_picture(write(tmp_path / "x.png", pixels, exif=exif), (8, 8)), pixels)


def on_white(colour: Any, alpha: Any) -> Any:
    return colour * (alpha / 255) + 255 * (1 - alpha / 255)


def test_opaque_modes_become_rgb(tmp_path: Path) -> None:
    grey = noise(8, 8)
    three = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(load_picture(write(tmp_path / "l.png", grey), (8, 8)), three)
    bits = grey > 127
    np.testing.assert_array_equal(load_picture(write(tmp_path / "1.png", bits), (8, 8)), np.where(three > 127, 255, 0))
    palette = Image.fromarray(grey, "P")
    colours = noise(256, 3, seed=1)
    palette.putpalette(colours.tobytes())
    np.testing.assert_array_equal(load_picture(write(tmp_path / "p.png", palette), (8, 8)), colours[grey])


def test_sixteen_bit_pictures_keep_their_high_byte(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65_536, (8, 8, 3)).astype(">u2")
    for colour, pixels in ((0, deep[..., :1]), (2, deep)):
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        (tmp_path / "x.png").write_bytes(png(8, 8, 16, colour, rows))
        expected = np.broadcast_to(pixels >> 8, (8, 8, 3))
        np.testing.assert_array_equal(load_picture(tmp_path / "x.png", (8, 8)), expected)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    rgba, la = noise(8, 8, 4), noise(8, 8, 2)
    for suffix in ("png", "webp"):
        loaded = load_picture(write(tmp_path / f"rgba.{suffix}", rgba, lossless=True, exact=True), (8, 8))
        np.testing.assert_allclose(loaded, on_white(rgba[..., :3].astype(float), rgba[..., 3:]), atol=1)
    loaded = load_picture(write(tmp_path / "la.png", Image.fromarray(la, "LA")), (8, 8))
    np.testing.assert_allclose(loaded, np.repeat(on_white(la[..., :1].astype(float), la[..., 1:]), 3, -1), atol=1)


def test_one_transparent_colour_becomes_white(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour = np.stack([grey, grey, 255 - grey], axis=-1)
    palette = Image.fromarray(grey, "P")
    palette.putpalette(np.stack([np.arange(256)] * 3, axis=-1).astype(np.uint8).tobytes())
    for picture, key, expected in (
        (Image.fromarray(grey), 9, np.stack([grey] * 3, axis=-1)),
        (Image.fromarray(colour), (9, 9, 246), colour),
        (palette, 9, np.stack([grey] * 3, axis=-1)),
        (palette, b"\xff" * 9 + b"\0" + b"\xff" * 246, np.stack([grey] * 3, axis=-1)),
    ):
        loaded = load_picture(write(tmp_path / "x.png", picture, transparency=key), (8, 8))
        white = expected.copy()
        white[1, 1] = 255
        np.testing.assert_array_equal(loaded, white)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 128, 255, 0))
    loaded = load_picture(write(tmp_path / "x.jpg", ink, quality=100), (16, 16))
    np.testing.assert_allclose(loaded, np.broadcast_to([255, 127, 0], (16, 16, 3)), atol=3)


def test_several_pictures_in_a_file_give_the_first(tmp_path: Path) -> None:
    for name, kind in (
        ("x.png", "PNG"), ("x.webp", "WEBP"), ("phone.jpg", "MPO"), ("x.gif", "GIF"), ("x.tif", "TIFF")
    ):  # fmt: skip
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        exactly = {"lossless": True} if kind == "WEBP" else {}
        path = write(tmp_path / name, frames[0], format=kind, save_all=True, append_images=frames[1:], **exactly)
        np.testing.assert_allclose(load_picture(path, (8, 8)), np.asarray(frames[0]), atol=2)


side = st.integers(1, 200)


@settings(max_examples=30, deadline=None)
@given(
    width=side, height=side, size=st.tuples(st.integers(1, 64), st.integers(1, 64)), colour=st.integers(0, 2**24 - 1)
)
def test_one_colour_stays_that_colour_at_any_size(width: int, height: int, size: tuple[int, int], colour: int) -> None:
    rgb = (colour >> 16, colour >> 8 & 255, colour & 255)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.png", Image.new("RGB", (width, height), rgb))
        np.testing.assert_array_equal(load_picture(path, size), np.full((*size, 3), rgb))


@pytest.mark.parametrize("turn", [False, True])
def test_picture_is_cut_to_its_centre(tmp_path: Path, turn: bool) -> None:
    thirds = np.zeros((60, 180, 3), np.uint8)
    thirds[:, :60, 0] = thirds[:, 60:120, 1] = thirds[:, 120:, 2] = 255
    path = write(tmp_path / "x.png", thirds.transpose(1, 0, 2) if turn else thirds)
    np.testing.assert_array_equal(load_picture(path, (20, 20))[1:-1, 1:-1], np.full((18, 18, 3), [0, 255, 0]))
    whole = load_picture(path, (180, 60) if turn else (60, 180))
    np.testing.assert_array_equal(whole, thirds.transpose(1, 0, 2) if turn else thirds)


def test_picture_is_scaled_with_antialiasing(tmp_path: Path) -> None:
    checkers = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    loaded = load_picture(write(tmp_path / "x.png", checkers), (32, 32))
    np.testing.assert_allclose(loaded, 127.5, atol=2)


def test_extreme_shapes_are_read(tmp_path: Path) -> None:
    for shape in ((1, 20_000), (20_000, 1), (1, 1)):
        path = write(tmp_path / "x.png", np.full((*shape, 3), 77, np.uint8))
        np.testing.assert_array_equal(load_picture(path, (32, 32)), np.full((32, 32, 3), 77))


# What cannot be read -------------------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, kind)
    return buffer.getvalue()


def bmp_header(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def tiff(bits: int, photometric: int, *, width: int = 4, height: int = 4, tile: int = 0) -> bytes:
    """A grey TIFF written from its definition: 256 zeros, then the directory; ``tile`` is the side of its only tile."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1}
    tags |= {322: tile, 323: tile, 324: 8, 325: 256} if tile else {273: 8, 278: height, 279: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 264) + bytes(256) + struct.pack("<H", len(tags)) + entries + bytes(4)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"not a picture at all\n" * 100, "not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture"),
    "html": (
        b"<!doctype html><html><body>404</body></html>",
        "not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture",
    ),
    "icon": (encoded("ICO"), "not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture"),
    "portable pixmap": (encoded("PPM"), "not a readable JPEG, PNG, WebP, BMP, GIF or TIFF picture"),
    "gif cut": (encoded("GIF")[:1_500], "truncated"),
    "bmp cut": (encoded("BMP")[:1_500], "truncated"),
    "tiff cut": (encoded("TIFF")[:1_500], ""),
    "bmp bomb": (bmp_header(10_000, 10_000), "at most 67,108,864 pixels, got 10000 x 10000"),
    "gif bomb": (b"GIF89a" + struct.pack("<HH", 10_000, 10_000) + encoded("GIF")[10:], "got 10000 x 10000"),
    "tiff bomb": (tiff(8, 1, width=10_000, height=10_000), "at most 67,108,864 pixels, got 10000 x 10000"),
    "tiff of a huge tile": (tiff(8, 1, tile=60_000), "expected tiles of at most 67,108,864 pixels, got 60000 x 60000"),
    "tiff of 12 bits": (tiff(12, 1), "a TIFF of 12 bits a channel cannot be read"),
    "tiff of 16 bits, 0 for white": (tiff(16, 0), "a TIFF of 16 bits a channel, 0 for white cannot be read"),
    "tiff of 32 bits": (tiff(32, 1), "a TIFF of 32 bits a channel cannot be read"),
    "jpeg cut": (encoded("JPEG")[:1_500], "truncated"),
    "jpeg header alone": (encoded("JPEG")[:20], ""),
    "png cut": (encoded("PNG")[:1_500], "truncated"),
    "png header alone": (encoded("PNG")[:33], ""),
    "png of half a header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(8)), "broken picture: Truncated IHDR chunk"),
    "png without pixels": (png(8, 8, 8, 2, b""), ""),
    "png of no size": (png(0, 8, 8, 2, b""), ""),
    "webp cut": (encoded("WEBP")[:500], ""),
    "webp header alone": (encoded("WEBP")[:16], ""),
    "bomb, square of 8,300": (png(8_300, 8_300, 8, 2, b""), "expected at most 67,108,864 pixels, got 8300 x 8300"),
    "bomb, square of 10,000": (png(10_000, 10_000, 8, 2, b""), "at most 67,108,864 pixels, got 10000 x 10000"),
    "bomb, square of 50,000": (png(50_000, 50_000, 8, 2, b""), "expected at most 67,108,864 pixels, got far more"),
    "bomb, line": (png(2**31 - 1, 1, 8, 2, b""), "expected at most 67,108,864 pixels, got far more"),
}


def error_of(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load_picture(path, (32, 32))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    message = error_of(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_what_is_no_regular_file_is_an_error(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent.png") == f"{tmp_path / 'absent.png'}: No such file or directory"
    assert error_of(tmp_path) == f"{tmp_path}: a folder, not a picture"
    os.mkfifo(tmp_path / "pipe.png")
    assert error_of(tmp_path / "pipe.png") == f"{tmp_path / 'pipe.png'}: not a regular file"
    huge = tmp_path / "huge.jpg"
    huge.write_bytes(encoded("JPEG"))
    os.truncate(huge, MAX_PICTURE_BYTES + 1)
    assert "expected at most 268,435,456 bytes, got 268,435,457" in error_of(huge)


def test_error_stays_one_line_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines\x1b[31m.png"
    path.write_bytes(b"")
    message = error_of(path)
    assert "\x1b" not in message
    assert r"two\nlines\x1b[31m.png" in message


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]), data=st.data())
def test_damaged_file_is_a_picture_or_an_image_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            assert load_picture(path, (32, 32)).shape == (32, 32, 3)
        except ImageError as error:
            assert str(error).startswith(f"{path}: ")


# Many pictures -------------------------------------------------------------------------------------------------------


def test_bad_picture_does_not_stop_the_others(tmp_path: Path) -> None:
    first = write(tmp_path / "first.png", noise(8, 8, 3, seed=1))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    last = write(tmp_path / "last.png", noise(8, 8, 3, seed=2))
    seen: list[tuple[int, int | None]] = []
    pictures = load_pictures([first, bad, tmp_path / "absent.png", last], (8, 8), lambda *done: seen.append(done))
    assert pictures.paths == (first, last)
    np.testing.assert_array_equal(pictures.images, [noise(8, 8, 3, seed=1), noise(8, 8, 3, seed=2)])
    assert [str(error).split(": ")[0] for error in pictures.errors] == [str(bad), str(tmp_path / "absent.png")]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_folder_stands_for_its_pictures(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a.png", ".hidden.png", ".cache/x.png", "b/deep/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write(tmp_path / name, noise(4, 4, 3))
    (tmp_path / "none").mkdir()
    pictures = load_pictures([tmp_path, tmp_path / "none", tmp_path / "b" / "2.png"], (4, 4))
    names = [path.relative_to(tmp_path).as_posix() for path in pictures.paths]
    assert names == ["a.png", "b/10.png", "b/2.png", "b/deep/3.png", "b/2.png"]
    assert [str(error) for error in pictures.errors] == [
        f"{tmp_path / 'none'}: no pictures in this folder ({' '.join(PICTURE_SUFFIXES)})"
    ]


def test_no_pictures_are_no_images() -> None:
    pictures = load_pictures([], (5, 6))
    assert pictures.images.shape == (0, 5, 6, 3)


def test_only_pictures_by_suffix_are_taken_from_a_folder(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.tiff", "c.gif"):
        write(tmp_path / name, noise(4, 4, 3))
    for name in ("Thumbs.db", "labels.csv", ".DS_Store", "README", "png"):
        (tmp_path / name).write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.png"))
        pictures = load_pictures([tmp_path], (4, 4))
    assert [path.name for path in pictures.paths] == ["a.JPG", "b.tiff", "c.gif"]
    assert [str(error) for error in pictures.errors] == [
        f"{tmp_path / name}: not a regular file" for name in ("pipe.png", "socket.png")
    ]
    assert pictures.skipped == 4
    assert pictures.left_out[2:] == ("4 other files in the folders skipped: no pictures by their suffixes",)
    given_by_name = load_pictures([tmp_path / "labels.csv"], (4, 4))
    assert "labels.csv: not a readable JPEG" in str(given_by_name.errors[0])


def test_links_to_folders_are_followed_and_every_folder_is_read_once(tmp_path: Path) -> None:
    for name in ("real/1.png", "elsewhere/2.png", "elsewhere/deep/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write(tmp_path / name, noise(4, 4, 3))
    album = tmp_path / "album"
    album.mkdir()
    for name, target in (
        ("a", "../elsewhere"), ("again", "../elsewhere/deep"), ("b", "../real"), ("self", "."), ("nowhere", "absent"),
    ):  # fmt: skip
        (album / name).symlink_to(target)
    (tmp_path / "real" / "up").symlink_to(album)
    pictures = load_pictures([album], (4, 4))
    real = sorted(path.resolve().relative_to(tmp_path).as_posix() for path in pictures.paths)
    assert real == ["elsewhere/2.png", "elsewhere/deep/3.png", "real/1.png"]
    assert [str(error) for error in pictures.errors] == [f"{album / 'nowhere'}: a link that leads nowhere"]
    (tmp_path / "link").symlink_to(album)
    assert len(load_pictures([tmp_path / "link"], (4, 4)).paths) == 3
    # Where a folder lies goes before where a link leads to it.
    assert load_pictures([tmp_path], (4, 4)).paths == tuple(
        tmp_path / name for name in ("elsewhere/2.png", "elsewhere/deep/3.png", "real/1.png")
    )


def test_a_folder_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed/1.png", "open/2.png"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, noise(4, 4, 3))
    scandir = os.scandir

    def closed(path: Path) -> Any:  # not by its mode: root may read all
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    pictures = load_pictures([tmp_path], (4, 4))
    assert pictures.paths == (tmp_path / "open" / "2.png",)
    assert [str(error) for error in pictures.errors] == [f"{tmp_path / 'closed'}: Permission denied"]


def test_images_are_relabelled_by_the_names_of_their_classes() -> None:
    images = ImageSet(noise(4, 2, 2, 3), np.array([0, 2, 2, 3]), ("cat", "unused", "dog", "ship"))
    other = images.relabelled(("ship", "bird", "dog", "cat"), "it")
    assert other.labels.tolist() == [3, 2, 2, 0]
    assert other.classes == ("ship", "bird", "dog", "cat")
    np.testing.assert_array_equal(other.images, images.images)
    for classes, named in (
        (("ship", "dog", "bird"), "it knows 'ship', 'dog', 'bird'; got 'cat'"),
        (("ship", "dog", "cat", "cat"), "got 'cat'"),
        (("a", "b", "c"), "got 'cat', 'dog', 'ship'"),
    ):
        with pytest.raises(ImageError, match=named):
            images.relabelled(classes, "it")


def test_the_python_version_of_cifar10_names_the_command_that_converts_it(tmp_path: Path) -> None:
    for inner in (tmp_path / "plain", tmp_path / "unpacked" / "cifar-10-batches-py"):
        inner.mkdir(parents=True)
        assert not holds_cifar10(inner)
        (inner / "test_batch").write_bytes(b"\x80\x02}q\x01")
    for place in (tmp_path / "plain", tmp_path / "unpacked"):
        with pytest.raises(ImageError, match=r"manidp data cifar10 --source \S+ --to cifar10"):
            holds_cifar10(place)
    (tmp_path / "plain" / "test_batch.bin").touch()
    assert holds_cifar10(tmp_path / "plain")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: 'cat' with pictures 1 and 2, 'dog' with picture 3 and a bad one."""
    root = tmp_path / "pets"
    for n, name in enumerate(("cat/1.png", "cat/2.webp", "dog/3.png"), 1):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        write(root / name, noise(8, 8, 3, seed=n), lossless=True)
    (root / "dog" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (root / "README.txt").write_text("not a class")
    return root


def test_class_folders_become_labels(folder: Path) -> None:
    pets, pictures = load_folder(folder, (8, 8))
    assert pets.classes == ("cat", "dog")
    assert pets.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pets.images, [noise(8, 8, 3, seed=n) for n in (1, 2, 3)])
    assert len(pictures.errors) == 1
    assert str(pictures.errors[0]).startswith(f"{folder / 'dog' / 'bad.jpg'}: ")


def test_labels_follow_given_classes(folder: Path) -> None:
    pets, _ = load_folder(folder, (8, 8), classes=("dog", "bird", "cat"))
    assert pets.classes == ("dog", "bird", "cat")
    assert pets.labels.tolist() == [2, 2, 0]
    with pytest.raises(ImageError, match=r"subfolders named after classes of \['cat', 'bird'\], got \['cat', 'dog'\]"):
        load_folder(folder, (8, 8), classes=("cat", "bird"))


def test_links_between_classes_give_no_picture_two_labels(folder: Path) -> None:
    (folder / "cat" / "all").symlink_to("..")
    (folder / "cat" / "more").symlink_to("../dog")
    (folder / "elsewhere").mkdir()
    write(folder / "elsewhere" / "4.png", noise(8, 8, 3))
    (folder / "elsewhere").rename(folder.parent / "elsewhere")
    (folder / "eel").symlink_to("../elsewhere")
    pets, _ = load_folder(folder, (8, 8))
    assert pets.classes == ("cat", "dog", "eel")
    assert pets.labels.tolist() == [0, 0, 1, 2]
    (folder / "kitty").symlink_to("cat")
    with pytest.raises(ImageError, match=r"of class 'kitty', got none to read; .*kitty: the same folder as another"):
        load_folder(folder, (8, 8))


def test_a_class_whose_name_no_checkpoint_can_hold_is_refused_at_once(folder: Path) -> None:
    (folder / "dog").rename(folder / os.fsdecode(b"h\xfcnd"))
    with pytest.raises(ImageError, match=r"h\\udcfcnd': the name of a class must be UTF-8"):
        load_folder(folder, (8, 8))


def remove_dog(root: Path) -> None:
    for path in (root / "dog").iterdir():
        path.unlink()
    (root / "dog").rmdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove_dog, r"two classes or more, got \['cat'\]"),
        (lambda root: (root / "dog" / "3.png").unlink(), r"pictures of class 'dog', got none to read; .*bad\.jpg: "),
        (lambda root: (root / "empty").mkdir(), "empty: expected pictures of class 'empty', got none to read$"),
        (lambda root: root.rename(root.with_name("elsewhere")), "pets: No such file or directory"),
    ],
    ids=["one class", "only bad pictures", "empty class", "missing"],
)
def test_folder_without_classes_to_learn_is_refused(folder: Path, spoil: Callable[[Path], None], reason: str) -> None:
    spoil(folder)
    with pytest.raises(ImageError, match=reason):
        load_folder(folder, (8, 8))


# Image-set files -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 5), height=st.integers(1, 9), width=st.integers(1, 9), taken=st.booleans())
def test_image_set_comes_back_as_it_was(count: int, height: int, width: int, taken: bool) -> None:
    labels = np.arange(count) % 3
    images = ImageSet(noise(count, height, width, 3), labels, ("a", "ü", "c"))
    if taken:
        images = images.take(np.arange(count)[::-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_image_set(images, path)
        first = path.read_bytes()
        save_image_set(images, path)
        assert path.read_bytes() == first
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]
        back = load_image_set(path)
    np.testing.assert_array_equal(back.images, images.images)
    np.testing.assert_array_equal(back.labels, images.labels)
    assert back.classes == images.classes
    assert (back.indices is None) == (images.indices is None)
    if images.indices is not None:
        np.testing.assert_array_equal(back.indices, images.indices)


def image_set_file(
    images: Any = None, labels: Any = None, description: Any = None, extra: dict[str, Any] | None = None
) -> bytes:
    tensors = {
        "images": noise(2, 4, 4, 3) if images is None else images,
        "labels": np.array([0, 1]) if labels is None else labels,
    }
    said = {"format": "image set", "version": 1, "classes": ["a", "b"]} | (description or {})
    return safetensors.numpy.save(tensors | (extra or {}), {"manidp": json.dumps(said)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable image set"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a readable image set"),
        (image_set_file()[:-1], "not a readable image set"),
        (struct.pack("<Q", 2**60) + b"{}", "not a readable image set"),
        (safetensors.numpy.save({"images": noise(2, 4, 4, 3)}), "not an image set"),
        (safetensors.numpy.save({"images": noise(2, 4, 4, 3)}, {"manidp": "[" * 100_000}), "not a readable image set"),
        (image_set_file(description={"version": 2}), "expected an image set of version 1, got 2"),
        (image_set_file(description={"format": "checkpoint"}), "not an image set"),
        (image_set_file(description={"classes": [1, 2]}), "expected a list of class names"),
        (image_set_file(description={"classes": ["a"]}), "expected labels from 0 to 0"),
        (image_set_file(labels=np.array([0, 1, 1])), "one for each image"),
        (image_set_file(labels=np.array([0.0, 1.0])), "expected the tensors"),
        (image_set_file(images=noise(2, 4, 4)), "expected images of uint8"),
        (image_set_file(extra={"other": noise(2)}), "expected the tensors"),
        (image_set_file(extra={"indices": np.array([1])}), "expected indices of int64"),
    ],
)
def test_file_that_is_no_image_set_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image_set(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_image_set_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet(noise(2, 4, 4, 3), np.array([0, 1]), ("a", "b"))
    with pytest.raises(ImageError, match=r"x\.safetensors: No such file or directory"):
        load_image_set(tmp_path / "x.safetensors")
    with pytest.raises(ImageError, match=r"absent/x: cannot be written: No such file or directory"):
        save_image_set(images, tmp_path / "absent" / "x")
    (tmp_path / "x").write_bytes(b"what was there")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match="x: cannot be written: No space left on device"):
        save_image_set(images, tmp_path / "x")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("x", b"what was there")]


def test_a_picture_in_memory_is_read_like_a_file_within_its_own_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.png", np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    content = path.read_bytes()
    np.testing.assert_array_equal(decode_picture(content, (8, 8), 600), load_picture(path, (8, 8)))
    with pytest.raises(ImageError, match=r"^expected at most 599 pixels, got 30 x 20$"):
        decode_picture(content, (8, 8), 599)
    with pytest.raises(ImageError, match=r"^not a readable JPEG"):
        decode_picture(b"GIF", (8, 8))


def test_a_jpeg_of_many_scans_is_refused_before_it_takes_minutes() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, "jpeg", progressive=True)
    content = file.getvalue()
    wanted = decode_picture(content, (8, 8), 64 * 64)
    behind = content + 1000 * b"\xff\xda\0\2"  # such as the film of a phone's picture
    np.testing.assert_array_equal(decode_picture(behind, (8, 8), 64 * 64), wanted)
    last = content[content.rindex(b"\xff\xda") : -2]
    for bomb in (content[:-2] + 10 * last + content[-2:], content[:2] + 30_000 * b"\xff\xfe\0\2" + content[2:]):
        with pytest.raises(ImageError, match=r"^expected a JPEG of at most 16 scans of 4,096 pixels, got more$"):
            decode_picture(bomb, (8, 8), 64 * 64)
    assert decode_picture(content[:-2] + 10 * last + content[-2:], (8, 8), 128 * 64).shape == (8, 8, 3)
