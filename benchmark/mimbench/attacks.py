"""White-box attacks with L-infinity bounded perturbations, of images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.corruptions.draws import Draws

Classifier = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] to logits (B, K), differentiable


def fgsm(classify: Classifier, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """One step of ``epsilon`` along the sign of the loss's gradient (Goodfellow et al., ICLR 2015, section 4).

    ``images`` (B, 3, H, W) in [0, 1], ``labels`` (B,). The result stays in [0, 1].
    """
    return (images + epsilon * _gradient(classify, images, labels).sign()).clamp(0, 1)


def pgd(
    classify: Classifier,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    seed: int,
    positions: Tensor,
) -> Tensor:
    """Projected gradient ascent on the loss from random starts (Madry et al., ICLR 2018, section 2.1).

    Each start is uniform in the ball of radius ``epsilon`` around the images (B, 3, H, W), drawn from ``seed``
    and the ``positions`` (B,) of the images, so that it does not depend on the batch. Per image the result is
    the end point that fools the classifier, and among equals the one with the highest loss; the image itself
    counts as one.
    """
    best, best_fooled, best_loss = images, *_outcome(classify, images, labels)
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    for restart in range(restarts):
        noise = Draws(positions.to(images.device), seed, "pgd", restart).uniform("start", *images.shape[1:])
        point = torch.clamp(images + epsilon * (2 * noise - 1), low, high)
        for _ in range(steps):
            point = torch.clamp(point + step_size * _gradient(classify, point, labels).sign(), low, high)
        fooled, loss = _outcome(classify, point, labels)
        better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (loss > best_loss))
        best = torch.where(better[:, None, None, None], point, best)
        best_fooled, best_loss = best_fooled | fooled, torch.where(better, loss, best_loss)
    return best


def _gradient(classify: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's own cross-entropy with respect to its pixels."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        loss = F.cross_entropy(classify(leaf), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]


@torch.no_grad()
def _outcome(classify: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image is misclassified (B,), and its cross-entropy (B,)."""
    logits = classify(images)
    return logits.argmax(1) != labels, F.cross_entropy(logits, labels, reduction="none")
