"""Classification by a weighted vote of the nearest training images, on frozen features.

``dino`` is the default: cosine similarity, weights exp(similarity / 0.07), k among 10, 20, 100 and 200 (Caron et
al., 2021). Here k is chosen by leave-one-out within the training split; the authors' code prints all four on the
test split. The other recipes are the default settings of other libraries, to meet a number on its own ground:
``lightly`` (KNNClassifier), ``vissl``, ``solo`` (solo-learn's offline kNN), ``sklearn`` (KNeighborsClassifier),
``capi`` (its dense kNN with a majority vote, here on whole images).

The search is exact (``mimbench.neighbours``). Equal distances are won by the earlier training image, equal votes
by the lower class; of values of k that do equally well the smallest is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mimbench import config, features, seeds, stats
from mimbench.encoder import Encoder
from mimbench.errors import ConfigError
from mimbench.neighbours import nearest, vote
from mimbench.task import Context, Result, Task

VERSION = 1
NEEDS = ("labels",)
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {},
    "lightly": {"ks": [200], "temperature": 0.1},
    "vissl": {"ks": [200], "temperature": 0.1},
    "solo": {"ks": [20]},
    "sklearn": {"ks": [5], "metric": "euclidean", "weighting": "uniform"},
    "capi": {"ks": [30], "weighting": "uniform"},
}
SELECTION_SEED = 20210429  # fixes which training images k is chosen on, whatever the run's seed


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``dino``."""

    recipe: str = "dino"  # the name these settings go by
    ks: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours to choose from
    metric: Literal["cosine", "euclidean"] = "cosine"  # what makes a neighbour near
    weighting: Literal["exponential", "uniform", "inverse"] = "exponential"  # see mimbench.neighbours.vote
    temperature: float = 0.07  # of the exponential weighting
    eval_crop: float = 1.0  # side of the central crop over the shorter side of the resized image
    selection_images: int = 10_000  # most training images that k is chosen on, each against all the others

    def __post_init__(self) -> None:
        config.check(
            self, "knn", positive=("ks", "temperature", "eval_crop", "selection_images"), filled=("ks",)
        )
        if self.weighting == "exponential" and self.metric != "cosine":
            raise ConfigError("the exponential weighting is of similarities", "Use knn.metric=cosine")
        if self.weighting == "inverse" and self.metric != "euclidean":
            raise ConfigError("the inverse weighting is of distances", "Use knn.metric=euclidean")


@dataclass
class Fitted:
    """Predictions with the choice that led to them."""

    predictions: Tensor  # (N,) int64
    details: dict[str, Any]
    warnings: list[str]


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Top-1 on the test split, with Wilson's interval."""
    with context.stage("features"):
        train = features.extract(encoder, task.train, context, crop=settings.eval_crop)
        test = features.extract(encoder, task.test, context, crop=settings.eval_crop)
    labels = task.train.labels
    with context.stage("neighbours"):
        fitted = classify(train, labels, test, task.num_classes, settings, context.device)
    return result(fitted, task.unseal().labels)


def result(fitted: Fitted, labels: Tensor) -> Result:
    """The metric of predictions against the true ``labels`` (N,)."""
    correct = fitted.predictions == labels
    metrics = {"top1": stats.accuracy(correct)}
    return Result(metrics, "top1", fitted.details, correct.numpy(), fitted.warnings)


def classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    settings: Settings,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Chooses k within ``train`` (N, D) with ``labels`` (N,) and predicts the classes of ``test`` (M, D)."""
    bank, labels = train.to(device), labels.to(device)
    ks, warnings = _that_fit(settings.ks, len(bank))
    details: dict[str, Any] = {"train_images": len(bank)}
    chosen = ks[0]
    if len(ks) > 1:
        found = _leave_one_out(bank, labels, num_classes, ks, settings)
        details["leave_one_out_top1"] = {str(k): score for k, score in found.items()}
        chosen = max(found, key=lambda k: found[k])
    details["chosen_k"] = chosen
    distances, neighbours = nearest(test.to(device), bank, chosen, settings.metric)
    votes = vote(
        distances, neighbours, labels, num_classes, [chosen], settings.weighting, settings.temperature
    )
    return Fitted(votes[chosen].cpu(), details, warnings)


def _that_fit(ks: tuple[int, ...], bank: int) -> tuple[list[int], list[str]]:
    """The values of k, ascending, that leave-one-out and the test can both use."""
    wanted = sorted(set(ks))
    if len(wanted) == 1:
        usable = [min(wanted[0], bank)]
    else:
        usable = [k for k in wanted if k < bank] or [min(wanted[0], bank)]
    left_out = [k for k in wanted if k not in usable]
    if not left_out:
        return usable, []
    return usable, [
        f"k = {', '.join(map(str, left_out))} is too large for {bank} training images:"
        f" k = {', '.join(map(str, usable))} was used"
    ]


def _leave_one_out(
    bank: Tensor, labels: Tensor, num_classes: int, ks: list[int], settings: Settings
) -> dict[int, float]:
    """Top-1 in percent for each k, of training images classified by the rest of the training split."""
    order = torch.randperm(len(bank), generator=seeds.generator("cpu", SELECTION_SEED))
    rows = order[: settings.selection_images].sort().values.to(bank.device)
    distances, neighbours = nearest(bank[rows], bank, max(ks), settings.metric, exclude=rows)
    votes = vote(distances, neighbours, labels, num_classes, ks, settings.weighting, settings.temperature)
    return {k: 100 * float((votes[k] == labels[rows]).double().mean()) for k in ks}
