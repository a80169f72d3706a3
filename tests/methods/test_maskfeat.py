"""What is special to MaskFeat: HOG of hidden patches, mask tokens that keep their places, learned positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.errors import ConfigError
from mimbench.models.hog import hog
from mimbench.models.vit import patchify, resize_positions, unpatchify
from mimbench.optim import learning_rate, parameter_groups

MODULE = registry.load_method("maskfeat")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("maskfeat").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, hidden: tuple[int, ...] = (26, 9, 1)) -> dict[str, torch.Tensor]:
    """Images, and masks that hide a different number of patches in each."""
    torch.manual_seed(1)
    size, patches = model.config.image_size, model.backbone.tokens
    rank = torch.rand(len(hidden), patches).argsort(1).argsort(1)
    images = torch.randn(len(hidden), 3, size, size)
    return {"images": images, "mask": rank < torch.tensor(hidden)[:, None]}


def test_the_loss_is_that_of_a_loop_over_hidden_patches_however_many_an_image_has() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    cells = hog(given["images"], 4)
    errors = []
    for image, patch in given["mask"].nonzero().tolist():
        target = cells[image, :, :, patch // 8, patch % 8].flatten()
        errors.append((out["pred"][image, patch] - target).square().mean())
    assert len(errors) == 36
    torch.testing.assert_close(out["loss"], torch.stack(errors).mean())


def test_gradients_come_from_hidden_patches_alone() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    (gradient,) = torch.autograd.grad(out["loss"], out["pred"])
    assert torch.equal(gradient.abs().sum(-1) > 0, given["mask"])


def test_a_patch_is_described_colour_by_colour_bin_by_bin_and_cell_by_cell() -> None:
    model = build(backbone={"patch_size": 8}, cell=4)
    images = torch.randn(2, 3, 32, 32)
    cells, found = hog(images, 4), model.target(images)
    expected = np.zeros((2, 16, 108))
    for b, row, column, colour, which, i, j in np.ndindex(2, 4, 4, 3, 9, 2, 2):
        place = ((colour * 9 + which) * 2 + i) * 2 + j
        expected[b, row * 4 + column, place] = cells[b, colour, which, 2 * row + i, 2 * column + j]
    np.testing.assert_array_equal(found, expected)


def test_an_edge_in_one_quadrant_of_one_patch_moves_one_cell() -> None:
    model = build(backbone={"patch_size": 8}, cell=4)
    image = torch.zeros(1, 3, 32, 32)
    image[0, 1, 13:15, 17:19] = (
        1.0  # green; patch (1, 2), its lower left cell, a pixel from the cell's border
    )
    filled = model.target(image).unflatten(2, (3, 9, 2, 2)).norm(dim=3)
    expected = torch.zeros(1, 16, 3, 2, 2)
    expected[0, 1 * 4 + 2, 1, 1, 0] = 1.0
    torch.testing.assert_close(filled, expected)


def test_hog_does_not_see_brightness_contrast_and_sign() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    changed = images * torch.tensor([0.3, -2.0, 5.0])[:, None, None] + 1
    torch.testing.assert_close(model.target(changed), model.target(images), rtol=0, atol=1e-3)


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_pixels_are_another_target(target: str) -> None:
    images = torch.randn(2, 3, 32, 32) * 3 + 1
    found = build(target=target).target(images)
    pixels = patchify(images, 4)
    if target == "normalised_pixels":
        mean, deviation = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        pixels = (pixels - mean) / deviation
    by_colour = pixels.unflatten(2, (16, 3)).mT.flatten(2)
    torch.testing.assert_close(found, by_colour)


@pytest.mark.parametrize("target", ["hog", "pixels", "normalised_pixels"])
def test_every_target_trains_every_parameter(target: str) -> None:
    model = build(target=target).train()
    model(**inputs(model))["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_encoder_keeps_the_whole_sequence_and_sees_nothing_of_hidden_patches() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape == (3, 65, 64)
    changed = patchify(given["images"], 4)
    changed[given["mask"]] += 1.0
    assert torch.equal(model.encode(unpatchify(changed, 4), given["mask"]), out["latent"])


def test_hidden_patches_enter_the_first_block_as_the_same_token_at_their_own_places() -> None:
    model = build()
    given = inputs(model)
    entered: list[torch.Tensor] = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    model(**given)
    tokens = model.backbone.patch_embed(given["images"])
    positions = model.backbone.pos_embed[0]
    torch.testing.assert_close(entered[0][:, 0], (model.backbone.cls_token[0] + positions[:1]).expand(3, -1))
    for image in range(3):
        for patch in range(64):
            token = model.mask_token[0, 0] if given["mask"][image, patch] else tokens[image, patch]
            torch.testing.assert_close(entered[0][image, 1 + patch], token + positions[1 + patch])
    first, second = entered[0][0, 1:][given["mask"][0]][:2]
    assert not torch.allclose(first, second)


def test_masks_are_blocks_of_at_most_two_fifths() -> None:
    model = build()
    batch = data.load("digits").train.batch(torch.arange(256))
    mask = model.views(batch, seeds.generator("cpu", 0))["mask"]
    count = mask.sum(1)
    assert (model.hidden, MODULE.Config().mask_ratio) == (26, 0.4)
    assert count.max() == 26
    assert 5 <= count.min() < 26, "where no block fits, fewer patches are hidden"
    assert count.float().mean() > 24
    # Neighbours of a hidden patch are hidden far more often than other patches: a random mask gives 0.4.
    grid = mask.unflatten(1, (8, 8))
    together = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid[:, :, 1:].sum()
    assert together > 0.65


def test_the_published_setting() -> None:
    paper = MODULE.Config()
    assert round((224 // 16) ** 2 * paper.mask_ratio) == 78
    recipe = paper.recipe
    assert learning_rate(30 * 100, 100, recipe) == pytest.approx(2e-4)
    assert learning_rate(0, 100, recipe) == pytest.approx(1e-6)
    assert learning_rate(300 * 100, 100, recipe) == pytest.approx(1e-6)
    assert recipe.clip_norm == 0.02
    module = MODULE.Model(config.build(MODULE.Config, {"backbone": {"depth": 1, "width": 48}}))
    assert module.head[1].out_features == 108
    assert module.hidden == 78


def test_tokens_and_positions_decay_and_vectors_do_not() -> None:
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "mask_token"} <= decayed
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]


def test_positions_are_learned_saved_and_interpolated_for_other_grids() -> None:
    model = build()
    assert "backbone.pos_embed" in dict(model.named_parameters())
    other = build()
    torch.nn.init.normal_(model.backbone.pos_embed)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 64)
    found = other.backbone.embed(images) - other.backbone.patch_embed(images)
    wanted = resize_positions(model.backbone.pos_embed[:, 1:], (8, 8), (8, 16))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert other.encoder().layer_of("vit.pos_embed") == 0


def test_initial_biases_are_small_and_positive_in_the_encoder_and_zero_in_the_head() -> None:
    model = build()
    for name, parameter in model.named_parameters():
        if name.startswith("head.") and name.endswith("bias"):
            assert not parameter.any(), name
        elif name.startswith("backbone.blocks.") and name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.02)), name
        elif "norm" in name or name == "head.0.weight":
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif not name.endswith("bias"):
            assert 0.015 < parameter.std() < 0.025, name


def test_finetuning_norms_the_mean_of_the_patches_and_frozen_probes_the_patches() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.encode(images, torch.zeros(2, 64, dtype=torch.bool))[:, 1:]
    tuned = model.encoder().for_finetuning()
    with torch.no_grad():
        tuned.fc_norm.weight.uniform_(0.5, 2)
    wanted = F.layer_norm(tokens.mean(1), (64,), tuned.fc_norm.weight, tuned.fc_norm.bias, 1e-6)
    torch.testing.assert_close(tuned(images).pooled, wanted)
    frozen = F.layer_norm(tokens, (64,), eps=1e-6).mean(1)
    torch.testing.assert_close(model.encoder()(images).pooled, frozen)
    assert not [name for name in model.encoder().state_dict() if "head" in name or "mask_token" in name]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio = 0.0 hides 0 of 64"),
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0 hides 64 of 64"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"cell": 8}, "cells of 8 pixels do not tile patches of 4"),
        ({"cell": 0}, "cell"),
        ({"image_size": 30}, "multiple of the patch size"),
        ({"target": "colours"}, "target"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**wrong)


def test_pixels_need_no_cells() -> None:
    assert build(target="pixels", cell=8).head[1].out_features == 48
