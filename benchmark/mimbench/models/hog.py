"""Histograms of oriented gradients (Dalal and Triggs, 2005), as masked feature prediction computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def hog(
    images: Tensor, cell: int, bins: int = 9, offset: Tensor | None = None, normalise: bool = True
) -> Tensor:
    """Histograms (B, C, bins, H / cell, W / cell) of float images (B, C, H, W), of each channel for itself.

    Gradients come from Sobel kernels on reflected borders; each pixel's magnitude goes whole to the one bin of
    its unsigned orientation; every cell's histogram has length 1 (0 in a flat cell). This local contrast
    normalisation is over the bins of one cell and channel, not over blocks of cells. ``offset`` (2, C) is added
    to both gradients; without ``normalise`` magnitudes are summed only. Source: ``HOGLayerC`` in MaskFeat's code
    (SlowFast, operators.py).
    """
    with torch.autocast(images.device.type, enabled=False):
        x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        down = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]  # smoothed along columns
        across = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
        gx = down[..., :-2] - down[..., 2:]
        gy = across[:, :, :-2] - across[:, :, 2:]
        if offset is not None:
            gx, gy = gx + offset[0, :, None, None], gy + offset[1, :, None, None]
        angle = torch.atan2(gx, gy) / math.pi * bins
        which = angle.floor() % bins  # opposite directions share a bin
        magnitude = torch.hypot(gx, gy)[:, :, None]
        spread = magnitude.new_zeros(*which.shape[:2], bins, *which.shape[2:])
        spread.scatter_(2, which.long()[:, :, None], magnitude)
        cells = F.avg_pool2d(spread.flatten(0, 1), cell).unflatten(0, which.shape[:2])
        return F.normalize(cells, dim=2) if normalise else cells * cell**2
