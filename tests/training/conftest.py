"""The laws of training hold in every framework: these tests run with each one that is installed."""

import os
import warnings
from importlib.util import find_spec

import pytest

from manidp.training.backend import Backend

FRAMEWORKS = [name for name in ("torch", "mindspore") if find_spec(name)]
collect_ignore_glob = (
    [] if "torch" in FRAMEWORKS else ["test_torch*.py", "test_points.py"] if FRAMEWORKS else ["test_*.py"]
)
if "mindspore" in FRAMEWORKS:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", params=FRAMEWORKS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """A framework, on one thread: the networks of these tests are too small to share."""
    if request.param == "torch":
        from manidp.torch.backend import Torch

        return Torch(threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that MindSpore itself gives rise to, while it is imported
        from manidp.mindspore.backend import MindSpore
    return MindSpore()
