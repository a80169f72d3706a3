"""Attacks on classifiers whose worst case is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import attacks

PGD = {"steps": 10, "restarts": 2, "seed": 0}


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 8, 8, generator=draw), torch.arange(count) % 3


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()


def loss(classify: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(classify(images), labels, reduction="none")


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255])
def test_changes_stay_within_epsilon_and_the_unit_range(network: nn.Module, epsilon: float) -> None:
    images, labels = batch()
    images[0], images[1] = 0, 1
    stepped = attacks.fgsm(network, images, labels, epsilon)
    climbed = attacks.pgd(
        network, images, labels, epsilon, step_size=epsilon / 2, positions=torch.arange(16), **PGD
    )
    for changed in (stepped, climbed):
        assert float((changed - images).abs().max()) <= epsilon * (1 + 1e-4)
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert not torch.equal(changed, images)


def test_attacks_beat_random_noise_and_pgd_beats_fgsm(network: nn.Module) -> None:
    images, labels = batch()
    epsilon = 8 / 255
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = loss(network, (images + epsilon * signs).clamp(0, 1), labels)
    stepped = loss(network, attacks.fgsm(network, images, labels, epsilon), labels)
    climbed = attacks.pgd(
        network, images, labels, epsilon, step_size=epsilon / 4, positions=torch.arange(16), **PGD
    )
    assert (stepped > noisy).all()
    assert (stepped > loss(network, images, labels)).all()
    assert loss(network, climbed, labels).mean() >= stepped.mean() - 1e-5


def test_on_a_linear_model_fgsm_is_the_worst_case() -> None:
    # For two classes the loss rises with (w1 - w0) x, whose maximum in the box is a step along its signs.
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    images, _ = batch()
    images = 0.2 + 0.6 * images
    labels = torch.zeros(16, dtype=torch.long)
    direction = (linear[1].weight[1] - linear[1].weight[0]).detach().sign().view(1, 3, 8, 8)
    wanted = images + 0.1 * direction
    torch.testing.assert_close(attacks.fgsm(linear, images, labels, 0.1), wanted)
    climbed = attacks.pgd(linear, images, labels, 0.1, step_size=0.05, positions=torch.arange(16), **PGD)
    torch.testing.assert_close(climbed, wanted)


def test_an_image_is_attacked_alike_in_any_batch(network: nn.Module) -> None:
    images, labels = batch()
    options = {"step_size": 2 / 255, **PGD}
    whole = attacks.pgd(network, images, labels, 8 / 255, positions=torch.arange(16) + 100, **options)
    alone = attacks.pgd(network, images[5:6], labels[5:6], 8 / 255, positions=torch.tensor([105]), **options)
    torch.testing.assert_close(whole[5:6], alone)


def test_no_gradient_is_left_behind(network: nn.Module) -> None:
    images, labels = batch()
    changed = attacks.fgsm(network, images, labels, 0.01)
    assert all(p.grad is None for p in network.parameters())
    assert not images.requires_grad
    assert not changed.requires_grad


def test_a_label_that_the_classifier_cannot_give_is_survived() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.constant_(linear[1].bias[2], -float("inf"))
    images, _ = batch()
    labels = torch.full((16,), 2)
    changed = attacks.pgd(linear, images, labels, 0.1, step_size=0.05, positions=torch.arange(16), **PGD)
    assert changed.isfinite().all()
