"""Intervals and tests against SciPy, scikit-learn, brute force and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimbench import stats
from mimbench.errors import DataError


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_accuracy_has_wilsons_interval(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    metric = stats.accuracy(np.arange(n) < hits)
    reference = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert metric.value == pytest.approx(100 * hits / n)
    assert metric.low == pytest.approx(100 * reference.low, abs=1e-9)
    assert metric.high == pytest.approx(100 * reference.high, abs=1e-9)
    assert metric.n == n
    assert metric.unit == "%"


def test_accuracy_takes_tensors_and_refuses_nothing_and_non_bools() -> None:
    assert stats.accuracy(torch.tensor([True, False])).value == 50
    with pytest.raises(DataError):
        stats.accuracy(np.zeros(0, bool))
    with pytest.raises(TypeError):
        stats.accuracy(np.array([3, 5, 7]))


def test_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).gamma(2, size=300)
    low, high = stats.bootstrap(values, resamples=20_000)
    reference = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert low == pytest.approx(reference.low, abs=0.01)
    assert high == pytest.approx(reference.high, abs=0.01)


def test_bootstrap_of_a_ratio_of_sums_agrees_with_scipy() -> None:
    draw = np.random.default_rng(3)
    table = np.stack([draw.gamma(2, size=200), draw.gamma(5, size=200)], axis=1)
    low, high = stats.bootstrap(table, lambda means: means[:, 0] / means[:, 1], resamples=10_000)
    reference = scipy.stats.bootstrap(
        (table[:, 0], table[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=4e-3)


def test_bootstrap_repeats_and_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=101)
    first = stats.bootstrap(values, seed=7)
    monkeypatch.setattr(stats, "_CHUNK", 1000)
    assert stats.bootstrap(values, seed=7) == first
    assert stats.bootstrap(values, seed=8) != first


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(6)
    inside = 0
    for trial in range(300):
        low, high = stats.bootstrap(draw.normal(5, 1, size=80), resamples=500, seed=trial)
        inside += low <= 5 <= high
    assert 0.90 <= inside / 300 <= 0.985


def test_seed_interval_is_students() -> None:
    values = [61.2, 60.1, 62.9, 61.0]
    reference = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stats.seed_interval(values) == pytest.approx((np.mean(values), reference.low, reference.high))
    assert stats.seed_interval([5.0]) == (5.0, None, None)
    assert stats.seed_interval([5.0, 5.0]) == (5.0, 5.0, 5.0)
