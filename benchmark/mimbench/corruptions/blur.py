"""Blur: defocus, frosted glass, motion and zoom; and the filters they share with the weather."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.corruptions.draws import Draws


def defocus_blur(images: Tensor, draws: Draws, radius: float, edge: float) -> Tensor:
    """Convolves images (B, 3, H, W) with a disc of ``radius`` pixels whose rim is smoothed by sigma ``edge``."""
    kernel = _disc(radius, edge).to(images.device)
    reach = kernel.shape[-1] // 2
    b, c, h, w = images.shape
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view(b, c, h, w)


@functools.lru_cache(maxsize=32)
def _disc(radius: float, edge: float) -> Tensor:
    """The kernel (2r + 1, 2r + 1) of ``defocus_blur``, cut to where it is not zero."""
    reach, taps = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disc = (line[:, None] ** 2 + line**2 <= radius**2).double()
    smooth = torch.exp(-(torch.arange(-taps, taps + 1, dtype=torch.float64) ** 2) / (2 * edge**2))
    smooth /= smooth.sum()
    padded = F.pad((disc / disc.sum())[None, None], (taps,) * 4, mode="reflect")
    disc = F.conv2d(padded, smooth[:, None].mul(smooth)[None, None])[0, 0]
    rows = disc.gt(1e-12).any(1).nonzero()
    cut = int(rows[0])
    return disc[cut : len(disc) - cut, cut : len(disc) - cut].float()


def gaussian_filter(images: Tensor, sigma: float, border: str, truncate: float = 4.0) -> Tensor:
    """Gaussian filter of (..., H, W) as two matrix products; ``border`` is "nearest" or "reflect" as in SciPy."""
    h, w = images.shape[-2:]
    down = _gaussian_matrix(h, sigma, border, truncate).to(images.device)
    across = _gaussian_matrix(w, sigma, border, truncate).to(images.device)
    return down @ images @ across.T


@functools.lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, border: str, truncate: float) -> Tensor:
    """(size, size): row i holds the weights of the inputs in output i, the border folded back in."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return torch.eye(size)
    offset = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    weights /= weights.sum()
    source = torch.arange(size)[:, None] + offset
    if border == "nearest":
        source = source.clamp(0, size - 1)
    else:  # mirrored at the outer edge of the last pixel
        source = source % (2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, weights.expand(size, -1)).float()


def glass_blur(images: Tensor, draws: Draws, sigma: float, reach: int, rounds: int) -> Tensor:
    """Blurs, displaces each pixel by up to ``reach`` pixels ``rounds`` times, blurs again.

    The published images were made by a loop from the last pixel to the first in which each pixel takes the
    *current* value of a random neighbour (it was written as a swap, but the two sides are views of one array,
    so one of them is lost). A pixel may thus pass on what it has itself just taken. These chains always run
    towards later pixels, so they are followed for all images at once by pointer doubling.
    """
    b, c, h, w = images.shape
    blurred = truncate(gaussian_filter(images, sigma, "nearest")).flatten(2)
    for number in range(rounds):
        source = _glass_sources(draws.uniform(f"offsets {number}", 2, h, w), reach)
        blurred = blurred.gather(2, source[:, None].expand(-1, c, -1))
    return gaussian_filter(blurred.view(b, c, h, w), sigma, "nearest")


def _glass_sources(noise: Tensor, reach: int) -> Tensor:
    """(B, H * W): for each pixel the index of the one whose value it ends with; ``noise`` (B, 2, H, W) in (0, 1).

    ``noise[:, 0]`` moves along the row, ``noise[:, 1]`` along the column, both by -reach to reach - 1.
    """
    b, _, h, w = noise.shape
    here = torch.arange(h * w, device=noise.device).view(h, w)
    shift = (noise * (2 * reach)).long() - reach
    inside = torch.zeros(h, w, dtype=torch.bool, device=noise.device)
    inside[reach + 1 : h - reach + 1, reach + 1 : w - reach + 1] = True
    chosen = torch.where(inside, here + shift[:, 1] * w + shift[:, 0], here).flatten(1)
    # Two nodes per pixel, its final and its original value. A pixel that takes from itself or from one not yet
    # visited takes an original value; there its chain ends.
    final = torch.where(chosen <= here.flatten(), chosen + h * w, chosen)
    original = (here.flatten() + h * w).expand(b, -1)
    step = torch.cat([final, original], dim=1)
    for _ in range(math.ceil(math.log2(h * w))):
        step = step.gather(1, step)
    return step[:, : h * w] - h * w


def motion_blur(images: Tensor, draws: Draws, radius: float, sigma: float) -> Tensor:
    """Smears along a random direction within 45 degrees of the horizontal."""
    return smear(images, radius, sigma, -45 + 90 * draws.uniform("angle"))


def smear(images: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:
    """One-sided motion blur of (B, C, H, W) along ``angle`` (B,) in degrees, as ImageMagick's MotionBlurImage.

    The weights are half a Gaussian over 2 * ceil(radius) + 1 whole-pixel steps; edge pixels are repeated. The
    result is rounded to 16 bits, then cut to 8, as when that library writes an 8-bit file.
    """
    b, c, h, w = images.shape
    width = 2 * math.ceil(radius) + 1
    weights = torch.exp(-(torch.arange(width, dtype=torch.float64) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = torch.deg2rad(angle)[:, None]
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    flat = images.flatten(2)
    total = torch.zeros_like(flat)
    for step, weight in enumerate(weights.tolist()):
        if weight < 1e-7:  # less than float32 resolves, and so are all that follow
            break
        down = (rows + torch.ceil(step * radians.sin() - 0.5).long()).clamp(0, h - 1)
        right = (columns + torch.ceil(step * radians.cos() - 0.5).long()).clamp(0, w - 1)
        source = (down[:, :, None] * w + right[:, None, :]).view(b, 1, h * w).expand(-1, c, -1)
        total.add_(flat.gather(2, source), alpha=weight)
    levels = (total * 65535 + 0.5).floor().div(257, rounding_mode="floor")
    return levels.view(b, c, h, w) / 255


def zoom_blur(images: Tensor, draws: Draws, step: float, steps: int) -> Tensor:
    """The mean of the image and of ``steps`` enlargements of it by 1, 1 + step, 1 + 2 step and so on."""
    total = images.clone()
    for number in range(steps):
        total += clipped_zoom(
            images, 1 + number * ((1 + step) - 1)
        )  # as arange adds up: 26 * 1.25 is above 32.5
    return total / (steps + 1)


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """The middle of square images (B, C, S, S), enlarged bilinearly to S x S (corners aligned, as SciPy's zoom)."""
    side = images.shape[-1]
    crop = math.ceil(side / factor)
    top = (side - crop) // 2
    middle = images[..., top : top + crop, top : top + crop]
    larger = round(crop * factor)
    if larger != crop:
        middle = F.interpolate(middle, size=(larger, larger), mode="bilinear", align_corners=True)
    trim = (larger - side) // 2
    return middle[..., trim : trim + side, trim : trim + side]


def truncate(images: Tensor) -> Tensor:
    """Values in [0, 1] cut down to multiples of 1/255, as a cast to uint8 does.

    A value that lies below a whole level by no more than float32 rounding counts as that level.
    """
    return (images * 255 + 2.0**-13).floor() / 255
