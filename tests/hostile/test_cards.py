"""What strangers say in cards, in answers of servers and in a spoiled cache is one of our errors, and soon."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hostile.campaign import try_mutant


@pytest.mark.parametrize(("kind", "count"), [("card", 120), ("cache", 40), ("answer", 120)])
def test_mutants(kind: str, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    outcomes = {try_mutant(kind, seed, tmp_path / "mutant") for seed in range(count)}
    assert len(outcomes) > 1, "all mutants end alike: they do not come far"
