"""ManiDP's losses: pure functions of tensors, named as in the paper (Tang et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from manidp.training.backend import SHORT


def complexity_weights(cross_entropy: Tensor, limit: float) -> Tensor:
    """How much each image pays for its saliency: (C - CE_i) / C where CE_i < C, else 0 (Tang et al. 2021, eq. 4).

    cross_entropy: (B,), nats. limit: C, half the mean cross entropy of the epoch before. Returns (B,) in [0, 1]:
    an easy image pays more, so fewer channels are kept for it.
    Departs: the weights carry no gradient; in the reference an easy image is rewarded for a higher loss.
    """
    if limit <= 0:
        return torch.zeros_like(cross_entropy)
    return ((limit - cross_entropy.detach()) / limit).clamp(min=0)


def sparsity_loss(saliencies: Iterable[Tensor], weights: Tensor) -> Tensor:
    """sum over gates of mean_i( w_i * mean_c saliency[i, c] ); saliencies (B, C_l) each, weights (B,)."""
    return torch.stack([(weights * saliency.mean(1)).mean() for saliency in saliencies]).sum()


def cosine_similarity(x: Tensor) -> Tensor:
    """Cosine between all pairs of rows of x (..., B, C): (..., B, B). A row of zeros has cosine 0 with every row.

    Departs: rows shorter than ``SHORT`` carry no gradient; that of a direction is one over the length, and would end
    the training of a network whose branches begin with zeros.
    """
    short = x.detach().square().sum(-1, keepdim=True) < SHORT**2
    x = torch.where(short, x.detach(), x)
    unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)
    return unit @ unit.transpose(-1, -2)


def similarity_loss(saliencies: Iterable[Tensor], features: Iterable[Tensor]) -> Tensor:
    """sum over gates of mean_ij (T_ij - R_ij)^2 (Tang et al. 2021, eq. 8-10).

    T: cosines of the saliencies before the threshold, R: cosines of the pooled features; (B, C_l) each. Images that
    look alike to the network shall be pruned alike.
    Departs: the diagonal is left out; it is 1 - 1, but for a row of zeros, which has no direction.
    """
    by_width: dict[int, list[tuple[Tensor, Tensor]]] = {}  # gates of one width are one product of matrices
    for saliency, feature in zip(saliencies, features, strict=True):
        by_width.setdefault(saliency.shape[1], []).append((saliency, feature))
    total = []
    for pairs in by_width.values():
        saliency, feature = (torch.stack(values) for values in zip(*pairs, strict=True))
        difference = cosine_similarity(saliency) - cosine_similarity(feature)
        images = difference.shape[-1]
        difference = difference * (1 - torch.eye(images, device=difference.device, dtype=difference.dtype))
        total.append(difference.square().sum() / images**2)
    return torch.stack(total).sum()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) of the softened predictions, mean over the batch, nats."""
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
