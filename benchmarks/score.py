"""Images a second of `manidp score`, and of a DataLoader with ONNX Runtime on the dense network, on the same files.

`make score` runs it on 10,000 CIFAR-10 test images as PNG files; `python benchmarks/score.py FOLDER --threads 4` on a
folder of yours. The two take turns; each decodes with as many threads or worker processes as the engine has threads.
Decoding is given in seconds of the processor, all workers together, the engine in seconds of the clock; both work at
once, so their sum may exceed the whole, which begins before the network is prepared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from manidp.data.folders import save_folder
from manidp.data.images import load_cifar10
from manidp.data.pictures import load_picture
from manidp.formats.checkpoint import Checkpoint
from manidp.hub.find import find_model
from manidp.machine import describe
from manidp.onnx import onnx_model
from manidp.score.run import score
from manidp.score.sources import open_source

BATCH = 256


class Files(Dataset[tuple[NDArray[np.float32], float]]):
    """Pictures as a network reads them, and what each took to decode."""

    def __init__(self, paths: list[Path], checkpoint: Checkpoint) -> None:
        self.paths, self.preprocessing = paths, checkpoint.preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], float]:
        started = time.thread_time()
        image = self.preprocessing.apply(load_picture(self.paths[index], self.preprocessing.size)[None])[0]
        return image, time.thread_time() - started


def with_loader(folder: Path, model: str, threads: int) -> dict[str, float]:
    """DataLoader and ONNX Runtime: seconds in all, of decoding, of the network."""
    started, decode, engine, images = time.perf_counter(), 0.0, 0.0, 0
    checkpoint = find_model(model).checkpoint
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_model(checkpoint).SerializeToString(), options)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for pixels, seconds in DataLoader(Files(paths, checkpoint), BATCH, num_workers=threads):
        before = time.perf_counter()
        images += len(session.run(["logits"], {"image": pixels.numpy()})[0])
        engine += time.perf_counter() - before
        decode += float(seconds.sum())
    whole = time.perf_counter() - started
    return {"images": images, "seconds": whole, "decode": decode, "engine": engine}


def with_score(folder: Path, model: str, threads: int, out: Path) -> dict[str, float]:
    """`manidp score`: the same, results written."""
    told = score(find_model(model), open_source(str(folder)), out, threads=threads)
    shutil.rmtree(out)
    return {"images": told.images, "seconds": told.seconds, "decode": told.decode, "engine": told.engine}


def main() -> None:
    """Measure, and print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of pictures; default: CIFAR-10's test images as PNG")
    parser.add_argument("--model", default="manidp-res20")
    parser.add_argument("--dense", default="dense-res20")
    parser.add_argument("--threads", type=int, default=int(describe()["cores"]))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder
        if folder is None:
            folder = Path(made, "pictures")
            save_folder(load_cifar10("cifar10")[1], folder)
        ways = {
            f"manidp score, {options.model}": lambda: with_score(
                folder, options.model, options.threads, Path(made, "out")
            ),
            f"DataLoader + ONNX Runtime, {options.dense}": lambda: with_loader(folder, options.dense, options.threads),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, run in ways.items():
                found[name].append(run())
    print(json.dumps({"machine": describe(), "threads": options.threads, "rounds": found}))
    print(f"{'':45} images  images/s  decoding, s of processor  engine, s  (medians of {options.rounds} rounds)")
    for name, rounds in found.items():
        images, seconds, decode, engine = (
            statistics.median(one[key] for one in rounds) for key in ("images", "seconds", "decode", "engine")
        )
        print(f"{name:45} {images:6.0f} {images / seconds:9,.0f} {decode:25.1f} {engine:10.1f}")


if __name__ == "__main__":
    main()
