"""What reaches a terminal: nothing that it would obey, in any encoding, and one line where it cannot be written."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manidp import cli, terminal
from manidp.bench.measure import random_checkpoint
from manidp.cli import hub
from manidp.data.images import load_sample
from manidp.formats.checkpoint import save_checkpoint
from manidp.gating.place import with_gates
from manidp.models import resnet
from manidp.terminal import escaped

# What a terminal obeys, what turns text round, what ends a line, what no encoding has; ESC as Markdown may spell it.
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eback\u2066\u2028\ud800\r\n&#27;[1m&#x202e;[/x] [bold]:ship:"
UID = "me/1.0/a"


@settings(max_examples=50)
@given(st.text())
def test_what_is_escaped_is_obeyed_by_no_terminal_and_all_other_text_stays(text: str) -> None:
    shown = escaped(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" for c in shown)
    assert not set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029") & set(shown)
    if text.isprintable():
        assert shown == text
    assert escaped(shown) == shown
    assert escaped(text, keep="\n").count("\n") == text.count("\n")


def test_scripts_that_need_joiners_keep_them() -> None:
    assert escaped("می‌خواهم 👩‍🔬\n") == "می‌خواهم 👩‍🔬\\n"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture and a card; whatever can be named is named so that a terminal might obey."""
    root = tmp_path_factory.mktemp("hostile")
    model = random_checkpoint(with_gates(resnet(8, width=4)))
    said = HOSTILE.replace("\ud800", "")  # which no checkpoint may hold
    classes = tuple(f"{said} {index}" for index in range(10))
    save_checkpoint(replace(model, classes=classes, provenance={said[:-30]: [said]}), root / "m.safetensors")
    (root / "me" / "1.0").mkdir(parents=True)
    text = HOSTILE.encode("utf-8", "replace").decode().replace("\r\n", " ")
    card = f"# {text}\n---\nmodel-name: {text}\n---\n\n[{text}](https://x.org)\n\n```\n{text}\n```\n\n> {text}\n"
    (root / "me" / "1.0" / "a.md").write_text(card)
    (root / "pictures").mkdir()
    Image.fromarray(load_sample().images[0]).save(root / "pictures" / "plain.png")
    odd = os.path.join(os.fsencode(root / "pictures"), b"\x1b[2J\xff\n\xe2\x80\xae.png")
    os.rename(root / "pictures" / "plain.png", odd)
    with open(odd.replace(b".png", b"2.png"), "wb") as broken:
        broken.write(b"no picture")
    return root


def commands(root: Path) -> dict[str, list[str]]:
    model, source = str(root / "m.safetensors"), ["--source", str(root)]
    return {
        "info": ["info", model],
        "classify": ["classify", "-m", model, str(root / "pictures")],
        "evaluate": ["evaluate", "-m", model],
        "list": ["hub", "list", "me/", *source],
        "show": ["hub", "show", UID, *source],
        "no card": ["hub", "show", "me/1.0/\x1b[31m", *source],
        "no model": ["info", "\x1b[31m\u202e"],
        "no option": ["classify", "--\x1b[31m"],
        "no command": ["\x1b[31m"],
    }


class Stdout(io.TextIOWrapper):
    """A strict stdout of some encoding, a terminal or not."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.seek(0)
        return self.read()


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, stdout: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["manidp", *arguments])
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("name", commands(Path()))
def test_no_command_prints_what_a_terminal_obeys(
    name: str, encoding: str, hostile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    monkeypatch.setenv("TERM", "dumb")  # so that no escape sequence is ours
    for is_terminal in (False, True):
        stdout = Stdout(encoding, is_terminal)
        code = run(commands(hostile)[name], monkeypatch, stdout)
        shown, err = stdout.text(), capsys.readouterr().err
        assert code == (1 if name == "classify" else 2 if name.startswith(("no ", "evaluate")) else 0), err
        for text in (shown, err):
            assert escaped(text, keep="\n") == text
        assert "Traceback" not in err
        if code == 2:
            assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["info", "classify", "list", "show", "help", "json"])
@pytest.mark.parametrize(
    ("failure", "said", "exit_code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", 2),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", 2),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "", 0),
        (None, "stdout is closed", 2),
    ],
)  # fmt: skip
def test_a_stdout_that_cannot_be_written_is_one_line(
    name: str,
    failure: OSError | None,
    said: str,
    exit_code: int,
    hostile: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MANIDP_OFFLINE", "1")

    class Full(Stdout):
        def flush(self) -> None:
            if failure is not None:
                raise failure

    stdout = None if failure is None else Full("utf-8", False)
    arguments = {"help": ["--help"], "json": ["info", "dense-res20", "--json"]} | commands(hostile)
    code = run(arguments[name], monkeypatch, stdout)
    err = capsys.readouterr().err
    wanted = 1 if name == "help" and not said else exit_code  # help is printed by typer, which then says 1
    assert (code, err.count("\n")) == (wanted, bool(said))
    assert said in err
    if stdout is not None:
        monkeypatch.setattr(Full, "flush", Stdout.flush)


def all_commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    command = command or typer.main.get_command(cli.app)
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, (*words, name))


@pytest.mark.parametrize("words", list(all_commands()), ids=" ".join)
def test_help_is_whole_and_plain(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Stdout("ascii", False)
    assert run([*words, "--help"], monkeypatch, stdout) == 0
    shown = " ".join(stdout.text().split())
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    for said in (command.help, *(parameter.help for parameter in command.params)):
        for part in (said or "").split():  # brackets, too: pip install 'manidp[bench]'
            assert part in shown
    if words == ("bench",):
        assert "pip install 'manidp[bench]'" in shown


def test_what_the_library_logs_is_a_complaint(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("manidp.hub.hub", logging.WARNING, "", 0, "%s: cut", ("\x1b[31m",), None)
    terminal.Complaints().handle(record)
    assert capsys.readouterr().err == "manidp: \\x1b[31m: cut\n"


def test_json_is_ascii_and_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_json({"x": HOSTILE + "\x7f"})
    out = capsys.readouterr().out
    assert escaped(out, keep="\n") == out
    assert json.loads(out) == {"x": HOSTILE + "\x7f"}


def test_a_title_of_a_bar_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stdout("utf-8", True)
    monkeypatch.setattr(sys, "stderr", stderr)
    with terminal.progress() as bars:
        terminal.steps(bars, "[/x]\x1b]0;title\x07")(1, 2)
        bars.refresh()
    assert "[/x]\\x1b]0;title\\x07" in stderr.text()


LONG = {"rows": "|a|b|\n|-|-|\n" + "|1|2|\n" * 70_000, "brackets": "[" * 500_000, "headings": "# a\n" * 100_000}


@pytest.mark.parametrize("name", LONG)
def test_a_long_card_is_shown_in_part_and_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "cards" / "me" / "1.0"
    place.mkdir(parents=True)
    (place / "a.md").write_text(f"# a\n---\nmodel-name: a\n---\n{LONG[name]}")
    arguments = ["hub", "show", "me/1.0/a", "--source", str(tmp_path / "cards")]
    start = time.process_time()
    assert run(arguments, monkeypatch, Stdout("utf-8", True)) == 0
    assert time.process_time() - start < 5  # all of it takes half a minute
    assert "more characters are not shown; all of them go into a file or pipe\n" in capsys.readouterr().err
    stdout = Stdout("utf-8", False)
    assert run(arguments, monkeypatch, stdout) == 0
    assert stdout.text().endswith(LONG[name].strip("\n") + "\n") and not capsys.readouterr().err


def test_a_long_list_of_cards_is_shown_in_part_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "cards" / "me" / "1.0"
    place.mkdir(parents=True)
    for stem in "abc":
        (place / f"{stem}.md").write_text(
            f"# a\n---\nmodel-name: {'x' * 10**6}\n{'junk' * 20}\n" + "junk\n" * 20 + "---\n"
        )
    monkeypatch.setattr(hub, "MOST_LISTED", 2)
    stdout = Stdout("utf-8", False)
    assert run(["hub", "list", "me/", "--source", str(tmp_path / "cards")], monkeypatch, stdout) == 0
    assert stdout.text().count("me/1.0/") == 2 and stdout.text().count("x") == 2 * hub.MOST_IN_A_CELL
    assert capsys.readouterr().err == "manidp: 1 more cards are not listed; give words to search for, or --json\n"
    assert (
        run(["hub", "show", "me/1.0/a", "--source", str(tmp_path / "cards")], monkeypatch, Stdout("utf-8", False)) == 0
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 11 and err.endswith("me/1.0/a: 11 more remarks; --json has all\n")
