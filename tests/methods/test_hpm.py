"""What is special to HPM: which patches are hidden and when, what the loss predictor learns, how the teacher moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mimbench import config, data, registry, seeds
from mimbench.errors import ConfigError
from mimbench.fit import fit
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("hpm")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("hpm").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, hard: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size, patches = model.config.image_size, model.student.backbone.tokens
    return {
        "images": torch.randn(count, 3, size, size),
        "noise": torch.rand(count, patches),
        "hard": torch.full((count,), hard),
    }


SMALL: dict[str, Any] = {
    "image_size": 16,
    "backbone": {"width": 32, "depth": 1},
    "decoder": {"width": 32, "depth": 1},
}


@pytest.mark.parametrize("epochs", [1, 3, 20, 200])
def test_the_mined_share_rises_by_epochs_to_half_of_the_hidden_patches(epochs: int) -> None:
    model = build(recipe={"epochs": epochs})
    steps = 7 * epochs
    mined = [model.hard_patches(step / steps) for step in range(steps)]
    expected = [int(48 * (float((step // 7 + 1) / epochs) * 0.5)) for step in range(steps)]
    assert mined == expected
    assert mined[-1] == 24


def test_the_batch_tells_how_far_training_is() -> None:
    model = build()
    batch = data.load("digits").train.batch(torch.arange(4))
    for progress, hard in [(0.0, 1), (0.5, 13), (0.999, 24)]:
        batch.progress = progress
        assert model.views(batch, seeds.generator("cpu", 0))["hard"].tolist() == [hard] * 4


@pytest.mark.parametrize(
    ("share", "first", "last"), [([0, 0], 0, 0), ([0.5, 0.5], 24, 24), ([0.5, 0], 22, 0), ([1, 1], 48, 48)]
)
def test_other_schedules(share: list[float], first: int, last: int) -> None:
    model = build(hard_share=share)
    assert (model.hard_patches(0.0), model.hard_patches(0.999)) == (first, last)


@pytest.mark.parametrize("epochs", [0.4, 2.5])
def test_a_training_that_ends_within_an_epoch_reaches_the_full_share(epochs: float) -> None:
    assert build(recipe={"epochs": epochs}).hard_patches(0.999) == 24


@pytest.mark.parametrize("hard", [0, 1, 14, 48])
def test_the_mask_is_that_of_a_loop_over_images(hard: int) -> None:
    predicted, noise, keep = torch.randn(5, 64), torch.rand(5, 64), 16
    mask = MODULE.mine_mask(predicted, torch.full((5,), hard), noise, keep)
    for row in range(5):
        hardest = np.argsort(predicted[row].numpy())[64 - hard :]
        others = np.delete(np.arange(64), hardest)
        kept = others[np.argsort(noise[row].numpy()[others])][:keep]
        assert sorted((mask[row] == 0).nonzero().flatten().tolist()) == sorted(kept.tolist())


def test_the_hardest_patches_are_hidden_in_every_draw_and_the_others_evenly() -> None:
    draws, hard, keep = 4000, 12, 16
    predicted = torch.arange(64.0).expand(draws, -1)
    torch.manual_seed(0)
    mask = MODULE.mine_mask(predicted, torch.full((draws,), hard), torch.rand(draws, 64), keep)
    assert (mask == 0).sum(1).eq(keep).all()
    assert mask[:, -hard:].all()
    share, expected = mask[:, :-hard].mean(0), (48 - hard) / (64 - hard)
    assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / draws)


def test_the_teacher_sees_the_whole_image_and_the_student_what_is_visible() -> None:
    model = build()
    given = inputs(model, hard=20)
    out = model(**given)
    assert out["latent"].shape[1] == model.keep + 1
    hidden = out["mask"].bool()
    changed = patchify(given["images"], 4)
    changed[hidden] += torch.randn_like(changed[hidden])
    images = unpatchify(changed, 4)
    visible = out["mask"].argsort(dim=1, stable=True)[:, : model.keep]
    assert torch.equal(model.student.encode(images, visible), out["latent"])
    assert not torch.allclose(model.difficulty(images), out["teacher_loss_pred"])


@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_counts_hidden_patches_each_at_its_own_place(normalised: bool) -> None:
    model = build(normalise_target=normalised)
    given = inputs(model, hard=10)
    out = model(**given)
    patches, errors = patchify(given["images"], 4), []
    for row in range(3):
        for place, patch in enumerate(out["mask"][row].nonzero().flatten()):
            target = patches[row, patch]
            if normalised:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((out["pred"][row, model.keep + place] - target).square().mean())
    torch.testing.assert_close(out["loss_matrix"].flatten(), torch.stack(errors))
    torch.testing.assert_close(out["loss_reconstruction"], torch.stack(errors).mean())
    torch.testing.assert_close(out["loss"], out["loss_reconstruction"] + out["loss_predictor"])


def test_decoders_get_each_token_with_the_position_of_its_own_patch() -> None:
    network = build().student
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    latent = torch.randn(2, 17, 64)
    sequence = network.sequence(latent, order)
    embedded, positions = network.decoder_embed(latent), network.decoder_pos_embed[0]
    for row in range(2):
        for place in range(64):
            token = embedded[row, place + 1] if place < 16 else network.mask_token[0, 0]
            torch.testing.assert_close(
                sequence[row, place + 1], token + positions[order[row, place] + 1], rtol=0, atol=1e-5
            )


def test_the_order_loss_is_that_of_a_loop_over_ordered_pairs() -> None:
    predicted, error = torch.randn(3, 6), torch.rand(3, 6)
    error[0, 2] = error[0, 4]  # a tie, which counts for nothing
    total, pairs = 0.0, 0
    for p, e in zip(predicted.double(), error.double(), strict=True):
        for i in range(6):
            for j in range(6):
                if e[i] != e[j]:
                    probability = torch.sigmoid(p[i] - p[j])
                    right = probability if e[i] > e[j] else 1 - probability
                    total, pairs = total - math.log(right + 1e-6), pairs + 1
    assert pairs == 3 * 30 - 2
    assert MODULE.order_loss(predicted, error).item() == pytest.approx(total / pairs, rel=1e-5)


def test_the_order_loss_rewards_the_order_alone() -> None:
    error = torch.tensor([[0.1, 0.5, 0.2, 0.9]])
    rank = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    assert MODULE.order_loss(100 * rank, error) < 1e-5
    assert MODULE.order_loss(-100 * rank, error) > 10
    assert MODULE.order_loss(rank + 7, error) == MODULE.order_loss(rank, error**3)


def test_equal_errors_give_no_order_to_learn() -> None:
    predicted = torch.randn(2, 5, requires_grad=True)
    loss = MODULE.order_loss(predicted, torch.ones(2, 5))
    loss.backward()
    assert loss == 0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_the_value_loss_compares_with_errors_standardised_in_each_image() -> None:
    predicted, error = torch.randn(3, 6), torch.rand(3, 6) * torch.tensor([[1.0], [10.0], [100.0]])
    scaled = [(e - e.mean()) / (e.var(ddof=1) + 1e-6) ** 0.5 for e in (row.numpy() for row in error)]
    expected = ((predicted.numpy() - np.stack(scaled)) ** 2).mean()
    assert MODULE.value_loss(predicted, error).item() == pytest.approx(expected, rel=1e-5)
    out = build(relative=False)
    given = inputs(out)
    found = out(**given)
    direct = MODULE.value_loss(found["loss_pred"][:, out.keep :], found["loss_matrix"])
    torch.testing.assert_close(found["loss_predictor"], direct)


@pytest.mark.parametrize("relative", [True, False])
def test_predicting_losses_trains_the_encoder_but_not_the_reconstructor(relative: bool) -> None:
    model = build(relative=relative)
    model(**inputs(model, hard=5))["loss_predictor"].backward()
    student = model.student
    assert student.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert student.loss_predictor.pred.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.reconstructor.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_teacher_starts_as_the_student_and_follows_it_after_each_step() -> None:
    model = build(momentum=[0.6, 0.8], momentum_epochs=10, recipe={"epochs": 20})
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert all(torch.equal(student[key], teacher[key]) for key in student)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = {key: value.clone() for key, value in teacher.items()}
    for progress, decay in [(0.0, 0.6), (0.26, 0.7), (0.5, 0.8), (0.9, 0.8)]:
        model.after_step(progress)
        expected = {key: decay * v + (1 - decay) * student[key] for key, v in expected.items()}
    for key, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_the_teacher_moves_once_per_step_and_not_per_accumulated_part() -> None:
    recipe = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "accumulate": 2}
    model, moved = build(recipe=recipe, **SMALL), []
    follow = model.after_step
    model.after_step = lambda progress: (moved.append(progress), follow(progress))
    split = data.load("digits").train.subset(torch.arange(32))
    fit(model, split, model.config.recipe, seed=0, device=torch.device("cpu"), progress=quiet())
    assert moved == [step / 8 for step in range(8)]
    student, teacher = model.student.decoder_embed.weight, model.teacher.decoder_embed.weight
    assert not torch.equal(student, teacher)


def test_the_student_learns_which_hidden_patches_are_hard() -> None:
    """Half of each image is noise, which nobody can predict; log 2 is the loss of a guess."""
    model = build(**SMALL).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(60):
        images = torch.cat([torch.zeros(16, 3, 8, 16), torch.randn(16, 3, 8, 16)], dim=2)
        out = model(images=images, noise=torch.rand(16, 16), hard=torch.full((16,), step // 20))
        if step == 0:
            assert out["loss_predictor"] > 0.65
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.0)
    assert out["loss_predictor"] < 0.55


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.98])
def test_a_ratio_that_leaves_nothing_to_see_or_to_order_is_refused(ratio: float) -> None:
    if ratio == 0.98:
        assert build(mask_ratio=ratio).keep == 1
        ratio = 0.01  # one hidden patch
    with pytest.raises(ConfigError, match="mask_ratio"):
        build(mask_ratio=ratio)


@pytest.mark.parametrize(
    "overrides", [{"hard_share": [0.0, 1.5]}, {"momentum": [0.9, 1.1]}, {"momentum_epochs": 0}]
)
def test_settings_out_of_range_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(overrides))):
        build(**overrides)


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    assert paper.recipe.base_lr * paper.recipe.batch_size / paper.recipe.lr_batch == pytest.approx(1.2e-3)
    assert (paper.backbone.width, paper.backbone.depth, paper.decoder.depth) == (768, 12, 8)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"student.mask_token", "student.backbone.cls_token"} <= decayed
    assert not any(name.startswith("teacher.") or name.endswith(("bias", "norm.weight")) for name in decayed)
