"""Changes of colour and sharpness of image batches, each image with its own parameters.

All take and return floats (B, 3, H, W) in [0, 1]; parameters are (B,). Torchvision's and Pillow's definitions
for 8-bit images are followed without their rounding, unless an operation is about grey levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.augment.geometry import Taps, portion, resample, uniform

LEVELS = 255  # the largest 8-bit grey level
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of colour jitter's factors


def per_image(values: Tensor) -> Tensor:
    """(B,) parameters shaped to scale images (B, C, H, W)."""
    return values.view(-1, 1, 1, 1)


def in_portions(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``operation`` on images (B, C, H, W) and parameters (B, ...), a few images at a time on a CPU.

    An operation makes many passes over its images. They run several times faster while these lie in the cache
    and memory is not asked for anew; no image depends on another, so the result is the same.
    """

    @functools.wraps(operation)
    def run(images: Tensor, *arguments: Tensor | int) -> Tensor:
        count, share = len(images), portion(images)
        if count <= share:
            return operation(images, *arguments)
        out = images.new_empty(0)
        for begin in range(0, count, share):
            here = slice(begin, begin + share)
            done = operation(images[here], *(a[here] if isinstance(a, Tensor) else a for a in arguments))
            if not begin:
                out = done.new_empty(count, *done.shape[1:])
            out[here] = done
        return out

    return run


@in_portions
def greyscale(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of ITU-R 601, with the weights of torchvision."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def blend(images: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """From ``target`` at factor 0 through the images at 1 and beyond, clamped to [0, 1]."""
    return torch.lerp(target, images, per_image(factor)).clamp_(0, 1)


@in_portions
def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black."""
    return (images * per_image(factor)).clamp_(0, 1)


@in_portions
def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean grey."""
    return blend(images, greyscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


@in_portions
def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the grey image."""
    return blend(images, greyscale(images), factor)


@in_portions
def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with a 3x3 smoothing (weights 1, in the middle 5); the outermost pixels stay."""
    lines = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    squares = lines[..., :-2, :] + lines[..., 1:-1, :] + lines[..., 2:, :]
    inner = images[..., 1:-1, 1:-1]
    out = images.clone()
    out[..., 1:-1, 1:-1] = blend(inner, (squares + 4 * inner) / 13, factor)
    return out


@in_portions
def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by ``shift``, in turns of the colour circle from -0.5 to 0.5."""
    red, green, blue = images.unbind(1)
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    safe = torch.where(chroma == 0, 1.0, chroma)  # grey has no hue and, its chroma being 0, needs none
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth.add_(shift.view(-1, 1, 1), alpha=6)
    out = torch.empty_like(images)
    for channel, offset in enumerate((3, 1, -1)):  # red, green and blue lose chroma over different arcs
        turn = sixth + offset
        arc = turn.sub_(
            (turn / 6).round_(), alpha=6
        ).abs_()  # to the middle of that arc, at most half a circle
        torch.sub(high, chroma * arc.neg_().add_(2).clamp_(0, 1), out=out[:, channel])
    return out


@in_portions
def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue changed in each image's own order, as torchvision does.

    ``factors`` (B, 4): three blend factors and the shift of hue; ``order`` (B, 4): a permutation of 0 to 3
    per image, the operations as they follow each other. The three blends differ only in their target, so they
    run together, once for what comes before the change of hue and once for what comes after.
    """
    hue_at = (order == HUE).int().argmax(dim=1)
    blends = order.gather(1, (order == HUE).int().argsort(dim=1, stable=True))[:, :3]
    strengths = factors.gather(1, blends)

    def run(images: Tensor, chosen: Tensor) -> Tensor:
        for step in range(3):
            grey = greyscale(images)
            operation = per_image(blends[:, step])
            mean = grey.mean(dim=(1, 2, 3), keepdim=True)
            # Towards its mean, itself, or black; faster than a choice, and exact, as each factor is 0 or 1.
            target = grey * (operation == SATURATION).float() + mean * (operation == CONTRAST).float()
            images = blend(images, target, torch.where(chosen[:, step], strengths[:, step], 1.0))
        return images

    before = torch.arange(3, device=order.device) < hue_at.unsqueeze(1)
    return run(adjust_hue(run(images, before), factors[:, HUE]), ~before)


def random_jitter(
    count: int, strength: tuple[float, float, float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors (count, 4) and orders (count, 4) for ``colour_jitter``, distributed as torchvision draws them.

    ``strength`` of brightness, contrast, saturation and hue.
    """
    blends = [uniform(count, (max(0.0, 1 - s), 1 + s), generator) for s in strength[:3]]
    hue = uniform(count, (-strength[3], strength[3]), generator)
    order = torch.rand(count, 4, generator=generator, device=generator.device).argsort(dim=1)
    return torch.stack([*blends, hue], dim=1), order


def blur_kernel_size(size: int) -> int:
    """SimCLR's kernel for images of a side: the odd number of pixels at a tenth of it (23 at 224, 3 at 32)."""
    return 2 * (size // 20) + 1


@in_portions
def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur by ``sigma`` (B,) pixels, cut off at an odd ``kernel_size``, over mirrored borders."""
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (taps / sigma.unsqueeze(1)) ** 2, dim=1).unsqueeze(2)
    kernels = F.threshold(kernels, 1e-12, 0.0)  # numbers near the smallest there are slow a CPU down tenfold

    def along(length: int) -> Taps:
        first = torch.arange(length, device=images.device).expand(len(images), -1)
        return Taps(first, kernels.expand(-1, -1, length))

    padded = F.pad(images, [reach] * 4, mode="reflect")  # the edge pixel itself is not repeated
    return resample(padded, along(images.shape[2]), along(images.shape[3]))


@in_portions
def invert(images: Tensor) -> Tensor:
    """The negative."""
    return 1 - images


@in_portions
def solarise(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts pixels at or above ``threshold``, on the scale of the images."""
    return torch.where(images >= per_image(threshold), 1 - images, images)


@in_portions
def brighten_shadows(images: Tensor, addition: Tensor) -> Tensor:
    """Adds ``addition``, on the scale of the images, to 8-bit levels below 128 (timm's SolarizeAdd)."""
    return torch.where(images * LEVELS < 128, (images + per_image(addition)).clamp(max=1), images)


def levels(images: Tensor) -> Tensor:
    """The nearest 8-bit grey levels, still as floats."""
    return (images * LEVELS).round()


@in_portions
def posterise(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the ``bits`` (0 to 8) most significant bits of the 8-bit level."""
    step = per_image(torch.exp2(8.0 - bits))
    return (levels(images) / step).floor() * step / LEVELS


@in_portions
def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to the full range; a flat channel stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


@in_portions
def equalise(images: Tensor) -> Tensor:
    """Spreads each channel's 8-bit levels to a flat histogram, by Pillow's integer rule."""
    level = levels(images).long().flatten(2)
    counts = torch.zeros(*level.shape[:2], LEVELS + 1, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, level, torch.ones_like(level))
    below = counts.cumsum(dim=2) - counts
    brightest = level.amax(dim=2, keepdim=True)
    step = below.gather(2, brightest).div(LEVELS, rounding_mode="floor")  # pixels per level of the result
    table = (below + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp(max=LEVELS)
    spread = torch.where(step == 0, level, table.gather(2, level))  # too few pixels or levels: unchanged
    return spread.view_as(images) / LEVELS
