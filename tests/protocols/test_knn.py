"""kNN against slow brute force and scikit-learn, and as a protocol that never sees test labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def brute_force(queries: Tensor, bank: Tensor, metric: str) -> np.ndarray:
    """All distances (Q, N), float64 rounded to float32; larger is nearer."""
    q, b = queries.numpy().astype(np.float32), bank.numpy().astype(np.float32)
    if metric == "cosine":
        q, b = (
            (x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-300)).astype("f4")
            for x in (q, b)
        )
        return np.stack([(b.astype("f8") * row).sum(1) for row in q.astype("f8")]).astype("f4")
    return -np.stack([np.sqrt(((b.astype("f8") - row) ** 2).sum(1)) for row in q.astype("f8")]).astype("f4")


def check(queries: Tensor, bank: Tensor, k: int, metric: str, tile: tuple[int, int]) -> None:
    nearness = brute_force(queries, bank, metric)
    order = np.argsort(-nearness, axis=1, kind="stable")[:, :k]
    values, positions = nearest(queries, bank, k, metric, tile=tile)
    assert np.array_equal(positions.numpy(), order)
    expected = np.take_along_axis(nearness, order, 1)
    np.testing.assert_allclose(
        values.numpy(), expected if metric == "cosine" else -expected, rtol=1e-6, atol=1e-7
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_brute_force_whatever_the_tiles(data: st.DataObject) -> None:
    n, q = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 20))
    d, k = data.draw(st.integers(1, 24)), data.draw(st.integers(1, n))
    tile = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 400)))
    metric = data.draw(st.sampled_from(["cosine", "euclidean"]))
    bank, queries = normal(n, d, seed=n), normal(q, d, seed=q + 1)
    if data.draw(st.booleans()):  # small integers: many exact ties and duplicates
        bank, queries = (bank * 2).round(), (queries * 2).round()
    check(queries, bank, k, metric, tile)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_nearly_collapsed_features_are_told_apart(metric: str, offset: float, scale: float) -> None:
    check(normal(9, 16, seed=1) * scale + offset, normal(700, 16) * scale + offset, 5, metric, (4, 256))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_distances_are_won_by_the_lower_position(metric: str) -> None:
    bank = torch.ones(500, 8)
    bank[7] = -1
    _, positions = nearest(torch.ones(3, 8), bank, 9, metric, tile=(2, 64))
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9]] * 3
    zeros = torch.zeros(400, 8)
    assert nearest(zeros[:2], zeros, 4, metric)[1].tolist() == [[0, 1, 2, 3]] * 2


def test_duplicates_of_a_query_lie_at_distance_zero() -> None:
    bank = normal(600, 32) + 100
    bank[500] = bank[3]
    values, positions = nearest(bank[3:4], bank, 2, "euclidean")
    assert values.tolist() == [[0.0, 0.0]]
    assert positions.tolist() == [[3, 500]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_leaving_one_out_is_a_search_without_it(metric: str) -> None:
    bank = torch.cat([normal(60, 6), torch.ones(40, 6)])  # with duplicates that hide the query itself
    rows = torch.tensor([0, 5, 61, 99])
    values, positions = nearest(bank[rows], bank, 12, metric, exclude=rows)
    for row, value, position in zip(rows.tolist(), values, positions, strict=True):
        others = torch.cat([torch.arange(row), torch.arange(row + 1, len(bank))])
        alone = nearest(bank[row : row + 1], bank[others], 12, metric)
        assert torch.equal(others[alone[1][0]], position)
        assert torch.equal(alone[0][0], value)


def test_most_queries_pass_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    exhaust = neighbours._Search._exhaust

    def counted(self: neighbours._Search, rows: Tensor) -> Tensor:
        searched.append(len(rows))
        return exhaust(self, rows)

    monkeypatch.setattr(neighbours._Search, "_exhaust", counted)
    for metric in ("cosine", "euclidean"):
        nearest(normal(500, 64, seed=3) + 2, normal(5_000, 64) + 2, 20, metric)
    assert sum(searched) <= 10


@pytest.mark.parametrize(
    ("weighting", "sklearn_weights", "metric"),
    [
        ("uniform", "uniform", "euclidean"),
        ("uniform", "uniform", "cosine"),
        ("inverse", "distance", "euclidean"),
        ("exponential", lambda distance: np.exp((1 - distance) / 0.07), "cosine"),
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


def test_what_cannot_be_searched_says_why() -> None:
    bank = normal(5, 3)
    for queries, k, message in [
        (normal(2, 4), 1, "do not fit"),
        (normal(0, 3), 1, "no features"),
        (normal(2, 3) / 0, 1, "not finite"),
        (normal(2, 3), 6, "k = 6"),
        (normal(2, 3), 0, "k = 0"),
    ]:
        with pytest.raises(DataError, match=message):
            nearest(queries, bank, k)
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
        assert fitted.predictions.shape == (5,)


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
