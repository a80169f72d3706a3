"""Random views of a batch that several methods share. The same generator state gives the same view."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimbench.augment.colour import blur_kernel_size, colour_jitter, gaussian_blur, greyscale, random_jitter
from mimbench.augment.geometry import (
    Interpolation,
    as_float,
    chance,
    image_sizes,
    pad_and_crop,
    portion,
    random_resized_crop_boxes,
    resized_crop,
    uniform,
)
from mimbench.data.split import Batch
from mimbench.errors import DataError


def crop_and_flip(
    batch: Batch,
    size: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    *,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_p: float = 0.5,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """A random resized crop of each image, mirrored with probability ``flip_p``: floats (B, 3, size, size) in [0, 1].

    ``scale`` bounds the crop's share of the image's area, ``ratio`` its width over its height.
    """
    boxes = random_resized_crop_boxes(image_sizes(batch.images, batch.sizes), scale, generator, ratio)
    mirrored = chance(len(batch), flip_p, generator)
    return resized_crop(batch.images, boxes, size, mirrored, interpolation)


def shift_and_flip(
    batch: Batch, generator: torch.Generator, *, padding: int = 4, flip_p: float = 0.5
) -> Tensor:
    """The usual view of CIFAR images: padded, cropped back at random, mirrored: floats of the same shape in [0, 1].

    Raises DataError for images of several sizes, whose borders do not align.
    """
    if batch.sizes is not None:
        raise DataError("padding and cropping needs images of one size", "Use random resized crops")
    offsets = torch.randint(2 * padding + 1, (len(batch), 2), generator=generator, device=batch.images.device)
    mirrored = chance(len(batch), flip_p, generator)
    return as_float(pad_and_crop(batch.images, offsets, padding, mirrored))


def simclr_view(
    batch: Batch,
    size: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    *,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    grey_p: float = 0.2,
    blur_p: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    flip_p: float = 0.5,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """A view as contrastive methods use it: floats (B, 3, size, size) in [0, 1].

    Crop and flip, then colour jitter, greyscale and Gaussian blur, each with its probability per image (Chen et
    al., 2020, appendix A; the defaults are MoCo v2's and SimSiam's). ``jitter`` holds the strengths for
    brightness, contrast, saturation and hue; ``blur_sigma`` is in pixels.
    """

    def blur(images: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_blur(images, sigma, blur_kernel_size(size))

    count = len(batch)
    images = crop_and_flip(batch, size, scale, generator, flip_p=flip_p, interpolation=interpolation)
    # All draws come before the pixels, so that these can be worked on in portions.
    steps: list[tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]] = []
    if jitter_p:
        drawn = random_jitter(count, jitter, generator)
        steps.append((colour_jitter, chance(count, jitter_p, generator), drawn))
    if grey_p:
        steps.append((greyscale, chance(count, grey_p, generator), ()))
    if blur_p:
        sigma = uniform(count, blur_sigma, generator)
        steps.append((blur, chance(count, blur_p, generator), (sigma,)))
    share = portion(images)
    for begin in range(0, count, share):
        here = slice(begin, begin + share)
        for operation, chosen, parameters in steps:
            images[here] = where(chosen[here], operation, images[here], *(p[here] for p in parameters))
    return images


def where(chosen: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """``operation`` on the ``chosen`` (B,) of the images (B, 3, H, W) with their parameters (B, ...).

    A CPU works on those alone; a GPU on all, since it would have to wait to learn how many they are.
    """
    if images.device.type != "cpu":
        return torch.where(chosen.view(-1, 1, 1, 1), operation(images, *parameters), images)
    out, rows = images, chosen.nonzero()[:, 0]
    if len(rows):
        out = images.clone()
        out[rows] = operation(images[rows], *(p[rows] for p in parameters)).expand(-1, 3, -1, -1)
    return out
