"""The code on docs/adding_an_op.md is what stands in the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "adding_an_op.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize(("path", "code"), BLOCKS)
def test_the_page_shows_the_code_that_is_there(path: str, code: str) -> None:
    assert code in (ROOT / path).read_text(encoding="utf-8")


def test_the_page_shows_every_place() -> None:
    places = "graph/ops", "reference", "torch/network", "onnx", "mindspore/network"
    assert {f"src/manidp/{place}.py" for place in places} | {"tests/networks.py"} == {path for path, _ in BLOCKS}
