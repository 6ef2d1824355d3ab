"""Archives of cards and of CIFAR-10 with anything wrong in them are one of our errors, and soon."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hostile.campaign import try_mutant


@pytest.mark.parametrize("kind", ("archive", "cifar"))
def test_mutants(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    outcomes = {try_mutant(kind, seed, tmp_path / "mutant") for seed in range(120)}
    assert len(outcomes) > 1, "all mutants end alike: they do not come far"
