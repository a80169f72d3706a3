"""Random numbers per image: a counter-based generator whose values do not depend on how images are batched.

Each number is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) of
(purpose, position of the image in its split, running index), computed for a whole batch at once on its device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mimbench import seeds


def _signed(constant: int) -> int:
    """A 64-bit constant as the int64 of the same bits."""
    return constant - (1 << 64) if constant >> 63 else constant


GAMMA = _signed(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: the step between counters
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    shifted = z >> bits
    return z.bitwise_xor_(
        shifted.bitwise_and_((1 << (64 - bits)) - 1)
    )  # the shift is arithmetic: drop the sign


def splitmix64(z: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 counters of any shape; overwrites its argument."""
    z = _xor_shift(z, 30).mul_(MULTIPLIERS[0])
    z = _xor_shift(z, 27).mul_(MULTIPLIERS[1])
    return _xor_shift(z, 31)


class Draws:
    """Random numbers for B images at ``positions`` (B,) of a split, for one purpose such as (seed, "fog", 3)."""

    def __init__(self, positions: Tensor, *purpose: int | str) -> None:
        self.positions = positions.long()
        self.purpose = purpose

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32, uniform in the open interval (0, 1), multiples of 2^-24."""
        key = seeds.derive(*self.purpose, name)
        stream = splitmix64(self.positions * GAMMA + key)
        counter = torch.arange(1, math.prod(shape) + 1, device=stream.device) * GAMMA
        bits = splitmix64(stream[:, None] + counter)
        top = (bits >> 41).bitwise_and_((1 << 23) - 1).float()  # 23 bits, so that adding a half is exact
        return top.add_(0.5).mul_(2.0**-23).view(-1, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal, by the inverse of its distribution function."""
        return torch.erfinv(self.uniform(name, *shape).mul_(2).sub_(1)).mul_(math.sqrt(2))
