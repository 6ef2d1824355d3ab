"""What several commands share: options, labelled data, and checks of the files to be written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manidp.errors import ManiDPError
from manidp.terminal import complain, progress, steps

if TYPE_CHECKING:
    from manidp.data.images import ImageSet
    from manidp.formats.checkpoint import Checkpoint

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled model, a checkpoint file, or the name of a card on the hub.")
]
Threads = Annotated[int, typer.Option(help="Number of threads; they work on different images.", min=1)]
Precision = Annotated[str, typer.Option(help="float32; or float16, where the CPU supports it.")]
Budget = Annotated[
    str,
    typer.Option(help="Operating point: a name that `info` lists, or a share of the dense multiply-adds: 45% or 0.45."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="CIFAR-10's folder (its test set is used), or one with a subfolder of pictures for each class. Default: "
        "the bundled 200 test images."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="Folder, archive or https address of cards, searched before the bundled catalogue."),
]


def help_alone(context: typer.Context) -> None:
    """A group without a command shows its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def labelled(data: Path | None, models: Mapping[str, Checkpoint]) -> tuple[ImageSet, str]:
    """Labelled images of the size that all these checkpoints read, and what to call them."""
    from manidp.data.folders import load_folder
    from manidp.data.images import holds_cifar10, load_cifar10, load_sample

    first, *others = models
    size = models[first].preprocessing.size
    for name in others:
        came = models[name].preprocessing.size
        if came != size:
            raise ManiDPError(f"both models must read pictures of one size (H, W): {first} {size}, {name} {came}")
    if data is None:
        return load_sample(), "200 bundled CIFAR-10 test images"
    if holds_cifar10(data):
        return load_cifar10(data)[1], "the 10,000 CIFAR-10 test images"
    with progress() as bars:
        images, pictures = load_folder(data, size, models[first].classes, steps(bars, "Reading"))
    for line in pictures.left_out:
        complain(line)
    return images, f"{len(images)} images of {data}"


def deciding(data: Path | None, images: ImageSet) -> ImageSet:
    """The images that decide where others measure: CIFAR-10's training images, else the labelled ones themselves."""
    from manidp.data.images import holds_cifar10, load_cifar10

    return load_cifar10(data)[0] if data is not None and holds_cifar10(data) else images


def suffix(path: Path, kinds: tuple[str, ...]) -> str:
    """The suffix of a file to be written, in lower case; it says what is written."""
    kind = path.suffix.lower()
    if kind not in kinds:
        raise ManiDPError(f"{path}: the suffix says what is written, {' or '.join(kinds)}; got {kind or 'none'}")
    return kind


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Before the work: every file to be written has a place, and is neither another one nor one that is read."""
    taken = {os.path.realpath(path): "is read as well; it would be lost" for path in inputs}
    for path in outputs:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ManiDPError(f"{path}: exists and is no regular file; give the name of a file to write")
        if not os.path.isdir(path.parent):
            raise ManiDPError(f"{path}: there is no folder {path.parent} to write it to")
        real = os.path.realpath(path)
        if real in taken:
            raise ManiDPError(f"{path}: {taken[real]}; give another name")
        taken[real] = "would be written twice"
