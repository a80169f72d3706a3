"""kNN's votes against scikit-learn, and kNN as a protocol that never sees test labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from mimbench import config, features, neighbours, registry
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError, DataError, LabelLeak
from mimbench.neighbours import nearest, vote
from mimbench.progress import quiet
from mimbench.task import Context, Task

knn = registry.load_protocol("knn")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("weighting", "sklearn_weights", "metric"),
    [
        ("uniform", "uniform", "euclidean"),
        ("uniform", "uniform", "cosine"),
        ("inverse", "distance", "euclidean"),
        ("exponential", lambda distance: np.exp((1 - distance) / 0.07), "cosine"),
        ("shifted", lambda distance: 1 / (distance + 0.07), "euclidean"),
    ],
)
def test_votes_agree_with_scikit_learn(weighting: str, sklearn_weights: object, metric: str) -> None:
    bank, queries = normal(800, 10), normal(300, 10, seed=1)
    queries[:30] = bank[:30]  # distance 0
    bank[100:110] = bank[0]
    labels = (bank[:, :4].argmax(1) + (normal(800, seed=2) > 1)) * 2  # odd classes are empty
    for k in (1, 5, 50):
        reference = KNeighborsClassifier(k, weights=sklearn_weights, algorithm="brute", metric=metric)
        expected = reference.fit(bank.double().numpy(), labels).predict(queries.double().numpy())
        distances, where = nearest(queries, bank, 50, metric)
        found = vote(distances, where, labels, 10, [1, 5, 50], weighting, 0.07)[k]
        assert (found.numpy() == expected).mean() > 0.995  # near ties are summed in another order there


def test_equal_votes_are_won_by_the_lowest_class() -> None:
    distances, where = torch.ones(1, 4), torch.arange(4)[None]
    found = vote(distances, where, torch.tensor([3, 1, 1, 3]), 5, [1, 2, 3, 4], "uniform")
    assert {k: int(v) for k, v in found.items()} == {1: 3, 2: 1, 3: 1, 4: 1}


def test_small_temperatures_do_not_overflow() -> None:
    found = vote(
        torch.tensor([[0.9, 0.8, 0.8]]),
        torch.arange(3)[None],
        torch.tensor([1, 0, 0]),
        2,
        [3],
        temperature=1e-4,
    )
    assert found[3].tolist() == [1]


def test_more_neighbours_than_were_searched_cannot_vote() -> None:
    with pytest.raises(DataError, match="k in"):
        vote(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), torch.zeros(5, dtype=torch.long), 2, [3])


def test_k_is_chosen_by_leave_one_out_on_train() -> None:
    train, labels = normal(300, 4), torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(5))
    train += labels[:, None]
    fitted = knn.classify(train, labels, normal(20, 4), 3, knn.Settings(ks=(1, 5, 40)))
    slow = {}
    unit = nn.functional.normalize(train.double(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-9)
    for k in (1, 5, 40):
        value, where = similarity.topk(k, dim=1)
        votes = nn.functional.one_hot(labels[where], 3) * (value / 0.07).exp()[:, :, None]
        slow[str(k)] = 100 * float((votes.sum(1).argmax(1) == labels).double().mean())
    assert fitted.details["leave_one_out_top1"] == pytest.approx(slow)
    assert fitted.details["chosen_k"] == int(max(slow, key=lambda k: slow[k]))


def test_small_train_splits() -> None:
    test = normal(6, 4)
    alone = knn.classify(normal(1, 4), torch.tensor([2]), test, 3, knn.Settings())
    assert alone.predictions.tolist() == [2] * 6
    assert "too large for 1" in alone.warnings[0]
    single = knn.classify(normal(50, 4), torch.full((50,), 1), test, 3, knn.Settings())
    assert single.predictions.tolist() == [1] * 6
    assert single.details["chosen_k"] == 10
    assert "k = 100, 200 is too large for 50" in single.warnings[0]
    (warning,) = knn.classify(normal(50, 4), torch.full((50,), 1), test, 3, knn.Settings(ks=(200,))).warnings
    assert "k = 50 was used" in warning
    with pytest.raises(ConfigError):
        knn.classify(normal(9, 4), torch.zeros(9).long(), test, 3, knn.Settings(ks=()))
    with pytest.raises(ConfigError):
        knn.classify(normal(9, 4), torch.zeros(9).long(), test, 3, knn.Settings(metric="euclidean"))


def test_every_recipe_is_a_valid_setting() -> None:
    for name, table in knn.RECIPES.items():
        chosen = config.build(knn.Settings, table | {"recipe": name})
        fitted = knn.classify(normal(30, 4), torch.arange(30) % 3, normal(5, 4), 3, chosen)
        assert all(predictions.shape == (5,) for predictions in fitted.candidates.values())


def test_idle_settings_move_nothing() -> None:
    assert knn.idle(knn.Settings()) == ()
    assert knn.idle(knn.Settings(ks=(5,), weighting="uniform")) == ("temperature", "selection_images")
    train, labels, test = normal(300, 4), torch.arange(300) % 3, normal(200, 4)
    for name, table in knn.RECIPES.items():
        chosen = config.build(knn.Settings, table | {"recipe": name})
        for setting in knn.idle(chosen):
            first = knn.classify(train, labels, test, 3, chosen).predictions
            changed = dataclasses.replace(chosen, **{setting: 3})
            assert torch.equal(knn.classify(train, labels, test, 3, changed).predictions, first)


def test_the_authors_k_is_the_best_on_the_test_split_and_said_to_be() -> None:
    train, labels = normal(300, 4), torch.arange(300) % 3
    test, truth = normal(90, 4, seed=1) + torch.arange(90)[:, None] % 3, torch.arange(90) % 3
    chosen = config.build(knn.Settings, knn.RECIPES["dino_official"] | {"recipe": "dino_official"})
    found = knn.result(knn.classify(train + labels[:, None], labels, test, 3, chosen), truth)
    each = {}
    for k in (10, 20, 100, 200):
        alone = knn.classify(train + labels[:, None], labels, test, 3, knn.Settings(ks=(k,)))
        each[str(k)] = 100 * float((alone.predictions == truth).double().mean())
    assert len(set(each.values())) > 1
    assert found.details["test_top1"] == pytest.approx(each)
    assert found.details["chosen_on"] == "test"
    assert found.metrics["top1"].value == pytest.approx(max(each.values()))
    assert each[str(found.details["chosen_k"])] == max(each.values())
    assert found.correct is not None
    assert 100 * found.correct.mean() == pytest.approx(max(each.values()))
    single = dataclasses.replace(chosen, ks=(20,))
    assert "chosen_on" not in knn.result(knn.classify(train, labels, test, 3, single), truth).details


@pytest.mark.parametrize(("recipe", "reads"), [("dino", 1), ("dino_official", 4), ("lightly", 1)])
def test_each_score_that_the_test_labels_choose_from_is_a_read(
    recipe: str, reads: int, context: Context
) -> None:
    task = Task(split_of(300, "train", 0), split_of(70, "test", 1))
    settings = config.build(knn.Settings, knn.RECIPES[recipe] | {"recipe": recipe})
    knn.evaluate(Colours(), task, settings, context)
    assert task.reads == reads


class Colours(nn.Module):
    """Reads the mean colour, so that labels can be made to follow from images."""

    dim, depth, stride, readout, input = 3, 1, 1, "mean colour", InputSpec(4)

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        return Features(images.mean((2, 3)), images)

    def for_finetuning(self, drop_path: float = 0.0) -> Colours:
        return self

    def layer_of(self, parameter: str) -> int:
        return 0


def split_of(count: int, part: str, seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=draw)
    images = torch.randint(0, 120, (count, 3, 4, 4), generator=draw)
    images[torch.arange(count), labels] += 100
    names = ("red", "green", "blue", "never seen")
    return Split("toy", part, InMemory(images.to(torch.uint8)), names, part, torch.arange(count), labels)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), 0, quiet(), tmp_path, tmp_path / "features")


def test_the_protocol_scores_and_keeps_test_labels_sealed(context: Context) -> None:
    task = Task(split_of(200, "train", 0), split_of(70, "test", 1))
    outcome = knn.evaluate(Colours(), task, knn.Settings(), context)
    assert outcome.metrics["top1"].value > 90
    assert outcome.correct is not None
    assert len(outcome.correct) == outcome.metrics["top1"].n == 70
    with pytest.raises(LabelLeak):
        _ = task.train


def test_predictions_do_not_depend_on_test_labels_or_batches(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = split_of(200, "train", 0), split_of(70, "test", 1)
    first = knn.evaluate(Colours(), Task(train, test), knn.Settings(), context)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(test, all_labels=test.labels[order])
    second = knn.evaluate(Colours(), Task(train, shuffled), knn.Settings(), context)
    assert second.details == first.details
    hits = torch.from_numpy(first.correct)
    predictions = features.extract(Colours(), test, context)
    again = knn.classify(
        features.extract(Colours(), train, context), train.labels, predictions, 4, knn.Settings()
    ).predictions
    assert torch.equal(hits, again == test.labels)
    assert torch.equal(torch.from_numpy(second.correct), again == shuffled.labels)
    monkeypatch.setattr(features, "BATCH", 7)
    monkeypatch.setattr(neighbours, "VOTES", 11)
    bare = dataclasses.replace(context, cache=None)
    third = knn.evaluate(Colours(), Task(train, test), knn.Settings(), bare)
    assert third.metrics == first.metrics
