"""Confusion matrices and IoU against scikit-learn, torchmetrics and cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassJaccardIndex

from mimbench import iou
from mimbench.errors import DataError


def maps(seed: int, classes: int, shape: tuple[int, ...] = (5, 13, 17)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, shape, generator=generator, dtype=torch.uint8)
    noise = torch.randint(classes, shape, generator=generator, dtype=torch.uint8)
    keep = torch.rand(shape, generator=generator) < 0.6
    return torch.where(keep, truth, noise), truth


def total(
    prediction: torch.Tensor, truth: torch.Tensor, classes: int, ignore: int | None = None
) -> np.ndarray:
    return iou.areas(iou.confusion(prediction, truth, classes, ignore)).sum(0).numpy()


def test_confusion_matrix_is_that_of_scikit_learn_for_each_image() -> None:
    prediction, truth = maps(0, classes=6)
    ours = iou.confusion(prediction, truth, 6)
    for row in range(len(truth)):
        theirs = confusion_matrix(truth[row].flatten(), prediction[row].flatten(), labels=range(6))
        np.testing.assert_array_equal(ours[row].numpy(), theirs)


@pytest.mark.parametrize("ignore", [None, 3, 255])
def test_mean_and_class_iou_are_those_of_torchmetrics(ignore: int | None) -> None:
    prediction, truth = maps(1, classes=7)
    if ignore == 255:
        truth[:, :4] = 255
    ours = iou.scores(total(prediction, truth, 7, ignore))
    per_class = MulticlassJaccardIndex(7, average="none", ignore_index=ignore)(
        prediction.long(), truth.long()
    )
    np.testing.assert_allclose(np.nan_to_num(ours.iou), per_class.numpy(), rtol=1e-6)
    if ignore != 3:  # torchmetrics also drops an ignored class from the mean; predicting it is an error to us
        mean = MulticlassJaccardIndex(7, average="macro", ignore_index=ignore)(
            prediction.long(), truth.long()
        )
        assert float(ours.miou) == pytest.approx(float(mean), rel=1e-6)


def test_a_class_absent_from_both_is_left_out_of_the_mean() -> None:
    prediction, truth = maps(2, classes=4)
    ours = iou.scores(total(prediction, truth, 9))
    theirs = MulticlassJaccardIndex(9, average="macro")(prediction.long(), truth.long())
    assert float(ours.miou) == pytest.approx(float(theirs), rel=1e-6)
    assert np.isnan(ours.iou[4:]).all()
    assert float(ours.miou_all_classes) == pytest.approx(float(ours.miou) * 4 / 9)


def test_case_counted_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [9, 9, 1, 1]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 1, 1, 1], [2, 0, 1, 2]]], dtype=torch.uint8)
    found = iou.scores(total(prediction, truth, 4, ignore=9))
    # class 0: 2 true, 1 predicted, 1 right; class 1: 4 true, 4 predicted, 3 right; class 2: never true
    np.testing.assert_allclose(found.iou[:3], [1 / 2, 3 / 5, 0])
    assert np.isnan(found.iou[3])
    assert float(found.miou) == pytest.approx((1 / 2 + 3 / 5) / 3)
    assert float(found.miou_all_classes) == pytest.approx((1 / 2 + 3 / 5) / 4)
    assert float(found.pixel_accuracy) == pytest.approx(4 / 6)
    assert float(found.frequency_weighted_iou) == pytest.approx((2 * 1 / 2 + 4 * 3 / 5) / 6)


def test_iou_is_of_the_split_and_not_the_mean_of_images() -> None:
    truth = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 0, 0, 1]], [[0, 1, 1, 1]]], dtype=torch.uint8)
    found = iou.scores(total(prediction, truth, 2))
    np.testing.assert_allclose(found.iou, [4 / 5, 3 / 4])


def test_all_pixels_ignored_gives_no_score() -> None:
    truth = torch.full((1, 3, 3), 255, dtype=torch.uint8)
    found = iou.scores(total(torch.zeros_like(truth), truth, 3, ignore=255))
    assert np.isnan([found.miou, found.miou_all_classes, found.pixel_accuracy]).all()


def test_a_label_outside_the_classes_is_refused() -> None:
    truth = torch.tensor([[[0, 7]]], dtype=torch.uint8)
    with pytest.raises(DataError, match="label 7"):
        iou.confusion(torch.zeros_like(truth), truth, 3, ignore_index=255)


def test_intervals_resample_images() -> None:
    prediction, truth = maps(3, classes=3, shape=(40, 6, 6))
    prediction[:10] = truth[:10]
    per_image = iou.areas(iou.confusion(prediction, truth, 3)).numpy()
    found = iou.metrics(per_image, seed=5)
    rng = np.random.default_rng(0)
    for name, metric in found.items():
        assert metric.n == 40
        assert metric.low < metric.value < metric.high
        plain = [getattr(iou.scores(per_image[rng.integers(40, size=40)].sum(0)), name) for _ in range(1000)]
        low, high = 100 * np.percentile(plain, [2.5, 97.5])
        assert [metric.low, metric.high] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_equal_images_leave_no_uncertainty() -> None:
    prediction, truth = maps(4, classes=3, shape=(1, 6, 6))
    per_image = iou.areas(iou.confusion(prediction, truth, 3)).repeat(8, 1, 1).numpy()
    for metric in iou.metrics(per_image, seed=0).values():
        assert metric.low == pytest.approx(metric.high) == pytest.approx(metric.value)


def test_no_labelled_pixel_is_refused() -> None:
    with pytest.raises(DataError, match="no test pixel"):
        iou.metrics(np.zeros((4, 3, 5), dtype=np.int64), seed=0)
