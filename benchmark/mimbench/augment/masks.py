"""Masks on the patch grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mimbench.errors import ConfigError

ASPECTS = (0.3, 1 / 0.3)  # least and most height of a block over its width
TRIES = 10  # draws in a row without a fitting block after which BEiT's generator gives up


def block_masks(
    count: int,
    grid: tuple[int, int],
    hidden: int,
    smallest: int,
    generator: torch.Generator,
    exact: bool = True,
) -> Tensor:
    """Block-wise masks (count, rows * columns), True where hidden (BEiT, Bao et al., 2022, Algorithm 1).

    Blocks are laid over each other until ``hidden`` patches are covered. A block's area is uniform between
    ``smallest`` and what is still missing, its aspect ratio log-uniform in ``ASPECTS``; it is taken when it
    adds some patches and not too many. Where none has fitted ``TRIES`` times the rest is hidden patch by patch
    at random, or, without ``exact``, left visible, as the authors of BEiT and MaskFeat do. All images are
    drawn side by side. Raises ConfigError when the grid has no ``hidden`` patches to hide.
    """
    rows, columns = grid
    if not 0 < hidden < rows * columns:
        raise ConfigError(
            f"{hidden} of {rows * columns} patches cannot be hidden",
            "Choose a mask ratio that keeps and hides at least one patch",
        )
    device = generator.device
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    mask = torch.zeros(count, rows, columns, dtype=torch.bool, device=device)
    failed = torch.zeros(count, device=device)  # draws in a row that did not fit
    low, high = (math.log(aspect) for aspect in ASPECTS)
    while True:
        missing = hidden - mask.sum((1, 2))
        active = (missing > 0) & (failed < TRIES)
        if not active.any():
            break
        draw = torch.rand(4, count, generator=generator, device=device)
        area = smallest + draw[0] * (missing - smallest)
        aspect = torch.exp(low + draw[1] * (high - low))
        height = (area * aspect).sqrt().round()
        width = (area / aspect).sqrt().round()
        top = (draw[2] * (rows - height + 1)).floor()[:, None, None]
        left = (draw[3] * (columns - width + 1)).floor()[:, None, None]
        covered = (row >= top) & (row < top + height[:, None, None])
        inside = covered & (column >= left) & (column < left + width[:, None, None])
        added = (inside & ~mask).sum((1, 2))
        fits = active & (height < rows) & (width < columns) & (added > 0) & (added <= missing)
        mask |= inside & fits[:, None, None]
        failed = torch.where(fits, 0.0, failed + 1)
    mask = mask.flatten(1)
    if not exact:
        return mask
    # hidden patches rank first, the others at random
    noise = torch.rand(mask.shape, generator=generator, device=device) - mask.to(torch.float32)
    return noise.argsort(dim=1).argsort(dim=1) < hidden
