"""A checkpoint run by torch: on a GPU, or compiled for a CPU to compare the engine with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manidp.engine.cascade import cascaded
from manidp.engine.inputs import Images, batch_of
from manidp.errors import ImageError, ManiDPError
from manidp.formats.checkpoint import DEFAULT, Checkpoint
from manidp.result import Result
from manidp.torch.convert import check_device, network_from, placed, use_threads
from manidp.torch.network import Network, Output
from manidp.training.backend import pass_size

PRECISIONS = ("float32", "bfloat16")


class TorchEngine:
    """A checkpoint, ready to run on a device: takes what ``Engine`` takes, and gives the same results.

    Every channel is computed, and closed ones are multiplied by 0: a GPU gains nothing by skipping them one image at a
    time. device: cpu or cuda. precision: "float32" (without TF32), or "bfloat16" for maps and convolutions. threads: of
    the CPU, for the whole process; None: as many as PyTorch has. ``batch_size`` images run together. Raises ManiDPError
    for options that cannot be.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str = "cpu", precision: str = "float32", threads: int | None = None
    ) -> None:
        check_device(device)
        if precision not in PRECISIONS:
            raise ManiDPError(f"precision of torch is {' or '.join(PRECISIONS)}; got {precision!r:.80}")
        use_threads(threads)
        self.checkpoint, self.graph, self.device, self.precision = checkpoint, checkpoint.graph, device, precision
        self.batch_size = pass_size(checkpoint.preprocessing.size)
        self._tables = torch.from_numpy(checkpoint.preprocessing.tables()).to(device)
        self._networks: dict[str, Network] = {}  # of the operating points that have been asked for
        self._network(DEFAULT)

    @property
    def threads(self) -> int:
        """Threads of the CPU."""
        return torch.get_num_threads()

    def _network(self, budget: str | float) -> Network:
        point = self.checkpoint.point(budget)
        if point.name not in self._networks:
            self._networks[point.name] = placed(network_from(self.checkpoint.at(budget)), self.device)
        return self._networks[point.name]

    def run(
        self,
        images: Images,
        *,
        budget: str | float = DEFAULT,
        cascade: tuple[str | float, str | float] | None = None,
        confidence: float | None = None,
    ) -> Result:
        """As ``Engine.run``."""
        if cascade is None and confidence is None:
            self._network(budget)
            return self._pass(batch_of(images, self.graph.input.dims), budget)
        batch = batch_of(images, self.graph.input.dims)
        return cascaded(self._pass, self.checkpoint, batch, cascade, confidence, budget)

    @torch.no_grad()
    def _pass(self, batch: NDArray[Any], budget: str | float) -> Result:
        network = self._network(budget)
        wide = sum(self.graph.gate_channels.values())
        logits = [torch.empty(0, self.graph.num_classes, device=self.device)]
        gates = [torch.empty(0, wide, device=self.device)]
        with exact(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            for start in range(0, len(batch), self.batch_size):
                output = network(self._planes(batch[start : start + self.batch_size]))
                logits.append(output.logits.float())
                if wide:
                    records = [output.records[name].gate for name in self.graph.gate_channels]
                    gates.append(torch.cat(records, 1).float())
        joined = torch.cat(logits).cpu().numpy()
        if not np.isfinite(joined).all():
            bad = np.flatnonzero(~np.isfinite(joined).all(axis=1))
            raise ManiDPError(f"the logits of images {bad.tolist()} are not finite: values overflow {self.precision}")
        values = torch.cat(gates).cpu().numpy() if wide else np.empty((len(joined), 0), np.float32)
        return Result(self.graph, joined, values)

    def _planes(self, images: NDArray[Any]) -> Tensor:
        """The network's input on the device, to which pixels travel as bytes."""
        placed = torch.from_numpy(images).to(self.device)
        if images.dtype == np.uint8:
            planes = [table[placed[..., channel].int()] for channel, table in enumerate(self._tables)]
            placed = torch.stack(planes, 1)
        elif not np.isfinite(images).all():
            raise ImageError("images hold numbers that are not finite (or exceed float32)")
        return placed.contiguous(memory_format=torch.channels_last)


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32: by default a GPU rounds those of convolutions to TF32."""
    backends: Any = torch.backends
    kinds = [backends.cudnn.conv, backends.cuda.matmul]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def compiled(checkpoint: Checkpoint, threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Normalised float32 images (B, C, H, W) -> logits (B, classes); weights frozen in, float32, channels last.

    Needs a C++ compiler. The number of threads is one for the whole process.
    """
    torch.set_num_threads(threads)
    network = placed(network_from(checkpoint))
    forward: Callable[[Tensor], Output] = torch.compile(network, dynamic=False, options={"freezing": True})

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            logits: NDArray[np.float32] = forward(batch).logits.numpy()
        return logits

    return run
