"""RandAugment (Cubuk et al., 2020) in the increasing variant of timm that MAE fine-tunes with.

``rand-m9-mstd0.5-inc1``: two of 15 operations per image, drawn with replacement, each then skipped with
probability one half; magnitude normal around 9 with deviation 0.5, cut to [0, 10]. Every operation is
stronger at higher magnitude, unlike in the paper, where some weaken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimbench.augment import colour
from mimbench.augment.geometry import affine, rotation
from mimbench.encoder import IMAGENET_MEAN

TOP = 10.0  # the magnitude at which operations are strongest


def warp(images: Tensor, fill: Tensor, place: tuple[int, int], entry: Tensor) -> Tensor:
    """An affine map that differs from the identity in one entry of its matrix."""
    maps = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    maps[:, place[0], place[1]] = entry
    return affine(images, maps, fill)


# What each operation does with its argument (B,), in the unit given; ``fill`` (3,) colours uncovered pixels.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda images, _, fill: colour.autocontrast(images),
    "equalise": lambda images, _, fill: colour.equalise(images),
    "invert": lambda images, _, fill: colour.invert(images),
    "rotate": lambda images, degrees, fill: affine(images, rotation(degrees, *images.shape[2:]), fill),
    "posterise": lambda images, bits, fill: colour.posterise(images, bits),
    "solarise": lambda images, level, fill: colour.solarise(images, level / colour.LEVELS),
    "solarise_add": lambda images, level, fill: colour.brighten_shadows(images, level / colour.LEVELS),
    "saturation": lambda images, factor, fill: colour.adjust_saturation(images, factor),
    "contrast": lambda images, factor, fill: colour.adjust_contrast(images, factor),
    "brightness": lambda images, factor, fill: colour.adjust_brightness(images, factor),
    "sharpness": lambda images, factor, fill: colour.adjust_sharpness(images, factor),
    "shear_x": lambda images, share, fill: warp(images, fill, (0, 1), share),
    "shear_y": lambda images, share, fill: warp(images, fill, (1, 0), share),
    "translate_x": lambda images, share, fill: warp(images, fill, (0, 2), share * images.shape[3]),
    "translate_y": lambda images, share, fill: warp(images, fill, (1, 2), share * images.shape[2]),
}


def argument(operation: str, magnitude: Tensor, sign: Tensor) -> Tensor:
    """What ``operation`` is called with at magnitudes (B,) from 0 to 10; ``sign`` (B,) holds 1 or -1."""
    strength = magnitude / TOP
    match operation:
        case "rotate":
            return 30 * strength * sign  # degrees
        case "posterise":
            return 4 - (4 * strength).floor()  # bits kept
        case "solarise":
            return 256 - (256 * strength).floor()  # the lowest level inverted
        case "solarise_add":
            return (110 * strength).floor()  # levels
        case "saturation" | "contrast" | "brightness" | "sharpness":
            return (1 + 0.9 * strength * sign).clamp(min=0.1)  # blend factor
        case "shear_x" | "shear_y":
            return 0.3 * strength * sign  # pixels per pixel
        case "translate_x" | "translate_y":
            return 0.45 * strength * sign  # share of the side
        case _:
            return strength  # not used


def apply_operations(
    images: Tensor, choice: Tensor, magnitude: Tensor, sign: Tensor, fill: tuple[float, ...] = IMAGENET_MEAN
) -> Tensor:
    """One operation per image: ``choice`` (B,) counts along ``OPERATIONS``, -1 leaves the image as it is.

    ``images`` (B, 3, H, W) floats in [0, 1]; ``magnitude`` (B,) from 0 to 10; ``sign`` (B,) 1 or -1;
    ``fill`` colours pixels from outside the image.
    """
    out = images.clone()
    colours = torch.tensor(fill, device=images.device)
    counts = torch.bincount(choice + 1, minlength=len(OPERATIONS) + 1).tolist()
    _, *groups = choice.argsort(stable=True).split(counts)
    for (name, operation), rows in zip(OPERATIONS.items(), groups, strict=True):
        if len(rows):
            out[rows] = operation(images[rows], argument(name, magnitude[rows], sign[rows]), colours)
    return out


def rand_augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    layers: int = 2,
    apply_p: float = 0.5,
    fill: tuple[float, ...] = IMAGENET_MEAN,
) -> Tensor:
    """Random operations one after another, drawn per image: floats (B, 3, H, W) in [0, 1] to the same.

    Each of ``layers`` operations is applied with probability ``apply_p`` at a magnitude drawn from a normal
    distribution and cut to [0, 10]. Between operations pixels are not rounded to 8 bits.
    """
    shape, device = (layers, len(images)), generator.device
    choice = torch.randint(len(OPERATIONS), shape, generator=generator, device=device)
    skipped = torch.rand(shape, generator=generator, device=device) >= apply_p
    noise = torch.randn(shape, generator=generator, device=device)
    sign = 1 - 2 * torch.randint(2, shape, generator=generator, device=device)
    choice = choice.masked_fill(skipped, -1)
    strength = (magnitude + magnitude_std * noise).clamp(0, TOP)
    for layer in range(layers):
        images = apply_operations(images, choice[layer], strength[layer], sign[layer], fill)
    return images
