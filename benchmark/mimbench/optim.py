"""Optimizers, parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mimbench.errors import ConfigError

if TYPE_CHECKING:
    from mimbench.fit import Recipe


def learning_rate(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, before any factor per group.

    With t the epochs since the stage began: a linear rise from ``warmup_lr`` over ``warmup_epochs``, then
    min_lr + (lr - min_lr) (1 + cos(pi c (t - warm-up) / (length - warm-up))) / 2 for ``cosine``, as in MAE's
    util/lr_sched.py, with c = ``cosine_share``; lr * gamma^(milestones passed) for ``multistep``; lr for
    ``constant``. With ``schedule_unit = "epoch"`` t is rounded down after the warm-up, as in SimSiam's
    main_simsiam.py.
    """
    peak = scaled(recipe.base_lr, recipe)
    length = recipe.epochs / recipe.stages
    time = step / steps_per_epoch
    if recipe.stages > 1:
        time -= length * stage(time / recipe.epochs, recipe.stages)
    if time < recipe.warmup_epochs:
        start = scaled(recipe.warmup_lr, recipe)
        return start + (peak - start) * time / recipe.warmup_epochs
    if recipe.schedule_unit == "epoch":
        time = max(math.floor(time + 1e-9), recipe.warmup_epochs)
    if recipe.schedule == "multistep":
        return peak * recipe.gamma ** sum(time >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "cosine":
        end = scaled(recipe.min_lr, recipe)
        share = (time - recipe.warmup_epochs) / max(length - recipe.warmup_epochs, 1e-12)
        return end + (peak - end) * (1 + math.cos(math.pi * min(share, 1.0) * recipe.cosine_share)) / 2
    return peak


def stage(progress: float, stages: int) -> int:
    """Which of ``stages`` equal parts of training, counted from 0, a share of it falls into."""
    return min(int(progress * stages + 1e-9), stages - 1)  # step / steps may fall short of a boundary


def scaled(lr: float, recipe: Recipe) -> float:
    """A base learning rate for the recipe's batch: the linear rule of Goyal et al. (2017)."""
    return lr * recipe.batch_size / recipe.lr_batch if recipe.lr_batch else lr


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` in groups of equal settings, in a fixed order.

    Every group has ``params``, ``weight_decay``, ``lr_scale`` (a factor on the learning rate) and
    ``schedule`` ("recipe", or "constant": the peak learning rate throughout). A model may set any of the
    last three by ``parameter_groups(recipe)``, a list of groups that together hold all its trainable
    parameters. Where weight decay is not set it is the recipe's, but 0 for biases and other parameters of
    at most one dimension (timm's rule) unless ``recipe.decay_vectors``. ``recipe.layer_decay`` multiplies
    ``lr_scale`` by layer_decay^(top - layer), with the layers of ``model.layer_of(name)`` (0 = embedding)
    and top the highest of them (Bao et al., 2022; MAE's util/lr_decay.py).
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    given: Iterable[dict[str, Any]] = [{"params": list(names)}]
    if own := getattr(model, "parameter_groups", None):
        given = own(recipe)
    layer_scale = _layer_scales(model, names.values(), recipe)
    groups: dict[tuple[float, float, str], dict[str, Any]] = {}
    seen: set[Tensor] = set()
    for group in given:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            if parameter not in names or parameter in seen:
                what = "is listed twice" if parameter in seen else "is not the model's"
                raise ConfigError(f"a parameter in parameter_groups() {what}: {names.get(parameter)}")
            seen.add(parameter)
            name = names[parameter]
            exempt = (parameter.ndim <= 1 or name.endswith(".bias")) and not recipe.decay_vectors
            decay = float(group.get("weight_decay", 0.0 if exempt else recipe.weight_decay))
            scale = group.get("lr_scale", 1.0) * layer_scale(name)
            schedule = group.get("schedule", "recipe")
            groups.setdefault(
                (decay, scale, schedule),
                {"params": [], "weight_decay": decay, "lr_scale": scale, "schedule": schedule},
            )["params"].append(parameter)
    if left_out := [name for parameter, name in names.items() if parameter not in seen]:
        raise ConfigError(f"parameter_groups() leaves out {', '.join(left_out)}")
    return list(groups.values())


def _layer_scales(model: nn.Module, names: Iterable[str], recipe: Recipe) -> Callable[[str], float]:
    if recipe.layer_decay == 1:
        return lambda name: 1.0
    layer_of = getattr(model, "layer_of", None)
    if layer_of is None:
        raise ConfigError(
            f"recipe.layer_decay = {recipe.layer_decay} needs a model that numbers its layers",
            "Set recipe.layer_decay to 1",
        )
    top = max(map(layer_of, names))
    return lambda name: recipe.layer_decay ** (top - layer_of(name))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``parameter_groups``; ``set_learning_rates`` sets its rates."""
    groups = parameter_groups(model, recipe)
    if not groups:
        raise ConfigError("the model has no parameter to train")
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = kinds <= {"cpu", "cuda"}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=fused)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=fused)
    return LARS(groups, momentum=recipe.momentum)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, peak: float) -> None:
    """Sets each group's rate to ``lr``, or ``peak`` if its schedule is constant, times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * (peak if group["schedule"] == "constant" else lr)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) with momentum and L2 weight decay.

    For a parameter w of more than one dimension and g = grad + weight_decay * w, the step is scaled by
    trust * |w| / |g| (1 where either norm is 0); vectors are not scaled. Then m = momentum * m + g and
    w = w - lr * m. As in MAE's util/lars.py, the rate enters after the momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad + group["weight_decay"] * parameter
                if parameter.ndim > 1:
                    size, pull = parameter.norm(), update.norm()
                    # on the device, so that no step waits for it
                    ratio = group["trust"] * size / pull
                    update = update * torch.where((size > 0) & (pull > 0), ratio, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(state["momentum_buffer"] * group["lr"])
