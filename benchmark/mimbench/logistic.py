"""Multinomial logistic regression solved to a stated gradient norm, for a whole path of penalties.

The objective over standardised features z (train mean, population standard deviation) of n items is

    mean of -log softmax(W z + b)[label]  +  ||W||^2 / (2 C n),

bias not penalised: what scikit-learn's ``LogisticRegression(C=C)`` minimises, divided by C n. (For two
classes scikit-learn fits one vector w = W[1] - W[0], for which the penalty is half as strong.)

L-BFGS (Liu and Nocedal, 1989) runs in float64 on features rotated to the axes of their covariance, where
the diagonal of the Hessian is a good first guess of all of it. That removes the bad conditioning that
otherwise costs hundreds of steps; one Gram matrix and one eigendecomposition serve every C.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mimbench.errors import DataError

CHUNK = 4_096  # items per pass in float64: 6 MB at 192 channels
MEMORY = 20  # pairs of steps and gradient changes that L-BFGS keeps


@dataclass(frozen=True)
class Solution:
    """A minimiser, with what certifies it."""

    C: float  # inverse strength of the penalty
    weight: Tensor  # (num_classes, D) float64, on standardised features; zero for classes absent from train
    bias: Tensor  # (num_classes,) float64; -inf for classes absent from train
    mean: Tensor  # (D,) float64, of the training features
    scale: Tensor  # (D,) float64: population standard deviation, 1 for a constant feature
    objective: float  # mean negative log-likelihood (nats) plus penalty
    gradient_norm: float  # Euclidean norm of the objective's gradient at (weight, bias)
    iterations: int  # steps taken
    evaluations: int  # of the objective with its gradient
    converged: bool  # whether gradient_norm reached the tolerance

    def logits(self, features: Tensor) -> Tensor:
        """Class scores (N, num_classes) float64 of raw features (N, D)."""
        weight = self.weight / self.scale
        bias = self.bias - weight @ self.mean
        return torch.cat([torch.addmm(bias, part.double(), weight.T) for part in features.split(CHUNK)])

    def top(self, features: Tensor, k: int = 1) -> Tensor:
        """The k best classes (N, k) int64 of raw features (N, D), best first; equal scores: lowest class first."""
        ranked = [
            self.logits(part).sort(dim=1, descending=True, stable=True).indices[:, :k]
            for part in features.split(CHUNK)
        ]
        return torch.cat(ranked)


class Problem:
    """Training features (N, D) and labels (N,), prepared once for any number of penalties.

    Memory beside the features: a few D x D matrices, 2 * MEMORY + 10 copies of the weights, one chunk.
    Raises DataError for empty, non-finite or mismatched input.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise DataError(
                f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit",
                "Expected (N, D) and (N,)",
            )
        if not features.numel():
            raise DataError("there is nothing to fit a linear classifier on")
        if not features.isfinite().all():
            raise DataError("the training features are not finite")
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise DataError(f"labels run from {labels.min()} to {labels.max()}, not below {num_classes}")
        self.features = features
        self.num_classes = num_classes
        self.present, self.labels = labels.to(features.device, torch.long).unique(return_inverse=True)
        n, d = features.shape
        constant = features.amin(0) == features.amax(0)
        self.mean = features.new_zeros(d, dtype=torch.float64)
        for part in features.split(CHUNK):
            self.mean += part.double().sum(0) / n
        gram = features.new_zeros(d, d, dtype=torch.float64)
        for part in features.split(CHUNK):
            centred = part.double() - self.mean
            gram.addmm_(centred.T, centred, alpha=1 / n)
        self.scale = gram.diagonal().sqrt().masked_fill(constant, 1.0)
        self.scale[self.scale == 0] = 1.0  # a spread too small for float64 to square
        self.axes = torch.linalg.eigh(gram / self.scale.outer(self.scale)).eigenvectors

    def solve(
        self,
        C: float,
        start: Solution | None = None,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 1_000,
    ) -> Solution:
        """The minimiser for one C, from zero or from the solution for another C.

        Stops when the Euclidean norm of the gradient is at most ``tolerance``. One class alone is a constant
        predictor with objective 0.
        """
        if C <= 0 or not math.isfinite(C):
            raise DataError(f"C must be positive and finite, not {C}")
        n, d = self.features.shape
        k = len(self.present)
        ridge = 1 / (C * n)
        point = self.features.new_zeros(k, d + 1, dtype=torch.float64)  # rotated weights, then the bias
        if start is not None:
            point[:, :d] = start.weight[self.present] @ self.axes
            point[:, d] = start.bias[self.present]
        if k == 1:
            return self._solution(C, point * 0, 0.0, 0.0, 0, 0, True)
        curvature = self._curvature(point)
        curvature[:d] += ridge
        found = minimise(
            lambda x: self._objective(x, ridge),
            point,
            (1 / curvature).expand(k, -1),
            tolerance,
            max_iterations,
        )
        return self._solution(C, *found)

    def path(self, penalties: Iterable[float], *, tolerance: float = 1e-6) -> Iterator[Solution]:
        """Solutions for a series of C, each started from the one before; increasing C is fastest."""
        last = None
        for C in penalties:
            last = self.solve(C, last, tolerance=tolerance)
            yield last

    def _curvature(self, point: Tensor) -> Tensor:
        """Second derivatives (D + 1,) of the mean NLL along each rotated axis and the bias, averaged over classes.

        Taken where the solver starts: with a weak penalty, items that are classified with certainty no longer
        bend the objective, so the covariance alone would be a poor guess. One vector for all classes did
        better than one for each.
        """
        n, d = self.features.shape
        rotated, bias = point[:, :d], point[:, d]
        total = point.new_zeros(d + 1)
        for part in self.features.split(CHUNK):
            inputs = ((part.double() - self.mean) / self.scale) @ self.axes
            chances = torch.addmm(bias, inputs, rotated.T).softmax(1)
            bend = (chances * (1 - chances)).mean(1)
            total[:d] += bend @ inputs.square()
            total[d] += bend.sum()
        return (total / n).clamp_(min=1e-12)

    def _objective(self, point: Tensor, ridge: float) -> tuple[float, Tensor]:
        """The objective and its gradient (K, D + 1) at rotated weights and bias (K, D + 1)."""
        n, d = self.features.shape
        rotated, bias = point[:, :d], point[:, d]
        weight = rotated @ self.axes.T / self.scale  # on raw features, so these are never copied
        offset = bias - weight @ self.mean
        loss = point.new_zeros(())
        raw = torch.zeros_like(weight)
        residual = torch.zeros_like(bias)
        for part, labels in zip(self.features.split(CHUNK), self.labels.split(CHUNK), strict=True):
            part = part.double()
            logits = torch.addmm(offset, part, weight.T)
            rest = logits - logits.logsumexp(1, keepdim=True)
            loss -= rest.gather(1, labels[:, None]).sum()
            rest.exp_()
            rest.scatter_add_(1, labels[:, None], -torch.ones_like(rest[:, :1]))
            raw.addmm_(rest.T, part)
            residual += rest.sum(0)
        gradient = torch.empty_like(point)
        gradient[:, :d] = (raw - residual.outer(self.mean)) / self.scale @ self.axes / n + ridge * rotated
        gradient[:, d] = residual / n
        return float(loss / n + ridge / 2 * rotated.square().sum()), gradient

    def _solution(
        self, C: float, point: Tensor, objective: float, norm: float, steps: int, calls: int, converged: bool
    ) -> Solution:
        d = len(self.mean)
        weight = point.new_zeros(self.num_classes, d)
        weight[self.present] = point[:, :d] @ self.axes.T
        bias = point.new_full((self.num_classes,), -math.inf)
        bias[self.present] = point[:, d]
        return Solution(C, weight, bias, self.mean, self.scale, objective, norm, steps, calls, converged)


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]],
    point: Tensor,
    inverse: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, float, float, int, int, bool]:
    """L-BFGS for a smooth convex function, with a diagonal guess ``inverse`` of its inverse Hessian.

    ``function`` returns value and gradient. Returns (point, value, gradient norm, iterations, evaluations,
    converged).
    """
    value, gradient = function(point)
    calls = 1
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    steps = 0
    norm = float(gradient.norm())
    while norm > tolerance and steps < max_iterations:
        direction = _two_loops(gradient, pairs, inverse)
        found = _line_search(function, point, value, gradient, direction)
        calls += found[3]
        if found[0] is point:
            if not pairs:
                break  # not even the scaled gradient lowers the value: as good as float64 gets
            pairs.clear()
            continue
        change, difference = found[0] - point, found[2] - gradient
        curvature = (change * difference).sum()
        if curvature > 0:
            pairs.append((change, difference, curvature))
        point, value, gradient = found[:3]
        norm = float(gradient.norm())
        steps += 1
    return point, value, norm, steps, calls, norm <= tolerance


def _two_loops(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The quasi-Newton direction of Nocedal and Wright, algorithm 7.4."""
    direction = -gradient
    shares = []
    for change, difference, curvature in reversed(pairs):
        share = (change * direction).sum() / curvature
        direction = direction - share * difference
        shares.append(share)
    if pairs:
        _, difference, curvature = pairs[-1]
        direction = direction * inverse * (curvature / (difference * inverse * difference).sum())
    else:
        direction = direction * inverse
    for (change, difference, curvature), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - (difference * direction).sum() / curvature) * change
    return direction


def _line_search(
    function: Callable[[Tensor], tuple[float, Tensor]],
    point: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
) -> tuple[Tensor, float, Tensor, int]:
    """A step that meets the weak Wolfe conditions, by bracketing and halving; the point itself if none does.

    Near the minimum, where values differ by less than float64 resolves, a falling slope stands in for a
    falling value (the approximate condition of Hager and Zhang, 2005).
    """
    slope = float((gradient * direction).sum())
    low, high, step = 0.0, math.inf, 1.0
    rounding = 1e-14 * max(abs(value), 1e-300) * 10
    for calls in range(1, 41):
        trial = point + step * direction
        new_value, new_gradient = function(trial)
        new_slope = float((new_gradient * direction).sum())
        falls = new_value <= value + 1e-4 * step * slope or (
            new_value <= value + rounding and new_slope <= (2e-4 - 1) * slope
        )
        if not falls:
            high = step
        elif new_slope < 0.9 * slope:
            low = step
        else:
            return trial, new_value, new_gradient, calls
        step = 2 * step if high == math.inf else (low + high) / 2
    return point, value, gradient, 40
