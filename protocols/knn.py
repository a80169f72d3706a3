"""Classification by a weighted vote of the nearest training images, on frozen features.

``dino`` is the default: cosine similarity, weights exp(similarity / 0.07), k among 10, 20, 100 and 200 (Caron et
al., 2021). Here k is chosen by leave-one-out within the training split. The authors' code prints all four on the
test split, and the best is reported: ``dino_official`` does so, to show by how much that flatters. The other
recipes are the default settings of other libraries, to meet a number on its own ground; behind each stands where
its settings are written. All of them read the same features: how a library crops or standardises images and
features is not part of a recipe.

The search is exact (``mimbench.neighbours``). Equal distances are won by the earlier training image, equal votes
by the lower class; of values of k that do equally well the smallest is taken.

Held against: scikit-learn's and lightly's predictions from the same features of real images, label by label
(``tests/test_score.py``, ``tests/protocols/test_knn.py``).
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
    # dino/eval_knn.py: --nb_knn 10 20 100 200, --temperature 0.07; each k is printed on the test split
    "dino_official": {"selection_images": 0},
    # dinov2/eval/knn.py: nb_knn 10, 20, 100, 200, temperature 0.07; each k is printed on the test split
    "dinov2_k10": {"ks": [10]},
    "dinov2_k20": {"ks": [20]},
    "dinov2_k100": {"ks": [100]},
    "dinov2_k200": {"ks": [200]},
    # lightly/utils/benchmarking/knn.py: knn_k 200, knn_t 0.1; so in benchmarks/imagenet/resnet50/main.py
    "lightly": {"ks": [200], "temperature": 0.1},
    # benchmarks/imagenet/vitb16/main.py: --knn-k 200, --knn-t 0.07
    "lightly_vit": {"ks": [200]},
    # configs/config/benchmark/nearest_neighbor/eval_resnet_8gpu_in1k_kNN.yaml: TOPK 200, SIGMA 0.1. With
    # L2_NORM_FEATS, which that file turns off: similarities of vectors of any length are no setting here
    "vissl": {"ks": [200], "temperature": 0.1},
    # solo/utils/knn.py, WeightedKNNClassifier: k 20, T 0.07, cosine
    "solo": {"ks": [20]},
    # solo/methods/base.py, while it trains: knn_k 20, distance_fx "euclidean", whose epsilon of 1e-5 matters
    # beside a distance of 0 alone
    "solo_online": {"ks": [20], "metric": "euclidean", "weighting": "inverse"},
    # stable_pretraining/callbacks/knn.py, OnlineKNN: k 5, euclidean, temperature 0.07; here without its queue
    "stable_pretraining": {"ks": [5], "metric": "euclidean", "weighting": "shifted"},
    # sklearn.neighbors.KNeighborsClassifier: n_neighbors 5, weights "uniform", metric "minkowski" with p 2
    "sklearn": {"ks": [5], "metric": "euclidean", "weighting": "uniform"},
    # eval_segmentation.py, KNNClassifier, whose grid for patches is 1, 3, 10, 30 in "cosine" and "L2", with the
    # most common label; here its largest k on whole images
    "capi": {"ks": [30], "weighting": "uniform"},
    "capi_l2": {"ks": [30], "metric": "euclidean", "weighting": "uniform"},
}
SELECTION_SEED = 20210429  # fixes which training images k is chosen on, whatever the run's seed


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``dino``."""

    recipe: str = "dino"  # the name these settings go by
    ks: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours to choose from
    metric: Literal["cosine", "euclidean"] = "cosine"  # what makes a neighbour near
    weighting: Literal["exponential", "uniform", "inverse", "shifted"] = "exponential"  # see neighbours.vote
    temperature: float = 0.07  # of the exponential weighting
    eval_crop: float = 1.0  # side of the central crop over the shorter side of the resized image
    selection_images: int = 10_000  # most training images that k is chosen on, each against all the others;
    # 0: the k that does best on the test split is taken, so that the score is the best of several

    def __post_init__(self) -> None:
        config.check(
            self,
            "knn",
            positive=("ks", "temperature", "eval_crop"),
            not_negative=("selection_images",),
            filled=("ks",),
        )
        if self.weighting == "exponential" and self.metric != "cosine":
            raise ConfigError("the exponential weighting is of similarities", "Use knn.metric=cosine")
        if self.weighting in ("inverse", "shifted") and self.metric != "euclidean":
            raise ConfigError(f"the {self.weighting} weighting is of distances", "Use knn.metric=euclidean")


def idle(settings: Settings) -> tuple[str, ...]:
    """The settings that move nothing beside the others."""
    without_temperature = settings.weighting != "exponential"
    alone = len(set(settings.ks)) == 1  # then nothing is chosen
    return ("temperature",) * without_temperature + ("selection_images",) * alone


@dataclass
class Fitted:
    """Predictions with the choice that led to them."""

    candidates: dict[int, Tensor]  # of each k (N,) int64; of several the test labels choose
    details: dict[str, Any]
    warnings: list[str]

    @property
    def predictions(self) -> Tensor:
        """Those of the k that was chosen within the training split."""
        (only,) = self.candidates.values()
        return only


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Top-1 on the test split, with Wilson's interval."""
    with context.stage("features"):
        train = features.extract(encoder, task.train, context, crop=settings.eval_crop)
        test = features.extract(encoder, task.test, context, crop=settings.eval_crop)
    labels = task.train.labels
    with context.stage("neighbours"):
        fitted = classify(train, labels, test, task.num_classes, settings, context.device)
    return result(fitted, task.unseal(looks=len(fitted.candidates)).labels)


def result(fitted: Fitted, labels: Tensor) -> Result:
    """The metric of predictions against the true ``labels`` (N,); of several candidates the best."""
    right = {k: predictions == labels for k, predictions in fitted.candidates.items()}
    found = {k: stats.accuracy(correct) for k, correct in right.items()}
    best = max(found, key=lambda k: found[k].value)
    details = fitted.details
    if len(found) > 1:
        scores = {str(k): metric.value for k, metric in found.items()}
        details = details | {"chosen_on": "test", "chosen_k": best, "test_top1": scores}
    return Result({"top1": found[best]}, "top1", details, right[best].numpy(), fitted.warnings)


def classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    settings: Settings,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Chooses k within ``train`` (N, D) with ``labels`` (N,) and predicts the classes of ``test`` (M, D).

    Without images to choose on it predicts by every k.
    """
    bank, labels = train.to(device), labels.to(device)
    ks, warnings = _that_fit(settings.ks, len(bank))
    details: dict[str, Any] = {"train_images": len(bank)}
    if len(ks) > 1 and settings.selection_images:
        found = _leave_one_out(bank, labels, num_classes, ks, settings)
        details["leave_one_out_top1"] = {str(k): score for k, score in found.items()}
        ks = [max(found, key=lambda k: found[k])]
    if len(ks) == 1:
        details["chosen_k"] = ks[0]
    distances, neighbours = nearest(test.to(device), bank, max(ks), settings.metric)
    votes = vote(distances, neighbours, labels, num_classes, ks, settings.weighting, settings.temperature)
    return Fitted({k: votes[k].cpu() for k in ks}, details, warnings)


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
