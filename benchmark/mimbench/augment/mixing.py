"""Random erasing, mixup and cutmix of image batches, in timm's variants, which MAE and others fine-tune with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.augment.geometry import chance, image_sizes, random_boxes
from mimbench.errors import ConfigError

BETA_TRIES = 64  # each fails with probability at most one half


def in_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, height, width) bool: which pixels lie in boxes (B, 4) of top, left, height, width."""
    top, left, tall, wide = boxes[..., None, None].unbind(1)
    y = torch.arange(height, device=boxes.device).view(1, height, 1)
    x = torch.arange(width, device=boxes.device).view(1, 1, width)
    return ((y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)).unsqueeze(1)


def erase(images: Tensor, boxes: Tensor, filling: Tensor | float) -> Tensor:
    """Images (B, C, H, W) with ``filling``, of any shape that broadcasts, in boxes (B, 4); empty boxes do nothing."""
    return torch.where(in_boxes(boxes, *images.shape[2:]), filling, images)


def random_erasing(
    images: Tensor,
    generator: torch.Generator,
    *,
    erase_p: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    noise: bool = True,
) -> Tensor:
    """One random box per image (Zhong et al., 2020) filled with standard normal ``noise`` or with zeros.

    Meant for normalised images (B, C, H, W), where noise and zeros have the statistics of pixels. ``area`` is
    the box's share of the image, ``ratio`` its height over its width; an image is spared with probability
    1 - ``erase_p`` and when ten tries gave no box smaller than it.
    """
    boxes, fitted = random_boxes(image_sizes(images), area, (1 / ratio[1], 1 / ratio[0]), generator, margin=1)
    chosen = fitted & chance(len(images), erase_p, generator)
    filling = torch.randn(images.shape, generator=generator, device=images.device) if noise else 0.0
    return erase(images, boxes * chosen.unsqueeze(1), filling)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """(B, num_classes) one-hot targets of labels (B,), a share ``smoothing`` of them spread over all classes."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(images: Tensor, targets: Tensor, weight: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Images and targets mixed with those at ``partner`` (B,), each pixel keeping its own value by ``weight``.

    ``weight`` (H, W) in [0, 1]: constant it is mixup (Zhang et al., 2018), zero in a box and one elsewhere
    cutmix (Yun et al., 2019). Targets (B, K) are mixed by its mean. ``images`` (B, C, H, W) are floats.
    """
    share = weight.mean()
    return images * weight + images[partner] * (1 - weight), targets * share + targets[partner] * (1 - share)


def cutmix_weight(kept: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Weights (height, width) for ``mix`` that are zero in a box of share 1 - ``kept`` of the image, else one.

    ``kept`` is a scalar, ``centre`` (2,) the box's middle pixel as y, x; what lies outside the image is cut off.
    """
    side = torch.tensor([height, width], device=kept.device)
    extent = (side * (1 - kept).sqrt()).long()
    low = (centre - extent // 2).clamp(min=0)
    high = torch.minimum(centre + (extent + 1) // 2, side)
    return 1 - in_boxes(torch.cat([low, high - low]).unsqueeze(0), height, width)[0, 0].float()


def draw_beta(alpha: float, generator: torch.Generator) -> Tensor:
    """A scalar from Beta(alpha, alpha), 0 < alpha <= 1, by Jöhnk's rejection (1964), without leaving the device.

    torch's own Beta distribution takes no generator.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"mixup and cutmix need an alpha above 0 and up to 1, not {alpha}")
    x, y = torch.rand(2, BETA_TRIES, generator=generator, device=generator.device).log() / alpha
    first = (x.exp() + y.exp() <= 1).int().argmax(dim=0, keepdim=True)
    return torch.sigmoid((x - y).gather(0, first)).squeeze(0)


def random_mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    mix_p: float = 1.0,
    cutmix_p: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Mixup or, with probability ``cutmix_p``, cutmix of the whole batch with itself in reverse order.

    One choice and one weight per batch, applied with probability ``mix_p``, as timm's ``Mixup`` in its batch
    mode. ``images`` (B, C, H, W) floats, ``labels`` (B,). Returns mixed images and targets (B, num_classes), into
    which label ``smoothing`` is folded. An alpha of 0 turns its kind off.
    """
    height, width = images.shape[2:]
    device = images.device
    targets = soft_targets(labels, num_classes, smoothing)
    if mixup_alpha == cutmix_alpha == 0:
        return images, targets
    weights = []
    if mixup_alpha:
        weights.append(draw_beta(mixup_alpha, generator).expand(height, width))
    if cutmix_alpha:
        side = torch.tensor([height, width], device=device)
        centre = (torch.rand(2, generator=generator, device=device) * side).long()
        weights.append(cutmix_weight(draw_beta(cutmix_alpha, generator), centre, height, width))
    weight = torch.where(chance(1, cutmix_p, generator), weights[-1], weights[0])
    weight = torch.where(chance(1, mix_p, generator), weight, 1.0)
    return mix(images, targets, weight, torch.arange(len(images), device=device).flip(0))
