"""What the commands print for people: tables and lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manidp.terminal import complain, escaped, say, show

if TYPE_CHECKING:
    from pathlib import Path

    from manidp.predict import Evaluation, Prediction
    from manidp.score.run import Scored
    from manidp.training.diagnosis import Diagnosis
    from manidp.training.job import Finished
    from manidp.training.state import EpochRecord


def row(image: str, truth: str | None, prediction: Prediction) -> dict[str, Any]:
    """What is told of one classified image, in JSON and in the table."""
    return {
        "image": image,
        "class": prediction.label,
        "probability": round(prediction.probability, 4),
        "truth": truth,
        "macs": prediction.macs,
        "share_of_dense": round(prediction.share_of_dense, 4),
        "kept": {stage: round(share, 4) for stage, share in prediction.kept.items()},
    }


def classified(rows: list[dict[str, Any]], dense: int) -> None:
    """One row an image: class, cost, share of channels kept in each stage."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    stages = list(rows[0]["kept"])
    table = Table(box=SIMPLE, caption=f"M MACs: million multiply-adds; without gates {dense / 1e6:.1f} for each image",
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


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def evaluated(rows: Sequence[Evaluation], description: str, device: str = "cpu") -> None:
    """One row a model: accuracy, multiply-adds, latency."""
    from rich.box import SIMPLE
    from rich.table import Table

    first = rows[0]
    where = _threads(first.threads) if device == "cpu" else device
    where += f" in batches of {first.batch_size}" if first.batch_size > 1 else ""
    table = Table(
        box=SIMPLE, title=description, title_justify="left", caption_justify="left",
        caption=f"M MACs: million multiply-adds; without gates {first.dense_macs / 1e6:.2f}; "
        f"latency: {where}, {first.precision}, median of {first.rounds} rounds",
    )  # fmt: skip
    table.add_column("model")
    for heading in ("correct", "accuracy", "mean M MACs", "of dense", "ms an image"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model, f"{row.correct} of {row.total}", f"{row.correct / row.total:.2%}",
            f"{row.mean_macs / 1e6:.2f}", f"{row.mean_macs / row.dense_macs:.1%}",
            f"{row.milliseconds_per_image:.3f}",
        )  # fmt: skip
    show(table)


def diagnosed(found: Diagnosis, model: str, description: str) -> None:
    """How often decisions differ, and one row for each way of changing them."""
    from rich.box import SIMPLE
    from rich.table import Table

    say(
        f"{model} on {description}: {found.correct} of {found.total} right ({found.correct / found.total:.2%}), "
        f"{found.mean_macs / 1e6:.2f} M multiply-adds an image, {found.macs_5 / 1e6:.2f} to {found.macs_95 / 1e6:.2f} "
        f"from the 5th to the 95th percentile"
    )
    differ = ", ".join(f"{stage} {share:.1%}" for stage, share in found.differing_by_stage.items())
    say(f"decisions that differ from their channel's majority: {differ}")
    table = Table(box=SIMPLE, caption_justify="left",
                  caption=f"batch statistics estimated anew on {found.estimated_on:,} other images")  # fmt: skip
    table.add_column("gates")
    for heading in ("correct", "accuracy", "mean M MACs"):
        table.add_column(heading, justify="right")
    for one in found.variants:
        right = f"{one.correct} of {found.total}"
        table.add_row(one.name, right, f"{one.correct / found.total:.2%}", f"{one.mean_macs / 1e6:.2f}")
    show(table)


def bench(found: dict[str, Any]) -> None:
    """One table for each way of running: one image at a time, batches, larger networks."""
    from rich.box import SIMPLE
    from rich.table import Table

    for mode in (*found["modes"], *found["growth"]):
        where = f"{mode['batch']} at a time on {_threads(mode['threads'])}" if "batch" in mode else mode["network"]
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


def info(shown: dict[str, Any]) -> None:
    """Facts of a model, then its layers that multiply."""
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


def scored_line(out: Path, scored: Scored) -> str:
    """How scoring ended, and where its time went."""
    now = scored.images - scored.before
    told = f"{out}: {scored.images:,} images, {scored.errors:,} of them could not be read"
    if now == 0:
        return f"{told}; all were there already"
    earlier = f"{scored.before:,} were there already, " if scored.before else ""
    return (
        f"{told}; {earlier}{now:,} in {scored.seconds:.1f} s, {now / scored.seconds:,.0f} images/s: decoding "
        f"{scored.decode:.1f} s of processor, engine {scored.engine:.1f} s"
    )


def epoch_line(record: EpochRecord) -> str:
    """One epoch of a training."""
    macs = f"  {record.macs / 1e6:.2f} M multiply-adds" if record.macs else ""
    points = (f"{point} {seen['accuracy']:.2%} at {seen['macs'] / 1e6:.2f} M" for point, seen in record.points.items())
    return (
        f"epoch {record.epoch + 1:3d}  loss {record.loss:.4f}  cross entropy {record.cross_entropy:.4f}  "
        f"train accuracy {record.accuracy:.2%}{macs}  {record.seconds:.1f} s" + "".join(f"  {one}" for one in points)
    )


def finished_line(finished: Finished) -> str:
    """How a training ended."""
    measured, before = finished.measured, finished.before
    if measured is None:
        return f"{finished.file}: written"
    was = f"; before, {_right(before)}" if before else ""
    return f"{finished.file}: {_right(measured)} on {measured['data']}{was}"


def _right(measured: dict[str, Any]) -> str:
    return (
        f"{measured['correct']} of {measured['total']} right ({measured['correct'] / measured['total']:.2%}), "
        f"{measured['mean_macs'] / 1e6:.3f} M multiply-adds an image"
    )
