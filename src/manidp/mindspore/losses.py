"""ManiDP's losses as in ``manidp.torch.losses``: pure functions of tensors (Tang et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable

from mindspore import Tensor, ops

from manidp.training.backend import SHORT


def complexity_weights(cross_entropy: Tensor, limit: Tensor) -> Tensor:
    """How much each image pays for its saliency: (C - CE_i) / C where CE_i < C, else 0 (Tang et al. 2021, eq. 4).

    cross_entropy: (B,), nats. limit: C, half the mean cross entropy of the epoch before, a scalar; 0: no image pays.
    Returns (B,) in [0, 1].
    Departs: the weights carry no gradient; in the reference an easy image is rewarded for a higher loss.
    """
    return ops.relu(limit - ops.stop_gradient(cross_entropy)) / ops.clamp(limit, min=1e-12)


def sparsity_loss(saliencies: Iterable[Tensor], weights: Tensor) -> Tensor:
    """sum over gates of mean_i( w_i * mean_c saliency[i, c] ); saliencies (B, C_l) each, weights (B,)."""
    total = 0.0
    for saliency in saliencies:
        total = total + (weights * saliency.mean(1)).mean()
    return total


def cosine_similarity(x: Tensor) -> Tensor:
    """Cosine between all pairs of rows of x (B, C): (B, B). A row of zeros has cosine 0 with every row.

    Departs: rows shorter than ``SHORT`` carry no gradient; that of a direction is one over the length, and would end
    the training of a network whose branches begin with zeros.
    """
    short = ops.square(ops.stop_gradient(x)).sum(1, keepdims=True) < SHORT**2
    x = ops.where(short, ops.stop_gradient(x), x)
    unit = x * ops.rsqrt(ops.square(x).sum(1, keepdims=True) + 1e-12)
    return ops.matmul(unit, unit.T)


def similarity_loss(saliencies: Iterable[Tensor], features: Iterable[Tensor]) -> Tensor:
    """sum over gates of mean_ij (T_ij - R_ij)^2 (Tang et al. 2021, eq. 8-10).

    T: cosines of the saliencies before the threshold, R: cosines of the pooled features; (B, C_l) each.
    Departs: the diagonal is left out; it is 1 - 1, but for a row of zeros, which has no direction.
    """
    total = 0.0
    for saliency, feature in zip(saliencies, features):  # noqa: B905 - GRAPH mode knows no strict
        difference = cosine_similarity(saliency) - cosine_similarity(feature)
        difference = difference * (1 - ops.eye(len(saliency), dtype=saliency.dtype))
        total = total + ops.square(difference).mean()
    return total


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) of the softened predictions, mean over the batch, nats."""
    student = ops.log_softmax(logits / temperature, 1)
    teacher = ops.log_softmax(teacher_logits / temperature, 1)
    return (ops.exp(teacher) * (teacher - student)).sum(1).mean() * temperature**2
