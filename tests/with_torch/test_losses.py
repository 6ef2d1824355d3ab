"""The losses compute the paper's formulas: the same from NumPy loops in float64, and gradients from differences."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manidp.torch.losses import (
    complexity_weights,
    cosine_similarity,
    distillation_loss,
    similarity_loss,
    sparsity_loss,
)


def batch(seed: int, images: int = 5, widths: tuple[int, ...] = (3, 7, 3)) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    saliencies = [torch.rand(images, c, generator=generator, dtype=torch.float64) for c in widths]
    features = [torch.randn(images, c, generator=generator, dtype=torch.float64) for c in widths]
    return saliencies, features


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.floats(0.01, 5))
def test_complexity_weights_are_the_formula(cross_entropy: list[float], limit: float) -> None:
    weights = complexity_weights(torch.tensor(cross_entropy, dtype=torch.float64), limit)
    expected = [(limit - ce) / limit if ce < limit else 0 for ce in cross_entropy]
    assert weights.tolist() == pytest.approx(expected)


def test_no_image_pays_before_the_first_epoch_has_been_seen() -> None:
    assert complexity_weights(torch.tensor([0.0, 1.0]), 0.0).tolist() == [0, 0]


def test_weights_carry_no_gradient() -> None:
    cross_entropy = torch.tensor([0.1, 0.2], requires_grad=True)
    assert not complexity_weights(cross_entropy, 1.0).requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_sparsity_is_the_formula(seed: int) -> None:
    saliencies, _ = batch(seed)
    weights = torch.tensor([0.0, 0.5, 1.0, 0.25, 0.75], dtype=torch.float64)
    expected = 0.0
    for saliency in saliencies:
        for i, w in enumerate(weights.tolist()):
            expected += w * sum(saliency[i].tolist()) / saliency.shape[1] / len(weights)
    assert sparsity_loss(saliencies, weights).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_similarity_is_the_formula(seed: int) -> None:
    saliencies, features = batch(seed)
    expected = 0.0
    for saliency, feature in zip(saliencies, features, strict=True):
        count = len(saliency)
        for i in range(count):
            for j in range(count):
                difference = cosine(saliency[i], saliency[j]) - cosine(feature[i], feature[j])
                expected += difference**2 / count**2
    assert similarity_loss(saliencies, features).item() == pytest.approx(expected, rel=1e-9)


def cosine(x: Tensor, y: Tensor) -> float:
    a, b = x.numpy(), y.numpy()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_images_pruned_as_they_look_cost_nothing() -> None:
    saliencies, _ = batch(0)
    assert similarity_loss(saliencies, [2 * saliency for saliency in saliencies]).item() == pytest.approx(0, abs=1e-15)


def test_a_row_of_zeros_is_no_trap() -> None:
    saliencies, features = batch(0, widths=(4,))
    saliencies[0][2] = 0
    saliencies[0].requires_grad_(True)
    loss = similarity_loss(saliencies, features)
    loss.backward()  # type: ignore[no-untyped-call]
    others = [0, 1, 3, 4]
    assert cosine_similarity(saliencies[0])[2].abs().max().item() == 0
    assert torch.isfinite(loss)
    assert saliencies[0].grad is not None
    assert torch.isfinite(saliencies[0].grad).all()
    # The zero row differs from its own feature on the diagonal only by convention; that must not count.
    rest = similarity_loss([saliencies[0][others]], [features[0][others]]).item() * 16
    crossed = 2 * sum(cosine(features[0][2], features[0][j]) ** 2 for j in others)
    assert loss.item() * 25 == pytest.approx(rest + crossed, rel=1e-9)


def test_the_direction_of_a_branch_that_begins_with_zeros_is_not_trained() -> None:
    """Its gradient is one over its length: a step along it would be a million times any other."""
    saliencies, features = batch(0, widths=(4,))
    whole = similarity_loss(saliencies, features)
    feature = (features[0] * 1e-5).requires_grad_(True)
    saliencies[0].requires_grad_(True)
    loss = similarity_loss(saliencies, [feature])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(whole.item(), rel=0.02)  # the value is the formula's
    assert feature.grad is not None
    assert not feature.grad.any()
    assert saliencies[0].grad is not None
    assert saliencies[0].grad.any()


@pytest.mark.parametrize("seed", range(2))
def test_gradients_agree_with_finite_differences(seed: int) -> None:
    saliencies, features = batch(seed, images=4, widths=(3, 5))
    weights = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    assert_gradient(lambda x: sparsity_loss([x, saliencies[1]], weights), saliencies[0])
    assert_gradient(lambda x: similarity_loss([x, saliencies[1]], features), saliencies[0])
    assert_gradient(lambda x: similarity_loss(saliencies, [x, features[1]]), features[0])
    assert_gradient(lambda x: distillation_loss(x, features[0], 3.0), features[0] * 0.5)


def assert_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> None:
    point = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(point), point)
    assert gradient.abs().max() > 0
    for index in np.ndindex(*at.shape):
        up, down = at.clone(), at.clone()
        up[index] += step
        down[index] -= step
        slope = (loss(up) - loss(down)).item() / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 100), st.floats(0.5, 10))
def test_distillation_is_zero_exactly_for_the_teachers_own_logits(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    assert distillation_loss(logits, logits + 3, temperature).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(logits, logits.flip(1), temperature).item() > 1e-3


def test_distillation_is_the_formula() -> None:
    student, teacher, temperature = np.array([[1.0, 2.0, 0.5]]), np.array([[0.2, 1.0, 3.0]]), 4.0
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (teacher, student))
    expected = temperature**2 * float((p * np.log(p / q)).sum())
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature).item()
    assert found == pytest.approx(expected, rel=1e-12)
