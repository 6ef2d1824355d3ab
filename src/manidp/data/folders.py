"""Folders of pictures: read as many pictures or as a labelled set, written from a set."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manidp.data.images import ImageSet
from manidp.data.pictures import PICTURE_SUFFIXES, load_picture
from manidp.errors import ImageError, listed, quoted, reason, shown
from manidp.files import filling
from manidp.progress import Progress


@dataclass(frozen=True)
class Pictures:
    """What came of many files: ``images`` uint8 (N, H, W, 3), their N ``paths``, and an error for each other picture.

    ``skipped``: how many other files lay in the folders, no pictures by their suffixes.
    """

    images: NDArray[np.uint8]
    paths: tuple[Path, ...]
    errors: tuple[ImageError, ...]
    skipped: int = 0

    @property
    def left_out(self) -> tuple[str, ...]:
        """What to tell of all that is not among the images: a line for each error, one for what was skipped."""
        return left_out(self.errors, self.skipped)


def left_out(errors: Iterable[ImageError], skipped: int) -> tuple[str, ...]:
    """A line for each error, and one for files that were skipped."""
    line = f"{skipped:,} other files in the folders skipped: no pictures by their suffixes"
    return (*map(str, errors), *([line] if skipped else []))


def load_pictures(paths: Iterable[str | Path], size: tuple[int, int], progress: Progress | None = None) -> Pictures:
    """Load many pictures, each as :func:`load_picture` does; one that cannot be read becomes an error among others.

    A folder stands for the files with ``PICTURE_SUFFIXES`` in it and in the folders below, in sorted order, hidden ones
    left out. Links to folders are followed, each folder is read once; one that cannot be read becomes an error too.
    Memory is that of the result, ``H * W * 3`` bytes a file, and of one picture being decoded.
    """
    errors: list[ImageError] = []
    files: list[Path] = []
    skipped = 0
    for path in map(Path, paths):
        if not os.path.isdir(path):
            files.append(path)
            continue
        (pictures,), unread, others = _walk([path])
        if not pictures and not unread:
            unread = [ImageError(f"{shown(path)}: no pictures in this folder ({' '.join(PICTURE_SUFFIXES)})")]
        files += pictures
        errors += unread
        skipped += others
    return _load(files, errors, skipped, size, progress)


def load_folder(
    folder: str | Path,
    size: tuple[int, int],
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[ImageSet, Pictures]:
    """A folder with one subfolder of pictures per class, as an image set and as what came of its files.

    Classes are the subfolders in sorted order, two at least, each with a picture that can be read. Where ``classes``
    are given (those of a checkpoint), labels follow them: every subfolder must be one of them, some may be absent.
    Files beside the subfolders and hidden ones are left out; subfolders are read as :func:`load_pictures` does. Raises
    ImageError when the folder is not so.
    """
    found = class_files(folder, classes)
    pictures = _load(list(found.label_of), found.errors, found.skipped, size, progress)
    return ImageSet(pictures.images, found.labels(pictures.paths, pictures.errors), found.names), pictures


@dataclass(frozen=True)
class ClassFiles:
    """The files of a folder of classes, with their labels; what could not be read; how many others there are.

    present: the classes that have a subfolder, some of ``names``.
    """

    root: Path
    names: tuple[str, ...]
    present: tuple[str, ...]
    label_of: Mapping[Path, int]
    errors: tuple[ImageError, ...]
    skipped: int

    def labels(self, read: Sequence[Path], errors: Sequence[ImageError]) -> NDArray[np.int64]:
        """Of the files ``read``; ``errors`` are of the others. Raises ImageError for a class of which none was read."""
        labels = np.array([self.label_of[path] for path in read], np.int64)
        there = set(labels.tolist())
        for name in self.present:
            if self.names.index(name) not in there:
                place = shown(self.root / name)
                reasons = (f"; {error}" for error in errors if str(error).startswith(place))
                raise ImageError(
                    f"{place}: expected pictures of class {quoted(name, 60)}, got none to read{next(reasons, '')}"
                )
        return labels


def class_files(folder: str | Path, classes: Sequence[str] | None = None) -> ClassFiles:
    """What ``load_folder`` reads, and with which labels. Raises ImageError."""
    root = Path(folder)
    found = class_folders(root) if classes is None else _subfolders(root)
    if classes is not None and not (found and set(found) <= set(classes)):
        raise ImageError(
            f"{shown(root)}: expected subfolders named after classes of [{listed(classes)}], got [{listed(found)}]"
        )
    names = tuple(found if classes is None else classes)
    of_class, unread, skipped = _walk([root / name for name in found], around=root)
    labels = map(names.index, found)
    label_of = {file: label for label, files in zip(labels, of_class, strict=True) for file in files}
    return ClassFiles(root, names, tuple(found), label_of, tuple(unread), skipped)


def class_folders(root: Path) -> list[str]:
    """The classes of a folder: names of its subfolders, sorted, two or more. Raises ImageError."""
    found = _subfolders(root)
    if len(found) < 2:
        raise ImageError(
            f"{shown(root)}: expected subfolders of pictures for two classes or more, got [{listed(found)}]"
        )
    return found


def _subfolders(root: Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise ImageError(f"{shown(root)}: {reason(error)}") from error
    for name in found:
        if name != name.encode("utf-8", "replace").decode():  # no checkpoint could hold it
            raise ImageError(f"{shown(root / name)}: the name of a class must be UTF-8; rename this folder")
    return found


def _load(
    files: Sequence[Path], errors: Iterable[ImageError], skipped: int, size: tuple[int, int], progress: Progress | None
) -> Pictures:
    images = np.empty((len(files), *size, 3), np.uint8)
    read: list[Path] = []
    met = list(errors)
    for number, file in enumerate(files, 1):
        try:
            images[len(read)] = load_picture(file, size)
            read.append(file)
        except ImageError as error:
            met.append(error)
        if progress is not None:
            progress(number, len(files))
    return Pictures(images[: len(read)], tuple(read), tuple(met), skipped)


def _walk(folders: Sequence[Path], around: Path | None = None) -> tuple[list[list[Path]], list[ImageError], int]:
    """The pictures in each of these folders and below, sorted; what could not be read; how many other files there are.

    As :func:`pictures_below` finds them; the folder ``around`` these is never read, wherever links lead.
    """
    pictures: list[list[Path]] = [[] for _ in folders]
    errors: list[ImageError] = []
    skipped = 0
    for number, path, said in pictures_below(folders, around):
        if path is None:
            skipped += 1
        elif said is None:
            pictures[number].append(path)
        else:
            errors.append(ImageError(f"{shown(path)}: {said}"))
    return [sorted(files) for files in pictures], errors, skipped


def pictures_below(
    folders: Sequence[Path], around: Path | None = None
) -> Iterator[tuple[int, Path | None, str | None]]:
    """What lies in these folders and below: number of the folder, path, and the reason where it cannot be read.

    Pictures are known by ``PICTURE_SUFFIXES``; of another file the path is None; hidden ones are left out. Links to
    folders are followed. Each folder is read once, where it lies rather than where a link leads to it, and the one
    ``around`` these never: links in circles come to an end, and one class does not take the pictures of another. The
    same files come in the same order; memory is that of the names in one folder.
    """
    seen = set() if around is None else {_identity(around)}
    waiting, linked = deque(enumerate(folders)), deque[tuple[int, Path]]()
    while waiting or linked:
        number, place = (waiting or linked).popleft()
        pictures: list[str] = []
        below: list[str] = []
        links: list[str] = []
        lost: list[str] = []
        others = 0
        try:
            identity = _identity(place)
            if identity in seen:
                if place == folders[number]:
                    yield number, place, "the same folder as another of these"
                continue
            seen.add(identity)
            with os.scandir(place) as listed:
                for entry in listed:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.name)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(entry.name)
                    elif is_picture(entry.name):
                        pictures.append(entry.name)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        lost.append(entry.name)
                    else:
                        others += 1
        except OSError as error:
            yield number, place, reason(error)
            continue
        waiting += [(number, place / name) for name in sorted(below)]
        linked += [(number, place / name) for name in sorted(links)]
        yield from ((number, place / name, None) for name in sorted(pictures))
        yield from ((number, place / name, "a link that leads nowhere") for name in sorted(lost))
        yield from ((number, None, None) for _ in range(others))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's does."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def save_folder(image_set: ImageSet, folder: str | Path) -> None:
    """Write an image set as PNG files, one subfolder for each class, into a new folder: what ``load_folder`` reads.

    The folder appears whole or not at all; raises ImageError if it exists or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists():
            raise ImageError(f"{shown(folder)}: exists already; a new folder is needed")
        with filling(folder) as temporary:
            for number, (pixels, label) in enumerate(zip(image_set.images, image_set.labels, strict=True)):
                of_class = temporary / image_set.classes[label]
                of_class.mkdir(exist_ok=True)
                Image.fromarray(pixels).save(of_class / f"{number:05d}.png")
    except OSError as error:
        raise ImageError(f"{shown(folder)}: cannot be written: {reason(error)}") from error
