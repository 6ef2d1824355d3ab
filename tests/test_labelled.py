"""Data sets of pictures in files: layouts, sizes, random crops, and that reading ahead changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manidp.data import labelled
from manidp.data.folders import load_folder
from manidp.data.images import ImageSet
from manidp.data.labelled import (
    PictureFiles,
    classes_of,
    crop,
    drawn_from,
    load_labelled,
    parts,
    random_places,
    size_of,
)
from manidp.data.pictures import load_picture, read_picture
from manidp.errors import ImageError


def write(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write(tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number}.png", 80 + number, 90, number)
    return tmp_path / "data"


def test_a_layout_is_that_of_train_and_val_only_where_nothing_else_lies(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "test/cat"):
        (tmp_path / "both" / name).mkdir(parents=True)
    for name in ("train", "bus", "val"):  # classes
        (tmp_path / "classes" / name).mkdir(parents=True)
    assert parts(tmp_path / "both") == (tmp_path / "both/train", tmp_path / "both/val")
    assert parts(tmp_path / "classes") == (tmp_path / "classes", None)
    assert parts(tmp_path / "nowhere") == (tmp_path / "nowhere", None)
    assert classes_of(tmp_path / "both") == ("cat", "dog")
    assert classes_of(tmp_path / "classes") == ("bus", "train", "val")


def test_what_a_network_reads_is_the_size_of_small_pictures(tmp_path: Path) -> None:
    for name, sizes in {"small": [(20, 30)] * 3, "mixed": [(20, 30), (30, 20)], "large": [(65, 65)] * 3}.items():
        for number, size in enumerate(sizes):
            write(tmp_path / name / ("a" if number else "b") / f"{number}.png", *size)
    (tmp_path / "small" / "a" / "broken.png").write_bytes(b"no")
    assert [size_of(tmp_path / name) for name in ("small", "mixed", "large")] == [(20, 30), (224, 224), (224, 224)]


def test_small_pictures_are_an_array_and_larger_ones_stay_files(folder: Path) -> None:
    small, _ = load_labelled(folder, (64, 64))
    large, _ = load_labelled(folder, (65, 64))
    assert isinstance(small, ImageSet) and isinstance(large, PictureFiles)
    assert small.size == (64, 64) and large.size == (65, 64)
    assert (small.labels == large.labels).all() and small.classes == large.classes == ("cat", "dog")
    assert (large.relabelled(("dog", "cat"), "m").labels == 1 - large.labels).all()


def test_pictures_in_files_are_what_they_are_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "AHEAD", 2)
    data, left_out = load_labelled(folder, (70, 70))
    assert isinstance(data, PictureFiles) and left_out == ()
    order = np.array([5, 0, 3, 1, 4, 2])
    came = list(data.take(order).batches(np.split(np.arange(6), [1, 3])))
    assert [len(batch) for batch in came] == [1, 2, 3]
    np.testing.assert_array_equal(np.concatenate(came), [load_picture(data.paths[i], (70, 70)) for i in order])
    places = random_places(np.random.default_rng(0), 6)
    (cropped,) = data.crops([(order, places)])
    for pixels, number, place in zip(cropped, order, places, strict=True):
        wanted = read_picture(data.paths[number], partial(crop, size=(70, 70), place=place))
        np.testing.assert_array_equal(pixels, wanted)
    unfinished = data.batches(np.arange(6)[:, None])
    next(unfinished)
    assert isinstance(unfinished, Generator)
    unfinished.close()  # waits for nothing


def test_a_crop_is_the_part_that_was_said() -> None:
    rows, columns = np.mgrid[0:120, 0:200]
    picture = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8))
    part = crop(picture, (30, 30), (0.24, 1.0, 1.0, 0.5, False)).astype(int)  # 75.9 pixels high and wide, at the bottom
    assert abs(part[0, :, 0].mean() - 45) < 2 and abs(part[-1, :, 0].mean() - 118) < 2
    assert abs(part[:, 0, 1].mean() - 63) < 2 and abs(part[:, -1, 1].mean() - 136) < 2
    mirrored = crop(picture, (30, 30), (0.24, 1.0, 1.0, 0.5, True))
    np.testing.assert_array_equal(mirrored[:, ::-1], part)
    for place in random_places(np.random.default_rng(1), 50):
        area, ratio, down, across, _ = place
        assert 0.08 <= area <= 1 and 3 / 4 <= ratio <= 4 / 3 and 0 <= min(down, across) <= max(down, across) < 1
        assert crop(picture, (16, 24), place).shape == (16, 24, 3)


def test_pictures_that_decide_are_drawn_from_all_classes(folder: Path) -> None:
    images, _ = load_folder(folder, (40, 40))
    chosen = drawn_from(folder, images, 4)
    places = [int(np.flatnonzero((images.images == one).all((1, 2, 3)))[0]) for one in chosen]
    assert len(set(places)) == 4 and set(images.labels[places]) == {0, 1}
    np.testing.assert_array_equal(drawn_from(folder, images, 2), chosen[:2])


def test_broken_pictures_are_left_out_before_the_work(folder: Path) -> None:
    whole, _ = load_labelled(folder, (70, 70))
    broken = folder / "cat" / "9.png"
    broken.write_bytes((folder / "cat" / "0.png").read_bytes()[:5000])
    data, lines = load_labelled(folder, (70, 70))
    assert len(data) == 6 and len(lines) == 1 and str(broken) in lines[0]
    assert data.sha256() == whole.sha256()
    write(folder / "cat" / "0.png", 20, 20)
    assert load_labelled(folder, (70, 70))[0].sha256() != whole.sha256()
    for file in (folder / "dog").iterdir():
        file.write_bytes(b"no")
    with pytest.raises(ImageError, match=r"expected pictures of class 'dog', got none to read; .*dog"):
        load_labelled(folder, (70, 70))


def test_threads_leave_the_filters_of_warnings_as_they_were(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "mine")
        before = list(warnings.filters)
        for _ in range(5):
            load_labelled(folder, (70, 70))
        assert warnings.filters == before
