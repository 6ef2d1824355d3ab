"""The README keeps its promises: the table is the recorded run's, commands exist, linked files are there."""

import contextlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from manidp import cli
from manidp.errors import MissingExtraError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_recorded_run() -> None:
    path = ROOT / "benchmarks" / "render_readme.py"
    spec = importlib.util.spec_from_file_location("render_readme", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = json.loads((ROOT / "benchmarks" / "bench.json").read_text())
    assert module.rendered(README, record) == README
    assert module.full(record) == (ROOT / "benchmarks" / "README.md").read_text()
    record["modes"][0]["rows"][0]["correct"] += 1
    assert module.rendered(README, record) != README


def test_every_command_in_the_readme_exists_and_every_command_is_in_the_readme() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    commands = group.commands
    shown = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    used = set(re.findall(r"^manidp (\w+)", shown, re.MULTILINE))
    assert used == commands.keys()
    for line in re.findall(r"^(manidp .*?)(?:\s+#.*)?$", shown, re.MULTILINE):
        name, *words = line.split()[1:]
        known = {option for parameter in all_parameters(commands[name]) for option in parameter.opts}
        options = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert options <= known, line


def all_parameters(command: Any) -> list[Any]:
    nested = getattr(command, "commands", {}).values()
    return [*command.params, *(parameter for inner in nested for parameter in inner.params)]


def test_make_targets_named_in_the_documents_exist() -> None:
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)`", texts)) <= targets


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = link[0] or link[1]
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_the_migration_note_names_what_is_there() -> None:
    rows = re.findall(r"^\| (.*) \| (.*) \|$", (ROOT / "docs" / "migration.md").read_text(), re.MULTILINE)
    now = {name for _, right in rows for name in re.findall(r"`(manidp[.\w]+)`", right)}
    assert len(now) > 15
    for name in now:
        with contextlib.suppress(MissingExtraError):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", ["README.md", "DESIGN.md", "docs/migration.md", "benchmarks/README.md"])
def test_the_documents_use_the_words_of_the_field(path: str) -> None:
    """The most expensive image is not the dearest; a speedup is 2.5x and not 1/2.5 of the time."""
    found = re.findall(r"(?i)\bdear(?:est|er)\b|\b1/\d+\.\d|of the time of|\bunpool\b", (ROOT / path).read_text())
    assert not found


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_in_the_readme_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
