"""Corruptions against SciPy, scikit-image, PIL and slow loops, with the same random numbers."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from skimage import color, data, filters
from torch import Tensor

from mimbench.corruptions import CORRUPTIONS, NAMES, blur, corrupt, digital, noise, weather
from mimbench.corruptions.draws import Draws
from mimbench.errors import ConfigError, UnknownName


def photographs(side: int) -> Tensor:
    """Three uint8 photographs (3, 3, side, side)."""
    pool = [data.astronaut(), data.chelsea(), data.coffee()]
    resized = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in pool]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def small() -> Tensor:
    return photographs(32)


def draws(count: int = 3) -> Draws:
    return Draws(torch.arange(count), 0, "test")


def rows(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) float64."""
    return images.permute(0, 2, 3, 1).double().numpy()


# Random numbers


def test_draws_are_uniform_and_normal() -> None:
    source = Draws(torch.arange(50), 7, "test")
    uniform = source.uniform("u", 2000).flatten().numpy()
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(source.normal("n", 2000).flatten().numpy(), "norm").pvalue > 1e-3


def test_draws_differ_between_images_purposes_and_places() -> None:
    first = Draws(torch.arange(200), 0, "a").uniform("x", 200)
    others = [
        Draws(torch.arange(200), 0, "b").uniform("x", 200),
        Draws(torch.arange(200), 1, "a").uniform("x", 200),
        Draws(torch.arange(200), 0, "a").uniform("y", 200),
        first.roll(1, 0),
        first.roll(1, 1),
    ]
    for other in others:
        correlation = np.corrcoef(first.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_splitmix_matches_its_published_first_outputs() -> None:
    # The widely quoted sequence for the seed 1234567.
    from mimbench.corruptions.draws import GAMMA, splitmix64

    state = torch.arange(1, 4) * GAMMA + 1234567
    found = [value % 2**64 for value in splitmix64(state).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# The interface


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_in_any_batch(name: str, small: Tensor) -> None:
    whole = corrupt(small, name, 3, seed=5, positions=torch.tensor([4, 9, 2]))
    alone = corrupt(small[1:2], name, 3, seed=5, positions=torch.tensor([9]))
    assert torch.equal(whole[1], alone[0])
    assert whole.dtype == torch.uint8
    assert not torch.equal(whole, small)


DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - DETERMINISTIC))
def test_random_corruptions_differ_between_seeds_and_images(name: str, small: Tensor) -> None:
    twins = small[:1].expand(2, -1, -1, -1)
    there = corrupt(twins, name, 5, seed=0, positions=torch.tensor([0, 1]))
    assert not torch.equal(there[0], there[1])
    assert not torch.equal(there, corrupt(twins, name, 5, seed=1, positions=torch.tensor([0, 1])))


@pytest.mark.parametrize("side", [8, 28, 65, 96])
def test_every_side_works(side: int) -> None:
    images = photographs(side)[:1]
    for name in NAMES:
        for severity in (1, 5):
            changed = corrupt(images, name, severity, seed=0, positions=torch.tensor([0]))
            assert changed.shape == images.shape


def test_strengths_are_the_published_ones_at_32_and_224_and_scale_between() -> None:
    for corruption in CORRUPTIONS.values():
        assert [corruption.strength(s, 32) for s in range(1, 6)] == list(corruption.small)
        assert [corruption.strength(s, 224) for s in range(1, 6)] == list(corruption.large)
    assert CORRUPTIONS["motion_blur"].strength(1, 64) == (12, 2)
    assert CORRUPTIONS["motion_blur"].strength(1, 112) == (5, 1.5)
    assert CORRUPTIONS["jpeg"].strength(1, 64) == (80,)


def test_bad_requests_are_named(small: Tensor) -> None:
    where = {"seed": 0, "positions": torch.arange(3)}
    with pytest.raises(UnknownName, match="fog"):
        corrupt(small, "fogg", 1, **where)
    with pytest.raises(ConfigError, match="severity"):
        corrupt(small, "fog", 6, **where)
    with pytest.raises(ConfigError, match="square"):
        corrupt(small[..., :16], "fog", 1, **where)


# Noise


def test_gaussian_noise_adds_its_draws(small: Tensor) -> None:
    wanted = rows(small) / 255 + 0.1 * rows(draws().normal("noise", 3, 32, 32))
    np.testing.assert_allclose(rows(noise.gaussian_noise(small / 255, draws(), 0.1)), wanted, atol=1e-6)


@pytest.mark.parametrize("photons", [500, 60, 3])
def test_shot_noise_inverts_scipys_poisson(small: Tensor, photons: float) -> None:
    uniform = draws().uniform("noise", 3, 32, 32).double().numpy()
    wanted = stats.poisson.ppf(uniform, small.double().numpy() / 255 * photons) / photons
    found = noise.shot_noise(small / 255, draws(), photons).double().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_impulse_noise_hits_its_share() -> None:
    grey = torch.full((8, 3, 64, 64), 0.5)
    changed = noise.impulse_noise(grey, draws(8), 0.2)
    n = grey.numel()
    for value, share in ((0.0, 0.1), (0.5, 0.8), (1.0, 0.1)):
        assert float((changed == value).double().mean()) == pytest.approx(
            share, abs=5 * math.sqrt(share * (1 - share) / n)
        )


# Blur


@pytest.mark.parametrize(("border", "truncate"), [("nearest", 4.0), ("reflect", 3.0)])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 2.5, 40.0])
def test_gaussian_filter_is_skimages(small: Tensor, border: str, truncate: float, sigma: float) -> None:
    wanted = filters.gaussian(rows(small)[0] / 255, sigma, mode=border, truncate=truncate, channel_axis=-1)
    found = rows(blur.gaussian_filter(small / 255, sigma, border, truncate))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_defocus_convolves_with_a_disc(small: Tensor) -> None:
    line = np.arange(-6, 7)
    disc = (line[:, None] ** 2 + line**2 <= 36).astype(float)
    found = rows(blur.defocus_blur(small / 255, draws(), 6, 0.05))  # a rim of 0.05 pixels is not smoothed
    wanted = ndimage.convolve(rows(small) / 255, (disc / disc.sum())[None, :, :, None], mode="mirror")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("reach", [1, 3])
def test_glass_follows_the_loop_from_last_to_first(reach: int) -> None:
    side = 20
    uniform = draws(2).uniform("offsets", 2, side, side)
    found = blur._glass_sources(uniform, reach)
    for image in range(2):
        values = np.arange(side * side).reshape(side, side)
        for row in range(side - reach, reach, -1):
            for column in range(side - reach, reach, -1):
                across, down = (int(u * 2 * reach) - reach for u in uniform[image, :, row, column].tolist())
                values[row, column] = values[row + down, column + across]
        assert found[image].tolist() == values.flatten().tolist()


def test_smear_is_a_sum_over_whole_pixel_steps(small: Tensor) -> None:
    radius, sigma, angle = 6, 2.5, 20.0
    image = rows(small)[0]
    weights = np.exp(-(np.arange(13) ** 2) / (2 * sigma**2))
    wanted = np.zeros_like(image)
    for step, weight in enumerate(weights / weights.sum()):
        down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        for row in range(32):
            for column in range(32):
                wanted[row, column] += weight * image[min(row + down, 31), min(column + right, 31)]
    found = rows(blur.smear(small[:1] / 255, radius, sigma, torch.tensor([angle])))[0] * 255
    assert np.abs(found - np.floor(wanted + 1 / 514)).max() <= 1 + 1e-4
    assert (np.abs(found - np.floor(wanted + 1 / 514)) > 0.5).mean() < 1e-3


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.25, 2.25])
def test_clipped_zoom_is_scipys(small: Tensor, factor: float) -> None:
    crop = math.ceil(32 / factor)
    top = (32 - crop) // 2
    middle = rows(small)[0, top : top + crop, top : top + crop]
    zoomed = ndimage.zoom(middle, (factor, factor, 1), order=1, mode="nearest")
    trim = (len(zoomed) - 32) // 2
    found = rows(blur.clipped_zoom(small.float(), factor))[0]
    np.testing.assert_allclose(found, zoomed[trim : trim + 32, trim : trim + 32], atol=1e-3)


# Weather


def test_plasma_is_diamond_square_on_a_torus() -> None:
    side, decay = 8, 1.7
    source = draws(1)
    wanted = np.zeros((side, side))
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2
        centres = range(half, side, step), range(half, side, step)
        tops = range(0, side, step), range(half, side, step)
        lefts = range(half, side, step), range(0, side, step)
        corners = ((-half, -half), (-half, half), (half, -half), (half, half))
        cross = ((-half, 0), (half, 0), (0, -half), (0, half))
        for name, (down, across), around in (
            ("square", centres, corners),
            ("row", tops, cross),
            ("column", lefts, cross),
        ):
            uniform = source.uniform(f"{name} {step}", side // step, side // step)[0].double().numpy()
            for i, y in enumerate(down):
                for j, x in enumerate(across):
                    mean = sum(wanted[(y + dy) % side, (x + dx) % side] for dy, dx in around) / 4
                    wanted[y, x] = mean + wobble * wobble * (2 * uniform[i, j] - 1)
        step, wobble = half, wobble / decay
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(weather.plasma(source, side, decay)[0].numpy(), wanted, atol=1e-5)


def test_fog_keeps_the_brightest_value_of_the_image(small: Tensor) -> None:
    foggy = weather.fog(small / 255, draws(), 1.5, 2)
    assert (foggy.amax((1, 2, 3)) <= small.amax((1, 2, 3)) / 255 + 1e-6).all()
    assert (foggy.std((2, 3)) < (small / 255).std((2, 3))).all()


def test_snow_whitens_and_is_symmetric_in_its_flakes() -> None:
    black = torch.zeros(2, 3, 32, 32)
    snowy = weather.snow(black, draws(2), 0.1, 0.2, 1, 0.5, 8, 3, 1.0)  # keeps the black image as it is
    assert torch.equal(snowy, snowy.flip(-1, -2))
    assert 0 < float((snowy > 0).double().mean()) < 1
    assert torch.equal(snowy[:, 0], snowy[:, 2])


def test_ice_has_the_colours_of_the_photographs() -> None:
    textures = weather.ice_textures(128, torch.device("cpu")) * 255
    means = textures.mean((2, 3))
    measured = torch.tensor(
        [[78, 149, 166], [201, 205, 214], [201, 205, 214], [138, 153, 165], [112, 123, 135.0]]
    )
    assert (means - measured).abs().max() < 6  # clipping at white moves the mean a little
    assert (textures.std((2, 3)) > 10).all()


# Digital


@pytest.mark.parametrize("amount", [0.05, 0.3, 0.5])
def test_brightness_is_the_value_of_hsv(small: Tensor, amount: float) -> None:
    images = torch.cat([small, torch.zeros_like(small[:1])])
    for found, image in zip(
        rows(digital.brightness(images / 255, draws(4), amount)), rows(images), strict=True
    ):
        hsv = color.rgb2hsv(image / 255)
        hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
        np.testing.assert_allclose(found, color.hsv2rgb(hsv), atol=1e-5)


def test_contrast_shrinks_towards_channel_means(small: Tensor) -> None:
    image = rows(small)[0] / 255
    mean = image.mean((0, 1))
    np.testing.assert_allclose(
        rows(digital.contrast(small / 255, draws(), 0.3))[0], 0.3 * image + 0.7 * mean, atol=1e-5
    )


def test_elastic_is_two_scipy_resamplings(small: Tensor) -> None:
    strength, sigma, affine = 3.2, 1.3, 1.6
    found = rows(digital.elastic(small / 255, draws(), strength, sigma, affine))
    corners = np.array([[26, 26], [26, 6], [6, 6]], dtype=float)
    moved = corners + affine * (2 * draws().uniform("corners", 3, 2).double().numpy() - 1)
    field = 2 * draws().uniform("field", 2, 32, 32).double().numpy() - 1
    y, x = np.mgrid[:32, :32].astype(float)
    for i, image in enumerate(rows(small) / 255):
        back = np.linalg.solve(np.c_[moved[i], np.ones(3)], corners)
        places = np.stack([x.ravel(), y.ravel(), np.ones(1024)], axis=1) @ back
        smooth = [strength * filters.gaussian(f, sigma, mode="reflect", truncate=3) for f in field[i]]
        for channel in range(3):
            warped = ndimage.map_coordinates(
                image[..., channel], [places[:, 1], places[:, 0]], order=1, mode="mirror"
            ).reshape(32, 32)
            wanted = ndimage.map_coordinates(
                warped, [(y + smooth[1]).ravel(), (x + smooth[0]).ravel()], order=1, mode="reflect"
            )
            np.testing.assert_allclose(found[i, ..., channel].ravel(), wanted, atol=1e-4)


@pytest.mark.parametrize("side", [32, 50, 224])
@pytest.mark.parametrize("share", [0.95, 0.65, 0.25])
def test_pixelate_is_pils_box_filter(side: int, share: float) -> None:
    images = photographs(side)
    found = corrupt_with(digital.pixelate, images, share)
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        small = picture.resize((int(side * share),) * 2, Image.Resampling.BOX)
        wanted = np.asarray(small.resize((side, side), Image.Resampling.BOX))
        assert np.abs(ours - wanted.astype(int)).max() == 0


@pytest.mark.parametrize("side", [32, 33, 40, 224])
@pytest.mark.parametrize("quality", [7, 25, 50, 80])
def test_jpeg_is_pils(side: int, quality: int) -> None:
    images = photographs(side)
    found = corrupt_with(digital.jpeg, images, quality)
    for image, ours in zip(images, found, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        wanted = np.asarray(Image.open(file)).astype(int)
        # libjpeg-turbo gives equality; other builds of libjpeg may round a level or two otherwise
        difference = np.abs(ours - wanted)
        assert difference.max() <= 4
        assert difference.mean() < 0.05


def corrupt_with(function: object, images: Tensor, strength: float) -> np.ndarray:
    """(B, H, W, 3) whole levels."""
    return (rows(function(images / 255, draws(), strength)) * 255).round().astype(int)  # type: ignore[operator]
