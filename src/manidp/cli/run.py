"""Commands that run models on images: classify, evaluate, report, bench."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manidp.cli import show
from manidp.cli.options import (
    Backend,
    Budget,
    Cascade,
    Confidence,
    Data,
    Device,
    Json,
    Model,
    Precision,
    Threads,
    asked_cascade,
    check_outputs,
    deciding,
    labelled,
    opened,
    resized,
    suffix,
)
from manidp.errors import ManiDPError
from manidp.terminal import complain, escaped, progress, say, say_json, steps


def classify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures, or folders of them. Default: bundled test images.")
    ] = None,
    model: Model = "manidp-res20",
    sample: Annotated[int, typer.Option(help="Without PATHS: how many of the 200 bundled test images.", min=1)] = 20,
    threads: Threads = 1,
    precision: Precision = "float32",
    budget: Budget = "default",
    cascade: Cascade = None,
    confidence: Confidence = None,
    backend: Backend = "engine",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Classify pictures; show multiply-adds and the share of channels kept in each stage.

    Pictures are JPEG, PNG, WebP, BMP, GIF (the first frame) and TIFF; other files in a folder are skipped. A picture
    that cannot be read is reported, the others are classified, and the exit code is 1.
    """
    from manidp import load_model
    from manidp.data.folders import load_pictures
    from manidp.data.images import load_sample
    from manidp.graph.macs import ungated_macs
    from manidp.predict import asked_budget, predict

    checkpoint = load_model(model)
    at, both = asked_budget(budget), asked_cascade(cascade) if cascade else None
    for point in both or (at,):
        checkpoint.point(point)
    truth: list[str | None]
    errors: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if paths:
        with progress() as bars:
            pictures = load_pictures(paths, checkpoint.preprocessing.size, steps(bars, "Reading"))
        images, names = pictures.images, [str(path) for path in pictures.paths]
        truth, errors, left_out = [None] * len(names), tuple(map(str, pictures.errors)), pictures.left_out
    else:
        bundled = load_sample(sample)
        assert bundled.indices is not None
        images, truth = bundled.images, [bundled.classes[label] for label in bundled.labels]
        names = [f"test image {index}" for index in bundled.indices]
    runner = opened(checkpoint, backend, device, precision, threads)
    predictions = predict(runner, images, budget=at, cascade=both, confidence=confidence)
    rows = [show.row(*one) for one in zip(names, truth, predictions, strict=True)]
    if as_json:
        say_json({"model": model, "images": rows, "errors": errors}, indent=2)
    else:
        show.classified(rows, ungated_macs(checkpoint.graph))
        for line in left_out:
            complain(line)
    if errors:
        raise typer.Exit(1)


def evaluate(
    data: Data = None,
    model: Model = "manidp-res20",
    beside: Annotated[
        str | None, typer.Option(help="A second model to compare with, at its default operating point.")
    ] = None,
    threads: Threads = 1,
    precision: Precision = "float32",
    budget: Budget = "default",
    cascade: Cascade = None,
    confidence: Confidence = None,
    backend: Backend = "engine",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure accuracy, mean multiply-adds and latency on labelled images; without --data, on the bundled 200."""
    from manidp import load_model
    from manidp.machine import describe
    from manidp.predict import asked_budget
    from manidp.predict import evaluate as evaluated

    models = {name: load_model(name) for name in dict.fromkeys([model, *([beside] if beside is not None else [])])}
    at, both = asked_budget(budget), asked_cascade(cascade) if cascade else None
    for point in both or (at,):
        models[model].point(point)
    if (both is None) != (confidence is None):
        raise ManiDPError("--cascade and --confidence need each other; `manidp calibrate --cascade` chooses one")
    images, description = labelled(data, models)
    engines = {name: opened(one, backend, device, precision, threads) for name, one in models.items()}
    cascades = {model: (*both, confidence)} if both and confidence is not None else {}
    rows = evaluated(engines, images, {model: at}, cascades)
    if as_json:
        say_json(
            {
                "data": description,
                "machine": describe(),
                "backend": backend,
                "device": device,
                "models": [asdict(row) for row in rows],
            },
            indent=2,
        )
    else:
        show.evaluated(rows, description, device)


def report(
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    model: Model = "manidp-res20",
    beside: Annotated[str, typer.Option(help="The dense network to compare with.")] = "dense-res20",
    data: Data = None,
    overview: Annotated[
        Path | None, typer.Option(help="Also write the overview figure to this PNG or SVG file.")
    ] = None,
) -> None:
    """Write an HTML report: which channels were computed for which images.

    One file, which loads nothing from elsewhere. Needs matplotlib: pip install 'manidp[plots]'.
    """
    from manidp.engine.engine import Engine
    from manidp.hub.find import find_model
    from manidp.report.charts import draw_overview
    from manidp.report.findings import collect
    from manidp.report.page import write_report

    found = {name: find_model(name) for name in (model, beside)}
    if overview:
        suffix(overview, (".png", ".svg"))
    check_outputs([out, *([overview] if overview else [])], [one.path for one in found.values()])
    images, _ = labelled(data, {name: one.checkpoint for name, one in found.items()})
    engine, dense = (Engine(found[name].checkpoint) for name in (model, beside))
    with progress() as bars:
        findings = collect(engine, images, dense, steps(bars, "Running"))
    write_report(findings, out)
    if overview:
        draw_overview(findings, overview)
    say(f"{out}: {len(images)} images")


def diagnose(
    model: Annotated[str, typer.Argument(help="A gated model; as for --model of evaluate.")],
    data: Data = None,
    budget: Budget = "default",
    page: Annotated[Path | None, typer.Option(help="Also write a page of it to this HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what the gates' decisions are worth: accuracy with decisions frozen, shuffled, or the same for a class.

    Batch statistics are estimated anew for each, with CIFAR-10 on 5,000 training images; accuracy is that on the test
    images. Needs PyTorch: pip install 'manidp[torch]'.
    """
    from manidp.hub.find import find_model
    from manidp.predict import asked_budget
    from manidp.torch.diagnose import diagnose as diagnosed

    found = find_model(model)
    if page:
        check_outputs([page], [found.path])
    checkpoint = found.checkpoint.at(asked_budget(budget))
    images, description = labelled(data, {model: checkpoint})
    test = images.relabelled(checkpoint.classes, model)
    with progress() as bars:
        diagnosis = diagnosed(checkpoint, deciding(data, images, 5_000), test, steps(bars, "Changing gates"))
    if page:
        from manidp.report.page import write_diagnosis

        write_diagnosis(diagnosis, page)
    if as_json:
        say_json({"model": model, "budget": budget, "data": description, **asdict(diagnosis)}, indent=2)
    else:
        show.diagnosed(diagnosis, model, description)


def bench(
    model: Model = "manidp-res20",
    dense: Annotated[
        list[str] | None,
        typer.Option(
            help="A network without gates to compare with, the original first; repeatable. Default: dense-res20."
        ),
    ] = None,
    data: Data = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads in the last measurement. Default: all cores.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size, where images do not run one at a time.", min=2)] = 100,
    rounds: Annotated[int, typer.Option(help="How many turns each runtime takes.", min=3)] = 21,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also measure deeper networks and ImageNet networks, with random weights.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write all measurements to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy and multiply-adds against time: PNG or SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the speed and accuracy of the engine and other runtimes, on the same models and images.

    The runtimes take turns. Those that are not installed are left out: pip install 'manidp[bench]'. Quantised ones
    choose their scales on training images where --data has some. Without --data, networks that know none of
    CIFAR-10's classes get bundled images of their size, and no accuracy is told.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of one library must not disturb the next
    from manidp.bench.measure import bench as measured
    from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
    from manidp.hub.find import find_model
    from manidp.machine import describe

    read = {name: find_model(name) for name in dict.fromkeys([*(dense or ["dense-res20"]), model])}
    if plot:
        suffix(plot, (".png", ".svg"))
    check_outputs([path for path in (out, plot) if path], [one.path for one in read.values()])
    models = {name: one.checkpoint for name, one in read.items()}
    known = any(set(CIFAR10_CLASSES) & set(one.classes) for one in models.values())
    scored = data is not None or (known and models[model].preprocessing.size == CIFAR10_PREPROCESSING.size)
    images, description = labelled(data, models) if scored else resized(models)
    with progress() as bars:
        task = bars.add_task("", total=None)
        found = measured(
            models, images, threads=threads or int(describe()["cores"]), batch=batch, rounds=rounds, growth=growth,
            say=lambda doing: bars.update(task, description=escaped(doing)), scored=scored,
            calibration=deciding(data, images, 500) if data is not None else None,
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
        show.bench(found)
