"""What is special to MFM: the filter, what it leaves to the encoder, and a loss on hidden frequencies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mimbench import config, data, registry, seeds
from mimbench.encoder import Encoder, normalise
from mimbench.errors import ConfigError
from mimbench.optim import parameter_groups

SLUG = "masked_frequency_modeling"
MODULE = registry.load_method(SLUG)
TINY_RESNET = {
    "architecture": "resnet",
    "resnet": {"block": "basic", "layers": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "stem": "cifar"},
}


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method(SLUG).preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, low: list[bool]) -> dict[str, torch.Tensor]:
    """Views of random images, of which those where ``low`` is true keep the disc."""
    torch.manual_seed(1)
    size = model.config.image_size
    pixels = torch.rand(len(low), 3, size, size)
    mask = model.disc == torch.tensor(low)[:, None, None]
    corrupted = MODULE.filtered(pixels, mask)
    return {
        "images": normalise(pixels, model.input),
        "corrupted": normalise(corrupted, model.input),
        "mask": mask,
    }


@pytest.mark.parametrize(("size", "radius", "count"), [(224, 16, 793), (32, 2.3, 21), (64, 64 / 14, 69)])
def test_the_disc_is_open_and_centred_on_the_zero_frequency(size: int, radius: float, count: int) -> None:
    disc = MODULE.low_frequencies(size, radius)
    assert disc.sum() == count
    centre = size // 2
    assert disc[centre, centre]
    ring = math.ceil(radius)
    assert not disc[centre, centre + ring], "a coefficient at the radius itself is hidden"
    assert disc[centre, centre + ring - 1]


def slow_filter(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The sum of the waves that ``mask`` keeps, of a square image (N, N), one centred frequency after the other."""
    n = len(image)
    y, x = np.mgrid[:n, :n]
    total = np.zeros((n, n), complex)
    for row in range(n):
        for column in range(n):
            if mask[row, column]:
                wave = np.exp(2j * np.pi * ((row - n // 2) * y + (column - n // 2) * x) / n)
                total += (image * wave.conj()).sum() * wave / n**2
    return total.real.clip(0, 1)


@pytest.mark.parametrize("size", [8, 9])
def test_filtering_keeps_the_waves_of_the_mask(size: int) -> None:
    image = np.random.default_rng(0).random((size, size))
    disc = MODULE.low_frequencies(size, 2.0)
    for mask in (disc, ~disc):
        ours = MODULE.filtered(torch.from_numpy(image).expand(1, 3, -1, -1), mask[None])
        np.testing.assert_allclose(ours[0, 1].numpy(), slow_filter(image, mask.numpy()), atol=1e-12)


def test_low_pass_keeps_flat_images_and_high_pass_blackens_them() -> None:
    flat = torch.full((1, 3, 16, 16), 0.7)
    disc = MODULE.low_frequencies(16, 2.3)[None]
    torch.testing.assert_close(MODULE.filtered(flat, disc), flat)
    torch.testing.assert_close(MODULE.filtered(flat, ~disc), torch.zeros_like(flat), rtol=0, atol=1e-6)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(MODULE.filtered(images, disc | ~disc), images, rtol=0, atol=1e-6)


def test_views_flip_a_coin_per_image_and_filter_pixels_before_normalising() -> None:
    model = build()
    batch = data.load("digits").train.batch(torch.arange(64))
    views = model.views(batch, seeds.generator("cpu", 0))
    low = views["mask"][:, 16, 16]
    assert 0 < low.sum() < 64
    assert torch.equal(views["mask"][low], model.disc.expand(int(low.sum()), -1, -1))
    assert torch.equal(views["mask"][~low], ~model.disc.expand(int((~low).sum()), -1, -1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.input.mean, model.input.std))
    pixels, seen = views["images"] * std + mean, views["corrupted"] * std + mean
    torch.testing.assert_close(seen, MODULE.filtered(pixels, views["mask"]), rtol=0, atol=1e-5)
    assert seen.min() > -1e-5
    assert seen.max() < 1 + 1e-5
    # Without its mean a picture is half below zero, where clamping leaves nothing.
    assert seen[~low].mean() < 0.5 * seen[low].mean()


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 16)])
def test_the_share_of_low_pass_images_can_be_none_or_all(share: float, kept: int) -> None:
    model = build(low_pass=share)
    batch = data.load("digits").train.batch(torch.arange(16))
    assert model.views(batch, seeds.generator("cpu", 0))["mask"][:, 16, 16].sum() == kept


def test_the_encoder_sees_the_whole_grid_of_the_filtered_image_alone() -> None:
    model = build()
    given = inputs(model, [True, False])
    out = model(**given)
    assert out["latent"].shape == (2, 64, 8, 8)
    other = model(**{**given, "images": given["images"] + 1})
    assert torch.equal(other["latent"], out["latent"])
    assert not torch.equal(model.encode(given["images"]), out["latent"])


@pytest.mark.parametrize("hidden_only", [True, False])
def test_the_loss_is_a_mean_over_the_hidden_coefficients_of_the_batch(hidden_only: bool) -> None:
    model = build(hidden_only=hidden_only)
    given = inputs(model, [True, False, True])
    with torch.no_grad():
        out = model(**given)
    total, count = 0.0, 0
    for image, pred, mask in zip(given["images"].numpy(), out["pred"].numpy(), given["mask"], strict=True):
        for channel in range(3):
            theirs, ours = (
                np.fft.fftshift(np.fft.fft2(x[channel].astype(float)) / 32) for x in (image, pred)
            )
            for row, column in np.ndindex(32, 32):
                if not mask[row, column] or not hidden_only:
                    total += abs(ours[row, column] - theirs[row, column])
                    count += 1
    assert count == 3 * ((2 * (1024 - 21) + 21) if hidden_only else 3 * 1024)
    assert float(out["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_what_the_input_still_holds_does_not_count() -> None:
    """A constant is one frequency, in the disc: low-pass images keep it, high-pass images must predict it."""
    model = build()
    for low, counts in ((True, False), (False, True)):
        given = inputs(model, [low])
        with torch.no_grad():
            before = model(**given)["loss"]
            after = model(**{**given, "images": given["images"] + 1})["loss"]
        assert bool((after - before).abs() > 1e-2) is counts


def test_the_distance_grows_with_its_power_of_the_error() -> None:
    pred, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    further = target + 2 * (pred - target)
    for gamma, factor in ((1.0, 2.0), (2.0, 4.0)):
        once, twice = (MODULE.frequency_distance(x, target, gamma) for x in (pred, further))
        torch.testing.assert_close(twice, factor * once)
    pred.requires_grad_()
    MODULE.frequency_distance(pred, pred.detach(), 1.0).sum().backward()
    assert pred.grad is not None
    assert torch.isfinite(pred.grad).all()


def test_mixed_precision_leaves_the_transform_in_float32() -> None:
    model = build()
    given = inputs(model, [True, False])
    exact = model(**given)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**given)
    assert out["pred"].dtype == torch.bfloat16
    assert out["loss"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], exact, rtol=0.01, atol=0)


def test_keys_have_no_bias_and_positions_are_learned_without_decay() -> None:
    model = build()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {n for n in names.values() if "attn.qkv" in n and "blocks.0" in n} == {
        f"backbone.blocks.0.attn.qkv.{n}" for n in ("weight", "q_bias", "v_bias")
    }
    groups = parameter_groups(model, model.config.recipe)
    spared = {names[p] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.blocks.0.attn.qkv.q_bias"} <= spared
    assert not {"backbone.patch_embed.proj.weight", "decoder.0.weight"} & spared


def test_initial_weights_are_cut_at_one_deviation_and_shrink_with_depth() -> None:
    backbone = build().backbone
    for tensor in (backbone.pos_embed, backbone.cls_token, backbone.blocks[1].attn.qkv.weight):
        assert 0.015 < tensor.abs().max() <= 0.02
    for number, block in enumerate(backbone.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert float(weight.detach().abs().max()) == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.02)


def test_a_resnet_trains_by_the_same_lines() -> None:
    model = build(**TINY_RESNET).train()
    views = inputs(model, [True, False, True, False])
    out = model(**views)
    assert out["latent"].shape == (4, 16, 4, 4)
    assert out["pred"].shape == views["images"].shape
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert model.decoder[0].weight.grad.abs().sum() > 0
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert len(parameter_groups(model, model.config.recipe)) == 2
    encoder = model.encoder().eval()
    assert isinstance(encoder, Encoder)
    found = encoder(views["images"])
    assert found.patches.shape == (4, 16, 4, 4)
    torch.testing.assert_close(found.pooled, found.patches.mean((2, 3)))


def test_one_output_of_the_head_is_one_pixel_of_one_colour() -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder[0].bias[2 * 16 + 1 * 4 + 3] = 1.0  # colour 2, row 1, column 3 of the patch
    lit = torch.zeros(3, 4, 4)
    lit[2, 1, 3] = 1.0
    assert torch.equal(model.decoder(torch.zeros(1, 64, 8, 8))[0, :, 4:8, 8:12], lit)


def test_the_published_recipe() -> None:
    recipe = MODULE.Config().recipe
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(1.2e-3)
    card = registry.method(SLUG)
    paper = config.build(MODULE.Config, card.preset("paper_resnet"))
    assert (paper.architecture, paper.resnet.name, paper.low_pass) == ("resnet", "resnet-50", 0.3)
    assert paper.recipe == recipe


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"radius": 0.0}, "radius = 0.0 puts 0 of 1024"),
        ({"radius": 23.0}, "radius = 23.0 puts 1024 of 1024"),
        ({"low_pass": 1.5}, "low_pass"),
        ({"gamma": 0.0}, "gamma"),
        ({"image_size": 30}, "multiple of the patch size"),
        ({"image_size": 30, **TINY_RESNET}, "multiple of the ResNet's stride 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**overrides)


def test_switches_of_the_authors_that_are_not_here_are_refused() -> None:
    official = registry.load_method(SLUG, "official")
    options = {
        **{"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0},
        **{"mask_radius1": 5, "mask_radius2": 999, "sample_ratio": 0.5, "recover_target_type": "normal"},
        **{"with_matrix": False, "ave_spectrum": False, "patch_factor": 1, "loss_gamma": 2.0},
    }
    ours = official.config_from_official(options)
    assert (ours.radius, ours.hidden_only, ours.gamma) == (5, False, 2.0)
    for switch in ({"mask_radius2": 10}, {"with_matrix": True}, {"ave_spectrum": True}, {"patch_factor": 2}):
        with pytest.raises(ConfigError, match="not here"):
            official.config_from_official({**options, **switch})
