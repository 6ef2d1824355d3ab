"""From a checkpoint to a torch network, and where it may run; ``Network.weights`` is the way back."""

from __future__ import annotations

import torch

from manidp.errors import ManiDPError
from manidp.formats.checkpoint import Checkpoint
from manidp.torch.network import Network
from manidp.training.backend import check_threads


def network_from(checkpoint: Checkpoint) -> Network:
    """The checkpoint's network with its weights and thresholds, in evaluation mode."""
    network = Network(checkpoint.graph)
    network.load(checkpoint.weights)
    return network.eval()


def placed(network: Network, device: str = "cpu") -> Network:
    """On the device, weights channels last: the fast layout on CPUs and on tensor cores."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def use_threads(threads: int | None) -> None:
    """Threads of the CPU, for the whole process; None leaves them as they are. Raises TrainingError."""
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)


def check_device(device: str, error: type[ManiDPError] = ManiDPError) -> None:
    """Raises ``error`` for a device that is neither cpu nor cuda, or cuda where PyTorch finds no GPU."""
    if device not in ("cpu", "cuda"):
        raise error(f"device must be cpu or cuda; got {device!r:.80}")
    if device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else f", and this PyTorch, {torch.__version__}, is built without CUDA"
        raise error(f"device cuda: PyTorch finds no GPU here{built}; use cpu")
