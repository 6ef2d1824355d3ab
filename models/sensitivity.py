"""Which gates bear closing badly: close a quarter of what one gate keeps, look at the loss on training images.

python models/sensitivity.py [MODEL] [CIFAR-10 FOLDER]. No training in between, so the figures are worst cases; their
order is what a recipe's ``closing`` follows.
"""

import sys

import numpy as np
import torch
import torch.nn.functional
from numpy.typing import NDArray

from manidp.find import find_model
from manidp.images import load_cifar10
from manidp.macs import macs_per_image
from manidp.torch.convert import network_from

IMAGES, BATCH, SHARE = 4000, 500, 0.25


def main(model: str = "manidp-res20", folder: str = "cifar10") -> None:
    """Print a line for every gate: its mean keep rate, what closing saves, and what that costs."""
    checkpoint = find_model(model).checkpoint
    network = network_from(checkpoint).eval()
    data, _ = load_cifar10(folder)
    images = torch.from_numpy(checkpoint.preprocessing.apply(data.images[:IMAGES]))
    labels = torch.from_numpy(data.labels[:IMAGES])

    @torch.no_grad()
    def measured() -> tuple[float, float, dict[str, NDArray[np.float32]]]:
        """Mean cross entropy, mean MACs, and all gates (IMAGES, C) by name."""
        loss, gates = 0.0, []
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            output = network(x.contiguous(memory_format=torch.channels_last))
            loss += float(torch.nn.functional.cross_entropy(output.logits, y, reduction="sum"))
            gates.append({name: record.gate.numpy() for name, record in output.records.items()})
        joined = {name: np.concatenate([each[name] for each in gates]) for name in gates[0]}
        macs = macs_per_image(network.graph, {name: gate > 0 for name, gate in joined.items()})
        return loss / IMAGES, float(macs.mean()), joined

    loss, macs, gates = measured()
    print(f"{model}: cross entropy {loss:.4f}, {macs / 1e6:.2f} M multiply-adds on {IMAGES:,} training images")
    for name, gate in gates.items():
        threshold = network.state_dict()[f"{name}.threshold"]
        before = float(threshold)
        threshold.fill_(float(np.quantile(gate[gate > 0], SHARE)))
        worse, fewer, _ = measured()
        threshold.fill_(before)
        print(f"{name}  keeps {(gate > 0).mean():.2f}  saves {(macs - fewer) / 1e6:+.2f} M  costs {worse - loss:+.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
