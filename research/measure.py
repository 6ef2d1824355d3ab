"""The students of gates.py on all 10,000 test images, by the engine; and what their decisions are worth.

Writes a checkpoint for every student of a packed file, and one line of JSON each: right answers, multiply-adds, share
of decisions that differ from the channel's majority (stages 1, 2, 3). With ``--probe`` also the right answers of
``manidp diagnose`` with decisions frozen to the majority and with the gates of one image used for the next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gates import BUDGET, GATES, VARIANTS, Pixels
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from manidp.data.images import ImageSet, load_cifar10
from manidp.data.preprocessing import CIFAR10_PREPROCESSING
from manidp.engine.engine import Engine
from manidp.formats.checkpoint import Checkpoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import Clip, Graph
from manidp.graph.macs import gate_macs, macs_per_image
from manidp.models import resnet
from manidp.torch.diagnose import diagnose
from manidp.torch.network import Network
from manidp.training.diagnosis import differing


def graph_of(name: str) -> Graph:
    """The graph of a student, by its variant."""
    if name == "start" or (name in VARIANTS and not VARIANTS[name].gated):
        return resnet(20)
    graph = with_gates(resnet(20))
    if name in VARIANTS and VARIANTS[name].hard:
        graph = Graph(tuple(replace(n, high=1.0) if isinstance(n, Clip) else n for n in graph.nodes), graph.output)
    return graph


@torch.no_grad()
def estimate(network: Network, pixels: Pixels) -> None:
    """Batch statistics anew, on the augmented images that training set them on."""
    network.train()
    generator = torch.Generator().manual_seed(77)
    for index, part in enumerate(torch.arange(len(pixels.labels)).split(1000)):  # type: ignore[no-untyped-call]
        corner = torch.randint(0, 9, (2, len(part)), generator=generator)
        flip = torch.randint(0, 2, (len(part),), generator=generator)
        network.momentum = 1 / (index + 1)
        network(pixels.crops(part, corner, flip))
    network.eval()


def constant_to_budget(weights: dict[str, Tensor], pixels: Pixels) -> None:
    """Keep the channels of highest score that fit the budget, ties by order; a bisection may jump over many at once."""
    graph = with_gates(resnet(20))
    free = gate_macs(graph)
    scores = {n: weights[f"{n}.fc2.bias"].numpy() for n in GATES}
    order = sorted(((float(s), n, i) for n, v in scores.items() for i, s in enumerate(v)), reverse=True)
    masks = {n: np.zeros((1, len(v)), dtype=bool) for n, v in scores.items()}
    for _, name, index in order:
        masks[name][0, index] = True
        if macs_per_image(graph, masks)[0] - free > BUDGET:
            masks[name][0, index] = False
            break
    for name, mask in masks.items():
        weights[f"{name}.fc2.bias"] = torch.from_numpy(np.where(mask[0], scores[name], 0).astype(np.float32))
        weights[f"{name}.threshold"] = torch.zeros(())
    network = Network(graph)
    network.load_state_dict(weights)
    estimate(network, pixels)
    weights |= {k: v.clone() for k, v in network.state_dict().items()}


def students(files: list[Path]) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """(name, seed, weights) of every student in packed files."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for file in files:
        for key, value in load_file(file).items():
            name, seed, parameter = key.split("/")
            found.setdefault((name, seed), {})[parameter] = value.float()
    for (name, seed), weights in found.items():
        yield name, int(seed), weights


def measure(
    checkpoint: Checkpoint, test: ImageSet, static: bool
) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]:
    """The engine's figures on all test images, and what every gate kept."""
    engine = Engine(checkpoint, threads=2)
    logits, macs, kept = [], [], []
    for start in range(0, len(test), 500):
        result = engine.run(test.images[start : start + 500])
        logits.append(result.logits)
        macs.append(np.broadcast_to(result.macs, len(result.logits)))
        kept.append(result.kept)
    cost = np.concatenate(macs) - (gate_macs(checkpoint.graph) if static else 0)
    figures: dict[str, Any] = {"right": int((np.concatenate(logits).argmax(1) == test.labels).sum()), "of": len(test)}
    figures |= {
        "macs": float(cost.mean()),
        "macs_5": float(np.percentile(cost, 5)),
        "macs_95": float(np.percentile(cost, 95)),
    }
    opened = {n: np.concatenate([k[n] for k in kept]) for n in kept[0]}
    if opened:
        figures["differ"] = [round(share, 4) for share in differing(opened)[1].values()]
    return figures, opened


def main() -> None:
    """Measure every student of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="packed files that gates.py wrote")
    parser.add_argument("--data", type=Path, default=Path("cifar10"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results.jsonl")
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = load_cifar10(args.data)
    pixels = Pixels(train.images[:5000], train.labels[:5000], "cpu")
    for name, seed, weights in students(args.files):
        if name == "teacher":
            continue
        static = name in VARIANTS and VARIANTS[name].gated and not VARIANTS[name].reads
        if static:
            constant_to_budget(weights, pixels)
        arrays = {k: v.numpy() for k, v in weights.items()}
        told = {"recipe": {"augment": True, "padding_mode": "reflect"}}  # as gates.py draws its batches
        checkpoint = Checkpoint(graph_of(name), arrays, CIFAR10_PREPROCESSING, test.classes, told)
        save_checkpoint(checkpoint, args.out / f"{name}-{seed}.safetensors")
        figures, kept = measure(checkpoint, test, static or name.endswith("-majority"))
        if args.probe and kept and not static and not name.endswith("-majority"):
            rows = {one.name: one.correct for one in diagnose(checkpoint, train.images[:5000], test).variants}
            figures |= {"frozen": rows["frozen to the majority"], "shuffled": rows["gates of another image"]}
        line = json.dumps({"name": name, "seed": seed, **figures})
        print(line, flush=True)
        with (args.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
