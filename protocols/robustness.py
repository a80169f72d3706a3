"""How a frozen encoder with a linear classifier holds up under corruption, occlusion and attack.

The classifier is multinomial logistic regression on pooled features of the clean training images, its penalty
chosen on a part of them. It then reads, without further training:

corruptions  the 15 of Hendrycks and Dietterich (ICLR 2019) at up to 5 severities, made on the fly at the data's
             own side and only then resized for the encoder. Frost is procedural (``mimbench.corruptions``).
occlusion    a share of the cells of a fixed grid replaced by the encoder's mean colour, i.e. by zero after
             normalisation: cells at random, or the most salient first (after Naseer et al., NeurIPS 2021,
             "Intriguing properties of vision transformers"). The salience of a cell is the sum over its pixels
             of the absolute gradient of the highest logit, so it needs no label and no attention map.
attacks      FGSM and PGD on encoder and classifier together, at the encoder's input resolution, bounded in
             [0, 1] pixel values before normalisation and not rounded to 8 bits, with the true labels. An image
             that is misclassified to begin with counts as wrong.

The encoder is always in eval mode: BatchNorm uses its running statistics, never those of corrupted batches.

Corruption error CE is the error summed over severities, divided by that of a reference; mCE is its mean over
corruptions. Relative mCE compares, in the same way, what is lost from the error on clean images. The reference
``pixels`` is logistic regression on raw pixels of the same training images, scored here on the very same
corrupted images; ``alexnet`` is the published AlexNet on ImageNet-C. Where the reference makes no error, or for
relative mCE loses nothing (raw pixels hardly mind noise and blur), the ratio is not defined and left out, and
``undefined`` in the details names the corruptions; ``drop``, the loss in points, is always there.

Held against: the published strengths, SciPy's, scikit-image's and PIL's filters under each corruption, published
AlexNet errors, whose mCE is 100, and a linear model, whose worst case is known (``tests/protocols/test_robustness.py``,
``test_corruptions.py``, ``test_attacks.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mimbench import attacks, config, seeds, stats
from mimbench.corruptions import NAMES, SEVERITIES, corrupt
from mimbench.corruptions.draws import Draws
from mimbench.data import Split, prefetch
from mimbench.encoder import Encoder, InputSpec, normalise
from mimbench.errors import ConfigError, UnknownName
from mimbench.features import extract, frozen, positions_in, prepare
from mimbench.logistic import Problem, Solution
from mimbench.task import Context, Metric, Result, Task

VERSION = 1  # raise it also when mimbench.corruptions or mimbench.attacks change what they give
NEEDS = ("labels",)
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {
        "severities": [1, 3, 5],
        "limit": 500,
        "occlusion_shares": [0.5],
        "epsilons": [1.0, 4.0],
        "pgd_steps": 5,
        "attack_limit": 100,
        "reference_side": 16,
        "reference_train": 2000,
    },
}
INFERENCE_BATCH = 250  # images per forward; no score depends on it
SUBSET_SEED = 20190327  # fixes which test images a limit keeps, whatever the run's seed
LARGEST_SIDE = 224  # in pixels; larger images are corrupted at this side, as ImageNet-C was

# Top-1 errors of AlexNet in percent, per corruption the mean over severities 1 to 5, and on clean images:
# Hendrycks and Dietterich (2019), as used by every published ImageNet mCE.
ALEXNET = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic": 64.6056,
    "pixelate": 71.7840,
    "jpeg": 60.6500,
}
ALEXNET_CLEAN = 43.4780


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``full``."""

    recipe: str = "full"  # the name these settings go by
    penalties: tuple[float, ...] = (
        1e-4,
        1e-3,
        1e-2,
        1e-1,
        1.0,
        10.0,
        100.0,
    )  # candidates for C of the classifier
    holdout: float = 0.1  # share of the training images on which candidates are compared
    corruptions: tuple[str, ...] = NAMES  # which corruptions
    severities: tuple[int, ...] = SEVERITIES  # which severities
    side: int | None = (
        None  # side at which images are corrupted, in pixels; none: the data's own, at most 224
    )
    limit: int | None = None  # how many test images, a fixed random choice; none: all
    reference: Literal["pixels", "alexnet"] = "pixels"  # whose errors mCE divides by
    reference_side: int = 32  # pixels: side to which images are resized for it, if theirs is larger
    reference_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)  # pixels: candidates for its C
    reference_train: int = 10_000  # pixels: at most so many training images, a fixed random choice
    occlusion_shares: tuple[float, ...] = (0.25, 0.5, 0.75)  # shares of the cells that are dropped
    occlusion_cells: int | None = (
        None  # cells per side; none: 8 for inputs up to 64 pixels, else 14 (Naseer et al.)
    )
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0)  # largest change of a pixel value by an attack, in 1/255
    pgd_steps: int = 20  # gradient steps per start
    pgd_reach: float = 2.5  # steps times step size, in epsilons
    pgd_restarts: int = 1  # random starts
    attack_limit: int | None = 1000  # how many of the test images are attacked

    def __post_init__(self) -> None:
        config.check(
            self,
            "robustness",
            positive=(
                *("penalties", "reference_penalties", "reference_side", "reference_train", "limit", "side"),
                *("occlusion_cells", "pgd_steps", "pgd_reach", "pgd_restarts", "attack_limit"),
            ),
            not_negative=("epsilons",),
            share=("holdout", "occlusion_shares"),
            filled=("penalties", "reference_penalties", "corruptions", "severities"),
        )
        for name in self.corruptions:
            if name not in NAMES:
                raise UnknownName("corruption", name, NAMES)
        if not set(self.severities) <= set(SEVERITIES):
            raise ConfigError(f"robustness.severities = {list(self.severities)} are not all of 1 to 5")


@dataclass(frozen=True)
class Head:
    """A linear classifier in float64 on the encoder's device."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    @classmethod
    def of(cls, solution: Solution, device: torch.device) -> Head:
        weight = solution.weight / solution.scale
        return cls(weight.to(device), (solution.bias - weight @ solution.mean).to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (B, K) float64 of features (B, D)."""
        return torch.addmm(self.bias, features.double(), self.weight.T)


@dataclass(frozen=True)
class Classifier:
    """An encoder in front of its head."""

    encoder: Encoder
    head: Head

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, S, S) at the encoder's size."""
        return self.head(self.encoder(inputs).pooled)

    def predict(self, images: Tensor) -> Tensor:
        """Classes (B,) of uint8 images (B, 3, H, W), on the CPU."""
        with frozen(self.encoder):
            return self(prepare(images, None, self.encoder.input)).argmax(1).cpu()


@dataclass(frozen=True)
class Pixels:
    """The reference: a head on raw pixels."""

    head: Head
    side: int  # in pixels

    def predict(self, images: Tensor) -> Tensor:
        """Classes (B,) of uint8 images (B, 3, H, W), on the CPU."""
        return self.head(_raw(images, None, self.side)).argmax(1).cpu()


@dataclass
class Predictions:
    """Classes (n,) of the n test images under one condition each; ``reference`` where there is one."""

    ours: dict[
        tuple[str, float], Tensor
    ]  # ("clean", 0), (corruption, severity), ("random" or "salient", share)
    reference: dict[tuple[str, float], Tensor]


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Fits on clean training images, predicts everything but the attacks, then opens the test labels."""
    _check(settings, task)
    side = _side(task.test, settings)
    with context.stage("classifier"):
        features = extract(encoder, task.train, context)
        solution, tried = _choose(
            features, task.train, task.num_classes, settings.penalties, settings.holdout
        )
        classifier = Classifier(encoder, Head.of(solution, context.device))
    pixels = None
    if settings.reference == "pixels":
        with context.stage("reference"):
            pixels = _fit_pixels(task, min(settings.reference_side, side), settings, context)
    chosen, attacked = _subset(task, settings)
    with context.stage("corruptions and occlusion"):
        predictions = _predict(classifier, pixels, task.test, chosen, side, settings, context)
    test = task.unseal()
    labels = test.labels[chosen]
    metrics, found, warnings = _score(predictions, labels, settings)
    with context.stage("attacks"):
        attack_metrics, masked = _attack(classifier, test, attacked, side, settings, context)
    warnings += masked
    if not solution.converged:
        warnings.append(f"logistic regression stopped at a gradient norm of {solution.gradient_norm:.1e}")
    return Result(
        metrics | attack_metrics,
        "corrupted",
        {
            "C": solution.C,
            "holdout_accuracy": tried,
            "side": side,
            "cells": _cells(encoder, settings),
            "frost": "procedural",
            **found,
        },
        warnings=warnings,
    )


def _check(settings: Settings, task: Task) -> None:
    if settings.reference == "alexnet" and task.name != "imagenet":
        raise ConfigError("AlexNet's errors are known for imagenet only", "Set robustness.reference=pixels")
    if settings.reference == "alexnet" and set(settings.severities) != set(SEVERITIES):
        raise ConfigError(
            "AlexNet's errors are means over all five severities", "Leave severities as they are"
        )


def _choose(
    features: Tensor, split: Split, num_classes: int, penalties: tuple[float, ...], holdout: float
) -> tuple[Solution, dict[str, float]]:
    """Logistic regression at the C that is best on the holdout (the smallest of equals), fitted on all of train."""
    labels = split.labels
    fit_part, held_part = (positions_in(part, split) for part in split.holdout(holdout))
    tried: dict[float, float] = {}
    path = Problem(features[fit_part], labels[fit_part], num_classes).path(sorted(penalties))
    for solution in path:
        hits = solution.top(features[held_part])[:, 0] == labels[held_part]
        tried[solution.C] = 100 * float(hits.double().mean())
    best = max(tried, key=lambda C: (tried[C], -C))
    return Problem(features, labels, num_classes).solve(best), {f"{C:g}": v for C, v in tried.items()}


def _raw(images: Tensor, sizes: Tensor | None, side: int) -> Tensor:
    """Pixel values (B, 3 * side * side) in [0, 1] of uint8 images, squared as the encoder's are."""
    return prepare(images, sizes, InputSpec(side, (0.0,) * 3, (1.0,) * 3)).flatten(1)


def _fit_pixels(task: Task, side: int, settings: Settings, context: Context) -> Pixels:
    """The reference ``pixels``, with its own C chosen in the same way."""
    train, count = task.train, settings.reference_train
    if len(train) > count:
        order = torch.randperm(len(train), generator=seeds.generator("cpu", SUBSET_SEED, "reference"))
        train = train.subset(order[:count].sort().values)
    batches = train.batches(INFERENCE_BATCH, context.device)
    rows = torch.cat([_raw(batch.images, batch.sizes, side).cpu() for batch in batches])
    solution, _ = _choose(rows, train, task.num_classes, settings.reference_penalties, settings.holdout)
    return Pixels(Head.of(solution, context.device), side)


def _subset(task: Task, settings: Settings) -> tuple[Tensor, Tensor]:
    """Positions of the test images that are scored, and of those among them that are attacked, in order."""
    order = torch.randperm(len(task.test), generator=seeds.generator("cpu", SUBSET_SEED, task.name))
    chosen = order[: settings.limit]
    return chosen.sort().values, chosen[: settings.attack_limit].sort().values


def _side(split: Split, settings: Settings) -> int:
    """The side at which all images are corrupted: the shorter one of the first image, at most 224."""
    if settings.side is not None:
        return settings.side
    first = split.batch(torch.tensor([0]))
    height, width = first.images.shape[-2:] if first.sizes is None else first.sizes[0].tolist()
    return min(height, width, LARGEST_SIDE)


def _cells(encoder: Encoder, settings: Settings) -> int:
    return settings.occlusion_cells or (8 if encoder.input.size <= 64 else 14)


def _canvas(images: Tensor, sizes: Tensor | None, side: int) -> Tensor:
    """uint8 images (B, 3, side, side): the centre square, resized; unchanged where it has that side already."""
    if sizes is None and images.shape[-2:] == (side, side):
        return images
    square = prepare(images, sizes, InputSpec(side, (0.0,) * 3, (1.0,) * 3))
    return (square * 255).round().to(torch.uint8)


def _predict(
    classifier: Classifier,
    pixels: Pixels | None,
    test: Split,
    chosen: Tensor,
    side: int,
    settings: Settings,
    context: Context,
) -> Predictions:
    """All predictions that need no label, batch by batch."""
    ours: dict[tuple[str, float], list[Tensor]] = {}
    theirs: dict[tuple[str, float], list[Tensor]] = {}
    batches = prefetch(test.subset(chosen).batches(INFERENCE_BATCH, context.device))
    total = -(-len(chosen) // INFERENCE_BATCH)
    conditions = [(name, severity) for name in settings.corruptions for severity in settings.severities]
    for batch in context.progress.track(batches, "corruptions and occlusion", total):
        images = _canvas(batch.images, batch.sizes, side)
        positions = chosen[batch.index]
        for name, severity in [("clean", 0), *conditions]:
            shown = images
            if severity:
                shown = corrupt(images, name, severity, seed=context.seed, positions=positions)
            ours.setdefault((name, severity), []).append(classifier.predict(shown))
            if pixels is not None:
                theirs.setdefault((name, severity), []).append(pixels.predict(shown))
        for key, classes in _occluded(classifier, images, positions, settings, context.seed).items():
            ours.setdefault(key, []).append(classes)
    return Predictions(
        {key: torch.cat(parts) for key, parts in ours.items()},
        {key: torch.cat(parts) for key, parts in theirs.items()},
    )


def _occluded(
    classifier: Classifier, images: Tensor, positions: Tensor, settings: Settings, seed: int
) -> dict[tuple[str, float], Tensor]:
    """Classes (B,) for each way of choosing cells and each share of cells dropped."""
    cells = _cells(classifier.encoder, settings)
    inputs = prepare(images, None, classifier.encoder.input)
    salience = cell_salience(classifier, inputs, cells)
    chance = Draws(positions.to(images.device), seed, "occlusion").uniform("cells", cells * cells)
    found = {}
    for way, score in (("random", chance), ("salient", salience)):
        order = score.argsort(dim=1, descending=True, stable=True)
        for share in settings.occlusion_shares:
            dropped = torch.zeros_like(score, dtype=torch.bool)
            dropped.scatter_(1, order[:, : round(share * cells * cells)], True)
            with frozen(classifier.encoder):
                found[way, share] = classifier(drop_cells(inputs, dropped, cells)).argmax(1).cpu()
    return found


@contextlib.contextmanager
def differentiable(encoder: Encoder) -> Iterator[None]:
    """Inside, the encoder is in eval mode and gradients with respect to its input are recorded."""
    with frozen(encoder), torch.inference_mode(False), torch.enable_grad():
        yield


def cell_salience(classifier: Classifier, inputs: Tensor, cells: int) -> Tensor:
    """(B, cells * cells): the absolute gradient of the highest logit, summed over the pixels of each cell.

    ``inputs`` (B, C, S, S) are normalised images; cells are numbered in raster order.
    """
    with differentiable(classifier.encoder):
        leaf = inputs.detach().requires_grad_()
        gradient = torch.autograd.grad(classifier(leaf).amax(1).sum(), leaf)[0].abs().sum(1)
    cell = _cell_of_pixel(inputs.shape[-1], cells, inputs.device)
    rows = torch.zeros(len(inputs), cells, inputs.shape[-1], device=inputs.device).index_add_(
        1, cell, gradient
    )
    return torch.zeros(len(inputs), cells, cells, device=inputs.device).index_add_(2, cell, rows).flatten(1)


def drop_cells(inputs: Tensor, dropped: Tensor, cells: int) -> Tensor:
    """Normalised images (B, C, S, S) with zeros in the cells where ``dropped`` (B, cells * cells) is True."""
    cell = _cell_of_pixel(inputs.shape[-1], cells, inputs.device)
    pixels = dropped.view(-1, cells, cells)[:, cell][:, :, cell]
    return inputs.masked_fill(pixels[:, None], 0.0)


def _cell_of_pixel(size: int, cells: int, device: torch.device) -> Tensor:
    """(size,): the row (or column) of cells that each row of pixels lies in."""
    return torch.arange(size, device=device) * cells // size


def _score(
    predictions: Predictions, labels: Tensor, settings: Settings
) -> tuple[dict[str, Metric], dict[str, Any], list[str]]:
    """Metrics, details with accuracies per condition, and warnings, from predictions and the labels (n,)."""

    def wrong(table: dict[tuple[str, float], Tensor], name: str) -> np.ndarray:
        """(n,) share of the severities at which each image is misclassified."""
        return torch.stack([table[name, s] != labels for s in settings.severities]).double().mean(0).numpy()

    n = len(labels)
    clean = (predictions.ours["clean", 0] == labels).numpy()
    errors = np.stack([wrong(predictions.ours, name) for name in settings.corruptions], axis=1)  # (n, C)
    per_image = 100 * (1 - errors.mean(1))
    metrics = {
        "corrupted": _mean(per_image),
        "clean": stats.accuracy(clean),
        "drop": _mean(100 * clean - per_image, unit="points"),
    }
    warnings: list[str] = []
    undefined: dict[str, list[str]] = {}
    if settings.reference == "alexnet":
        reference = np.tile([ALEXNET[name] / 100 for name in settings.corruptions], (n, 1))
        reference_clean = np.full(n, ALEXNET_CLEAN / 100)
        warnings.append(
            "AlexNet was measured on the published ImageNet-C: its frost shows photographs, ours is procedural,"
            " and its images were stored as JPEG after corruption"
        )
    else:
        reference = np.stack([wrong(predictions.reference, name) for name in settings.corruptions], axis=1)
        reference_clean = (predictions.reference["clean", 0] != labels).double().numpy()
    ours_clean = 1.0 - clean
    for name, pair in (
        ("mce", (errors, reference)),
        ("relative_mce", (errors - ours_clean[:, None], reference - reference_clean[:, None])),
    ):
        table = np.stack(pair, axis=1)  # (n, 2, C)
        means = table.mean(0)
        if (means[1] <= 0).any():
            undefined[name] = [c for c, m in zip(settings.corruptions, means[1], strict=True) if m <= 0]
            continue
        value = 100 * float((means[0] / means[1]).mean())
        metrics[name] = Metric(value, *stats.bootstrap(table, mean_ratio), n)
    for way in ("random", "salient"):
        hits = [predictions.ours[way, share] == labels for share in settings.occlusion_shares]
        if hits:
            metrics[f"occlusion_{way}"] = _mean(100 * torch.stack(hits).double().mean(0).numpy())
    details: dict[str, Any] = {"undefined": undefined}
    if "mce" in undefined:
        warnings.append(
            f"mCE is not defined: the reference makes no error under {', '.join(undefined['mce'])}"
        )
    for title, predicted in (("encoder", predictions.ours), ("reference", predictions.reference)):
        accuracies: dict[str, dict[str, float]] = {}
        for (name, strength), classes in predicted.items():
            accuracies.setdefault(name, {})[f"{strength:g}"] = 100 * float(
                (classes == labels).double().mean()
            )
        if accuracies:
            details.setdefault("accuracy", {})[title] = accuracies
    return metrics, details, warnings


def mean_ratio(means: np.ndarray) -> np.ndarray:
    """100 times the mean over corruptions of ours / reference, from (R, 2, C) to (R,); NaN where not defined."""
    ours, reference = means[:, 0], means[:, 1]
    return 100 * np.divide(ours, reference, out=np.full_like(ours, np.nan), where=reference > 0).mean(1)


def _mean(values: np.ndarray, unit: str = "%") -> Metric:
    """The mean over images of ``values`` (n,), with its bootstrap interval."""
    return Metric(float(values.mean()), *stats.bootstrap(values), len(values), unit)


def _attack(
    classifier: Classifier, test: Split, attacked: Tensor, side: int, settings: Settings, context: Context
) -> tuple[dict[str, Metric], list[str]]:
    """Accuracy under FGSM and PGD per epsilon, over the ``attacked`` positions of the labelled test split."""
    spec = classifier.encoder.input
    unit = InputSpec(spec.size, (0.0,) * 3, (1.0,) * 3)
    correct: dict[str, list[Tensor]] = {}

    def classify(images: Tensor) -> Tensor:
        return classifier(normalise(images, spec))

    batches = test.subset(attacked).batches(INFERENCE_BATCH, context.device, ("labels",))
    for batch in context.progress.track(batches, "attacks", -(-len(attacked) // INFERENCE_BATCH)):
        assert batch.labels is not None
        images = prepare(_canvas(batch.images, batch.sizes, side), None, unit)
        with differentiable(classifier.encoder):
            with torch.no_grad():
                right = classify(images).argmax(1) == batch.labels
            images, labels = images[right], batch.labels[right]
            positions = attacked[batch.index][right.cpu()]
            for level in settings.epsilons:
                changed = _attacked(classify, images, labels, level / 255, settings, context.seed, positions)
                for name, adversarial in changed.items():
                    kept = right.clone()
                    if len(images):
                        with torch.no_grad():
                            kept[right] = classify(adversarial).argmax(1) == labels
                    correct.setdefault(f"{name}_{level:g}", []).append(kept.cpu())
    metrics = {name: stats.accuracy(torch.cat(parts).numpy()) for name, parts in correct.items()}
    warnings = [
        f"PGD at {level:g}/255 is weaker than FGSM: gradients may be masked, or the steps too few"
        for level in settings.epsilons
        if metrics[f"pgd_{level:g}"].value > metrics[f"fgsm_{level:g}"].value
    ]
    return metrics, warnings


def _attacked(
    classify: attacks.Classifier,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    settings: Settings,
    seed: int,
    positions: Tensor,
) -> dict[str, Tensor]:
    """Adversarial images (B, 3, S, S) in [0, 1], by attack."""
    if not len(images):
        return {"fgsm": images, "pgd": images}
    return {
        "fgsm": attacks.fgsm(classify, images, labels, epsilon),
        "pgd": attacks.pgd(
            classify,
            images,
            labels,
            epsilon,
            steps=settings.pgd_steps,
            step_size=settings.pgd_reach * epsilon / settings.pgd_steps,
            restarts=settings.pgd_restarts,
            seed=seed,
            positions=positions,
        ),
    }
