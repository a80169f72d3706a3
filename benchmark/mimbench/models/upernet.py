"""A UPerNet-style head (Xiao et al., 2018): pyramid pooling, a feature pyramid, and a fusion of its levels.

It differs from the published head in its norm: GroupNorm in place of synchronised BatchNorm, so that
neither training nor scores depend on how many images share a batch. The auxiliary head that some code
bases add is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SIZES = (1, 2, 3, 6)  # grids that pyramid pooling averages the deepest map to


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) resized bilinearly to ``size`` = (height, width), corners not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """At least 16 channels per group: a pooled map of one position then still has something to average."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        group_norm(outputs),
        nn.ReLU(inplace=True),
    )


class Rescale(nn.Module):
    """Four maps of one size to sizes x4, x2, x1 and x0.5, as plain ViTs are given a pyramid (BEiT, MAE).

    Each map is normalised first: the output of an inner block has passed no norm of its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(1, width) for _ in range(4)])
        self.x4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            group_norm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.x2 = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        a, b, c, d = (norm(m) for norm, m in zip(self.norms, maps, strict=True))
        return [self.x4(a), self.x2(b), c, F.max_pool2d(d, 2, ceil_mode=True)]


class UPerNet(nn.Module):
    """Four maps, fine to coarse, to class logits at the resolution of the finest."""

    def __init__(
        self, widths: Sequence[int], classes: int, width: int, dropout: float, rescale: bool
    ) -> None:
        """``widths`` are the channels of the four maps; ``rescale`` says that all four have one size."""
        super().__init__()
        self.rescale = Rescale(widths[0]) if rescale else nn.Identity()
        self.pools = nn.ModuleList([convolution(widths[-1], width, 1) for _ in POOL_SIZES])
        self.bottleneck = convolution(widths[-1] + len(POOL_SIZES) * width, width, 3)
        self.laterals = nn.ModuleList([convolution(w, width, 1) for w in widths[:-1]])
        self.smooth = nn.ModuleList([convolution(width, width, 3) for _ in widths[:-1]])
        self.fuse = convolution(len(widths) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) to logits (B, classes, h_0, w_0), h_0 being four times h where rescaled."""
        *finer, deepest = self.rescale(maps)
        size = deepest.shape[2:]
        pooled = [
            upsample(pool(F.adaptive_avg_pool2d(deepest, grid)), size)
            for pool, grid in zip(self.pools, POOL_SIZES, strict=True)
        ]
        level = self.bottleneck(torch.cat([deepest, *pooled], dim=1))
        levels = [level]
        for fine, lateral, smooth in zip(
            reversed(finer), reversed(self.laterals), reversed(self.smooth), strict=True
        ):
            level = lateral(fine) + upsample(level, fine.shape[2:])
            levels.append(smooth(level))
        finest = levels[-1].shape[2:]
        fused = self.fuse(torch.cat([upsample(m, finest) for m in reversed(levels)], dim=1))
        return self.classify(self.dropout(fused))
