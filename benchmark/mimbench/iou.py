"""Confusion matrices of label maps, and the intersection over union that follows from them.

Conventions, those of torchmetrics' JaccardIndex and of the common segmentation code bases:

- a pixel whose true label is ``ignore_index`` counts nowhere, whatever was predicted there;
- a class's IoU is taken over the pixels of the whole test split, never averaged over images;
- a class that occurs neither in the truth nor in the predictions has no IoU (NaN), and the mean IoU
  leaves it out; ``miou_all_classes`` counts it as 0. A class that is predicted but absent from the truth
  has an IoU of 0 and does count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimbench import stats
from mimbench.errors import DataError
from mimbench.task import Metric


def confusion(prediction: Tensor, truth: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Confusion matrices (B, K, K) int64 of label maps (B, H, W): rows are the truth, columns the prediction.

    Raises DataError for a true label that is neither one of the K classes nor ``ignore_index``.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"predictions {tuple(prediction.shape)} against masks {tuple(truth.shape)}")
    prediction, truth = prediction.flatten(1).long(), truth.flatten(1).long()
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
    unknown = counted & ((truth < 0) | (truth >= classes))
    if unknown.any():
        label = int(truth[unknown][0])
        raise DataError(f"a mask holds label {label}, but there are {classes} classes (0 to {classes - 1})")
    image = torch.arange(len(truth), device=truth.device)[:, None].expand_as(truth)
    cell = (image * classes + truth) * classes + prediction
    counts = torch.bincount(cell[counted], minlength=len(truth) * classes**2)
    return counts.view(len(truth), classes, classes)


def areas(matrices: Tensor) -> Tensor:
    """Per image and class the pixels of intersection, truth and prediction: (B, K, K) to (B, 3, K) int64."""
    return torch.stack([matrices.diagonal(dim1=1, dim2=2), matrices.sum(2), matrices.sum(1)], dim=1)


@dataclass(frozen=True)
class Scores:
    """What areas (..., 3, K) say, as shares in [0, 1]; leading dimensions are kept."""

    iou: np.ndarray  # (..., K): NaN where a class occurs neither in truth nor in prediction
    miou: np.ndarray  # mean over the classes that occur in either
    miou_all_classes: np.ndarray  # the same with 0 for classes that occur in neither
    pixel_accuracy: np.ndarray  # share of counted pixels that are right
    frequency_weighted_iou: np.ndarray  # IoU weighted by the true pixels of each class


def scores(total: np.ndarray) -> Scores:
    """Scores of areas (..., 3, K) that have been summed over images.

    All are NaN where no pixel has been counted.
    """
    intersection, truth, prediction = np.moveaxis(np.asarray(total, dtype=np.float64), -2, 0)
    union = truth + prediction - intersection
    pixels = truth.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that the docstrings promise
        iou = intersection / union
        present = np.where(union > 0, iou, 0.0)
        return Scores(
            iou=iou,
            miou=present.sum(-1) / (union > 0).sum(-1),
            miou_all_classes=np.where(pixels > 0, present.mean(-1), np.nan),
            pixel_accuracy=intersection.sum(-1) / pixels,
            frequency_weighted_iou=(present * truth).sum(-1) / pixels,
        )


def metrics(per_image: np.ndarray, seed: int) -> dict[str, Metric]:
    """Scores of a split in percent from its images' areas (N, 3, K), with intervals that resample images."""
    if not per_image[:, 1].any():
        raise DataError("no test pixel has a label, so there is nothing to score")
    names = ("miou", "miou_all_classes", "pixel_accuracy", "frequency_weighted_iou")
    found = {}
    for name in names:

        def percent(areas: np.ndarray, name: str = name) -> np.ndarray:
            return 100 * getattr(scores(areas), name)

        low, high = stats.bootstrap(per_image, percent, seed=seed)
        found[name] = Metric(float(percent(per_image.sum(0))), low, high, len(per_image))
    return found
