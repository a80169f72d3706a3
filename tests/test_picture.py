"""Pictures of views are drawn by the code that trains, so those in the repository must be what it draws."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mimbench import picture, registry

DRAWN = [slug for slug, card in registry.methods().items() if (card.folder / "views.png").is_file()]


def tiles(sheet: Image.Image) -> np.ndarray:
    """(columns, ROWS, SIDE, SIDE, 3) float: the images of a sheet without captions, whose font may differ."""
    pixels = np.asarray(sheet.convert("RGB"), dtype=float)
    step = picture.SIDE + picture.GAP
    columns = (sheet.width - picture.GAP) // step
    return np.stack(
        [
            [
                pixels[top : top + picture.SIDE, left : left + picture.SIDE]
                for top in (picture.CAPTION + row * step for row in range(picture.ROWS))
            ]
            for left in (picture.GAP + column * step for column in range(columns))
        ]
    )


@pytest.mark.parametrize("slug", DRAWN)
def test_the_picture_in_the_repository_is_what_the_method_draws(slug: str) -> None:
    with Image.open(registry.method(slug).folder / "views.png") as stored:
        drawn = picture.views(slug)
        assert stored.size == drawn.size
        difference = np.abs(tiles(stored) - tiles(drawn))
    assert (difference <= 2).mean() > 0.999, (
        f"draw it again: mimbench picture {slug} --out methods/{slug}/views.png"
    )


def test_every_method_that_augments_has_its_picture() -> None:
    augmenting = [slug for slug in registry.methods() if hasattr(registry.load_method(slug).Model, "views")]
    assert augmenting == DRAWN


def test_a_masked_autoencoder_hides_the_share_of_patches_that_it_says() -> None:
    image, view, visible = tiles(picture.views("mae"))
    grey = round(0.85 * 255)
    hidden = (visible == grey).all(-1)
    assert hidden.mean() == pytest.approx(0.75, abs=0.02)
    assert np.array_equal(visible[~hidden], view[~hidden])
    assert not np.array_equal(image, view)
