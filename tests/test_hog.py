"""Histograms of oriented gradients, against scikit-image and against a loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog as reference
from torch import Tensor

from mimbench.models.hog import hog


def quadratic(size: int, seed: int) -> Tensor:
    """A surface of second degree: there Sobel's gradients are four times scikit-image's central differences."""
    a, b, c, d, e = np.random.default_rng(seed).normal(size=5)
    y, x = np.mgrid[:size, :size] / size
    return torch.from_numpy(a * x * x + b * x * y + c * y * y + d * x + e * y)[None, None]


@pytest.mark.parametrize(("cell", "bins"), [(8, 9), (4, 9), (8, 18)])
def test_equals_scikit_image_within_the_borders(cell: int, bins: int) -> None:
    for seed in range(5):
        image = quadratic(48, seed)
        # MaskFeat measures the angle from the other axis, which a transposed image undoes
        ours = hog(image.mT, cell, bins)[0, 0].permute(2, 1, 0)
        theirs = reference(
            image[0, 0].numpy(),
            orientations=bins,
            pixels_per_cell=(cell, cell),
            cells_per_block=(1, 1),
            block_norm="L2",
            feature_vector=False,
        )[:, :, 0, 0]
        np.testing.assert_allclose(ours[1:-1, 1:-1], theirs[1:-1, 1:-1], atol=2e-4)


def test_equals_a_loop_over_pixels() -> None:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    expected = np.zeros((2, 3, 9, 2, 3))
    for b, c, i, j in np.ndindex(2, 3, 8, 12):
        window = padded[b, c, i : i + 3, j : j + 3]
        gx, gy = (window * kernel).sum(), (window * kernel.T).sum()
        which = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
        expected[b, c, which, i // 4, j // 4] += math.hypot(gx, gy)
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    np.testing.assert_allclose(hog(images, 4), expected, atol=1e-5)


def test_opposite_directions_share_a_bin_and_contrast_does_not_matter() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hog(-images, 8), hog(images, 8))
    scale = torch.tensor([0.2, 3.0, 7.0])[:, None, None]
    torch.testing.assert_close(hog(images * scale + 5, 8), hog(images, 8), atol=1e-3, rtol=0)


def test_a_flat_cell_is_zero_and_a_ramp_fills_one_bin() -> None:
    assert torch.equal(hog(torch.ones(1, 3, 8, 8), 4), torch.zeros(1, 3, 9, 2, 2))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16) + 0.5 * torch.arange(16.0)[:, None]
    filled = hog(ramp, 4)[0, 0, :, 1:-1, 1:-1] > 0
    assert torch.equal(filled.sum(0), torch.ones(2, 2, dtype=torch.int64))


def test_an_offset_moves_both_gradients() -> None:
    offset = torch.tensor([[0.3], [-0.2]])
    cells = hog(torch.zeros(1, 1, 8, 8), 4, offset=offset)[0, 0]
    which = math.floor(math.atan2(0.3, -0.2) / math.pi * 9) % 9
    assert torch.equal(cells[which], torch.ones(2, 2))
    assert cells.sum() == 4
