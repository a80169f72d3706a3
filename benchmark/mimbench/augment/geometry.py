"""Crops, flips, resizing and affine maps of image batches, each image with its own parameters.

A crop, its antialiased resize and a flip are linear in the pixels and separate into rows and columns, so all
three are two matrix products per image: ``rows @ image @ columns.T``. This is exact, needs no loop over images
and leaves padding untouched, since pixels outside an image's box have no weight.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]

TRIES = 10  # draws of a crop before torchvision falls back to the central one


def as_float(images: Tensor) -> Tensor:
    """uint8 images to floats in [0, 1]; floats pass unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def image_sizes(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, 2) height and width of each image: ``sizes`` of a padded batch, else the tensor's own shape."""
    if sizes is not None:
        return sizes
    return torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)


def chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """(count,) bool, each true with ``probability``."""
    return torch.rand(count, generator=generator, device=generator.device) < probability


def uniform(count: int, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(count,) floats drawn uniformly between ``limits``."""
    return (
        torch.rand(count, generator=generator, device=generator.device) * (limits[1] - limits[0]) + limits[0]
    )


def random_boxes(
    sizes: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
    margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Boxes of random area and shape, each the first of ten tries that fits its image.

    ``sizes`` (B, 2) as height, width; area is uniform in ``scale`` times the image's, width / height is
    log-uniform in ``ratio``; a box fits if its sides are at least ``margin`` pixels below the image's. Returns
    int64 boxes (B, 4) as top, left, height, width, and (B,) whether any try fitted; where none did, the box
    means nothing.
    """
    device = generator.device
    height, width = (side.unsqueeze(1) for side in sizes.unbind(1))
    draws = torch.rand(len(sizes), TRIES, 2, generator=generator, device=device)
    place = torch.rand(len(sizes), 2, generator=generator, device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * draws[..., 1])
    tall, wide = (area / shape).sqrt().round().long(), (area * shape).sqrt().round().long()
    fits = (tall > 0) & (tall <= height - margin) & (wide > 0) & (wide <= width - margin)
    first = fits.int().argmax(dim=1, keepdim=True)
    extent = torch.cat([tall.gather(1, first), wide.gather(1, first)], dim=1)
    room = (sizes - extent).clamp(min=0) + 1
    corner = torch.minimum((place * room).long(), room - 1)
    return torch.cat([corner, extent], dim=1), fits.any(dim=1)


def random_resized_crop_boxes(
    sizes: Tensor,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Crops distributed as torchvision's ``RandomResizedCrop`` draws them, its central fallback included.

    ``sizes`` (B, 2) as height, width. Returns int64 boxes (B, 4) as top, left, height, width in pixels.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(
            f"a crop of {list(scale)} of the image's area", "Both should be above 0, at most 1, and rise"
        )
    boxes, fitted = random_boxes(sizes, scale, ratio, generator)
    height, width = sizes.unbind(1)
    tall = torch.where(width < ratio[0] * height, (width / ratio[0]).round().long(), height)
    wide = torch.where(width > ratio[1] * height, (height * ratio[1]).round().long(), width)
    central = torch.stack([(height - tall) // 2, (width - wide) // 2, tall, wide], dim=1)
    return torch.where(fitted.unsqueeze(1), boxes, central)


def triangle(x: Tensor) -> Tensor:
    """The bilinear kernel at distances ``x``."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel (a = -0.5) at distances ``x``, as antialiased bicubic resizing uses it."""
    x = x.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def sharp_cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1 at distances ``x`` of at most 2, as Pillow's affine transform uses it."""
    x = x.abs()
    return torch.where(x < 1, (x - 2) * x * x + 1, ((5 - x) * x - 8) * x + 4)


KERNELS = {"bilinear": triangle, "bicubic": cubic}


def resampling_matrix(
    extent: int, start: Tensor, step: Tensor, length: Tensor, positions: Tensor, interpolation: Interpolation
) -> Tensor:
    """(B, n, extent) weights that take a line of ``extent`` pixels to n antialiased samples of a stretch of it.

    Image b's stretch begins at pixel ``start[b]`` and is ``length[b]`` long; sample i lies
    ``(positions[b, i] + 0.5) * step[b]`` pixels into it. The kernel widens with ``step`` when shrinking; its
    weights outside the stretch are dropped and the rest rescaled to sum to one, as in torch's antialiasing.
    """
    pixel = torch.arange(extent, device=start.device) + 0.5 - start.unsqueeze(1)
    inside = (pixel > 0) & (pixel < length.unsqueeze(1))
    centre = (positions + 0.5) * step.unsqueeze(1)
    distance = (pixel.unsqueeze(1) - centre.unsqueeze(2)) / step.clamp(min=1).view(-1, 1, 1)
    weights = KERNELS[interpolation](distance) * inside.unsqueeze(1)
    return weights / weights.sum(dim=2, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor, interpolation: Interpolation) -> Tensor:
    """``rows @ image @ columns.T`` of images (B, C, H, W), rows (B, h, H), columns (B, w, W): (B, C, h, w) floats.

    uint8 is scaled to [0, 1], and the result clamped to it, as bicubic resizing overshoots. That of 8-bit images
    is clamped between the two passes too: Pillow and torchvision, which store 8 bits between them, do the same.
    """
    coarse = images.dtype == torch.uint8
    if coarse:
        rows = rows / 255
    with torch.autocast(images.device.type, enabled=False):  # half precision would cost grey levels
        narrow = images.float().flatten(1, 2) @ columns.transpose(1, 2)
        if coarse and interpolation == "bicubic":
            narrow.clamp_(0, 255)
        small = rows.unsqueeze(1) @ narrow.unflatten(1, images.shape[1:3])
    return small.clamp_(0, 1)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: int | tuple[int, int],
    flip: Tensor | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Each image's box, resized with antialiasing and mirrored where ``flip`` (B,) is true.

    ``images`` (B, C, H, W) uint8 or floats in [0, 1]; ``boxes`` (B, 4) as top, left, height, width in pixels,
    inside the image; ``size`` as side or (height, width). Returns floats (B, C, *size) in [0, 1]. Equals
    torchvision's ``resized_crop(antialias=True)``: of floats but for the clamp to [0, 1], of uint8 but for the
    rounding to 8 bits after each of the two passes, which is not imitated (at most 1 level of 255).
    """
    out_height, out_width = (size, size) if isinstance(size, int) else size
    top, left, height, width = boxes.float().unbind(1)
    down = torch.arange(out_height, device=boxes.device).unsqueeze(0)
    across = torch.arange(out_width, device=boxes.device).unsqueeze(0)
    if flip is not None:
        across = torch.where(flip.unsqueeze(1), out_width - 1 - across, across)
    rows = resampling_matrix(images.shape[2], top, height / out_height, height, down, interpolation)
    columns = resampling_matrix(images.shape[3], left, width / out_width, width, across, interpolation)
    return resample(images, rows, columns, interpolation)


def resize_and_center_crop(
    images: Tensor,
    resized: int,
    size: int,
    sizes: Tensor | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """The usual evaluation view: the shorter side resized to ``resized``, then the central square of ``size``.

    ``images`` (B, C, H, W) uint8 or floats in [0, 1], ``sizes`` (B, 2) their true height and width when padded.
    Returns floats (B, C, size, size) in [0, 1]. Equal to torchvision's ``Resize`` and ``CenterCrop``.
    """
    if size > resized:
        raise ConfigError(f"a crop of {size} pixels does not fit in images resized to {resized}")
    lengths = image_sizes(images, sizes)
    shorter = lengths.amin(dim=1, keepdim=True)
    target = lengths * resized // shorter  # torchvision truncates the longer side
    first = ((target - size) / 2).round()
    positions = first.unsqueeze(2) + torch.arange(size, device=images.device)
    step = lengths / target
    start = torch.zeros(len(images), device=images.device)
    rows, columns = (
        resampling_matrix(
            images.shape[2 + axis], start, step[:, axis], lengths[:, axis], positions[:, axis], interpolation
        )
        for axis in (0, 1)
    )
    return resample(images, rows, columns, interpolation)


def horizontal_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Images (B, C, H, W) mirrored left to right where ``flip`` (B,) is true."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def pad_and_crop(images: Tensor, offsets: Tensor, padding: int, flip: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) shifted inside a border of zeros: padded, then cropped to the same size at ``offsets``.

    ``offsets`` (B, 2) as top, left, from 0 to twice ``padding``; mirrored where ``flip`` (B,) is true. The
    small-image augmentation of He et al. (2016, section 4.2). Keeps the dtype.
    """
    count, channels, height, width = images.shape
    device = images.device
    across = torch.arange(width, device=device).unsqueeze(0)
    if flip is not None:
        across = torch.where(flip.unsqueeze(1), width - 1 - across, across)
    rows = (offsets[:, :1] + torch.arange(height, device=device)).view(count, 1, height, 1)
    columns = (offsets[:, 1:] + across).view(count, 1, 1, width)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return F.pad(images, [padding] * 4)[image, channel, rows, columns]


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, 2, 3) for ``affine`` that turn images counter-clockwise about their centre by ``degrees`` (B,)."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    x, y = width / 2, height / 2
    across = torch.stack([cos, -sin, x - cos * x + sin * y], dim=1)
    down = torch.stack([sin, cos, y - sin * x - cos * y], dim=1)
    return torch.stack([across, down], dim=1)


def affine(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Images resampled where affine ``maps`` send each output pixel, as Pillow's bicubic ``transform`` does.

    ``images`` (B, C, H, W) floats in [0, 1]. ``maps`` (B, 2, 3) take (x, y, 1), at pixel centres 0.5, 1.5, ...,
    to x and y in the input. Pixels sent outside the image become ``fill`` (C,); those within read the cubic
    kernel with a = -1 that Pillow uses here, over replicated borders. Returns floats in [0, 1].
    """
    channels, height, width = images.shape[1:]
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, width)
    y = (torch.arange(height, device=images.device) + 0.5).view(1, height, 1)
    (xx, xy, x1), (yx, yy, y1) = (row.unbind(1) for row in maps[..., None, None].unbind(1))
    across, down = xx * x + xy * y + x1, yx * x + yy * y + y1
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    pixels = images.flatten(2)
    out = torch.zeros_like(pixels)
    column, row = (across - 0.5).floor(), (down - 0.5).floor()
    for dy in (-1, 0, 1, 2):
        vertical = sharp_cubic(down - 0.5 - row - dy)
        line = (row + dy).clamp(0, height - 1) * width
        for dx in (-1, 0, 1, 2):
            weight = vertical * sharp_cubic(across - 0.5 - column - dx)
            index = (line + (column + dx).clamp(0, width - 1)).long()
            tap = pixels.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1))
            out += weight.flatten(1).unsqueeze(1) * tap
    return torch.where(outside.unsqueeze(1), fill.view(1, -1, 1, 1), out.clamp_(0, 1).view_as(images))
