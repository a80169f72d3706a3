"""Intervals and tests. All intervals are at 95 %; all percentages run from 0 to 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mimbench.errors import DataError
from mimbench.task import Metric

if TYPE_CHECKING:
    from torch import Tensor

Z = 1.959963984540054  # the normal distribution's 97.5 % point
ALPHA = 0.05  # the level of tests
_CHUNK = 4_000_000  # resampled indices held at once


def accuracy(correct: np.ndarray | Tensor) -> Metric:
    """The share of True in ``correct`` (N,) bool, in percent, with Wilson's score interval.

    Wilson, JASA 22 (1927): unlike the textbook interval it never has zero width, and stays in [0, 100].
    """
    hits = _bools(correct)
    n = len(hits)
    if n == 0:
        raise DataError("there is no test item to compute an accuracy from")
    share = float(hits.mean())
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low = 0.0 if share == 0 else 100 * (middle - half)
    high = 100.0 if share == 1 else 100 * (middle + half)
    return Metric(100 * share, low, high, n)


def bootstrap(
    values: np.ndarray | Tensor,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic under resampling of the N test items.

    ``values`` (N, ...) holds one entry per item. ``statistic`` maps the means over each of R resamples,
    (R, ...), to (R,) numbers; None leaves means of ``values`` (N,) as they are. Whatever depends on the
    items through sums alone fits: a mean, a ratio of sums, a mean IoU of per-item counts.
    The same seed gives the same interval.
    """
    table = _array(values).astype(np.float64)
    n = len(table)
    if n == 0:
        raise DataError("there is no test item to compute an interval from")
    flat = table.reshape(n, -1)
    draw = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, step := max(1, _CHUNK // n)):
        rows = min(step, resamples - start)
        # One bincount for all rows: row r counts in the cells from r * n on.
        cells = draw.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n)
        means = (weights @ flat / n).reshape(rows, *table.shape[1:])
        found.append(means if statistic is None else statistic(means))
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over seeds and Student's t interval of that mean; one seed alone has no interval."""
    if not values:
        raise DataError("there is no run to average over")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None, None
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Equivalence:
    """How far the mean of some values is from a fixed number, and whether by more than a margin."""

    difference: float  # mean - number
    low: float  # the 90 % interval of the difference: within the margin at both ends where p_within < 0.05
    high: float
    p_within: float  # of a difference as large as the margin or larger: two one-sided tests
    p_beyond: float  # of a difference as large as the margin or smaller, two-sided


def equivalence(values: Sequence[float], number: float, margin: float) -> Equivalence:
    """Tests by Student's t whether the mean that ``values`` are drawn from lies within ``margin`` of ``number``.

    ``p_within`` is that of Schuirmann's two one-sided tests (J. Pharmacokinet. Biopharm. 15, 1987). ``p_beyond``
    is below 0.05 where the 95 % interval of the mean lies wholly beyond the margin. Values that are all equal
    decide without doubt. Raises DataError for fewer than two values.
    """
    from scipy.special import stdtr, stdtrit

    if len(values) < 2:
        raise DataError("a test of equivalence needs two values or more")
    df, difference = len(values) - 1, float(np.mean(values)) - number
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if not error:
        distance = abs(difference) - margin
        return Equivalence(difference, difference, difference, float(distance >= 0), float(distance <= 0))
    p_within = float(stdtr(df, (abs(difference) - margin) / error))
    p_beyond = min(1.0, 2 * float(stdtr(df, (margin - abs(difference)) / error)))
    half = float(stdtrit(df, 1 - ALPHA)) * error
    return Equivalence(difference, difference - half, difference + half, p_within, p_beyond)


@dataclass(frozen=True)
class Paired:
    """How much better a is than b on the same test items, in points of percent."""

    difference: float
    low: float
    high: float
    p: float  # of no difference, two-sided, not corrected
    only_a: int  # items that only a has right, over all seeds
    only_b: int
    n: int  # test items
    seeds: int


def paired(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Paired:
    """Compares what two methods have right: (N,) bool of one run each, or (S, N) of S seeds.

    One run each: McNemar's exact test (Psychometrika 12, 1947), and the interval of Bonett and Price (J. Educ.
    Behav. Stat. 37, 2012). Both are over test items alone, and the test is the stricter where they disagree.
    Several seeds: both seeds and items are samples, so that the interval covers another pretraining too. The
    variance has a part of the seeds, known to S - 1 degrees of freedom, and one of the items (a two-way table);
    their intervals add up in squares (Howe, JASA 69, 1974), and the p value is where that reaches zero. This
    errs on the safe side, unlike Satterthwaite's degrees of freedom, which leave 2 or 3 seeds too sure.
    Raises DataError for unequal shapes and fewer than two items.
    """
    right, other = np.atleast_2d(_array(a)), np.atleast_2d(_array(b))
    if right.dtype != bool or other.dtype != bool or right.ndim != 2:
        raise TypeError(f"expected (N,) or (S, N) bool, got {right.shape} {right.dtype}, {other.dtype}")
    if right.shape != other.shape:
        raise DataError(f"seeds and test items do not pair: {right.shape} and {other.shape}")
    seeds, n = right.shape
    if n < 2 or not seeds:
        raise DataError("a paired comparison needs two test items or more")
    only_a, only_b = int((right & ~other).sum()), int((other & ~right).sum())
    difference = (only_a - only_b) / (n * seeds)
    if seeds == 1:
        centre, half, p = _mcnemar(only_a, only_b, n)
    else:
        centre = difference
        half, p = _over_seeds_and_items(right.astype(np.float64) - other)
    low, high = (100 * min(max(end, -1.0), 1.0) for end in (centre - half, centre + half))
    return Paired(100 * difference, low, high, p, only_a, only_b, n, seeds)


def _mcnemar(only_a: int, only_b: int, n: int) -> tuple[float, float, float]:
    """Centre and half width of the interval of a difference of shares, and the exact p value."""
    from scipy.special import bdtr

    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    more, less = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return more - less, half, p


def _over_seeds_and_items(table: np.ndarray) -> tuple[float, float]:
    """Half width of the interval of the mean of (S, N) differences, and the p value of a mean of zero."""
    from scipy.optimize import brentq
    from scipy.special import ndtri, stdtrit

    seeds, n = table.shape
    by_seed, by_item, mean = table.mean(1), table.mean(0), float(table.mean())
    rest = table - by_seed[:, None] - by_item + mean
    noise = float((rest**2).sum()) / ((seeds - 1) * (n - 1) * n * seeds)  # of the mean, from neither alone
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    # At least what two runs have that agree on every item: no finite sample proves that nothing differs.
    of_items = max(float(by_item.var(ddof=1)) / n - noise, 2 / (n + 2) ** 2)

    def half(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        return math.hypot(
            stdtrit(seeds - 1, tail) * math.sqrt(of_seeds), float(ndtri(tail)) * math.sqrt(of_items)
        )

    least = -700.0  # exp of less is 0
    if half(least) <= abs(mean):
        return half(math.log(0.05)), 0.0
    return half(math.log(0.05)), math.exp(brentq(lambda p: half(p) - abs(mean), least, 0.0))


def pairwise(correct: np.ndarray) -> np.ndarray:
    """The p values of ``paired`` for all pairs of M methods at once: (M, M), symmetric, 1 on the diagonal.

    ``correct`` (M, S, N) bool holds what each has right, by seed and test item; all of one set of seeds and items.
    """
    from scipy.special import bdtr  # of scipy.stats it would take a second to import

    methods, seeds, n = correct.shape
    flat = correct.reshape(methods, -1).astype(np.float32)
    both = (flat @ flat.T).astype(np.float64)  # exact: a count below 2^24
    only = np.diag(both)[:, None] - both  # what the first has right and the second has not
    if seeds == 1:
        return np.minimum(1.0, 2 * bdtr(np.minimum(only, only.T), (only + only.T).astype(int), 0.5))
    by_seed, by_item = correct.mean(2), correct.mean(1)
    mean = by_seed.mean(1)[:, None] - by_seed.mean(1)
    gram = by_item @ by_item.T
    item_squares = np.maximum(np.diag(gram)[:, None] + np.diag(gram) - 2 * gram, 0.0)
    seed_squares = np.zeros_like(gram)
    for column in by_seed.T:
        seed_squares += (column[:, None] - column) ** 2
    rest = only + only.T - seeds * item_squares - n * seed_squares + n * seeds * mean**2
    noise = np.maximum(rest, 0.0) / ((seeds - 1) * (n - 1) * n * seeds)
    of_seeds = np.maximum(seed_squares - seeds * mean**2, 0.0) / (seeds - 1) / seeds
    of_items = np.maximum((item_squares - n * mean**2) / (n - 1) / n - noise, 2 / (n + 2) ** 2)
    return _p_of_sum(np.abs(mean), of_seeds, of_items, seeds - 1)


def _p_of_sum(mean: np.ndarray, of_seeds: np.ndarray, of_items: np.ndarray, df: int) -> np.ndarray:
    """Where the half width of ``_over_seeds_and_items`` reaches each mean: looked up, as a root each takes too long."""
    from scipy.special import ndtri, stdtrit

    log_p = -(np.linspace(0.0, math.sqrt(700.0), 1 << 14) ** 2)  # dense where decisions fall
    tail = np.exp(log_p) / 2
    of_t = np.maximum(stdtrit(df, tail), -1e150) ** 2
    of_z = ndtri(tail) ** 2
    wanted = mean**2
    low, high = np.zeros(mean.shape, np.int64), np.full(mean.shape, len(log_p) - 1)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        wide = of_t[middle] * of_seeds + of_z[middle] * of_items >= wanted
        low, high = np.where(wide, low, middle), np.where(wide, middle, high)
    ends = [of_t[i] * of_seeds + of_z[i] * of_items for i in (low, high)]
    share = np.clip((wanted - ends[0]) / np.maximum(ends[1] - ends[0], 1e-300), 0.0, 1.0)
    return np.where(ends[1] < wanted, 0.0, np.exp(log_p[low] + share * (log_p[high] - log_p[low])))


def unpaired(
    a: Sequence[float], b: Sequence[float], half_a: float | None = None, half_b: float | None = None
) -> float | None:
    """The p value of no difference between the means of ``a`` and ``b``, values of a seed each.

    Two seeds or more on both sides: Welch's t test. One on both: the normal distribution with the half widths of
    their 95 % intervals over test items. Anything else cannot be tested: None.
    """
    from scipy.special import ndtr, stdtr

    if len(a) > 1 and len(b) > 1:
        parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
        error = math.sqrt(sum(parts))
        distance = abs(float(np.mean(a)) - float(np.mean(b)))
        if not error:
            return float(distance == 0)
        # Welch's degrees of freedom (Biometrika 34, 1947)
        df = error**4 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
        return 2 * float(stdtr(df, -distance / error))
    if len(a) == len(b) == 1 and half_a is not None and half_b is not None:
        error = math.hypot(half_a, half_b) / Z
        return 2 * float(ndtr(-abs(a[0] - b[0]) / error)) if error else float(a[0] == b[0])
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number: below 0.05 in any of them has a chance under 5 % if none is real.

    Holm, Scand. J. Stat. 6 (1979): as safe as Bonferroni's and never weaker, however the tests depend.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for done, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[i]))
        corrected[i] = largest
    return corrected


def rank_groups(scores: Sequence[float], separated: np.ndarray) -> list[int]:
    """The place of each method's group: 1 + the number of methods in better groups. Higher scores are better.

    ``separated`` (M, M) bool, symmetric, says which pairs a corrected test tells apart. A group ends only where
    each method above is separated from each below, so two methods of different groups always are; a tie with
    both keeps two separated methods in one group.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    places, place = [0] * len(order), 1
    for position, i in enumerate(order):
        if separated[np.ix_(order[:position], order[position:])].all():
            place = position + 1
        places[i] = place
    return places


def kendall(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Kendall's tau-b of N pairs and its interval; fewer than five pairs have no interval.

    The interval is Fieller, Hartley and Pearson's (Biometrika 44, 1957): atanh(tau) has the variance
    0.437 / (N - 4). Raises DataError where all of x or all of y are equal, as no order can be told.
    """
    n = len(x)
    if len(y) != n or len(set(x)) < 2 or len(set(y)) < 2:
        raise DataError("a rank correlation needs two lists of equal length, each with two values or more")
    of_x, of_y = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    untied = math.sqrt(float((of_x**2).sum() * (of_y**2).sum()))  # pairs that are in order, both ways round
    tau = min(max(float((of_x * of_y).sum()) / untied, -1.0), 1.0)  # rounding may end a little beside
    if n < 5:
        return tau, None, None
    # Half a pair short of a perfect order, which would have no width.
    inner = math.copysign(min(abs(tau), 1 - 2 / (n * (n - 1))), tau)
    half = Z * math.sqrt(0.437 / (n - 4))
    low, high = math.tanh(math.atanh(inner) - half), math.tanh(math.atanh(inner) + half)
    return tau, min(low, tau), max(high, tau)


def _bools(correct: Any) -> np.ndarray:
    array = _array(correct)
    if array.dtype != bool or array.ndim != 1:
        raise TypeError(f"expected (N,) bool, got {array.shape} {array.dtype}")
    return array


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
