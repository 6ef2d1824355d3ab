"""All commands as one application, and the entry point."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from manidp.cli import hub, inspect, models, run, score, serve, train
from manidp.cli.options import help_alone
from manidp.errors import ManiDPError
from manidp.terminal import Complaints, complain, give_up_stdout, say

# No markup: it would take "manidp[bench]" for a style.
app = typer.Typer(
    help="Dynamic channel pruning: a CNN that decides for each image which of its channels to compute.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (
    run.classify, run.evaluate, models.freeze, models.calibrate, train.data, models.info, train.train, train.prune,
    models.convert, run.report, run.diagnose, run.bench, inspect.inspect, serve.serve,
):  # fmt: skip
    app.command()(_command)
app.command(cls=score.ScoreCommand)(score.score)
app.add_typer(hub.app, name="hub")


def _print_version(wanted: bool) -> None:
    if wanted:
        from manidp import __version__

        say(f"manidp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    help_alone(context)


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
