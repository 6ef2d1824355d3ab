"""What may load what, measured in fresh processes; a probe is shown to be able to fail."""

import importlib
import json
import subprocess
import sys
import time
import warnings

import pytest

from manidp import moved

HEAVY = ("torch", "mindspore", "matplotlib", "llvmlite", "onnxruntime", "openvino", "pyarrow")


def loaded_after(code: str) -> list[str]:
    probe = f"import sys, json\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "module",
    [
        "manidp",
        "manidp.cli",
        "manidp.formats.checkpoint",
        "manidp.data.images",
        "manidp.graph",
        "manidp.training.job",
        "manidp.training.train",
        "manidp.score.sources",
    ],
)
def test_base_modules_load_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") == []


def test_an_engine_loads_pillow_only_for_pictures() -> None:
    arrays = "import manidp, numpy; engine = manidp.load('manidp-res20'); engine.run(numpy.zeros((1, 32, 32, 3), 'u1'))"
    probe = "print('PIL' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{arrays}\n{probe}\nimport PIL.Image\n"
         "engine.run(PIL.Image.new('RGB', (40, 40)))\n" + probe],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"]


def test_the_probe_can_fail() -> None:
    assert loaded_after("sys.modules['torch'] = sys") == ["torch"]


def test_help_is_quick_and_loads_no_framework() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "manidp", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "classify" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {*HEAVY, "numpy", "PIL"}
    plain = [sys.executable, "-m", "manidp", "--help"]
    fastest = min(timed(plain) for _ in range(5))
    assert fastest < 0.3 * slowness(), "seconds"


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - started


def slowness() -> float:
    """How much slower than usual this machine starts a Python now, at least 1: others may be using it."""
    return max(1.0, min(timed([sys.executable, "-c", "import json, http.client"]) for _ in range(5)) / 0.06)


@pytest.mark.parametrize(("was", "now"), moved.MOVED.items())
def test_what_has_moved_is_still_found_and_says_where_it_is(was: str, now: str) -> None:
    sys.modules.pop(was, None)
    parent, _, name = was.rpartition(".")
    places = now.split()
    with pytest.warns(DeprecationWarning, match=f"{was} has moved: import {' or '.join(places)}$"):
        found = importlib.import_module(was)
    if len(places) == 1:
        assert found is importlib.import_module(now)
    for place in places:
        names = {name for name in vars(importlib.import_module(place)) if not name.startswith("__")}
        assert names and names <= vars(found).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert getattr(importlib.import_module(parent), name) is found
