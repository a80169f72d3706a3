"""What is special to MAE: what the encoder sees, what the loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimbench import config, data, registry
from mimbench.errors import ConfigError
from mimbench.fit import fit
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("mae")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("mae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.backbone.tokens)}


@pytest.mark.parametrize(("tokens", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (100, 0.9, 9)])
def test_the_number_of_visible_patches_is_truncated_as_in_the_authors_code(
    tokens: int, ratio: float, kept: int
) -> None:
    side = 4 * int(tokens**0.5)
    assert build(image_size=side, mask_ratio=ratio).keep == kept


def test_the_encoder_sees_the_class_token_and_the_visible_patches_only() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape[1] == model.keep + 1
    assert (out["mask"] == 0).sum(1).tolist() == [model.keep] * 3
    hidden = out["mask"].bool()
    changed = patchify(given["images"], 4)
    changed[hidden] += 1.0
    again = model.encode(unpatchify(changed, 4), given["noise"])[0]
    assert torch.equal(again, out["latent"])


def test_the_loss_ignores_predictions_at_visible_patches() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    target = MODULE.patch_target(given["images"], 4, normalise=True)
    error = (out["pred"] - target).square().mean(-1)
    torch.testing.assert_close(out["loss"], error[out["mask"].bool()].mean())


def test_normalised_targets_have_unit_unbiased_variance_per_patch() -> None:
    target = MODULE.patch_target(torch.randn(2, 3, 32, 32) * 5 + 3, 4, normalise=True)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 64), rtol=0, atol=1e-5)


def test_restoring_brings_tokens_back_to_raster_order() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1).expand(2, 16, 3)
    kept, mask, restore = MODULE.random_masking(tokens, torch.rand(2, 16), keep=5)
    filled = torch.cat([kept, torch.full((2, 11, 3), -1.0)], dim=1)
    back = filled.gather(1, restore[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(back, torch.where(mask[..., None].bool(), -torch.ones(()), tokens))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999])
def test_a_ratio_that_hides_or_keeps_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        build(mask_ratio=ratio)


def test_an_image_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the patch size"):
        build(image_size=30)


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    assert paper.recipe.base_lr * paper.recipe.batch_size / paper.recipe.lr_batch == pytest.approx(2.4e-3)
    assert (paper.backbone.width, paper.backbone.depth, paper.decoder.depth) == (768, 12, 8)
    model = build()
    decayed = decayed_names(model)
    assert "decoder.mask_token" in decayed
    assert "backbone.cls_token" in decayed
    assert "backbone.norm.weight" not in decayed
    assert "decoder.pred.bias" not in decayed


def decayed_names(model: Any) -> set[str]:
    """Names of the parameters that weight decay acts on."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    return {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}


def test_bfloat16_stays_within_the_noise_of_seeds() -> None:
    """The loss curve moves far less with the precision than with the seed, all along."""
    images = data.load("digits").train.subset(torch.arange(512))

    def curve(precision: str, seed: int) -> torch.Tensor:
        model = build(recipe={"epochs": 6, "warmup_epochs": 0.6, "precision": precision})
        options = {"seed": seed, "device": torch.device("cpu"), "progress": quiet()}
        history = fit(model, images, model.config.recipe, **options)
        return torch.tensor([point["loss"] for point in history.curve])

    fp32, bf16, other = curve("fp32", 0), curve("bf16", 0), curve("fp32", 1)
    assert len(fp32) == 24
    by_precision, by_seed = (bf16 - fp32).abs(), (other - fp32).abs()
    assert by_precision.max() > 0, "bfloat16 was used"
    assert by_precision.max() < 0.1 * by_seed.max()
    assert by_precision.mean() < 0.1 * by_seed.mean()
