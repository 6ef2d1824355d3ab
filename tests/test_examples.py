"""The examples run as they are, without a warning, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from manidp.data.images import load_sample

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "1_classify.py": r"(\d+) of (\d+) right\n([\d.]+) to ([\d.]+) million multiply-adds an image\n",
    "2_static_twin.py": (
        r"dynamic: (\d+) of (\d+) right, ([\d.]+) million multiply-adds\n"
        r"static, not trained again: \d+ of \d+ right, [\d.]+ million multiply-adds\n"
    ),
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs_and_prints_what_it_says(path: Path, tmp_path: Path) -> None:
    if "import manidp.torch" in path.read_text():
        pytest.importorskip("torch.nn", reason="training needs PyTorch: pip install 'manidp[torch]'")
    done = subprocess.run([sys.executable, "-W", "error", path], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(PRINTED.get(path.name, r"(?s).+"), done.stdout)
    assert found, done.stdout
    if path.name in PRINTED:
        assert int(found[2]) == len(load_sample()) and int(found[1]) > 170
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
