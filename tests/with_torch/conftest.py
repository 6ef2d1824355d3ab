import pytest
import torch

torch.set_num_threads(1)  # the networks of these tests are too small to share


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)
