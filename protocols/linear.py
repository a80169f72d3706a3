"""Classification by a linear layer on frozen features.

``cached`` is the default: features are computed once, logistic regressions with 45 penalties solved to a stated
gradient norm (``mimbench.logistic``), the penalty chosen on a held-out part of the training split, and the
chosen one solved again on all of it. Deterministic, and independent of seeds.

``mae`` is the probe of MAE (He et al., 2022, appendix A.1): a BatchNorm without affine parameters on the
readout, LARS, 90 epochs of random resized crops through the frozen encoder. ``dino`` is that of DINO (Caron et
al., 2021, eval_linear.py): no BatchNorm, SGD, 100 epochs; its learning rate is chosen on held-out training
images, with one head per candidate trained at once. Both read ``Features.pooled``, as the encoder defines it,
and report the last epoch, where the authors' code reports the best one on the test split.

Held against: scikit-learn's optimum of the same regression at several penalties, on features of real images, to 1e-6
of the objective; heads trained together against heads trained alone (``tests/test_logistic.py``, ``test_linear.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, features, seeds, stats
from mimbench.augment import crop_and_flip
from mimbench.data import Batch, Split
from mimbench.encoder import Encoder, normalise
from mimbench.errors import ConfigError
from mimbench.fit import History, Recipe, fit
from mimbench.logistic import Problem, Solution
from mimbench.progress import Progress, quiet
from mimbench.task import Context, Result, Task

VERSION = 1
NEEDS = ("labels",)
RECIPES: dict[str, dict[str, Any]] = {
    "cached": {},
    "mae": {"solver": "training", "batch_norm": True, "eval_crop": 0.875},
    "dino": {
        "solver": "training",
        "learning_rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "eval_crop": 0.875,
        "training": {
            "epochs": 100,
            "batch_size": 1024,
            "optimizer": "sgd",
            "base_lr": 1e-3,
            "warmup_epochs": 0,
            "schedule_unit": "epoch",
        },
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``cached`` and, for training, of ``mae``."""

    recipe: str = "cached"  # the name these settings go by
    solver: Literal["lbfgs", "training"] = "lbfgs"  # on features computed once, or on augmented images
    holdout: float = 0.1  # share of the training split on which penalties or learning rates are compared
    eval_crop: float = 1.0  # side of the central crop over the shorter side of the resized image
    c_powers: tuple[float, float] = (
        -6.0,
        5.0,
    )  # lbfgs: range of log10(C), C = inverse strength of the penalty
    c_steps: int = 45  # lbfgs: values of C in that range, evenly spaced in the logarithm
    gradient_norm: float = 1e-6  # lbfgs: at which a solution is accepted
    learning_rates: tuple[float, ...] = ()  # training: candidates for training.base_lr; none: that one
    batch_norm: bool = False  # training: BatchNorm without affine parameters (eps 1e-6) before the layer
    crop_scale: tuple[float, float] = (0.08, 1.0)  # training: area of a crop over the image's
    flip: float = 0.5  # training: probability of a mirrored crop
    head_std: float = 0.01  # training: of the layer's first weights, a truncated normal; its bias starts at 0
    training: Recipe = Recipe(
        epochs=90,
        batch_size=16_384,
        optimizer="lars",
        base_lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        warmup_epochs=10,
    )

    def __post_init__(self) -> None:
        config.check(
            self,
            "linear",
            positive=("eval_crop", "c_steps", "gradient_norm", "learning_rates", "crop_scale"),
            not_negative=("head_std",),
            share=("holdout", "flip"),
        )
        low, high = self.c_powers
        if not -30 <= low <= high <= 30:
            raise ConfigError(f"linear.c_powers = {[low, high]} should rise, within -30 and 30")


@dataclass
class Fitted:
    """Predictions with the choice that led to them."""

    ranked: Tensor  # (N, 5 or fewer) int64: classes, best first
    details: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Top-1 (and top-5 of more than five classes) on the test split, with Wilson's intervals."""
    with context.stage("features"):
        test = features.extract(encoder, task.test, context, crop=settings.eval_crop)
    if settings.solver == "training":
        fitted = _train(encoder, task, test, settings, context)
    else:
        with context.stage("features"):
            train = features.extract(encoder, task.train, context, crop=settings.eval_crop)
        validation = torch.arange(0)
        if len(train) > 1:
            validation = features.positions_in(task.train.holdout(settings.holdout)[1], task.train)
        labels = task.train.labels
        with context.stage("solver"):
            fitted = classify(
                train, labels, test, task.num_classes, validation, settings, context.device, context.progress
            )
    return result(fitted, task.unseal().labels, task.classes)


def result(fitted: Fitted, labels: Tensor, classes: Sequence[str]) -> Result:
    """The metrics of ranked predictions against the true ``labels`` (N,)."""
    hits = fitted.ranked == labels[:, None]
    metrics = {"top1": stats.accuracy(hits[:, 0])}
    if len(classes) > 5:
        metrics["top5"] = stats.accuracy(hits.any(1))
    right = hits[:, 0].double()
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    per_class = torch.bincount(labels, right, minlength=len(classes)).tolist()
    details = fitted.details | {
        "accuracy": {
            name: 100 * hit / count if count else None
            for name, hit, count in zip(classes, per_class, counts, strict=True)
        }
    }
    return Result(metrics, "top1", details, hits[:, 0].numpy(), fitted.warnings)


def classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    validation: Tensor,
    settings: Settings,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Fitted:
    """Logistic regression on ``train`` (N, D) with ``labels`` (N,), applied to ``test`` (M, D).

    C is chosen by top-1 on the training items at the positions ``validation``; of equal ones the smallest.
    """
    penalties = _penalties(settings)
    train, labels = train.to(device), labels.to(device)
    warnings = []
    present = len(labels.unique())
    details: dict[str, Any] = {"train_images": len(train), "train_classes": present}
    chosen = penalties[len(penalties) // 2]
    if present == 1:
        warnings.append("the training split has a single class: it is predicted for every image")
    elif present < num_classes:
        warnings.append(f"{num_classes - present} of {num_classes} classes have no training image")
    if present > 1 and len(penalties) > 1 and len(validation):
        scores = _selection(train, labels, num_classes, validation, penalties, settings, progress or quiet())
        chosen = max(penalties, key=lambda C: scores[C])
        details["selection"] = [{"C": C, "top1": score} for C, score in scores.items()]
        if chosen in (penalties[0], penalties[-1]):
            warnings.append(f"the chosen C = {chosen:g} lies at the end of the range that was tried")
    solution = Problem(train, labels, num_classes).solve(chosen, tolerance=settings.gradient_norm)
    if not solution.converged:
        warnings.append(_unfinished(solution, settings))
    details |= {
        "chosen_C": chosen,
        "objective": solution.objective,
        "gradient_norm": solution.gradient_norm,
        "duality_gap": solution.duality_gap,
        "iterations": solution.iterations,
        "converged": solution.converged,
    }
    return Fitted(solution.top(test.to(device), min(5, num_classes)).cpu(), details, warnings)


def _penalties(settings: Settings) -> list[float]:
    low, high = settings.c_powers
    if settings.c_steps == 1:
        return [10.0 ** ((low + high) / 2)]
    return [10.0 ** (low + (high - low) * i / (settings.c_steps - 1)) for i in range(settings.c_steps)]


def _selection(
    train: Tensor,
    labels: Tensor,
    num_classes: int,
    validation: Tensor,
    penalties: list[float],
    settings: Settings,
    progress: Progress,
) -> dict[float, float]:
    """Top-1 in percent on the held-out items, per C."""
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[validation] = True
    held_out = held_out.to(train.device)
    problem = Problem(train[~held_out], labels[~held_out], num_classes)
    inputs, truth = train[held_out], labels[held_out]
    found = {}
    path = problem.path(penalties, tolerance=settings.gradient_norm)
    for solution in progress.track(path, "choosing C", total=len(penalties)):
        hits = solution.top(inputs)[:, 0] == truth
        found[solution.C] = 100 * float(hits.double().mean())
    return found


def _unfinished(solution: Solution, settings: Settings) -> str:
    return (
        f"the solver stopped after {solution.iterations} steps at a gradient norm of"
        f" {solution.gradient_norm:.1e}, above {settings.gradient_norm:.1e}"
    )


class Probe(nn.Module):
    """One or several linear layers on a frozen encoder, as ``mimbench.fit`` trains them.

    The encoder is no submodule: it is neither trained, nor saved, nor ever put into training mode.
    """

    needs = ("labels",)

    def __init__(
        self, encoder: Encoder, classes: int, rates: tuple[float, ...], settings: Settings, seed: int
    ) -> None:
        super().__init__()
        self.frozen = (encoder,)
        self.rates = rates
        self.settings = settings
        self.norm: nn.Module = nn.Identity()
        if settings.batch_norm:
            self.norm = nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False)
        self.heads = nn.ModuleList([nn.Linear(encoder.dim, classes) for _ in rates])
        for head in self.heads:  # all start alike, so that only the learning rate tells them apart
            assert isinstance(head, nn.Linear)
            generator = seeds.generator("cpu", seed, "head")
            nn.init.trunc_normal_(head.weight, std=settings.head_std, generator=generator)
            nn.init.zeros_(head.bias)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """A learning rate for each head."""
        return [
            {"params": list(head.parameters()), "lr_scale": rate / recipe.base_lr}
            for head, rate in zip(self.heads, self.rates, strict=True)
        ]

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Frozen features (B, D) of random crops, and labels (B,)."""
        (encoder,) = self.frozen
        settings = self.settings
        size = encoder.input.size
        images = crop_and_flip(batch, size, settings.crop_scale, generator, flip_p=settings.flip)
        parts = []
        with features.frozen(encoder):
            for part in images.split(features.BATCH):
                parts.append(encoder(normalise(part, encoder.input)).pooled.float())
        assert batch.labels is not None
        return {"inputs": torch.cat(parts), "labels": batch.labels}

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy, summed over heads: each head's gradient is that of its own loss."""
        inputs = self.norm(inputs)
        return {
            "loss": sum((F.cross_entropy(head(inputs), labels) for head in self.heads), inputs.new_zeros(()))
        }

    def logits(self, inputs: Tensor) -> list[Tensor]:
        """Each head's scores (N, K) of features (N, D), with the statistics of training."""
        self.eval()
        with torch.inference_mode():
            inputs = self.norm(inputs)
            return [head(inputs) for head in self.heads]


def _train(encoder: Encoder, task: Task, test: Tensor, settings: Settings, context: Context) -> Fitted:
    """Trains the layer on augmented images, at the learning rate that does best on held-out training images."""
    rates = settings.learning_rates or (settings.training.base_lr,)
    if settings.batch_norm and len(task.train) < 2:
        raise ConfigError("batch_norm needs at least 2 training images", "Use linear:cached")
    chosen = rates[0]
    details: dict[str, Any] = {"train_images": len(task.train), "learning_rates": list(rates)}
    if len(rates) > 1:
        with context.stage("selection"):
            part, validation = task.train.holdout(settings.holdout)
            inputs = features.extract(encoder, validation, context, crop=settings.eval_crop)
            probe, _ = _fitted_probe(encoder, part, task.num_classes, rates, settings, context)
            logits = probe.logits(inputs.to(context.device))
        hits = [(scores.argmax(1).cpu() == validation.labels).double() for scores in logits]
        found = [100 * float(hit.mean()) for hit in hits]
        details["selection_top1"] = found
        chosen = rates[found.index(max(found))]
    with context.stage("training"):
        probe, history = _fitted_probe(encoder, task.train, task.num_classes, (chosen,), settings, context)
    details |= {"chosen_learning_rate": chosen, "steps": history.steps, "curve": history.curve}
    (scores,) = probe.logits(test.to(context.device))
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()
    return Fitted(ranked, details, history.warnings)


def _fitted_probe(
    encoder: Encoder,
    split: Split,
    classes: int,
    rates: tuple[float, ...],
    settings: Settings,
    context: Context,
) -> tuple[Probe, History]:
    probe = Probe(encoder, classes, rates, settings, context.seed)
    history = fit(
        probe,
        split,
        settings.training,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.workdir / f"linear-{split.fingerprint}-{'-'.join(f'{rate:g}' for rate in rates)}",
        name="linear probe",
    )
    return probe, history
