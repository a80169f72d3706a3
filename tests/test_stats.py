"""Intervals and tests against SciPy, scikit-learn, brute force and simulation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimbench import stats
from mimbench.errors import DataError


@given(st.integers(1, 400), st.data())
@settings(max_examples=60)
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


def test_seed_interval_is_students() -> None:
    values = [61.2, 60.1, 62.9, 61.0]
    reference = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stats.seed_interval(values) == pytest.approx((np.mean(values), reference.low, reference.high))
    assert stats.seed_interval([5.0]) == (5.0, None, None)
    assert stats.seed_interval([5.0, 5.0]) == (5.0, 5.0, 5.0)


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=8),
    st.floats(0, 100),
    st.floats(0.01, 5),
)
@settings(max_examples=60)
def test_equivalence_is_two_one_sided_tests(tenths: list[int], number: float, margin: float) -> None:
    values = [tenth / 10 for tenth in tenths]
    found = stats.equivalence(values, number, margin)
    assert found.difference == pytest.approx(np.mean(values) - number)
    if len(set(values)) == 1:
        distance = abs(values[0] - number) - margin
        assert (found.low, found.high) == pytest.approx((found.difference, found.difference))
        if abs(distance) > 1e-9:
            assert (found.p_within < 0.5, found.p_beyond < 0.5) == (distance < 0, distance > 0)
        return
    above = scipy.stats.ttest_1samp(values, number - margin, alternative="greater")
    below = scipy.stats.ttest_1samp(values, number + margin, alternative="less")
    assert found.p_within == pytest.approx(max(above.pvalue, below.pvalue), abs=1e-12)
    # Reproduced where the 90 % interval lies within the margin, different where the 95 % interval lies beyond.
    ninety = scipy.stats.ttest_1samp(values, number).confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((ninety.low - number, ninety.high - number), abs=1e-9)
    assert (found.p_within < 0.05) == (max(-found.low, found.high) < margin)
    _, low, high = stats.seed_interval(values)
    assert low is not None
    assert high is not None
    assert (found.p_beyond < 0.05) == (low > number + margin or high < number - margin)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("scatter", [0.1, 0.4, 1.5])
def test_equivalence_is_rarely_claimed_at_the_margins_edge(seeds: int, scatter: float) -> None:
    draw = np.random.default_rng(seeds)

    def rates(truth: float) -> tuple[float, float]:
        found = [stats.equivalence(row, 60, 1) for row in draw.normal(60 + truth, scatter, (4000, seeds))]
        within = np.mean([each.p_within < stats.ALPHA for each in found])
        return float(within), float(np.mean([each.p_beyond < stats.ALPHA for each in found]))

    slack = 3 * (0.05 * 0.95 / 4000) ** 0.5
    for edge in (-1, 1):
        within, beyond = rates(edge)
        assert within < 0.05 + slack
        assert beyond < 0.025 + slack
    assert rates(2.5)[0] < 0.01
    within, beyond = rates(0)
    assert beyond < 0.025
    if scatter == 0.1:
        assert within > (0.7 if seeds == 2 else 0.99)
        assert rates(2.5)[1] > (0.6 if seeds == 2 else 0.99)


def test_equivalence_needs_two_values() -> None:
    with pytest.raises(DataError, match="two values"):
        stats.equivalence([60.0], 60, 1)


def test_mcnemars_test_is_the_binomial_test_of_discordant_items() -> None:
    draw = np.random.default_rng(8)
    for _ in range(30):
        a, b = draw.random((2, 60)) < draw.random((2, 1))
        found = stats.paired(a, b)
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
        assert (found.only_a, found.only_b, found.n, found.seeds) == (only_a, only_b, 60, 1)
        assert found.p == pytest.approx(expected)
        assert found.difference == pytest.approx(100 * (a.mean() - b.mean()))
        assert -100 <= found.low < found.difference < found.high <= 100
        mirrored = stats.paired(torch.tensor(b), torch.tensor(a))
        assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_the_interval_of_one_run_each_is_bonett_and_prices() -> None:
    # 5 and 2 of 40 items: shares 6/42 and 3/42, variance (9/42 - (3/42)^2) / 42
    found = stats.paired(np.arange(40) < 5, (np.arange(40) >= 5) & (np.arange(40) < 7))
    half = 1.959964 * ((9 / 42 - (3 / 42) ** 2) / 42) ** 0.5
    assert (found.low, found.high) == pytest.approx((100 * (3 / 42 - half), 100 * (3 / 42 + half)), abs=1e-4)


def test_seeds_that_all_items_share_are_students_t() -> None:
    """Where an item is right for every reason but the seed, only the seeds' own differences vary."""
    a = np.zeros((3, 4000), bool)
    for seed, right in enumerate((400, 800, 1600)):  # evenly spread, so that items hardly differ
        a[seed, np.random.default_rng(seed).permutation(4000)[:right]] = True
    found = stats.paired(a, np.zeros_like(a))
    reference = scipy.stats.ttest_1samp(a.mean(1), 0)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.5)
    assert found.p == pytest.approx(reference.pvalue, abs=5e-3)


def test_runs_that_agree_on_every_item_leave_some_doubt() -> None:
    a = np.random.default_rng(9).random((3, 300)) < 0.4
    for runs_of_a in (a, a[0]):
        same = stats.paired(runs_of_a, runs_of_a)
        assert (same.difference, same.p, same.only_a, same.only_b) == (0, 1, 0, 0)
        assert -3 < same.low < 0 < same.high < 3


def test_what_does_not_pair_is_refused() -> None:
    ten = np.ones(10, bool)
    for a, b in ((ten, ten[:9]), (ten[:1], ten[:1]), (ten[:0], ten[:0]), (np.stack([ten, ten]), ten)):
        with pytest.raises(DataError):
            stats.paired(a, b)
    with pytest.raises(TypeError):
        stats.paired(ten.astype(float), ten)


@given(st.lists(st.floats(0, 1), max_size=5))
def test_holm_is_the_closure_of_bonferronis_test(p_values: list[float]) -> None:
    """A pair is rejected when Bonferroni rejects every set of hypotheses that it is in."""
    several = range(len(p_values))
    for i, corrected in enumerate(stats.holm(p_values)):
        sets = [s for size in several for s in itertools.combinations(several, size + 1) if i in s]
        assert corrected == max(min(1, len(s) * min(p_values[j] for j in s)) for s in sets)


def test_groups_end_where_all_above_are_separated_from_all_below() -> None:
    def groups(scores: list[float], *pairs: tuple[int, int]) -> list[int]:
        separated = np.zeros((len(scores), len(scores)), bool)
        for i, j in pairs:
            separated[i, j] = separated[j, i] = True
        return stats.rank_groups(scores, separated)

    assert groups([3, 1, 2]) == [1, 1, 1]
    assert groups([3, 1, 2], (0, 1), (1, 2)) == [1, 3, 1]
    assert groups([3, 1, 2], (0, 1), (0, 2), (1, 2)) == [1, 3, 2]
    assert groups([3, 2, 1], (0, 2)) == [1, 1, 1]  # the middle one ties with both
    assert groups([5]) == [1]
    assert groups([]) == []


def runs(
    draw: np.random.Generator, shares: list[float], items: int, seeds: int = 1, sway: float = 0.0
) -> np.ndarray:
    """(M, S, N) correctness of methods with these expected shares: items are easy or hard for all, of an item
    some is noise of the run, and ``sway`` is how far a pretraining moves its whole run."""
    ease = draw.normal(size=items)
    own = draw.normal(size=(len(shares), seeds, items)) + sway * draw.normal(size=(len(shares), seeds, 1))
    threshold = scipy.stats.norm.ppf(shares) * (2 + sway**2) ** 0.5
    return ease + own < threshold[:, None, None]


def of_paired(seeds: int, items: int, sway: float) -> Callable[[np.random.Generator], tuple[float, ...]]:
    def interval(draw: np.random.Generator) -> tuple[float, ...]:
        found = stats.paired(*runs(draw, [0.65, 0.6], items, seeds, sway))
        return found.low, found.high, 5.0

    return interval


def of_kendall(draw: np.random.Generator) -> tuple[float, ...]:
    x, noise = draw.normal(size=(2, 20))
    _, low, high = stats.kendall(list(x), list(0.6 * x + 0.8 * noise))
    assert low is not None
    assert high is not None
    return low, high, 2 / np.pi * np.arcsin(0.6)  # of a bivariate normal with correlation 0.6


def of_seeds(draw: np.random.Generator) -> tuple[float, ...]:
    _, low, high = stats.seed_interval(list(draw.normal(60, 2, 3)))
    assert low is not None
    assert high is not None
    return low, high, 60


def of_accuracy(draw: np.random.Generator) -> tuple[float, ...]:
    metric = stats.accuracy(draw.random(300) < 0.8)
    assert metric.low is not None
    assert metric.high is not None
    return metric.low, metric.high, 80


@pytest.mark.parametrize(
    "interval",
    [
        pytest.param(of_accuracy, id="accuracy"),
        pytest.param(of_seeds, id="seeds"),
        pytest.param(
            lambda draw: (*stats.bootstrap(draw.normal(5, 1, size=100), resamples=300), 5.0), id="bootstrap"
        ),
        pytest.param(of_paired(1, 250, 0), id="one run each"),
        pytest.param(of_paired(1, 40, 0), id="one run each, few items"),
        pytest.param(of_paired(3, 250, 0.3), id="three seeds"),
        pytest.param(of_paired(5, 250, 0.2), id="five seeds"),
        pytest.param(of_kendall, id="kendall"),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    interval: Callable[[np.random.Generator], tuple[float, float, float]],
) -> None:
    draw = np.random.default_rng(10)
    trials = [interval(draw) for _ in range(800)]
    assert 0.93 <= np.mean([low <= truth <= high for low, high, truth in trials]) <= 0.97


@pytest.mark.parametrize(("seeds", "sway"), [(1, 0.0), (3, 0.3)])
def test_equal_methods_share_a_group_and_a_better_one_stands_alone(seeds: int, sway: float) -> None:
    draw = np.random.default_rng(11)

    def places(*shares: float) -> list[int]:
        correct = runs(draw, list(shares), 200, seeds, sway)
        separated = np.zeros((len(shares), len(shares)), bool)
        pairs = list(itertools.combinations(range(len(shares)), 2))
        for (i, j), p in zip(
            pairs, stats.holm([stats.paired(correct[i], correct[j]).p for i, j in pairs]), strict=True
        ):
            separated[i, j] = separated[j, i] = p < 0.05
        return stats.rank_groups(list(correct.mean((1, 2))), separated)

    assert sum(max(places(*[0.6] * 4)) > 1 for _ in range(200)) < 0.05 * 200
    # ... and where only some are equal, those are not torn apart.
    found = [places(0.95, 0.5, 0.5) for _ in range(100)]
    assert sum(place[1] != place[2] for place in found) < 5
    if seeds == 1:
        assert sum(place[0] == 1 and min(place[1:]) == 2 for place in found) > 95


def test_kendalls_tau_counts_pairs() -> None:
    x, y = [1, 2, 2, 4, 5, 6], [2, 1, 3, 3, 6, 5]
    signs = [
        (np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in itertools.combinations(range(len(x)), 2)
    ]
    expected = (
        sum(s * t for s, t in signs) / (sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs)) ** 0.5
    )
    tau, low, high = stats.kendall(x, y)
    assert tau == pytest.approx(expected)
    half = 1.959964 * (0.437 / 2) ** 0.5
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(tau) - half), np.tanh(np.arctanh(tau) + half)))


def test_a_perfect_order_of_few_is_no_certainty() -> None:
    tau, low, high = stats.kendall(range(6), range(6))
    assert (tau, high) == pytest.approx((1, 1))
    assert low is not None
    assert 0.3 < low < 0.9
    assert stats.kendall(range(6), range(0, -6, -1)) == pytest.approx((-1, -1, -low))
    assert stats.kendall(range(4), range(4))[1:] == (None, None)
    for x, y in (([1, 2], [1]), ([1, 1, 1], [1, 2, 3]), ([], [])):
        with pytest.raises(DataError):
            stats.kendall(x, y)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_all_pairs_at_once_have_the_p_values_of_each_pair_alone(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    ease = draw.normal(size=400)
    skill = np.array([0.0, 0.05, 0.3, 0.3, 1.5, 4.0])
    correct = ease + skill[:, None, None] + draw.normal(size=(6, seeds, 400)) > 0
    correct[3] = correct[2]  # no difference at all
    found = stats.pairwise(correct)
    expected = [[stats.paired(a, b).p for b in correct] for a in correct]
    assert found == pytest.approx(np.array(expected), rel=1e-4, abs=1e-290)
    assert found.min() < 0.01
    assert found[2, 3] == 1


def test_means_without_items_in_common_are_tested_by_seeds_or_by_their_intervals() -> None:
    a, b = [71.0, 72.5, 70.1], [74.0, 73.2, 75.5]
    assert stats.unpaired(a, b) == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue)
    # A difference of 1.96 standard errors of sqrt(1 + 1) has p = 0.05.
    assert stats.unpaired([50.0], [50.0 + 2**0.5 * stats.Z], stats.Z, stats.Z) == pytest.approx(0.05)
    assert stats.unpaired([50.0], b, 1.0) is None
    assert stats.unpaired([50.0], [51.0]) is None
    assert (stats.unpaired([1.0, 1.0], [1.0, 1.0]), stats.unpaired([1.0, 1.0], [2.0, 2.0])) == (1, 0)
