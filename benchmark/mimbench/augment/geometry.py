"""Crops, flips, resizing and affine maps of image batches, each image with its own parameters.

A crop, its antialiased resize and a flip are linear in the pixels and separate into rows and columns, so all
three are two matrix products per image: ``rows @ image @ columns.T``. This is exact and leaves padding
untouched, since pixels outside an image's box have no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]

TRIES = 10  # draws of a crop before torchvision falls back to the central one
SMALL = 6 * 2**20  # products per image up to which a CPU uses dense matrices: about where both ways tie
CACHED = 2**18  # pixel values that a CPU works on at a time, so that it finds them in its cache again
BLOCK = 32  # samples that share a window of the pixels; 28 to 56 are about equally fast


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


KERNELS = {"bilinear": (triangle, 1.0), "bicubic": (cubic, 2.0)}  # and how far they reach


@dataclass(frozen=True)
class Taps:
    """What each of n samples along one axis reads of a line of pixels."""

    first: Tensor  # (B, n) the first pixel that counts
    weights: Tensor  # (B, k, n) of that pixel and of those that follow it

    def __getitem__(self, images: slice) -> Taps:
        return Taps(self.first[images], self.weights[images])

    def matrix(self, origin: Tensor, extent: int) -> Tensor:
        """(B, extent, n) the same as matrices over ``extent`` pixels from pixel ``origin`` (B, n) on."""
        count, taps, samples = self.weights.shape
        place = (self.first - origin).unsqueeze(1) + torch.arange(taps, device=origin.device).view(-1, 1)
        # Pixels beyond the line have no weight; k more rows give each a place of its own all the same.
        dense = self.weights.new_zeros(count, extent + taps, samples)
        return dense.scatter_(1, place, self.weights)[:, :extent]


def resampling_taps(
    start: Tensor,
    step: Tensor,
    length: Tensor,
    positions: Tensor,
    interpolation: Interpolation,
    largest_step: float,
) -> Taps:
    """Antialiased samples of a stretch of a line of pixels.

    Image b's stretch begins at pixel ``start[b]`` and is ``length[b]`` long; sample i lies
    ``(positions[b, i] + 0.5) * step[b]`` pixels into it. The kernel widens with ``step`` when shrinking; its
    weights outside the stretch are dropped and the rest rescaled to sum to one, as in torch's antialiasing.
    No ``step`` is above ``largest_step``, which makes the number of taps known without a look at the device.
    """
    kernel, reach = KERNELS[interpolation]
    taps = math.ceil(2 * reach * max(largest_step, 1.0)) + 1  # one more than is needed absorbs rounding
    width = step.clamp(min=1).unsqueeze(1)
    centre = (positions + 0.5) * step.unsqueeze(1)
    first = (centre - reach * width + 0.5).long().clamp(min=0)
    pixel = (first + 0.5).unsqueeze(1) + torch.arange(taps, device=start.device).view(-1, 1)
    weights = kernel((pixel - centre.unsqueeze(1)) / width.unsqueeze(2))
    weights = weights * (pixel < length.view(-1, 1, 1))
    return Taps(first + start.long().unsqueeze(1), weights / weights.sum(dim=1, keepdim=True))


def portion(images: Tensor) -> int:
    """How many images to work on at a time: all on a GPU, on a CPU as many as its cache holds."""
    return max(1, CACHED // images[0].numel() if images.device.type == "cpu" and len(images) else len(images))


def resample(images: Tensor, rows: Taps, columns: Taps, overshoots: bool = False) -> Tensor:
    """Images (B, C, H, W) sampled at h ``rows`` and w ``columns``: (B, C, h, w) floats.

    uint8 is scaled to [0, 1], and the result clamped to it. Where the first pass ``overshoots`` the range of
    8-bit images it is clamped too: Pillow and torchvision, which store 8 bits between the passes, do the same.
    """
    coarse = images.dtype == torch.uint8
    overshoots = overshoots and coarse
    if coarse:
        rows = Taps(rows.first, rows.weights / 255)
    count, channels, height, width = images.shape
    tall, wide = rows.first.shape[1], columns.first.shape[1]
    out = torch.empty(count, channels, tall, wide, device=images.device)
    way, share = _resample_at_once, portion(images)
    if images.device.type == "cpu" and channels * height * wide * (width + tall) > SMALL:
        way, share = _resample_in_blocks, max(16, share)  # which goes through them one by one
    with torch.autocast(images.device.type, enabled=False):  # half precision would cost grey levels
        for begin in range(0, count, share):
            here = slice(begin, begin + share)
            way(images[here], rows[here], columns[here], overshoots, out[here])
    return out


def _resample_at_once(images: Tensor, rows: Taps, columns: Taps, overshoots: bool, out: Tensor) -> None:
    """Two batched products with dense matrices: no loop over images, and mostly products with zero."""
    count, channels, height, width = images.shape
    zero = rows.first.new_zeros(1, 1)
    lines = images.transpose(1, 2).to(torch.float, memory_format=torch.contiguous_format)
    narrow = lines.reshape(count, -1, width) @ columns.matrix(zero, width)
    if overshoots:
        narrow.clamp_(0, 255)
    small = rows.matrix(zero, height).mT @ narrow.view(count, height, -1)
    torch.clamp(small.unflatten(2, (channels, -1)).transpose(1, 2), 0, 1, out=out)


def _resample_in_blocks(images: Tensor, rows: Taps, columns: Taps, overshoots: bool, out: Tensor) -> None:
    """The same image by image and ``BLOCK`` samples at a time, which reads only the pixels that they need.

    For large images on a CPU, where this saves most of the arithmetic and stays within the cache; small
    images would be slowed down by the many calls, as a GPU would.
    """
    channels, height, width = images.shape[1:]
    tall, wide = out.shape[2:]
    lefts, across = _blocks(columns, width)
    tops, down = _blocks(rows, height)
    pixels = torch.empty(height * channels * width)
    lines = torch.empty(height * channels, wide)
    turned = torch.empty(tall, channels * wide)
    samples = turned.split(BLOCK)
    upright = turned.view(tall, channels, wide).transpose(0, 1)
    for image, place, left, weights_across, top, weights_down in zip(
        images, out, lefts, zip(*across, strict=True), tops, zip(*down, strict=True), strict=True
    ):
        x, y = min(left), min(top)
        w, h = max(left) + across[0].shape[1] - x, max(top) + down[0].shape[1] - y
        part = pixels[: h * channels * w].view(h, channels, w)
        part.copy_(image[:, y : y + h, x : x + w].transpose(0, 1))
        part, narrow = part.view(-1, w), lines[: h * channels]
        for begin, weights, target in zip(left, weights_across, narrow.split(BLOCK, 1), strict=True):
            torch.mm(part.narrow(1, begin - x, len(weights)), weights, out=target)
        if overshoots:
            narrow.clamp_(0, 255)
        narrow = narrow.view(h, -1)
        for begin, weights, target in zip(top, weights_down, samples, strict=True):
            torch.mm(weights.T, narrow.narrow(0, begin - y, len(weights)), out=target)
        torch.clamp(upright, 0, 1, out=place)


def _blocks(taps: Taps, extent: int) -> tuple[list[list[int]], tuple[Tensor, ...]]:
    """The first pixel of each ``BLOCK`` samples, (B, blocks), and their weights from there on, (B, pixels, n) each.

    All windows are equally long and within the line of ``extent`` pixels.
    """
    parts = taps.first.split(BLOCK, dim=1)
    begin = torch.stack([part.amin(dim=1) for part in parts], dim=1)
    span = max(int((part.amax(dim=1) - part.amin(dim=1)).max()) for part in parts) + taps.weights.shape[1]
    span = min(span, extent)
    begin = begin.clamp(max=extent - span)
    origin = begin.repeat_interleave(BLOCK, dim=1)[:, : taps.first.shape[1]]
    return begin.tolist(), taps.matrix(origin, span).split(BLOCK, dim=2)


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
    rows = resampling_taps(
        top, height / out_height, height, down, interpolation, images.shape[2] / out_height
    )
    columns = resampling_taps(
        left, width / out_width, width, across, interpolation, images.shape[3] / out_width
    )
    return resample(images, rows, columns, overshoots=interpolation == "bicubic")


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
    largest = min(images.shape[2:]) / max(resized - 1, 0.5)  # the truncation makes steps longer
    start = torch.zeros(len(images), device=images.device)
    rows, columns = (
        resampling_taps(start, step[:, axis], lengths[:, axis], positions[:, axis], interpolation, largest)
        for axis in (0, 1)
    )
    return resample(images, rows, columns, overshoots=interpolation == "bicubic")


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
