"""Schedules, parameter groups and LARS against hand-computed values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.optim import (
    LARS,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_learning_rates,
    stage,
)


def test_mae_schedule() -> None:
    recipe = Recipe(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)
    hand = {0: 0.0, 1: 2.4e-3 / 400, 200: 1.2e-3, 400: 2.4e-3, 4200: 1.2e-3, 6100: 2.4e-3 * 0.14644661}
    for step, lr in hand.items():
        assert learning_rate(step, 10, recipe) == pytest.approx(lr, rel=1e-7)
    for step in range(0, 8000, 7):
        epoch = step / 10
        if epoch < 40:
            expected = 2.4e-3 * epoch / 40
        else:
            expected = 0 + (2.4e-3 - 0) * 0.5 * (1.0 + math.cos(math.pi * (epoch - 40) / (800 - 40)))
        assert learning_rate(step, 10, recipe) == pytest.approx(expected, rel=1e-12)


def test_simsiam_schedule_changes_once_an_epoch() -> None:
    recipe = Recipe(epochs=100, batch_size=512, base_lr=0.05, schedule_unit="epoch")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for epoch in range(100):
        expected = reference.get_last_lr()[0]
        assert learning_rate(epoch * 7, 7, recipe) == pytest.approx(expected, rel=1e-9)
        assert learning_rate(epoch * 7 + 6, 7, recipe) == learning_rate(epoch * 7, 7, recipe)
        optimizer.step()
        reference.step()
    assert learning_rate(25 * 7, 7, recipe) == pytest.approx(0.1 * 0.8535533906)


def test_simmim_schedules() -> None:
    steps = Recipe(
        epochs=800,
        batch_size=2048,
        base_lr=1e-4,
        lr_batch=512,
        schedule="multistep",
        milestones=(700,),
        warmup_epochs=10,
        warmup_lr=5e-7,
    )
    hand = {0: 2e-6, 5: 2e-6 + (4e-4 - 2e-6) / 2, 10: 4e-4, 699: 4e-4, 700: 4e-5, 799: 4e-5}
    for epoch, lr in hand.items():
        assert learning_rate(epoch * 3, 3, steps) == pytest.approx(lr)
    cosine = Recipe(epochs=100, batch_size=512, base_lr=2e-4, lr_batch=512, min_lr=1e-5)
    assert learning_rate(0, 5, cosine) == pytest.approx(2e-4)
    assert learning_rate(50 * 5, 5, cosine) == pytest.approx((2e-4 + 1e-5) / 2)
    assert learning_rate(100 * 5, 5, cosine) == pytest.approx(1e-5)


def test_constant_schedule_and_unscaled_rate() -> None:
    recipe = Recipe(base_lr=0.3, batch_size=64, lr_batch=0, schedule="constant", warmup_epochs=2)
    assert [learning_rate(s, 2, recipe) for s in range(6)] == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.3])


def test_warmup_longer_than_training_never_reaches_the_peak() -> None:
    recipe = Recipe(epochs=2, batch_size=256, base_lr=1.0, warmup_epochs=4)
    assert [learning_rate(s, 2, recipe) for s in range(4)] == pytest.approx([0, 0.125, 0.25, 0.375])
    even = Recipe(epochs=2, batch_size=256, base_lr=1.0, warmup_epochs=2)
    assert math.isfinite(learning_rate(4, 2, even))


def test_a_cosine_that_stops_early_follows_the_longer_one() -> None:
    """CroCo's is planned over 800 epochs and stopped at 400."""
    planned = Recipe(epochs=780, batch_size=256, base_lr=1.5e-4, min_lr=1e-6)
    stopped = dataclasses.replace(planned, epochs=390, cosine_share=0.5)
    for step in range(0, 390 * 3, 50):
        assert learning_rate(step, 3, stopped) == pytest.approx(learning_rate(step, 3, planned))


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_stages_repeat_the_schedule_of_one(unit: Literal["step", "epoch"]) -> None:
    one = Recipe(epochs=20, base_lr=0.3, warmup_epochs=2, min_lr=0.01, schedule_unit=unit)
    three = dataclasses.replace(one, epochs=60, stages=3)
    rates = [learning_rate(step, 7, one) for step in range(20 * 7)]
    assert [learning_rate(step, 7, three) for step in range(60 * 7)] == pytest.approx(rates * 3)


def test_the_stage_of_a_step_is_right_at_every_boundary() -> None:
    for stages, each in itertools.product((1, 2, 3, 7), (1, 3, 49, 50)):
        total = stages * each
        assert [stage(step / total, stages) for step in range(total)] == [s // each for s in range(total)]
    assert stage(1.0, 3) == 2


def test_lars_steps_by_hand() -> None:
    matrix = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    vector = nn.Parameter(torch.tensor([3.0, 4.0]))
    zero = nn.Parameter(torch.zeros(1, 2))
    gradient = np.array([0.5, -1.0])
    optimizer = LARS(
        [{"params": [matrix, zero], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}], lr=2.0
    )
    w, m = np.array([3.0, 4.0]), np.zeros(2)
    for _ in range(3):
        for p in (matrix, vector, zero):
            p.grad = torch.tensor(gradient, dtype=torch.float32).view_as(p)
        optimizer.step()
        g = gradient + 0.1 * w
        m = 0.9 * m + g * 0.001 * np.hypot(*w) / np.hypot(*g)
        w = w - 2.0 * m
    np.testing.assert_allclose(matrix.detach().numpy()[0], w, rtol=1e-6)
    # plain momentum: the gradient counts 1 + 1.9 + 2.71 times
    np.testing.assert_allclose(vector.detach().numpy(), [3, 4] - 2 * 5.61 * gradient, rtol=1e-6)
    assert torch.isfinite(zero).all()


def test_lars_leaves_weights_of_no_norm_unscaled() -> None:
    zero = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([zero, still], lr=0.5)
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(zero, torch.full((2, 2), -0.5))
    assert torch.equal(still, torch.ones(2, 2))


class Tuned(nn.Module):
    """A small ViT under a classifier."""

    def __init__(self) -> None:
        super().__init__()
        shape = ViTShape(patch_size=4, width=8, depth=3, heads=2)
        self.encoder = ViTEncoder(ViT(8, shape), InputSpec(8), "mean").for_finetuning()
        self.head = nn.Linear(8, 2)

    def layer_of(self, name: str) -> int:
        part, _, inner = name.partition(".")
        return self.encoder.layer_of(inner) if part == "encoder" else self.encoder.depth + 1


def settings_by_name(model: nn.Module, recipe: Recipe) -> dict[str, dict[str, object]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group for group in parameter_groups(model, recipe) for p in group["params"]}


def test_decay_follows_timm() -> None:
    model, recipe = Tuned(), Recipe(weight_decay=0.05)
    spared, decayed = param_groups_weight_decay(model, weight_decay=0.05)
    expected = {id(p): group["weight_decay"] for group in (spared, decayed) for p in group["params"]}
    ours = settings_by_name(model, recipe)
    assert {n: g["weight_decay"] for n, g in ours.items()} == {
        n: expected[id(p)] for n, p in model.named_parameters()
    }
    assert ours["encoder.vit.cls_token"]["weight_decay"] == 0.05  # three-dimensional
    every = settings_by_name(model, Recipe(weight_decay=0.05, decay_vectors=True))
    assert {group["weight_decay"] for group in every.values()} == {0.05}


def test_layer_decay_scales_as_in_mae() -> None:
    found = settings_by_name(Tuned(), Recipe(layer_decay=0.5))
    expected = {
        "encoder.vit.cls_token": 0.5**4,
        "encoder.vit.patch_embed.proj.weight": 0.5**4,
        "encoder.vit.blocks.0.norm1.bias": 0.5**3,
        "encoder.vit.blocks.2.mlp.fc2.weight": 0.5,
        "encoder.fc_norm.weight": 1.0,
        "head.weight": 1.0,
    }
    assert {name: found[name]["lr_scale"] for name in expected} == expected
    with pytest.raises(ConfigError, match="layer_decay"):
        parameter_groups(nn.Linear(2, 2), Recipe(layer_decay=0.5))


def test_frozen_parameters_are_left_out() -> None:
    model = Tuned()
    model.encoder.requires_grad_(False)
    assert set(settings_by_name(model, Recipe())) == {"head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="no parameter"):
        make_optimizer(model.requires_grad_(False), Recipe())


class Grouped(nn.Module):
    """A model that sets its own groups."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 2))
        self.predictor = nn.Linear(2, 2)
        self.groups = [
            {"params": list(self.body.parameters())},
            {"params": [self.token], "weight_decay": 0.0, "lr_scale": 0.5},
            {"params": list(self.predictor.parameters()), "weight_decay": 0.3, "schedule": "constant"},
        ]

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, object]]:
        return self.groups


def test_a_model_sets_its_own_groups() -> None:
    model = Grouped()
    recipe = Recipe(weight_decay=0.05, batch_size=256, base_lr=0.1)
    found = settings_by_name(model, recipe)
    decay = {name: group["weight_decay"] for name, group in found.items()}
    assert decay == {
        "body.weight": 0.05,
        "body.bias": 0.0,
        "token": 0.0,
        "predictor.weight": 0.3,
        "predictor.bias": 0.3,
    }
    optimizer = make_optimizer(model, recipe)
    set_learning_rates(optimizer, 0.02, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named == {
        "body.weight": 0.02,
        "body.bias": 0.02,
        "token": 0.01,
        "predictor.weight": 0.1,
        "predictor.bias": 0.1,
    }


def test_groups_must_hold_each_parameter_once() -> None:
    model = Grouped()
    model.groups = model.groups[:2]
    with pytest.raises(ConfigError, match=r"leaves out predictor\.weight, predictor\.bias"):
        parameter_groups(model, Recipe())
    model = Grouped()
    model.groups.append({"params": [model.token]})
    with pytest.raises(ConfigError, match="listed twice: token"):
        parameter_groups(model, Recipe())
    model = Grouped()
    model.groups.append({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigError, match="not the model's"):
        parameter_groups(model, Recipe())
