"""All output to a terminal goes through here, since a server, a card, a file or its name may have chosen the text.

Characters that a terminal would take for a command, or that would change the order in which text is shown, are
escaped. So are characters that stdout cannot encode.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from manidp.errors import ManiDPError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_ESCAPED = frozenset(
    {"Cc", "Cf", "Cs", "Zl", "Zp"}
)  # controls, formats (such as bidi overrides), surrogates, line ends
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # formats, but several scripts are not written without them
_LONGEST = 2000  # characters of one complaint
_MOST_LAID_OUT = 12_000  # characters of Markdown, whose layout takes much longer than its length


def escaped(text: str, keep: str = "") -> str:
    r"""The text with each character that is not to reach a terminal as ``\x1b``, ``\n``, ``\u202e``.

    ``keep``: characters that are not escaped, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED and character not in _JOINERS + keep
        else character
        for character in text
    )


def say(line: object) -> None:
    """Print one line on stdout. Raises ManiDPError if it cannot be written."""
    _write(f"{escaped(str(line))}\n")


def say_json(value: object, indent: int | None = None) -> None:
    """Print a value as JSON, all of it ASCII."""
    _write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def complain(message: object) -> None:
    """Print the message as one line on stderr; nothing if there is no stderr."""
    line = escaped(" ".join(str(message).split()))
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]} ... ({len(line):,} characters)"
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"manidp: {line}", file=sys.stderr)


def show(renderable: Any) -> None:
    """Print a table or text on stdout. Into a file or pipe, tables are as wide as what is in them."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
    page = _Page()
    _console(file=page, width=width).print(renderable)
    _write(page.getvalue())


def show_markdown(text: str) -> None:
    """Print Markdown, laid out for a person; into a file or pipe, and where boxes cannot be shown, as it is written.

    Of a very long text only the beginning is laid out, and a complaint says so.
    """
    console = _console(file=_Page())
    if console.is_terminal and not console.options.ascii_only:
        from rich.markdown import Markdown

        show(Markdown(text[:_MOST_LAID_OUT], hyperlinks=False))  # where a link leads is to be seen
        if len(text) > _MOST_LAID_OUT:
            complain(
                f"{len(text) - _MOST_LAID_OUT:,} more characters are not shown; all of them go into a file or pipe"
            )
    else:
        _write("".join(f"{escaped(line)}\n" for line in text.splitlines()))


def progress() -> Progress:
    """Progress bars on stderr, only where a person looks on; of processes that torchrun starts, the first one's."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = _console(stderr=True)
    title = TextColumn("{task.description}", markup=False)
    # What is printed meanwhile goes above the bar only if it goes to the same terminal.
    return Progress(
        title, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0", redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip


def steps(bars: Progress, title: str) -> Any:
    """A callback (done, total) that moves a bar."""
    task = bars.add_task(escaped(title), total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def give_up_stdout() -> None:
    """After a failed write: discard what is still buffered, so that the exit raises nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Complaints(logging.Handler):
    """What the library logs, as complaints."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


class _Page(io.StringIO):
    """What stdout will show, so that one place writes to stdout; it takes what stdout takes."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stdout, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return sys.stdout.isatty()


def _write(text: str) -> None:
    encoding = _Page().encoding
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has ended, e.g. `manidp ... | head`
        give_up_stdout()
        raise SystemExit(0) from None
    except OSError as error:
        give_up_stdout()
        raise ManiDPError(f"stdout: cannot be written: {error.strerror or error}") from error


def _console(**options: Any) -> Console:
    """rich's, which takes no text for markup, and escapes all of it: cells before they are laid out, the rest after."""
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render_str(self, text: str, **style: Any) -> Any:
            return super().render_str(escaped(text), **style)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else escaped(text, keep="\n"), style, control)

    return Escaping(markup=False, emoji=False, **options)
