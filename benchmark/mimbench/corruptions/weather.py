"""Weather: snow, frost and fog."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.corruptions.blur import clipped_zoom, smear, truncate
from mimbench.corruptions.draws import Draws

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601)


def snow(
    images: Tensor,
    draws: Draws,
    mean: float,
    std: float,
    flake: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
) -> Tensor:
    """Bright flakes of about ``flake`` pixels, driven downwards by a motion blur, over a whitened image.

    The flakes are the noise N(mean, std) above ``threshold``, added twice, the second time upside down.
    ``keep`` is the share of the original image in the whitened one.
    """
    h, w = images.shape[-2:]
    layer = mean + std * draws.normal("flakes", 1, h, w)
    layer = clipped_zoom(layer, flake)
    layer = truncate(torch.where(layer < threshold, 0, layer).clamp(0, 1))
    layer = smear(layer, radius, sigma, -135 + 90 * draws.uniform("angle"))
    grey = (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    whitened = keep * images + (1 - keep) * torch.maximum(images, grey * 1.5 + 0.5)
    return whitened + layer + layer.flip(-1, -2)


def frost(images: Tensor, draws: Draws, keep: float, ice: float, scale: float) -> Tensor:
    """Frost (procedural): a random cut of one of five synthetic ice textures, mixed as ``keep`` and ``ice`` say.

    The published corruption overlays five photographs that cannot be redistributed here. Ours are drawn instead
    (``ice_textures``), with the photographs' mean colour and contrast, so scores under frost are comparable
    between methods measured here but not with published ImageNet-C or CIFAR-10-C frost scores.
    ``scale`` is the size of the texture relative to the photographs.
    """
    h, w = images.shape[-2:]
    textures = ice_textures(max(round(640 * scale), 2 * max(h, w)), images.device)
    room = textures.shape[-1] - max(h, w)
    pick = (draws.uniform("texture") * len(textures)).long()
    top, left = (draws.uniform("place", 2) * room).long().unbind(1)
    rows = top[:, None] + torch.arange(h, device=images.device)
    columns = left[:, None] + torch.arange(w, device=images.device)
    cut = textures.permute(0, 2, 3, 1)[pick[:, None, None], rows[:, :, None], columns[:, None, :]]
    return keep * images + ice * cut.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=4)
def ice_textures(side: int, device: torch.device) -> Tensor:
    """Five fixed ice-like images (5, 3, side, side) in [0, 1]: ridged fractal noise, warped, in a cold tint.

    Mean and standard deviation of each are set to those measured on the five photographs of the original.
    """
    draws = Draws(torch.arange(5), "ice")
    warp_rows, warp_columns = (_fractal(draws, f"warp {axis}", side, 4, 5) - 0.5 for axis in (0, 1))
    line = torch.linspace(-1, 1, side)
    grid = torch.stack([line + 0.6 * warp_columns, line[:, None] + 0.6 * warp_rows], dim=-1)
    octaves = max(1, int(math.log2(side)) - 2)
    crystals = 1 - (2 * _fractal(draws, "crystals", side, 6, octaves) - 1).abs()
    needles = F.grid_sample(crystals[:, None], grid, padding_mode="reflection", align_corners=True)[:, 0] ** 3
    grain = _fractal(draws, "grain", side, side // 4, 2)
    height = needles / needles.std((1, 2), keepdim=True) + 0.5 * grain / grain.std((1, 2), keepdim=True)
    height = (height - height.mean((1, 2), keepdim=True)) / height.std((1, 2), keepdim=True)
    colour = torch.tensor(
        [[78, 149, 166], [201, 205, 214], [201, 205, 214], [138, 153, 165], [112, 123, 135]]
    )
    contrast = torch.tensor([19, 22, 22, 29, 43])
    return (
        ((colour[:, :, None, None] + contrast[:, None, None, None] * height[:, None]) / 255)
        .clamp(0, 1)
        .to(device)
    )


def _fractal(draws: Draws, name: str, side: int, coarse: int, octaves: int) -> Tensor:
    """(5, side, side) value noise in about [0, 1]: smooth random fields of doubling frequency, halving height."""
    total = torch.zeros(5, side, side)
    for octave in range(octaves):
        cells = min(coarse * 2**octave, side) + 1
        field = draws.uniform(f"{name} {octave}", 1, cells, cells)
        total += F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True)[:, 0] / 2**octave
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low)


def fog(images: Tensor, draws: Draws, thickness: float, decay: float) -> Tensor:
    """Adds ``thickness`` times a plasma fractal and brings the sum back into the image's own range."""
    side = max(images.shape[-2:])
    mist = plasma(draws, 2 ** math.ceil(math.log2(side)), decay)[
        :, None, : images.shape[2], : images.shape[3]
    ]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * mist) * brightest / (brightest + thickness)


def plasma(draws: Draws, side: int, decay: float) -> Tensor:
    """Fractal height maps (B, side, side) in [0, 1] by the diamond-square algorithm on a torus.

    ``side`` is a power of two; the random part shrinks by ``decay`` at each halving of the step.
    """
    height = torch.zeros(len(draws.positions), side, side, device=draws.positions.device)
    step, wobble = side, 100.0

    def perturbed(total: Tensor, name: str) -> Tensor:
        noise = draws.uniform(f"{name} {step}", *total.shape[1:])
        return total / 4 + wobble * wobble * (2 * noise - 1)

    while step >= 2:
        half = step // 2
        corners = height[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = perturbed(pairs + pairs.roll(-1, 2), "square")
        height[:, half::step, half::step] = centres
        above_below = centres + centres.roll(1, 1)
        height[:, ::step, half::step] = perturbed(above_below + corners + corners.roll(-1, 2), "row")
        left_right = centres + centres.roll(1, 2)
        height[:, half::step, ::step] = perturbed(left_right + corners + corners.roll(-1, 1), "column")
        step, wobble = half, wobble / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)
