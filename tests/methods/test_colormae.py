"""What is special to ColorMAE: the colours of the noise, how masks are cut from it, what they hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from mimbench import config, data, registry, seeds
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, parameter_groups

MODULE = registry.load_method("colormae")
COLOURS = ("white", "red", "blue", "green", "purple")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("colormae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def noise_of(colour: str, count: int = 200, size: int = 64) -> torch.Tensor:
    white = torch.randn(count, size, size, generator=seeds.generator("cpu", "test"))
    return MODULE.colour_noise(white, colour, MODULE.Sigmas())


def visible(colour: str, side: int = 14, count: int = 4000) -> torch.Tensor:
    """Maps (count, side, side) with 1 where a patch is visible."""
    noise = MODULE.cut_windows(noise_of(colour), count, side, seeds.generator("cpu", 0)).flatten(1)
    mask = MODULE.random_masking(noise[..., None], -noise, side * side // 4)[1]
    return 1 - mask.view(count, side, side)


def power(colour: str) -> torch.Tensor:
    """Mean power (16,) of the noise at growing frequencies, up to 0.5 cycles a patch; 1 for white noise."""
    noise = noise_of(colour)
    spectrum = torch.fft.fft2(noise).abs().square().mean(0) / 64**2
    along = torch.fft.fftfreq(64)
    radius = (along[:, None] ** 2 + along**2).sqrt()
    bins = (radius * 32).long()
    return torch.stack([spectrum[bins == b].mean() for b in range(16)])


def test_the_colours_are_the_papers_formulas() -> None:
    white = torch.randn(3, 32, 32)
    sigmas = MODULE.Sigmas(red=2.0, blue=0.7, green=(0.8, 1.6), purple=(0.5, 3.0))

    def blurred(sigma: float) -> np.ndarray:
        double = white.double().numpy()
        return ndimage.gaussian_filter(double, (0, sigma, sigma), mode="wrap", radius=(0, 15, 15))

    expected = {
        "white": white.numpy(),
        "red": blurred(2.0),
        "blue": white.numpy() - blurred(0.7),
        "green": blurred(0.8) - blurred(1.6),
        "purple": white.numpy() - (blurred(0.5) - blurred(3.0)),
    }
    for colour, values in expected.items():
        ours = MODULE.colour_noise(white, colour, sigmas).numpy()
        np.testing.assert_allclose(ours, values, atol=2e-6, err_msg=colour)


def test_each_colour_has_its_power_where_its_name_says() -> None:
    torch.testing.assert_close(power("white"), torch.ones(16), rtol=0.05, atol=0)
    red, blue, green, purple = (power(colour) for colour in ("red", "blue", "green", "purple"))
    assert red[0] > 0.4
    assert red[4:].max() < 1e-3
    assert (blue.diff() > 0).all()
    assert blue[0] < 1e-3
    assert 5 <= green.argmax() <= 7  # 0.16 to 0.25 cycles a patch
    assert green[[0, -1]].max() < 0.1 * green.max()
    assert 2 <= purple.argmin() <= 7
    assert min(purple[0], purple[-1]) > 5 * purple.min()


def test_visible_patches_cluster_as_the_colour_says() -> None:
    """The correlation of a patch with its right neighbour, over many masks."""
    found = {}
    for colour in COLOURS:
        seen = visible(colour) - 0.25
        found[colour] = float((seen[..., 1:] * seen[..., :-1]).mean() / (0.25 * 0.75))
    assert abs(found["white"]) < 0.02
    assert found["blue"] < -0.1
    assert found["blue"] < found["purple"] < found["white"]
    assert 0.2 < found["green"] < found["red"] - 0.2
    # purple has red's regions beside blue's scatter: far patches go together too
    far = visible("purple")[..., 3:] * visible("purple")[..., :-3]
    assert far.mean() > 0.25**2 * 1.1


def test_a_window_is_a_walk_through_one_noise_image() -> None:
    """Every window, redrawn by a plain loop from where its first cell lies and which way it goes."""
    count, size, side = 300, 9, 4
    noise = torch.arange(5.0 * size * size).view(5, size, size)
    windows = MODULE.cut_windows(noise, count, side, seeds.generator("cpu", 0))
    seen = set()
    for window in windows:
        number, rest = divmod(int(window[0, 0]), size * size)
        top, left = divmod(rest, size)
        down = (int(window[1, 0]) // size - top) % size
        right = (int(window[0, 1]) - left) % size
        assert {down, right} <= {1, size - 1}
        for i in range(side):
            for j in range(side):
                assert window[i, j] == noise[number, (top + i * down) % size, (left + j * right) % size]
        seen.add((number, top, left, down, right))
    assert len(seen) > 0.8 * count, "each image has a window of its own"
    for part in range(5):
        assert len({place[part] for place in seen}) == (5, size, size, 2, 2)[part]


def test_every_patch_is_visible_equally_often() -> None:
    share = visible("green").mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_the_strongest_noise_is_visible_and_enters_first() -> None:
    ramp = torch.arange(16.0).repeat(2, 1)
    kept, mask, restore = MODULE.random_masking(ramp[..., None], -ramp, keep=4)
    assert kept[0, :, 0].tolist() == [15, 14, 13, 12]
    assert mask[0].tolist() == [1.0] * 12 + [0.0] * 4
    filled = torch.cat([kept[..., 0], torch.arange(11.0, -1, -1).repeat(2, 1)], dim=1)
    assert torch.equal(filled.gather(1, restore), ramp)


def test_the_encoder_sees_the_class_token_and_the_visible_patches_only() -> None:
    model = build()
    batch = data.load("digits").train.batch(torch.arange(4))
    given = model.views(batch, seeds.generator("cpu", 0))
    out = model(**given)
    assert out["latent"].shape[1] == model.keep + 1 == 17
    assert (out["mask"] == 0).sum(1).tolist() == [16] * 4
    changed = patchify(given["images"], 4)
    changed[out["mask"].bool()] += 1.0
    again = model(images=unpatchify(changed, 4), noise=given["noise"])
    assert torch.equal(again["latent"], out["latent"])
    assert torch.equal(again["mask"], out["mask"]), "the mask does not depend on the image"


def test_the_loss_is_the_mean_over_hidden_patches() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    out = model(images=images, noise=torch.randn(2, 8, 8))
    errors = []
    for b in range(2):
        for place in range(64):
            row, column = 4 * (place // 8), 4 * (place % 8)
            patch = images[b, :, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            if out["mask"][b, place]:
                errors.append((out["pred"][b, place] - target).square().mean())
    assert len(errors) == 2 * 48
    torch.testing.assert_close(out["loss"], torch.stack(errors).mean())


def test_the_noise_is_the_same_in_every_run_and_no_weight() -> None:
    first = build()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = first.make_noise()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise, first.noise)
    assert "noise" not in first.state_dict()
    assert not torch.equal(build(colour="blue").noise, first.noise)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999])
def test_a_ratio_that_hides_or_keeps_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        build(mask_ratio=ratio)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"noise_size": 7}, "hold no window of 8 patches"),
        ({"noise_images": 0}, "hold no window"),
        ({"colour": "red", "noise_size": 32}, "noise_size to 36"),
        ({"sigmas": {"green": [1.5, 1.1]}}, "sigmas.green"),
        ({"sigmas": {"red": 0.0}}, "sigmas.red"),
        ({"colour": "pink"}, "colour"),
    ],
)
def test_noise_that_cannot_be_made_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**settings)


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    recipe = paper.recipe
    assert learning_rate(0, 312, recipe) == pytest.approx(2.4e-3 * 1e-4)
    assert learning_rate(40 * 312, 312, recipe) == pytest.approx(2.4e-3)
    assert (paper.backbone.width, paper.backbone.depth, paper.decoder.depth) == (768, 12, 8)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert not decayed & {"backbone.cls_token", "decoder.mask_token", "backbone.norm.weight"}
    assert {"backbone.patch_embed.proj.weight", "decoder.pred.weight"} <= decayed
