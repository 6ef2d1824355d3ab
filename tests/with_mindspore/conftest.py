"""Tests that need MindSpore; the folder is not called mindspore, or Python would take it for that."""

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("mindspore") is None:
    collect_ignore_glob = ["test_*.py"]
    _HINT = "tests/with_mindspore left out: they need MindSpore and numpy < 2; make test-mindspore runs them"

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(_HINT)

else:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that MindSpore itself gives rise to, while it is imported
        import mindspore

        import manidp.mindspore  # noqa: F401

    mindspore.runtime.launch_blocking()  # else its threads spin while they wait: eight times the time of these tests


@pytest.fixture(params=["PYNATIVE", "GRAPH"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both of MindSpore's modes, one after the other."""
    mindspore.set_context(mode=getattr(mindspore, f"{request.param}_MODE"))
    yield request.param
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
