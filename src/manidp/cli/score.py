"""The command score: any number of images into Parquet."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from manidp.cli import show
from manidp.cli.options import Budget, Json, Model, Precision, Threads
from manidp.terminal import progress, say, say_json, steps

_ADDRESS = re.compile(r"\S+:[0-9]+|local|auto")  # of a Ray cluster


class ScoreCommand(TyperCommand):
    """``score``, where the address of ``--ray`` may be left out; typer has no option of this kind."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        words = (
            word + "=" * (word == "--ray" and not _ADDRESS.fullmatch(after)) for word, after in pairwise([*args, ""])
        )
        return super().parse_args(ctx, [*words])


def score(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures; a .tar or .parquet file, a folder of such, or a pattern in quotes, '*/*.tar'."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of Parquet files: new, or of the same run.")],
    model: Model = "manidp-res20",
    budget: Budget = "default",
    threads: Threads = 1,
    precision: Precision = "float32",
    column: Annotated[
        str | None, typer.Option(help="Parquet: the column of image bytes. Default: the only one that can hold them.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Score on Ray's workers: of the cluster at HOST:PORT or ray://HOST:PORT; without an address, of the "
            "cluster of RAY_ADDRESS or on this machine; local: of a new cluster here.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray's workers. Default: processors / --threads.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify any number of pictures, in bounded memory; a run that was killed goes on when it is started again.

    Each picture becomes one row: key (its path in a folder; SHARD/NAME in a tar; FILE/ROW in Parquet), class,
    probability, macs (multiply-adds), budget, error (why it could not be read; then the others are empty). Needs
    pyarrow: pip install 'manidp[score]'; --ray needs Ray: pip install 'manidp[score,ray]'.
    """
    from manidp.hub.find import find_model
    from manidp.predict import asked_budget
    from manidp.score.run import Way, here
    from manidp.score.run import score as scored
    from manidp.score.sources import open_source

    way: Way = here
    if ray is not None:
        from manidp.score.cluster import on_ray

        way = on_ray(ray or None, workers)
    elif workers is not None:
        raise typer.BadParameter("workers are Ray's; give --ray too", param_hint="--workers")
    with progress() as bars:
        found = scored(
            find_model(model), open_source(source, column), out, budget=asked_budget(budget), threads=threads,
            precision=precision, progress=steps(bars, "Scoring"), way=way,
        )  # fmt: skip
    if as_json:
        say_json({"out": str(out), **asdict(found)})
    else:
        say(show.scored_line(out, found))
