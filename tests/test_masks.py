"""Block-wise masks."""

from __future__ import annotations

import pytest
import torch

from mimbench.augment.masks import block_masks
from mimbench.errors import ConfigError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_number_of_hidden_patches_is_exact() -> None:
    masks = block_masks(10_000, (14, 14), 75, 16, generator())
    assert masks.shape == (10_000, 196)
    assert (masks.sum(1) == 75).all()


def test_without_exact_some_masks_stay_short_but_none_goes_over() -> None:
    hidden = block_masks(2_000, (14, 14), 78, 15, generator(), exact=False).sum(1)
    assert hidden.max() == 78
    assert hidden.min() >= 50
    assert 0.02 < (hidden < 78).float().mean() < 0.9


def test_masks_are_blocks_rather_than_scattered() -> None:
    def neighbours(masks: torch.Tensor) -> float:
        """Of the pairs of neighbouring patches, how many are hidden together."""
        grid = masks.unflatten(1, (14, 14))
        return float(
            (grid[:, 1:] & grid[:, :-1]).float().mean() + (grid[..., 1:] & grid[..., :-1]).float().mean()
        )

    masks = block_masks(500, (14, 14), 78, 16, generator())
    noise = torch.rand(500, 196, generator=generator(1))
    scattered = noise.argsort(1).argsort(1) < 78
    assert neighbours(masks) > 1.6 * neighbours(scattered)


def test_the_draw_favours_no_side_and_differs_between_images() -> None:
    masks = block_masks(4_000, (8, 8), 26, 5, generator()).unflatten(1, (8, 8))
    share = masks.float().mean(0)
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < 0.04  # five deviations
    assert share.min() > 0.05  # corners are in few blocks, yet in some
    assert len(masks[:100].unique(dim=0)) == 100


def test_equal_generators_give_equal_masks() -> None:
    first, second = (block_masks(20, (8, 8), 26, 5, generator(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("hidden", [0, 64])
def test_hiding_none_or_all_is_refused(hidden: int) -> None:
    with pytest.raises(ConfigError, match=f"{hidden} of 64 patches"):
        block_masks(2, (8, 8), hidden, 5, generator())
