"""What is special to SimSiam: the stop-gradient, the heads, the learning rate of the predictor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mimbench import config, registry
from mimbench.optim import make_optimizer, set_learning_rates

MODULE = registry.load_method("simsiam")


def build(preset: str = "smoke", **overrides: Any) -> Any:
    table = config.merge(registry.method("simsiam").preset(preset), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table))


def views(model: Any, count: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {name: torch.randn(count, 3, size, size) for name in ("images1", "images2")}


def test_no_gradient_flows_through_the_target() -> None:
    """With the predictor's output cut off, what is left of the gradient would have come through z."""
    model = build().train()
    out = model(**views(model))
    assert out["loss"].requires_grad
    for parameter in model.predictor[3].parameters():
        nn.init.zeros_(parameter)
    model.predictor[3].bias.data.fill_(1.0)  # p no longer depends on the images
    model(**views(model))["loss"].backward()
    grads = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert all(not g.abs().sum() > 0 for g in grads)
    leaking = build(stop_gradient=False).train()
    for parameter in leaking.predictor[3].parameters():
        nn.init.zeros_(parameter)
    leaking.predictor[3].bias.data.fill_(1.0)
    leaking(**views(leaking))["loss"].backward()
    assert any(p.grad.abs().sum() > 0 for p in leaking.backbone.parameters() if p.grad is not None)


def test_the_loss_is_the_symmetrised_cosine_and_minus_one_at_best() -> None:
    model = build().train()
    out = model(**views(model))
    cosine = lambda a, b: (a / a.norm(dim=1, keepdim=True) * b / b.norm(dim=1, keepdim=True)).sum(1).mean()  # noqa: E731
    expected = -(cosine(out["p1"], out["z2"]) + cosine(out["p2"], out["z1"])) / 2
    torch.testing.assert_close(out["loss"], expected)
    assert -1 <= out["loss"] <= 1


def test_the_heads_are_the_papers() -> None:
    model = build("paper", backbone={"block": "basic", "layers": [1, 1, 1, 1]})
    linear = [m for m in model.projector if isinstance(m, nn.Linear)]
    norms = [m for m in model.projector if isinstance(m, nn.BatchNorm1d)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 512), (512, 512), (512, 2048)]
    assert [m.affine for m in norms] == [True, True, False]
    assert not linear[-1].bias.requires_grad
    assert isinstance(model.projector[-1], nn.BatchNorm1d)
    assert isinstance(model.predictor[-1], nn.Linear)
    assert model.predictor[-1].bias is not None


def test_the_cifar_recipe_is_that_of_appendix_d() -> None:
    cifar = config.build(MODULE.Config, registry.method("simsiam").preset("cifar"))
    assert cifar.projector_layers == 2
    assert cifar.augmentation.blur_p == 0
    recipe = cifar.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (800, 512, 5e-4)
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(0.06)


def test_everything_decays_and_the_predictor_keeps_its_learning_rate() -> None:
    model = build()
    recipe = MODULE.Config().recipe
    optimizer = make_optimizer(model, recipe)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    set_learning_rates(optimizer, lr=0.001, peak=0.05)
    head = id(model.predictor[0].weight)
    rates = {group["lr"] for group in optimizer.param_groups if head in map(id, group["params"])}
    assert rates == {0.05}
    assert {group["lr"] for group in optimizer.param_groups} == {0.001, 0.05}


def test_outputs_that_collapse_have_no_spread() -> None:
    model = build().train()
    healthy = model(**views(model, 64))["z_std"]
    assert healthy > 0.5 / model.config.width**0.5
    one = torch.randn(1, 3, 32, 32).expand(8, -1, -1, -1)
    assert model(images1=one, images2=one)["z_std"] < 1e-3
