"""Pictures of views are drawn by the code that trains, so those in the repository must be what it draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mimbench import config, data, picture, registry
from mimbench.errors import ConfigError
from mimbench.models import vit

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


@pytest.mark.parametrize(
    "slug", ["mae", "simmim", "cropmae", "croco", "spark", "masked_frequency_modeling", "hpm"]
)
def test_a_perfect_prediction_is_drawn_as_the_image(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load_method(slug)
    settings = config.build(module.Config, registry.method(slug).preset("smoke"))
    model = module.Model(settings)
    forward = model.forward

    def perfect(**views: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = forward(**views)
        target = views.get("images", views.get("images1" if slug == "croco" else "images2"))
        assert target is not None
        if outputs["pred"].ndim == 3:
            patches = vit.patchify(target, math.isqrt(outputs["pred"].shape[-1] // 3))
            middle, spread = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            exact = (patches - middle) / spread if getattr(settings, "normalise_target", True) else patches
            if slug == "hpm":
                order = outputs["mask"].argsort(dim=1, stable=True)
                exact = exact.take_along_dim(order[..., None], 1)
            return outputs | {"pred": exact}
        return outputs | {"pred": target}

    split = data.load("digit-scenes" if "frames" in model.needs else "digits").test
    untrained = tiles(picture.reconstructions(model, split))
    monkeypatch.setattr(model, "forward", perfect)
    image, seen, predicted = tiles(picture.reconstructions(model, split))
    assert np.abs(predicted - image).max() <= 1
    assert np.abs(seen - image).max() > 50
    assert np.abs(untrained[2] - image).max() > 50


def test_what_predicts_no_pixels_reconstructs_nothing() -> None:
    model = registry.load_method("maskfeat")
    model = model.Model(config.build(model.Config, registry.method("maskfeat").preset("smoke")))
    with pytest.raises(ConfigError, match="no pixels"):
        picture.reconstructions(model, data.load("digits").test)
