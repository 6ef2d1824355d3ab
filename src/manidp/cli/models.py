"""Commands on model files: info, convert, calibrate, freeze."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manidp.cli import show
from manidp.cli.options import Cascade, Data, Json, asked_cascade, check_outputs, deciding, labelled, refusals, suffix
from manidp.errors import GraphError, ManiDPError, MissingExtraError, short, some
from manidp.terminal import complain, say, say_json

if TYPE_CHECKING:
    from manidp.training.backend import Backend

Statistics = Annotated[
    bool, typer.Option(help="Estimate batch statistics anew, with PyTorch: pip install 'manidp[torch]'.")
]


def info(
    checkpoint: Annotated[
        str, typer.Argument(help="A bundled model, a checkpoint file, or the name of a card on the hub.")
    ],
    as_json: Json = False,
) -> None:
    """Show a model: layers, multiply-adds, thresholds, operating points, provenance, digest; checks the whole file."""
    from manidp.formats.facts import facts
    from manidp.hub.find import find_model

    shown = facts(find_model(checkpoint))
    if as_json:
        say_json(shown, indent=2)
    else:
        show.info(shown)


def convert(
    source: Annotated[str, typer.Argument(help="A .ckpt or .onnx file, or a model as for --model of evaluate.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File to write: .safetensors, .ckpt or .onnx."),
    ],
    thresholds: Annotated[
        Path | None, typer.Option(help="Thresholds of the gates, a .npy file: read with a .ckpt, or written with one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model to a checkpoint, to MindSpore's .ckpt or to ONNX; MindSpore is not needed.

    Reading ONNX needs PyTorch and ONNX Runtime. The checkpoint then takes pixels of 0 to 1 as they are.
    """
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.formats.ckpt import write_ckpt
    from manidp.formats.conversion import is_ckpt_file, load_ckpt, to_ckpt, write_thresholds
    from manidp.hub.find import find_model

    kind = suffix(out, (".safetensors", ".ckpt", ".onnx"))
    from_ckpt = is_ckpt_file(source)
    to_write = thresholds if kind == ".ckpt" and not from_ckpt else None
    if thresholds and not from_ckpt and not to_write:
        raise ManiDPError(f"--thresholds {thresholds} is for a .ckpt, read or written; a {kind} holds them itself")
    if source.lower().endswith(".onnx"):
        from manidp.torch.onnx import found_in

        with refusals():
            found = found_in(source)
    else:
        found = load_ckpt(source, thresholds) if from_ckpt else find_model(source)
    checkpoint = found.checkpoint
    if kind == ".ckpt" and checkpoint.graph.gates and thresholds is None:
        raise ManiDPError("a .ckpt does not hold thresholds; say with --thresholds FILE where to write them")
    written = [path for path in (out, to_write) if path]
    check_outputs(written, [found.path, *([thresholds] if thresholds and not to_write else [])])
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


def calibrate(
    model: Annotated[str, typer.Argument(help="A gated model; as for --model of evaluate.")],
    budget: Annotated[
        list[str], typer.Option(help="Share of the dense multiply-adds, 35% or 0.35; may be given several times.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The checkpoint to write: a .safetensors file.")
    ] = None,
    cascade: Cascade = None,
    statistics: Statistics = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Add operating points to a gated model without training: thresholds under which it takes other budgets.

    Other channels are then open, so that each point gets batch statistics of its own, too. With --cascade nothing is
    written: it says the confidence with which two operating points together take the budget. The images of --data
    decide; with CIFAR-10, 5,000 training images decide, and the test images measure. A model is surer of images that it
    was trained on, so that others then take more than the budget: hold some out (train --holdout), and give them as
    --data.
    """
    from manidp.engine.engine import Engine
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.hub.find import find_model
    from manidp.predict import asked_budget, evaluate
    from manidp.training.calibrate import calibrate as calibrated
    from manidp.training.calibrate import confidence_for

    shares = [share for share in map(asked_budget, budget) if isinstance(share, float)]
    if len(shares) < len(budget):
        raise ManiDPError(f"--budget is a share of the dense multiply-adds, 35% or 0.35; got {', '.join(budget)}")
    if (out is None) == (cascade is None) or (cascade is not None and len(shares) > 1):
        raise ManiDPError("give --out for a checkpoint with more points, or --cascade with one --budget")
    found = find_model(model)
    checkpoint = found.checkpoint
    if out is not None:
        suffix(out, (".safetensors",))
        check_outputs([out], [found.path])
    backend = _estimating() if statistics and out is not None else None
    images, description = labelled(data, {model: checkpoint})
    chosen = deciding(data, images, 5_000)
    if out is None:
        both = asked_cascade(cascade or "")
        confidence = confidence_for(checkpoint, chosen, both, shares[0])
        rows = evaluate({model: Engine(checkpoint)}, images, cascades={model: (*both, confidence)})
        if as_json:
            said = {"confidence": confidence, "data": description, "models": [asdict(row) for row in rows]}
            say_json(said, indent=2)
        else:
            show.evaluated(rows, description)
            say(f"--cascade {cascade} --confidence {confidence:.6g}: {rows[0].went_on:.1%} of the images went on")
        return
    for share in shares:
        checkpoint = calibrated(checkpoint, chosen, share, backend=backend)
    engine, names = Engine(checkpoint), {f"{model} at {one.name}": one.name for one in checkpoint.points}
    rows = evaluate(dict.fromkeys(names, engine), images, names)
    points = [replace(one, accuracy=row.correct / row.total) for one, row in zip(checkpoint.points, rows, strict=True)]
    save_checkpoint(replace(checkpoint, points=tuple(points)), out)
    if as_json:
        say_json({"written": str(out), "data": description, "models": [asdict(row) for row in rows]}, indent=2)
    else:
        show.evaluated(rows, description)
        say(f"{out}: written")


def _estimating() -> Backend:
    """What estimates batch statistics."""
    try:
        from manidp.torch.backend import Torch
    except MissingExtraError as error:
        raise MissingExtraError(f"{error}; or leave batch statistics as they are: --no-statistics") from error
    return Torch()


def freeze(
    model: Annotated[str, typer.Argument(help="A gated model; as for --model of evaluate.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint to write: a .safetensors file.")],
    gates: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Freeze only the gates of these names, as in 'stage_1.*'; repeatable."),
    ] = None,
    statistics: Statistics = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write the static twin of a gated model: a dense network with the same channels for every image.

    Each gate keeps the channels that it opens most often, and the others are removed. The twin takes no more
    multiply-adds than the model does on average, where it can: convolutions in groups may not be cut. Its batch
    statistics are estimated anew; it is not trained further, as `train --from` would. The images of --data decide; with
    CIFAR-10, 10,000 training images decide, and the test images measure. With --gates, the other gates go on deciding:
    `diagnose` tells which gates hardly do.
    """
    from manidp.engine.engine import Engine
    from manidp.formats.checkpoint import save_checkpoint
    from manidp.gating.static import freeze as frozen
    from manidp.hub.find import find_model
    from manidp.predict import evaluate
    from manidp.training.statistics import estimated

    suffix(out, (".safetensors",))
    found = find_model(model)
    check_outputs([out], [found.path])
    checkpoint = found.checkpoint
    chosen = _matching(gates, checkpoint.graph.gate_channels) if gates else None
    backend = _estimating() if statistics else None
    images, description = labelled(data, {model: checkpoint})
    decide = deciding(data, images, 10_000)
    twin = frozen(checkpoint, decide, chosen)
    if backend is not None:
        twin = replace(twin, weights={**twin.weights, **estimated(backend, twin, decide)})
    save_checkpoint(twin, out)
    rows = evaluate({model: Engine(checkpoint), str(out): Engine(twin)}, images)
    if as_json:
        say_json({"written": str(out), "data": description, "models": [asdict(row) for row in rows]}, indent=2)
    else:
        show.evaluated(rows, description)


def _matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names of gates that shell patterns mean; a pattern that means none is an error."""
    names = list(names)
    found: list[str] = []
    for pattern in patterns:
        meant = fnmatch.filter(names, pattern)
        if not meant:
            raise GraphError(f"--gates {short(pattern)}: no gate has such a name; there are {some(names)}")
        found += meant
    return found
