"""Training in several processes, each on its share of every batch: together they take the steps that one would take.

What depends on the whole batch is computed over all of it: batch statistics, the similarity of images, losses,
saliencies. So every process holds the same network, to the bit where their machines compute alike.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from manidp.errors import TrainingError, reason


@dataclass(frozen=True)
class Processes:
    """All processes of a training: how many, and which one this is, from 0. All of them call each method together."""

    size: int = 1
    rank: int = 0

    def share(self, count: int) -> slice:
        """Which of ``count`` images are this process's; ``count`` is a multiple of ``size``."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def rows(self, own: Tensor) -> Tensor:
        """The rows of all processes, in their order; without gradient. Shapes are the same in all of them."""
        if self.size == 1:
            return own.detach()
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.detach().contiguous())
        return torch.cat(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, to the bit the same in each."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, to the bit the same in each."""
        return value if self.size == 1 else self.sum(value) / self.size

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Each gradient becomes the mean over all processes."""
        if self.size == 1:
            return
        held = list(gradients)
        means = self.mean(torch.cat([gradient.reshape(-1) for gradient in held]))
        for gradient, mean in zip(held, torch.split(means, [one.numel() for one in held]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def agree(self, content: bytes) -> bool:
        """Whether all processes hold the same bytes; each waits here for the others."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        if self.size > 1 and dist.get_backend() == "nccl":
            digest = digest.cuda()
        found = self.rows(digest[None])
        return bool((found == found[0]).all())


def together(device: str) -> Processes:
    """The processes that torchrun started, joined: gloo on the CPU, nccl on GPUs, one GPU each; alone without torchrun.

    Raises TrainingError if they do not find one another.
    """
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if size == 1:
        return Processes()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"the {size} processes do not find one another: {reason(error)}") from error
        atexit.register(dist.destroy_process_group)
    return Processes(size, rank)


class AllRows(torch.autograd.Function):
    """``Processes.rows``, for a loss that every process computes alike.

    The gradient is that of the sum of all these losses, of which the one computed here is one.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.rows(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.processes.share(len(gradient))] * ctx.processes.size, None


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, moving: tuple[Tensor, Tensor], momentum: float, eps: float,
    processes: Processes,
) -> Tensor:  # fmt: skip
    """Batch normalisation of this process's (B, C, ...) by mean and variance of all processes' images.

    moving: mean and variance, moved by ``momentum`` towards those of the batch, as ``F.batch_norm`` does.
    """
    with torch.no_grad():
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        means, variances = processes.rows(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        count = x.numel() // x.shape[1] * processes.size
        moving[0].lerp_(mean, momentum)
        moving[1].lerp_(variance * (count / (count - 1)), momentum)
    y: Tensor = _BatchNorm.apply(x, gamma, beta, mean, variance, eps, processes)  # type: ignore[no-untyped-call]
    return y


class _BatchNorm(torch.autograd.Function):
    """Normalisation by statistics that depend on the images of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float,
        processes: Processes,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, mean, torch.rsqrt(variance + eps))
        ctx.processes = processes
        return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, scale = ctx.saved_tensors
        axes = [axis for axis in range(x.dim()) if axis != 1]
        spread = [1, -1, *[1] * (x.dim() - 2)]
        normal = (x.float() - mean.view(spread)) * scale.view(spread)
        gradient = gradient.float()
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])
        count = x.numel() // x.shape[1] * ctx.processes.size
        plain, along = (ctx.processes.sum(own) / count).view(2, *spread)
        back = (gamma * scale).view(spread) * (gradient - plain - normal * along)
        return back.to(x.dtype), own[1], own[0], None, None, None, None
