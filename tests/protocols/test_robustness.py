"""The robustness protocol on stubs whose scores are known, and against hand-computed mCE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimbench import config, registry
from mimbench.corruptions import NAMES
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec
from mimbench.errors import LabelLeak, MimbenchError
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.task import Context, Result, Task

robustness = registry.load_protocol("robustness")
SPEC = InputSpec(16, (0.5,) * 3, (0.25,) * 3)
FAST: dict[str, Any] = {
    "severities": [1, 5],
    "penalties": [0.01, 1.0],
    "occlusion_shares": [0.25, 0.75],
    "epsilons": [1.0, 8.0],
    "pgd_steps": 3,
    "reference_side": 8,
}


def split_of(count: int, classes: int, part: str, labels: Tensor | None = None, seed: int = 0) -> Split:
    """16x16 images whose colour and brighter quadrant tell the class, but for one in eight."""
    draw = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = torch.arange(count) % classes
    images = torch.randint(0, 90, (count, 3, 16, 16), generator=draw)
    shown = labels.clone()
    shown[::8] = (shown[::8] + 1) % classes
    for image, label in zip(images, shown.tolist(), strict=True):
        row, column = label // 2 % 2 * 8, label % 2 * 8
        image[label % 3, row : row + 8, column : column + 8] += 120
    names = tuple(f"class {k}" for k in range(classes))
    return Split(
        "squares", part, InMemory(images.to(torch.uint8)), names, f"{part}{seed}", torch.arange(count), labels
    )


def task_of(classes: int = 4, test: int = 40) -> Task:
    return Task(split_of(80, classes, "train"), split_of(test, classes, "test", seed=1))


def vit(size: int = 16) -> ViTEncoder:
    torch.manual_seed(0)
    spec = dataclasses.replace(SPEC, size=size)
    return ViTEncoder(ViT(size, ViTShape(4, 16, 1, 2)), spec, "mean").requires_grad_(False)


class Means(nn.Module):
    """An encoder whose features are the means of the four quadrants: linear in the image."""

    input, dim, depth, stride, readout = SPEC, 12, 1, 8, "quadrants"

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        patches = nn.functional.adaptive_avg_pool2d(images, 2)
        return Features(patches.flatten(1), patches)


def context(tmp_path: Path, seed: int = 0) -> Context:
    return Context(torch.device("cpu"), seed, quiet(), tmp_path)


def run(encoder: Any, task: Task, tmp_path: Path, seed: int = 0, **changes: Any) -> Result:
    settings = config.build(robustness.Settings, FAST | changes)
    return robustness.evaluate(encoder, task, settings, context(tmp_path, seed))


def test_scores_are_complete_and_within_their_intervals(tmp_path: Path) -> None:
    result = run(vit(), task_of(), tmp_path)
    assert result.primary in result.metrics
    for name in ("corrupted", "clean", "drop", "mce", "occlusion_random", "occlusion_salient", "pgd_8"):
        metric = result.metrics[name]
        assert metric.low <= metric.value <= metric.high, name
    ours = result.details["accuracy"]["encoder"]
    assert set(NAMES) <= set(ours)
    per_condition = [ours[name][severity] for name in NAMES for severity in ("1", "5")]
    assert result.metrics["corrupted"].value == pytest.approx(np.mean(per_condition))
    assert result.metrics["clean"].value == pytest.approx(ours["clean"]["0"])
    assert result.metrics["drop"].value == pytest.approx(ours["clean"]["0"] - np.mean(per_condition))


def test_mce_is_what_the_table_of_accuracies_gives(tmp_path: Path) -> None:
    result = run(vit(), task_of(), tmp_path)
    ours, theirs = result.details["accuracy"]["encoder"], result.details["accuracy"]["reference"]
    ratios = []
    for name in NAMES:
        ratios.append(sum(100 - a for a in ours[name].values()) / sum(100 - a for a in theirs[name].values()))
    assert result.metrics["mce"].value == pytest.approx(100 * np.mean(ratios))


def predictions(wrong: dict[tuple[str, float], list[int]], n: int) -> dict[tuple[str, float], Tensor]:
    """Label 0 for every image but those listed as misclassified."""
    found = {}
    for key, images in wrong.items():
        found[key] = torch.zeros(n, dtype=torch.long)
        found[key][images] = 1
    return found


def test_mce_by_hand() -> None:
    # fog: ours 1 + 2 errors, reference 2 + 4; snow: ours 2 + 2, reference 2 + 3; clean: ours 1, reference 1; of 4.
    ours = {("clean", 0): [0], ("fog", 1): [0], ("fog", 2): [0, 1], ("snow", 1): [0, 1], ("snow", 2): [2, 3]}
    theirs = {
        ("clean", 0): [3],
        ("fog", 1): [0, 1],
        ("fog", 2): [0, 1, 2, 3],
        ("snow", 1): [1, 2],
        ("snow", 2): [0, 1, 2],
    }
    settings = config.build(
        robustness.Settings, {"corruptions": ["fog", "snow"], "severities": [1, 2], "occlusion_shares": []}
    )
    told = robustness.Predictions(predictions(ours, 4), predictions(theirs, 4))
    metrics, _, warnings = robustness._score(told, torch.zeros(4, dtype=torch.long), settings)
    assert metrics["mce"].value == pytest.approx(100 * (3 / 6 + 4 / 5) / 2)
    # per severity: fog loses 1.5 - 1 over the clean error, its reference 3 - 1; snow 2 - 1, its reference 2.5 - 1
    assert metrics["relative_mce"].value == pytest.approx(100 * (0.5 / 2 + 1 / 1.5) / 2)
    assert metrics["corrupted"].value == pytest.approx(100 * (1 - 7 / 16))
    assert metrics["clean"].value == 75
    assert not warnings


def test_an_undefined_ratio_is_left_out_and_said() -> None:
    ours = {("clean", 0): [0], ("fog", 1): [0]}
    theirs: dict[tuple[str, float], list[int]] = {("clean", 0): [], ("fog", 1): []}
    settings = config.build(
        robustness.Settings, {"corruptions": ["fog"], "severities": [1], "occlusion_shares": []}
    )
    told = robustness.Predictions(predictions(ours, 4), predictions(theirs, 4))
    metrics, details, warnings = robustness._score(told, torch.zeros(4, dtype=torch.long), settings)
    assert details["undefined"] == {"mce": ["fog"], "relative_mce": ["fog"]}
    assert "mce" not in metrics
    assert "relative_mce" not in metrics
    assert "fog" in warnings[0]


def test_mce_against_alexnet_is_100_for_alexnets_errors() -> None:
    # 10,000 images with, per corruption, exactly AlexNet's share of errors (to the fourth decimal of a percent).
    n = 10_000
    wrong: dict[tuple[str, float], list[int]] = {("clean", 0): list(range(4348))}
    for name, error in robustness.ALEXNET.items():
        wrong |= {(name, severity): list(range(round(error * 100))) for severity in range(1, 6)}
    settings = config.build(robustness.Settings, {"reference": "alexnet", "occlusion_shares": []})
    told = robustness.Predictions(predictions(wrong, n), {})
    metrics, _, _ = robustness._score(told, torch.zeros(n, dtype=torch.long), settings)
    assert metrics["mce"].value == pytest.approx(100, abs=0.01)
    assert metrics["relative_mce"].value == pytest.approx(100, abs=0.05)
    assert np.mean(list(robustness.ALEXNET.values())) == pytest.approx(78.9, abs=0.1)


def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(vit(), task_of(), tmp_path)
    monkeypatch.setattr(robustness, "INFERENCE_BATCH", 7)
    parts = run(vit(), task_of(), tmp_path)
    assert parts.metrics == whole.metrics
    assert parts.details == whole.details


def test_the_same_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    first = run(vit(), task_of(), tmp_path)
    assert run(vit(), task_of(), tmp_path) == first
    assert run(vit(), task_of(), tmp_path, seed=1).details != first.details


def test_a_limit_keeps_the_corruption_of_each_image(tmp_path: Path) -> None:
    # The same images corrupted alike: predictions under a limit are a part of those without one.
    settings = config.build(robustness.Settings, FAST)
    limited = dataclasses.replace(settings, limit=10, attack_limit=5)
    task = task_of()
    chosen, attacked = robustness._subset(task, limited)
    assert len(chosen) == 10
    assert len(attacked) == 5
    assert set(attacked.tolist()) <= set(chosen.tolist())
    head = robustness.Head(torch.randn(4, 16, dtype=torch.double), torch.zeros(4, dtype=torch.double))
    classifier = robustness.Classifier(vit(), head)
    every = torch.arange(40)
    whole = robustness._predict(classifier, None, task.test, every, 16, settings, context(tmp_path))
    part = robustness._predict(classifier, None, task.test, chosen, 16, limited, context(tmp_path))
    for key, classes in part.ours.items():
        assert torch.equal(classes, whole.ours[key][chosen])


def test_labels_stay_sealed_until_everything_but_the_attacks_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    predict, attack, unseal = robustness._predict, robustness._attack, Task.unseal
    for name, function in (("_predict", predict), ("_attack", attack)):
        monkeypatch.setattr(robustness, name, lambda *a, _n=name, _f=function: (order.append(_n), _f(*a))[1])
    monkeypatch.setattr(Task, "unseal", lambda self: (order.append("unseal"), unseal(self))[1])
    task = task_of()
    run(vit(), task, tmp_path)
    assert order == ["_predict", "unseal", "_attack"]
    with pytest.raises(LabelLeak):
        task.unseal()


def test_classes_may_be_missing_from_either_split(tmp_path: Path) -> None:
    only_two = Task(
        split_of(40, 4, "train", labels=torch.arange(40) % 2),
        split_of(30, 4, "test", labels=torch.arange(30) % 3 + 1, seed=1),
    )
    result = run(Means(), only_two, tmp_path)
    assert result.metrics["clean"].value <= 100 / 3 + 1e-6  # of classes 1, 2 and 3 only 1 was ever seen
    assert all(np.isfinite(m.value) for m in result.metrics.values())


def test_any_input_size_and_modes_are_left_as_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = ResNetEncoder(
        ResNet(ResNetShape(block="basic", layers=(1, 1, 1, 1), widths=(8, 8, 16, 16), stem="cifar")), SPEC
    )
    resnet.train()
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    run(resnet, task_of(test=12), tmp_path, corruptions=["fog", "jpeg"])
    assert resnet.training
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    larger = run(vit(24), task_of(test=12), tmp_path, corruptions=["fog"])
    assert larger.details["side"] == 16


def test_salient_cells_are_those_with_the_largest_gradients() -> None:
    # Only the upper right quadrant and, less, the lower left one move the highest logit.
    weight = torch.zeros(2, 12, dtype=torch.double)
    weight[0, 1], weight[0, 2] = 3.0, 1.0
    head = robustness.Head(weight, torch.tensor([5.0, 0.0], dtype=torch.double))
    classifier = robustness.Classifier(Means(), head)
    salience = robustness.cell_salience(classifier, torch.randn(2, 3, 16, 16), 4).view(2, 4, 4)
    assert (salience[:, :2, 2:] > salience[:, 2:, :2].amax()).all()
    assert (salience[:, 2:, :2] > 0).all()
    assert (salience[:, :2, :2] == 0).all()


def test_dropped_cells_become_zero_after_normalisation() -> None:
    inputs = torch.ones(1, 3, 6, 6)
    dropped = torch.zeros(1, 9, dtype=torch.bool)
    dropped[0, 5] = True  # second row, third column
    changed = robustness.drop_cells(inputs, dropped, 3)
    assert changed.sum() == 3 * (36 - 4)
    assert (changed[0, :, 2:4, 4:6] == 0).all()


def test_attacks_on_a_linear_model_find_its_exact_robust_accuracy(tmp_path: Path) -> None:
    result = run(Means(), task_of(), tmp_path, corruptions=["fog"], epsilons=[0.5, 64.0], pgd_steps=10)
    metrics = result.metrics
    assert metrics["fgsm_64"].value <= metrics["fgsm_0.5"].value <= metrics["clean"].value
    assert metrics["pgd_64"].value <= metrics["fgsm_64"].value
    assert metrics["pgd_64"].value < 5


def test_images_that_are_misclassified_to_begin_with_count_as_wrong_under_attack(tmp_path: Path) -> None:
    hopeless = Task(
        split_of(40, 4, "train", labels=torch.arange(40) % 2),
        split_of(20, 4, "test", labels=torch.full((20,), 3), seed=1),
    )
    result = run(Means(), hopeless, tmp_path, corruptions=["fog"])
    assert result.metrics["clean"].value == 0
    assert result.metrics["fgsm_1"].value == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruptions": ["fogg"]}, "fogg"),
        ({"severities": [0]}, "severities"),
        ({"limit": 0}, "limit"),
        ({"occlusion_shares": [1.5]}, "occlusion"),
        ({"reference": "alexnet"}, "imagenet"),
        ({"corruptions": []}, "corruptions is an empty list"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MimbenchError, match=message):
        run(vit(), task_of(), tmp_path, **changes)


@pytest.mark.parametrize("recipe", robustness.RECIPES)
def test_recipes_build(recipe: str) -> None:
    settings = config.build(robustness.Settings, robustness.RECIPES[recipe] | {"recipe": recipe})
    assert settings.recipe == recipe
