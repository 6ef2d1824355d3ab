"""serve: a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from manidp.cli.options import Precision
from manidp.errors import ManiDPError, MissingExtraError


def serve(
    model: Annotated[
        str, typer.Argument(help="A bundled model, a checkpoint file, or the name of a card on the hub.")
    ] = "manidp-res20",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model. Default: its own name.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine. Default: all cores.", min=1)] = None,
    precision: Precision = "float32",
    budget: Annotated[str, typer.Option(help="Operating point without load: a name, or a share such as 45%.")] = (
        "default"
    ),
    floor: Annotated[
        str | None,
        typer.Option(help="Least accuracy under load, 91% or 0.91. Default: 1 point below that of --budget."),
    ] = None,
    target: Annotated[
        float, typer.Option(help="Milliseconds within which 99% of requests are to be answered.", min=1)
    ] = 50,
    max_body: Annotated[int | None, typer.Option(help="Bytes of a request.", min=1)] = None,
    max_pictures: Annotated[int | None, typer.Option(help="Pictures of a request.", min=1)] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels of a picture.", min=1)] = None,
    max_connections: Annotated[int | None, typer.Option(help="Connections at one time.", min=1)] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for a request, from start to end.", min=0.1)] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds after SIGTERM in which requests are still taken.", min=0)
    ] = None,
    log: Annotated[bool, typer.Option(help="Write a line of JSON on stdout for each request.")] = True,
) -> None:
    """Serve a model over HTTP: POST /v1/classify, and the Open Inference Protocol v2; a page at /.

    Under load the server goes down to cheaper operating points of the model, never below --floor, and refuses requests
    (429) only when these do not suffice. Needs: pip install 'manidp[serve]'.
    """
    try:
        from manidp.serve.app import Service
        from manidp.serve.log import Log
        from manidp.serve.server import serve as served
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is needed to serve: pip install 'manidp[serve]'") from error
    from manidp.engine.engine import Engine
    from manidp.hub.find import find_model
    from manidp.machine import describe
    from manidp.predict import asked_budget
    from manidp.serve.dial import ladder
    from manidp.serve.limits import Limits
    from manidp.serve.metrics import Metrics

    least = None
    if floor is not None:
        asked = asked_budget(floor)
        if not isinstance(asked, float) or not 0 <= asked <= 1:
            raise ManiDPError(f"--floor is an accuracy such as 91% or 0.91; got {floor}")
        least = asked
    found = find_model(model)
    steps = ladder(found.checkpoint, asked_budget(budget), least)
    given = {
        "body": max_body, "pictures": max_pictures, "pixels": max_pixels, "connections": max_connections,
        "seconds": timeout, "grace": grace,
    }  # fmt: skip
    limits = Limits(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    engine = Engine(found.checkpoint, precision=precision, threads=threads or int(describe()["cores"]))
    metrics = Metrics()
    called = name or found.name.rpartition("/")[2]
    lines = Log(metrics.lines.inc) if log else None
    served(Service(called, engine, steps, target / 1000, limits, lines, metrics), host, port)
