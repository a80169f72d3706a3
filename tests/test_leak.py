"""No protocol reads test labels before its predictions are final, nor training data after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import evaluate, parts
from torch import Tensor

from mimbench import data, registry, seeds
from mimbench.data import Split
from mimbench.encoder import InputSpec
from mimbench.errors import LabelLeak
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.task import Task

# What follows from test labels, so that other labels may change it; all else in details must not move.
SCORES = {"accuracy", "iou", "j", "f"}
TEST_SELECTED = {("knn", "dino_official")}  # take the best of several scores on the test split, and say so
NOTHING_FITTED = {"label_propagation"}  # needs no training data

NEEDY = [
    (name, recipe)
    for name, card in registry.protocols().items()
    if card.needs
    for recipe in registry.load_protocol(name).RECIPES
]


class Watched(torch.Tensor):
    """Labels that note when anything is computed from them."""

    @staticmethod
    def of(values: Tensor, kind: str, events: list[str]) -> Watched:
        watched = values.as_subclass(Watched)
        watched.kind, watched.events = kind, events
        return watched

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, Watched) and hasattr(value, "events"):
                value.events.append(value.kind)
        with torch._C.DisableTorchFunctionSubclass():
            plain = [v.as_subclass(torch.Tensor) if isinstance(v, Watched) else v for v in args]
            return function(*plain, **(kwargs or {}))


class WatchedStore:
    """Images or masks that note when they are read."""

    def __init__(self, store: Any, kind: str, events: list[str]) -> None:
        self.store, self.kind, self.events = store, kind, events

    def __len__(self) -> int:
        return len(self.store)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        self.events.append(self.kind)
        return self.store.read(index)


class WatchedTask(Task):
    """A task that notes when its parts are read and when the test labels are opened."""

    def __init__(self, train: Split, test: Split) -> None:
        self.events: list[str] = []
        super().__init__(self._watched(train, "train"), self._watched(test, "test"))

    def _watched(self, split: Split, part: str) -> Split:
        changes: dict[str, Any] = {}
        if part == "train":
            changes["store"] = WatchedStore(split.store, "train images", self.events)
        if split.all_labels is not None:
            changes["all_labels"] = Watched.of(split.all_labels, f"{part} truth", self.events)
        if split.all_masks is not None:
            changes["all_masks"] = WatchedStore(split.all_masks, f"{part} truth", self.events)
        return dataclasses.replace(split, **changes)

    def clips(self, length: int | None = None) -> list[tuple[Tensor, Tensor]]:
        before = len(self.events)
        clips = super().clips(length)
        self.events[before:] = ["first frames"]  # what they show is tested with label propagation
        return clips

    def unseal(self, looks: int = 1) -> Split:
        self.events.append("unseal")
        return super().unseal(looks)


def encoder() -> ViTEncoder:
    seeds.seed_everything("leak test")
    return ViTEncoder(
        ViT(16, ViTShape(patch_size=4, width=16, depth=2, heads=2)), InputSpec(16), "mean"
    ).eval()


@pytest.mark.parametrize(("protocol", "recipe"), NEEDY)
def test_test_labels_are_opened_once_after_the_last_look_at_training_data(
    protocol: str, recipe: str, tmp_path: Path
) -> None:
    task = WatchedTask(*parts(protocol))
    found = evaluate(encoder(), protocol, recipe, task, tmp_path)
    assert task.events.count("unseal") == 1
    assert (found.details.get("chosen_on") == "test") == ((protocol, recipe) in TEST_SELECTED)
    assert (task.reads > 1) == ((protocol, recipe) in TEST_SELECTED)
    opened = task.events.index("unseal")
    before, after = set(task.events[:opened]), set(task.events[opened + 1 :])
    assert protocol in NOTHING_FITTED or {"train truth", "train images"} <= before
    assert "test truth" not in before
    assert after == {"test truth"}


def with_other_truth(split: Split) -> tuple[Split, Tensor]:
    """The split with the truth of every second image replaced by another, and (N,) which images kept theirs."""
    kept = torch.arange(len(split)) % 2 == 0
    rows = split.index[~kept]
    if split.all_masks is not None:
        masks = split.all_masks.read(torch.arange(len(split.all_masks)))[0].clone()
        masks[rows] = (masks[rows] + 1) % len(split.classes)
        return dataclasses.replace(split, all_masks=data.InMemory(masks)), kept
    assert split.all_labels is not None
    labels = split.all_labels.clone()
    labels[rows] = (labels[rows] + 1) % len(split.classes)
    return dataclasses.replace(split, all_labels=labels), kept


@pytest.mark.parametrize(("protocol", "recipe"), [pair for pair in NEEDY if pair not in TEST_SELECTED])
def test_other_test_labels_change_the_score_and_nothing_else(
    protocol: str, recipe: str, tmp_path: Path
) -> None:
    train, test = parts(protocol)
    other, kept = with_other_truth(test)
    first = evaluate(encoder(), protocol, recipe, Task(train, test), tmp_path / "first")
    second = evaluate(encoder(), protocol, recipe, Task(train, other), tmp_path / "second")
    assert first.details.keys() == second.details.keys()
    choices = first.details.keys() - SCORES
    assert choices
    assert {k: first.details[k] for k in choices} == {k: second.details[k] for k in choices}
    assert first.metrics.keys() == second.metrics.keys()
    if first.correct is not None:
        # The same predictions: right where they were for the same label, and never right for both labels.
        assert second.correct is not None
        assert np.array_equal(first.correct[kept.numpy()], second.correct[kept.numpy()])
        assert not (first.correct & second.correct)[~kept.numpy()].any()


def test_the_watch_sees_what_it_should() -> None:
    """The ways in which a protocol could cheat are noticed."""
    task = WatchedTask(*parts("knn"))
    with pytest.raises(LabelLeak):
        _ = task.test.labels
    assert task.test.all_labels is None
    assert task.events == []
    assert task._test.labels.shape == (60,)
    assert task.events == ["test truth"]

    task = WatchedTask(*parts("segmentation"))
    train = task.train
    with pytest.raises(LabelLeak):
        task.test.batch(torch.arange(2), needs=("masks",))
    assert task.test.all_masks is None
    task.unseal()
    train.batch(torch.arange(2), needs=("masks",))
    assert task.events == ["unseal", "train images", "train truth"]


def test_the_seal_holds() -> None:
    train, test = parts("knn")
    task = Task(train, test)
    for peek in (task.test, task.test.subset(torch.arange(3)), *task.test.holdout(0.5)):
        with pytest.raises(LabelLeak, match="before all choices were final"):
            _ = peek.labels
        with pytest.raises(LabelLeak):
            peek.batch(torch.arange(2), needs=("labels",))
    assert task.unseal().labels.equal(test.labels)
    with pytest.raises(LabelLeak, match="after the test labels"):
        _ = task.train
    with pytest.raises(LabelLeak, match="twice"):
        task.unseal()
