"""Noise: Gaussian, shot and impulse."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mimbench.corruptions.draws import Draws


def gaussian_noise(images: Tensor, draws: Draws, std: float) -> Tensor:
    """Adds normal noise of standard deviation ``std`` to images (B, 3, H, W) in [0, 1]."""
    return images + std * draws.normal("noise", *images.shape[1:])


def shot_noise(images: Tensor, draws: Draws, photons: float) -> Tensor:
    """Photon noise: each value becomes Poisson(value * photons) / photons.

    Counts are drawn by inverting the distribution function. Images hold at most 256 different values, so the
    256 functions are laid end to end in one sorted table, and one search serves the batch.
    """
    table, width = _poisson_table(photons)
    level = (images * 255).round().long()
    target = level + draws.uniform("noise", *images.shape[1:]).double()
    found = torch.searchsorted(table.to(images.device).flatten(), target)
    return (found - level * width).float() / photons


@functools.lru_cache(maxsize=16)
def _poisson_table(photons: float) -> tuple[Tensor, int]:
    """(256, K) float64: row v is v + P(count <= k) for the rate v / 255 * photons, and K."""
    width = int(photons + 12 * photons**0.5 + 24)
    count = torch.arange(width, dtype=torch.float64)
    rate = torch.arange(256, dtype=torch.float64)[:, None] / 255 * photons
    probability = torch.exp(torch.xlogy(count, rate) - rate - torch.lgamma(count + 1))
    level = torch.arange(256, dtype=torch.float64)[:, None]
    table = level + probability.cumsum(1).clamp(max=1)
    table[:, -1] = level[:, 0] + 1
    return table, width


def impulse_noise(images: Tensor, draws: Draws, amount: float) -> Tensor:
    """Salt and pepper: a share ``amount`` of the values, channels apart, becomes 0 or 1 with equal chance."""
    hit = draws.uniform("where", *images.shape[1:]) <= amount
    salt = draws.uniform("salt", *images.shape[1:]) <= 0.5
    return torch.where(hit, salt.to(images.dtype), images)
