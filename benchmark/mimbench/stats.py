"""Intervals and tests. All intervals are at 95 %; all percentages run from 0 to 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mimbench.errors import DataError
from mimbench.task import Metric

if TYPE_CHECKING:
    from torch import Tensor

Z = 1.959963984540054  # the normal distribution's 97.5 % point
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
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _bools(correct: Any) -> np.ndarray:
    array = _array(correct)
    if array.dtype != bool or array.ndim != 1:
        raise TypeError(f"expected (N,) bool, got {array.shape} {array.dtype}")
    return array


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
