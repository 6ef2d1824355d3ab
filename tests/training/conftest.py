"""The laws of training hold in every framework, and on a GPU: these tests run with each that is there."""

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


def _gpu() -> bool:
    if "torch" not in FRAMEWORKS:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", params=[*FRAMEWORKS, *(["cuda"] if _gpu() else [])])
def backend(request: pytest.FixtureRequest) -> Backend:
    """A framework, on one thread: the networks of these tests are too small to share."""
    if request.param == "cuda":
        import torch

        from manidp.torch.backend import Torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # sums in one order, as a CPU has them: runs that go on end the same
        return Torch("cuda", threads=1)
    if request.param == "torch":
        from manidp.torch.backend import Torch

        return Torch(threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that MindSpore itself gives rise to, while it is imported
        from manidp.mindspore.backend import MindSpore
    return MindSpore()
