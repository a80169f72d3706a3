"""What is special to SimMIM: coarse squares, mask tokens at the input, pixels under an L1 loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimbench import config, registry
from mimbench.errors import ConfigError

MODULE = registry.load_method("simmim")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("simmim").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


@pytest.mark.parametrize(("squares", "masked"), [(7, 30), (6, 22), (4, 10)])
def test_the_number_of_masked_squares_is_rounded_up(squares: int, masked: int) -> None:
    mask = MODULE.square_masks(torch.rand(5, squares, squares), 0.6, repeat=2)
    assert mask.shape == (5, 2 * squares, 2 * squares)
    assert mask.sum((1, 2)).tolist() == [4 * masked] * 5
    blocks = mask.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert ((blocks.sum(-1) == 0) | (blocks.sum(-1) == 4)).all()


def test_the_encoder_keeps_the_whole_grid_and_hides_what_is_masked() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    mask = MODULE.square_masks(torch.rand(2, 4, 4), 0.6, repeat=2)
    out = model(images=images, mask=mask)
    assert out["latent"].shape == (2, 64, 8, 8)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other = torch.where(pixels, images + 1, images)
    assert torch.equal(model.encode(other, mask), out["latent"])


def test_the_loss_is_the_mean_absolute_error_of_masked_pixels() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    mask = MODULE.square_masks(torch.rand(2, 4, 4), 0.6, repeat=2)
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    torch.testing.assert_close(model(images=images, mask=mask)["loss"], images[pixels].abs().mean())


def test_one_output_of_the_head_is_one_pixel_of_one_colour() -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder[0].bias[2 * 16 + 1 * 4 + 3] = 1.0  # colour 2, row 1, column 3 of the patch
    pred = model.decoder(torch.zeros(1, 64, 8, 8))
    lit = torch.zeros(3, 4, 4)
    lit[2, 1, 3] = 1.0
    assert torch.equal(pred[0, :, 4:8, 8:12], lit)


def test_positions_are_relative_only() -> None:
    """Without a class token's help the bias depends on the offset between two patches alone."""
    model = build()
    torch.nn.init.normal_(model.backbone.rel_pos_bias.relative_position_bias_table)
    bias = model.backbone.rel_pos_bias((8, 8))[:, 1:, 1:]
    at = lambda row, column: row * 8 + column  # noqa: E731
    assert torch.equal(bias[:, at(2, 3), at(4, 1)], bias[:, at(3, 5), at(5, 3)])
    assert not torch.equal(bias[:, at(2, 3), at(4, 1)], bias[:, at(4, 1), at(2, 3)])
    wider = model.backbone.rel_pos_bias((4, 16))
    assert wider.shape == (2, 65, 65)
    assert torch.equal(wider[:, 0, 0], model.backbone.rel_pos_bias((8, 8))[:, 0, 0])


def test_the_learning_rate_is_scaled_by_512() -> None:
    recipe = MODULE.Config().recipe
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(4e-4)


@pytest.mark.parametrize("unit", [6, 64])
def test_squares_that_do_not_fit_are_refused(unit: int) -> None:
    with pytest.raises(ConfigError, match="mask_unit"):
        build(mask_unit=unit)


def test_initial_weights_are_cut_at_one_deviation_and_shrink_with_depth() -> None:
    model = build()
    blocks = model.backbone.blocks
    assert blocks[0].attn.qkv.weight.abs().max() <= 0.02
    for number, block in enumerate(blocks, 1):
        assert block.mlp.fc2.weight.abs().max() <= 0.02 / (2 * number) ** 0.5 + 1e-7
        assert block.mlp.fc2.weight.abs().max() > 0.9 * 0.02 / (2 * number) ** 0.5
