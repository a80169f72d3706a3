"""The 15 common corruptions at 5 severities (Hendrycks and Dietterich, ICLR 2019), in batches on the device.

Definitions and strengths are facts of the published sets: up to 64 pixels those of CIFAR-10-C, above those of
ImageNet-C. Everything measured in pixels (radii, widths, displacements, flakes, the grain of frost) is
proportional to the side, so that at 32 and at 224 pixels the strengths are the published ones. One corruption
is not the published one: frost overlays procedural textures, since the photographs cannot be shipped. ImageNet-C
was stored as JPEG of quality 85 after corrupting; that step is not repeated.

Random numbers depend on (seed, corruption, severity, position of the image) only; see ``draws``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mimbench.corruptions import blur, digital, noise, weather
from mimbench.corruptions.draws import Draws
from mimbench.errors import ConfigError, UnknownName

SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SMALL = 64  # the largest side, in pixels, at which the strengths of CIFAR-10-C are used
Strength = tuple[float, ...]


@dataclass(frozen=True)
class Corruption:
    """A corruption and its strengths, severity 1 first, at 32 pixels and at 224."""

    apply: Callable[..., Tensor]
    small: tuple[Strength, ...]  # CIFAR-10-C
    large: tuple[Strength, ...]  # ImageNet-C
    lengths: tuple[int, ...] = ()  # which of a strength's numbers are in pixels
    least: float = 0.0  # lower bound of a length after scaling
    whole: tuple[int, ...] = ()  # which are whole numbers

    def strength(self, severity: int, side: int) -> Strength:
        """The arguments of ``apply`` for square images of ``side`` pixels."""
        table, scale = (self.small, side / 32) if side <= LARGEST_SMALL else (self.large, side / 224)
        values = list(table[severity - 1])
        for place in self.lengths:
            values[place] = max(values[place] * scale, self.least)
        for place in self.whole:
            values[place] = max(round(values[place]), 1)
        return tuple(values)


def _single(*values: float) -> tuple[Strength, ...]:
    return tuple((value,) for value in values)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        noise.gaussian_noise, _single(0.04, 0.06, 0.08, 0.09, 0.10), _single(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(noise.shot_noise, _single(500, 250, 100, 75, 50), _single(60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(
        noise.impulse_noise, _single(0.01, 0.02, 0.03, 0.05, 0.07), _single(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": Corruption(  # radius and smoothing of the rim, in pixels
        blur.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        lengths=(0, 1),
    ),
    "glass_blur": Corruption(  # sigma and reach in pixels, rounds
        blur.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        lengths=(0, 1),
        whole=(1, 2),
    ),
    "motion_blur": Corruption(  # radius and sigma in pixels
        blur.motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        lengths=(0, 1),
    ),
    "zoom_blur": Corruption(  # step of the factor, number of factors
        blur.zoom_blur,
        ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
        whole=(1,),
    ),
    "snow": Corruption(  # mean, std, flake in pixels, threshold, radius and sigma in pixels, share kept
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        lengths=(2, 4, 5),
        least=1.0,
    ),
    "frost": Corruption(  # share of the image, share of the ice, size of the texture
        weather.frost,
        ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        lengths=(2,),
    ),
    "fog": Corruption(  # thickness, decay of the fractal
        weather.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(
        digital.brightness, _single(0.05, 0.1, 0.15, 0.2, 0.3), _single(0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        digital.contrast, _single(0.75, 0.5, 0.4, 0.3, 0.15), _single(0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "elastic": Corruption(  # strength, sigma and affine shift, all in pixels; 244 is the published script's number
        digital.elastic,
        tuple(
            (32 * a, 32 * s, 32 * m)
            for a, s, m in (
                (0, 0, 0.08),
                (0.05, 0.2, 0.07),
                (0.08, 0.06, 0.06),
                (0.1, 0.04, 0.05),
                (0.1, 0.03, 0.03),
            )
        ),
        tuple(
            (244 * a, 244 * s, 244 * m)
            for a, s, m in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        lengths=(0, 1, 2),
    ),
    "pixelate": Corruption(
        digital.pixelate, _single(0.95, 0.9, 0.85, 0.75, 0.65), _single(0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg": Corruption(digital.jpeg, _single(80, 65, 58, 50, 40), _single(25, 18, 15, 10, 7), whole=(0,)),
}
NAMES = tuple(CORRUPTIONS)


def corrupt(images: Tensor, name: str, severity: int, *, seed: int, positions: Tensor) -> Tensor:
    """Corrupted copies of square uint8 images (B, 3, S, S) that stand at ``positions`` (B,) of their split.

    Returns uint8 (B, 3, S, S) on the device of ``images``; fractions are cut off, as in the published sets.
    Raises UnknownName for an unknown corruption and ConfigError for another severity than 1 to 5.
    """
    if name not in CORRUPTIONS:
        raise UnknownName("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} is not one of 1 to 5")
    side = images.shape[-1]
    if images.dtype != torch.uint8 or images.shape[-2] != side:
        raise ConfigError(f"corruptions need square uint8 images, not {images.dtype} {tuple(images.shape)}")
    corruption = CORRUPTIONS[name]
    draws = Draws(positions.to(images.device), seed, "corruption", name, severity)
    result = corruption.apply(images.float() / 255, draws, *corruption.strength(severity, side))
    return (blur.truncate(result.clamp(0, 1)) * 255).round().to(torch.uint8)
