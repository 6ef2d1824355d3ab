"""Checkpoint <-> MindSpore network."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from manidp.errors import UnsupportedError
from manidp.formats.checkpoint import Checkpoint
from manidp.formats.conversion import to_ckpt
from manidp.hub.bundle import description
from manidp.mindspore.network import Network


def from_checkpoint(checkpoint: Checkpoint, *, adjustable: bool = False) -> Network:
    """The checkpoint's network with its weights and thresholds, in evaluation mode; ``adjustable``: see Network.

    Raises UnsupportedError for an op that MindSpore's table lacks.
    """
    try:
        network = Network(description(checkpoint.graph), to_ckpt(checkpoint)[1], adjustable=adjustable)
    except NotImplementedError as error:  # the file of the network stands alone, without our errors
        raise UnsupportedError(str(error)) from error
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(checkpoint.weights[parameter.name]))
    return network


def weights(network: Network) -> dict[str, NDArray[np.float32]]:
    """A copy of all that a checkpoint holds of a network: its parameters and thresholds, under the graph's names."""
    thresholds = zip(network.deciding, network.thresholds, strict=True)
    fixed = {f"{name}.threshold": np.array(value) for name, value in thresholds}
    return fixed | {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
