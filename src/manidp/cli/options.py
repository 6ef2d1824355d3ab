"""What several commands share: options, labelled data, and checks of the files to be written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manidp.errors import FrontendError, ManiDPError
from manidp.terminal import complain, progress, steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from manidp.data.images import ImageSet
    from manidp.formats.checkpoint import Checkpoint
    from manidp.predict import Runner

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled model, a checkpoint file, or the name of a card on the hub.")
]
Threads = Annotated[int, typer.Option(help="Number of threads; they work on different images.", min=1)]
Precision = Annotated[str, typer.Option(help="float32; or float16, where the CPU supports it; with torch, bfloat16.")]
Budget = Annotated[
    str,
    typer.Option(help="Operating point: a name that `info` lists, or a share of the dense multiply-adds: 45% or 0.45."),
]
Cascade = Annotated[
    str | None,
    typer.Option(metavar="CHEAP,DEAR", help="Two operating points: the dear one sees what the cheap one is unsure of."),
]
Confidence = Annotated[
    float | None,
    typer.Option(help="With --cascade: images go on where the most probable class has less, 0..1.", min=0, max=1),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="CIFAR-10's folder, or one with a subfolder of pictures for each class, or with these below train/ and "
        "val/; the test images are used. Default: the bundled 200 test images."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
UserNetwork = Annotated[
    str,
    typer.Argument(
        help="Your Python file and what makes the torch module: my_net.py:make, the file is run. Or an ONNX file."
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="Folder, archive or https address of cards, searched before the bundled catalogue."),
]


Backend = Annotated[str, typer.Option(help="What runs the model: engine, or torch, which computes every channel.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; with the engine, cpu.")]


def opened(checkpoint: Checkpoint, backend: str, device: str, precision: str, threads: int) -> Runner:
    """The checkpoint, ready to run where the user says."""
    if backend == "torch":
        from manidp.torch.inference import TorchEngine

        return TorchEngine(checkpoint, device=device, precision=precision, threads=threads)
    if backend != "engine":
        raise ManiDPError(f"--backend is engine or torch; got {backend}")
    if device != "cpu":
        raise ManiDPError(f"the engine runs on cpu, not on {device}; add --backend torch")
    from manidp.engine.engine import Engine

    return Engine(checkpoint, threads=threads, precision=precision)


def help_alone(context: typer.Context) -> None:
    """A group without a command shows its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def asked_cascade(text: str) -> tuple[str | float, str | float]:
    """ "25%,default" -> the two operating points."""
    from manidp.predict import asked_budget

    points = [asked_budget(part.strip()) for part in text.split(",")]
    if len(points) != 2:
        raise ManiDPError(f"--cascade is two operating points, the cheap one first: 25%,default; got '{text}'")
    return points[0], points[1]


def dims(size: str) -> tuple[int, int, int]:
    """ "3x224x224" -> (3, 224, 224)."""
    parts = size.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**16 for part in parts):
        raise ManiDPError(f"--input is channels x height x width, such as 3x224x224; got '{size}'")
    channels, height, width = map(int, parts)
    return channels, height, width


def three(text: str, option: str) -> tuple[float, float, float]:
    """ "0.485,0.456,0.406", or one number for all three channels."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise ManiDPError(f"{option} is one number, or three for red, green and blue: 0.485,0.456,0.406; got '{text}'")
    red, green, blue = values * (3 // len(values))
    return red, green, blue


@contextmanager
def refusals() -> Iterator[None]:
    """What cannot be imported is told with a line for each op, before the error itself."""
    try:
        yield
    except FrontendError as error:
        for line in error.refused:
            complain(line)
        raise


def labelled(data: Path | None, models: Mapping[str, Checkpoint]) -> tuple[ImageSet, str]:
    """Labelled images of the size that all these checkpoints read, and what to call them."""
    from manidp.data.folders import load_folder
    from manidp.data.images import holds_cifar10, load_cifar10, load_sample
    from manidp.data.labelled import parts

    first, size = _one_size(models)
    if data is None and size != load_sample(1).size:
        raise ManiDPError(f"the bundled test images are 32x32, {first} reads {size[0]}x{size[1]}; give --data FOLDER")
    if data is None:
        return load_sample(), "200 bundled CIFAR-10 test images"
    if holds_cifar10(data):
        return load_cifar10(data)[1], "the 10,000 CIFAR-10 test images"
    with progress() as bars:
        images, pictures = load_folder(parts(data)[1] or data, size, models[first].classes, steps(bars, "Reading"))
    for line in pictures.left_out:
        complain(line)
    return images, f"{len(images)} images of {data}"


def resized(models: Mapping[str, Checkpoint]) -> tuple[ImageSet, str]:
    """50 bundled images at the size that these checkpoints read, and what to call them."""
    from manidp.data.images import ImageSet, load_sample
    from manidp.data.pictures import fit_images

    _, size = _one_size(models)
    sample = load_sample(50)
    return ImageSet(
        fit_images(sample.images, size), sample.labels, sample.classes
    ), f"50 bundled images as {size[0]}x{size[1]}"


def _one_size(models: Mapping[str, Checkpoint]) -> tuple[str, tuple[int, int]]:
    """The first model's name, and the size that all read."""
    first, *others = models
    size = models[first].preprocessing.size
    for name in others:
        came = models[name].preprocessing.size
        if came != size:
            raise ManiDPError(f"both models must read pictures of one size (H, W): {first} {size}, {name} {came}")
    return first, size


def deciding(data: Path | None, images: ImageSet, count: int) -> NDArray[np.uint8]:
    """At most ``count`` images that decide where others measure: training images where there are some, else the same.

    Of CIFAR-10 the first ones, of a folder with train/ and val/ ones drawn at random, always the same.
    """
    from manidp.data.images import holds_cifar10, load_cifar10
    from manidp.data.labelled import drawn_from, parts

    if data is not None and holds_cifar10(data):
        return load_cifar10(data)[0].images[:count]
    train, test = parts(data) if data is not None else (None, None)
    return images.images[:count] if train is None or test is None else drawn_from(train, images, count)


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
