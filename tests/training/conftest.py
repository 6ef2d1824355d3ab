"""The laws of training hold in every framework, and on a GPU: these tests run with each that is there."""

import os
from importlib.util import find_spec

import pytest

from manidp.training.backend import Backend

from .cases import backend_of

FRAMEWORKS = [name for name in ("torch", "mindspore") if find_spec(name)]
collect_ignore_glob = (
    [] if "torch" in FRAMEWORKS else ["test_torch*.py", "test_points.py"] if FRAMEWORKS else ["test_*.py"]
)
if "mindspore" in FRAMEWORKS:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _gpu() -> bool:
    if "torch" not in FRAMEWORKS:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", params=[*FRAMEWORKS, *(["cuda"] if _gpu() else [])])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)
