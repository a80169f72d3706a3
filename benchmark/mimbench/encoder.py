"""What protocols see of a method: images in, features out.

An encoder is any ``nn.Module`` that meets the ``Encoder`` protocol below; ``ViTEncoder`` and
``ResNetEncoder`` in ``mimbench.models`` do so for the shared backbones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """The input an encoder was trained on; protocols resize and normalise to it."""

    size: int  # side of the square training image, in pixels
    mean: tuple[float, ...] = IMAGENET_MEAN  # subtracted per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD  # divided by per channel


class Features(NamedTuple):
    """What an encoder says of a batch of B images."""

    pooled: Tensor  # (B, D): the vector that probes read
    patches: Tensor  # (B, D, h, w): dense features on the patch grid, after the final norm
    layers: tuple[Tensor, ...] = ()  # (B, D_i, h_i, w_i) for each layer asked for


@runtime_checkable
class Encoder(Protocol):
    """Images to features. Frozen probes call it; fine-tuning calls it through ``for_finetuning``."""

    name: str  # of the backbone, as tables print it: "vit-b/16"
    input: InputSpec
    dim: int  # width D of ``Features.pooled`` and ``Features.patches``
    depth: int  # how many layers ``layers=`` can select from, numbered 0 to depth - 1
    stride: int  # pixels per step of the patch grid; image sides must be multiples of it
    readout: str  # how ``pooled`` is read, e.g. "class token after the final norm"; part of fingerprints

    def __call__(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """Features of normalised float images (B, C, H, W), for any H and W divisible by ``stride``."""
        ...

    def for_finetuning(self, drop_path: float = 0.0) -> Encoder:
        """A trainable copy whose ``pooled`` is what the published fine-tuning head reads."""
        ...

    def layer_of(self, parameter: str) -> int:
        """The depth of a named parameter for layer-wise decay: 0 = embedding, depth + 1 = what tops it."""
        ...


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 or [0, 1] float images (B, 3, H, W) to the normalised floats that an encoder expects."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    mean = torch.tensor(spec.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, -1, 1, 1)
    return (pixels - mean) / std


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) to ``size`` = (height, width): bicubic, antialiased, kept in range; floats in [0, 1]."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
