"""From a checkpoint to a torch network; ``Network.weights`` is the way back."""

from __future__ import annotations

from manidp.formats.checkpoint import Checkpoint
from manidp.torch.network import Network


def network_from(checkpoint: Checkpoint) -> Network:
    """The checkpoint's network with its weights and thresholds, in evaluation mode."""
    network = Network(checkpoint.graph)
    network.load(checkpoint.weights)
    return network.eval()
