"""Random views of a batch that several methods share. The same generator state gives the same view."""

from __future__ import annotations

import torch
from torch import Tensor

from mimbench.augment.colour import blur_kernel_size, colour_jitter, gaussian_blur, greyscale, random_jitter
from mimbench.augment.geometry import (
    Interpolation,
    as_float,
    chance,
    image_sizes,
    pad_and_crop,
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

    def choose(probability: float) -> Tensor:
        return chance(len(batch), probability, generator).view(-1, 1, 1, 1)

    images = crop_and_flip(batch, size, scale, generator, flip_p=flip_p, interpolation=interpolation)
    if jitter_p:
        jittered = colour_jitter(images, *random_jitter(len(batch), jitter, generator))
        images = torch.where(choose(jitter_p), jittered, images)
    if grey_p:
        images = torch.where(choose(grey_p), greyscale(images), images)
    if blur_p:
        blurred = gaussian_blur(images, uniform(len(batch), blur_sigma, generator), blur_kernel_size(size))
        images = torch.where(choose(blur_p), blurred, images)
    return images
