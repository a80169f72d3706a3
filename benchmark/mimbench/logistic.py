"""Multinomial logistic regression solved to a stated gradient norm, for a whole path of penalties.

The objective over standardised features z (train mean, population standard deviation) of n items is

    mean of -log softmax(W z + b)[label]  +  ||W||^2 / (2 C n),

bias not penalised: what scikit-learn's ``LogisticRegression(C=C)`` minimises, divided by C n. (For two
classes scikit-learn fits one vector w = W[1] - W[0], for which the penalty is half as strong.)

L-BFGS (Liu and Nocedal, 1989) runs on features rotated to the axes of their covariance, where the diagonal of
the Hessian is a good first guess of all of it. That removes the bad conditioning that otherwise costs hundreds
of steps; one Gram matrix and one eigendecomposition serve every C, and several C share each pass over the data.

Passes over float32 (or narrower) features multiply in float32 and add up in float64 until the gradient comes
near the tolerance; what is left is done in float64, and so is the certificate: objective, gradient norm and
duality gap of a ``Solution`` are always float64's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mimbench.errors import DataError

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # points, which heads -> values, gradients

CHUNK = {"cpu": 200_000, "cuda": 10_000_000}  # numbers in a block of features; a CPU's stays in its cache
MEMORY = 20  # pairs of steps and gradient changes that L-BFGS keeps
TRIES = 40  # steps of a line search
WIDTH = 512  # columns of logits in one pass: penalties times classes
SAMPLE = 4_096  # items that guess the curvature, which steers the steps but not where they end
FLOOR = 3e-6  # gradient norm down to which passes in float32 are worth their speed
PATIENCE = 8  # passes in float32 that may go by without a new lowest gradient norm


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
    duality_gap: float  # the objective lies at most this far above its minimum (to rounding, some 1e-15)
    iterations: int  # steps taken
    evaluations: int  # of the objective with its gradient
    converged: bool  # whether gradient_norm reached the tolerance

    def logits(self, features: Tensor) -> Tensor:
        """Class scores (N, num_classes) float64 of raw features (N, D)."""
        weight = self.weight / self.scale
        bias = self.bias - weight @ self.mean
        parts = features.split(_rows(features, len(bias)))
        return torch.cat([torch.addmm(bias, part.double(), weight.T) for part in parts])

    def top(self, features: Tensor, k: int = 1) -> Tensor:
        """The k best classes (N, k) int64 of raw features (N, D), best first; equal scores: lowest class first."""
        ranked = [
            self.logits(part).sort(dim=1, descending=True, stable=True).indices[:, :k]
            for part in features.split(_rows(features, len(self.bias)))
        ]
        return torch.cat(ranked)


class Problem:
    """Training features (N, D) and labels (N,), prepared once for any number of penalties.

    Features are only ever read in slices of rows and never copied as a whole, so they may be a memory-mapped
    file larger than memory (``torch.from_file``). Memory beside them: a few D x D matrices, some blocks of
    CHUNK numbers and their logits, and for each of the penalties solved together 2 * MEMORY + 10 copies of the
    weights; as many are as have WIDTH logits for an item, or one.
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
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise DataError(f"labels run from {labels.min()} to {labels.max()}, not below {num_classes}")
        self.features = features
        self.num_classes = num_classes
        self.present, self.labels = labels.to(features.device, torch.long).unique(return_inverse=True)
        n, d = features.shape
        # About the first item, so that what is constant has exactly no spread. An item lies within sqrt(n)
        # deviations of the mean, so float64 loses little in the difference of squares.
        first = features[0].double()
        total, square = torch.zeros_like(first), torch.zeros_like(first)
        self.sums = first.new_zeros(len(self.present), d)
        for part, labels in zip(self._blocks(first), self.labels.split(self._rows), strict=True):
            members = first.new_zeros(len(self.present), len(part)).scatter_(0, labels[None], 1.0)
            self.sums.addmm_(members, part, alpha=1 / n)
            total += part.new_ones(len(part)) @ part
            square += part.new_ones(len(part)) @ part.square_()
        if not total.isfinite().all():
            raise DataError("the training features are not finite")
        counts = torch.bincount(self.labels, minlength=len(self.present))
        self.frequency = counts.double() / n  # (K,) of each class
        self.mean = first + total / n
        # (K, D): features about the mean, added up by class, over n
        self.sums -= self.frequency.outer(total / n)
        self.scale = (square / n - (total / n).square()).clamp_(min=0).sqrt()
        self.scale[self.scale == 0] = 1.0
        self.sample = features[:: max(1, n // max(4 * SAMPLE, 8 * d))]
        gram = first.new_zeros(d, d)
        for part in self._blocks(self.mean, self.sample):
            part /= self.scale
            gram.addmm_(part.T, part, alpha=1 / len(self.sample))
        self.axes = torch.linalg.eigh(gram).eigenvectors
        narrow = features.dtype.itemsize < 8 and self.scale.min() > 1e-15 and self.scale.max() < 1e15
        self.fast = torch.float32 if narrow else torch.float64

    @property
    def _rows(self) -> int:
        return _rows(self.features, len(self.present))

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
        d = len(self.mean)
        point = self.mean.new_zeros(1, len(self.present), d + 1)  # rotated weights, then the bias
        if start is not None:
            point[0, :, :d] = start.weight[self.present] @ self.axes
            point[0, :, d] = start.bias[self.present]
        return self._solve([C], point, tolerance, max_iterations)[0][0]

    def path(self, penalties: Iterable[float], *, tolerance: float = 1e-6) -> Iterator[Solution]:
        """Solutions for a series of C, in its order; all are found before the first is given.

        A few are solved first and those between them next, each started where a cubic through its neighbours
        over log C leads; those of one level together, so that they share passes over the data.
        """
        wanted = list(penalties)
        values = sorted(set(wanted))
        origin = self.mean.new_zeros(len(self.present), len(self.mean) + 1)
        points: dict[int, Tensor] = {}
        found: dict[float, Solution] = {}
        width = max(1, WIDTH // len(self.present))
        for level in _levels(len(values)):
            known = dict(points)
            for first in range(0, len(level), width):
                places = level[first : first + width]
                start = torch.stack(
                    [_interpolated(values, known, place) if known else origin for place in places]
                )
                solved, ends = self._solve([values[place] for place in places], start, tolerance, 1_000)
                points |= zip(places, ends, strict=True)
                found |= {solution.C: solution for solution in solved}
        yield from (found[C] for C in wanted)

    def _solve(
        self, penalties: list[float], point: Tensor, tolerance: float, max_iterations: int
    ) -> tuple[list[Solution], Tensor]:
        """Solutions for H penalties from points (H, K, D + 1), and the points where they lie."""
        if bad := [C for C in penalties if C <= 0 or not math.isfinite(C)]:
            raise DataError(f"C must be positive and finite, not {bad[0]}")
        n, d = self.features.shape
        ridge = 1 / (n * torch.tensor(penalties, dtype=torch.float64, device=point.device))
        if len(self.present) == 1:  # any weight but zero would cost without a gain
            point = torch.zeros_like(point)
        search = Search(point, self._inverse(point, ridge), max_iterations)
        # In float32 rounding hides what is left of the gradient at some point, and float64 takes over: where the
        # norm has fallen to FLOOR, or no further for a while.
        if self.fast is torch.float32:
            search.run(
                lambda x, heads: self._evaluate(x, ridge[heads], torch.float32),
                max(tolerance / 2, FLOOR),
                rounding=1e-6,
                patience=PATIENCE,
            )
        search.run(lambda x, heads: self._evaluate(x, ridge[heads], torch.float64), tolerance)
        ends = search.point.view_as(point)
        gaps = self._gaps(ends, search.value, search.gradient.view_as(point), ridge)
        solutions = []
        for head, C in enumerate(penalties):
            weight = point.new_zeros(self.num_classes, d)
            weight[self.present] = ends[head, :, :d] @ self.axes.T
            bias = point.new_full((self.num_classes,), -math.inf)
            bias[self.present] = ends[head, :, d]
            norm = float(search.norm[head])
            solutions.append(
                Solution(
                    C=C,
                    weight=weight,
                    bias=bias,
                    mean=self.mean,
                    scale=self.scale,
                    objective=float(search.value[head]),
                    gradient_norm=norm,
                    duality_gap=float(gaps[head]),
                    iterations=int(search.steps[head]),
                    evaluations=int(search.calls[head]),
                    converged=norm <= tolerance,
                )
            )
        return solutions, ends

    def _blocks(self, centre: Tensor, source: Tensor | None = None, ones: bool = False) -> Iterator[Tensor]:
        """Rows of the features less ``centre`` (D,), in its dtype, with a column of ones if asked for.

        A block is overwritten by the next.
        """
        source = self.features if source is None else source
        d = len(centre)
        aligned = centre.new_ones(min(self._rows, len(source)), -(-(d + ones) // 16) * 16)
        for part in source.split(self._rows):
            block = aligned[: len(part), : d + ones]
            if part.dtype == centre.dtype:
                torch.sub(part, centre, out=block[:, :d])
            else:  # in one go it would be slower
                block[:, :d].copy_(part).sub_(centre)
            yield block

    def _inverse(self, point: Tensor, ridge: Tensor) -> Tensor:
        """A guess (H, 1, D + 1) of the objective's inverse Hessian at points (H, K, D + 1): a diagonal.

        Its entries are second derivatives along each rotated axis and the bias, averaged over classes. They are
        taken where the solver starts: with a weak penalty, items that are classified with certainty no longer
        bend the objective, so the covariance alone would be a poor guess. One vector for all classes did as
        well as one for each.
        """
        heads, k, d = len(point), len(self.present), len(self.mean)
        sample = self.sample[:: max(1, len(self.sample) // SAMPLE)]
        curvature = point.new_zeros(heads, d + 1)
        for part in self._blocks(self.mean, sample):
            inputs = (part / self.scale) @ self.axes
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            chances = (point.flatten(0, 1) @ inputs.T).view(heads, k, -1).softmax(1)
            curvature += (chances * (1 - chances)).mean(1) @ inputs.square_()
        curvature /= len(sample)
        curvature[:, :d] += ridge[:, None]
        return 1 / curvature.clamp_(min=1e-12)[:, None]

    def _evaluate(self, point: Tensor, ridge: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Objectives (H,) and gradients (H, K, D + 1) at rotated weights and biases (H, K, D + 1).

        Matrix products are those of ``dtype``, sums over blocks are float64's.
        """
        n, d = self.features.shape
        heads, k = point.shape[:2]
        rotated, bias = point[..., :d], point[..., d]
        centre = self.mean.to(dtype)
        shift = self.mean - centre  # what rounding has left
        weight = rotated @ self.axes.T / self.scale
        layer = torch.cat([weight, (bias - weight @ shift)[..., None]], 2)
        narrow = layer.flatten(0, 1).to(dtype)
        partition = point.new_zeros(heads)
        total = point.new_zeros(heads * k, d + 1)
        for inputs in self._blocks(centre, ones=True):
            logits = (narrow @ inputs.T).view(heads, k, -1)  # items last: softmax then runs along memory
            rest = logits.log_softmax(1)
            partition += (logits[:, 0] - rest[:, 0]).sum(1, dtype=torch.float64)
            total += rest.exp_().flatten(0, 1) @ inputs
        sums = torch.cat([self.sums + self.frequency.outer(shift), self.frequency[:, None]], 1)
        loss = partition / n - (layer * sums).sum((1, 2))
        total = total.view_as(point) / n - sums
        total -= total.mean(1, keepdim=True)  # zero but for rounding, which must not move all classes alike
        residual = total[..., d]
        gradient = torch.empty_like(point)
        gradient[..., :d] = (total[..., :d] - residual[..., None] * shift) / self.scale @ self.axes
        gradient[..., :d] += ridge[:, None, None] * rotated
        gradient[..., d] = residual
        return loss + ridge / 2 * rotated.square().sum((1, 2)), gradient

    def _gaps(self, point: Tensor, value: Tensor, gradient: Tensor, ridge: Tensor) -> Tensor:
        """How far at most (H,) the objectives lie above their minima: weak duality, without a pass over the data.

        For probabilities q_i that average to the class frequencies f (the condition from the unpenalised bias),
        Fenchel's inequality bounds the minimum from below by

            mean entropy of q_i  -  ||mean of (q_i - e_label) z_i^T||^2 / (2 ridge)

        (Yu, Huang and Lin, 2011, the dual of maximum entropy models). The model's own p_i average to
        f + r, where r is the gradient of the bias. Mixed as q_i = (1 - t) p_i + t s with the constant
        s = f + r - r / t, they average to f; s >= 0 needs t >= r_k / (f + r)_k, and t <= 1. As z_i average to zero,
        s leaves the second term; as entropy is concave, (1 - t) H(p_i) + t H(s) bounds that of q_i. The mean of
        H(p_i) is the loss less the inner product of its gradient with (W, b), for log p_i is linear in them.
        """
        d = len(self.mean)
        weight, bias = point[..., :d], point[..., d]
        residual = gradient[..., d]
        slope = gradient[..., :d] - ridge[:, None, None] * weight
        penalty = ridge / 2 * weight.square().sum((1, 2))
        entropy = value - penalty - (slope * weight).sum((1, 2)) - (residual * bias).sum(1)
        mean = self.frequency + residual
        share = (residual / mean).amax(1, keepdim=True).clamp_(min=0)
        mixture = (mean - residual / share.clamp(min=1e-300)).clamp_(min=0)
        entropy = (1 - share[:, 0]) * entropy + share[:, 0] * torch.special.entr(mixture).sum(1)
        pull = (1 - share[..., None]) * slope - share[..., None] * (self.sums / self.scale @ self.axes)
        dual = entropy - pull.square().sum((1, 2)) / (2 * ridge)
        return (value - dual).clamp_(min=0)


class Search:
    """L-BFGS for H smooth convex functions at once, each with its own steps, from ``point`` (H, ...).

    ``inverse`` guesses their inverse Hessians and multiplies gradients elementwise.
    """

    def __init__(self, point: Tensor, inverse: Tensor, max_iterations: int) -> None:
        self.shape = point.shape
        self.point = point.flatten(1).clone()
        self.inverse = inverse.expand_as(point).flatten(1)
        self.max_iterations = max_iterations
        heads = len(point)
        # Steps (H, P), changes of the gradient (H, P) and inverse products of the two (H,), oldest first. Heads that
        # made no step when others did have zeros there, and so remember less.
        self.memory: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
        self.scale = point.new_ones(heads)  # of ``inverse``, by the latest step
        self.remembers = torch.zeros(heads, dtype=torch.bool, device=point.device)
        self.steps = torch.zeros(heads, dtype=torch.long, device=point.device)
        self.calls = torch.zeros_like(self.steps)
        self.value = point.new_zeros(heads)
        self.norm = point.new_zeros(heads)
        self.gradient = torch.zeros_like(self.inverse)

    def run(
        self, function: Function, tolerance: float, rounding: float = 1e-13, patience: float = math.inf
    ) -> None:
        """Goes on until the norm of each gradient is at most ``tolerance``, no step helps, or ``patience`` is over.

        ``function`` takes points (h, ...) and which heads (h,) these are, and returns values and gradients.
        ``patience`` is a number of calls without a new lowest norm. Values whose relative difference is below
        ``rounding`` count as equal. A step has to meet the weak Wolfe conditions, by bracketing and halving;
        between equal values, a falling slope stands in for a falling value (the approximate condition of Hager
        and Zhang, 2005).
        """
        heads = torch.arange(len(self.point), device=self.point.device)
        self.value, gradient = function(self.point.view(self.shape), heads)
        self.gradient = gradient.flatten(1)
        self.norm = self.gradient.norm(dim=1)
        self.calls += 1
        direction, slope = torch.zeros_like(self.gradient), torch.zeros_like(self.value)
        step, low, high, tries = (torch.zeros_like(self.value) for _ in range(4))
        turned = torch.zeros_like(heads, dtype=torch.bool)  # whether the direction is the present point's
        stuck = torch.zeros_like(turned)
        lowest, since = self.norm.clone(), torch.zeros_like(self.value)
        while True:
            stuck |= since >= patience
            heads = ((self.norm > tolerance) & (self.steps < self.max_iterations) & ~stuck).nonzero()[:, 0]
            if not len(heads):
                return
            new = heads[~turned[heads]]
            if len(new):
                direction[new] = self._direction(new)
                slope[new] = _dot(self.gradient[new], direction[new])
                step[new], low[new], high[new], tries[new], turned[new] = 1.0, 0.0, math.inf, 0.0, True
            trial = self.point[heads] + step[heads, None] * direction[heads]
            value, gradient = function(trial.view(-1, *self.shape[1:]), heads)
            gradient = gradient.flatten(1)
            self.calls[heads] += 1
            tries[heads] += 1
            before, s, down = self.value[heads], step[heads], slope[heads]
            rise = _dot(gradient, direction[heads])
            falls = (value <= before + 1e-4 * s * down) | (
                (value <= before + rounding * before.abs()) & (rise <= (2e-4 - 1) * down)
            )
            steep = rise < 0.9 * down
            low[heads] = torch.where(falls, s, low[heads])
            high[heads] = torch.where(falls, high[heads], s)
            step[heads] = torch.where(high[heads].isinf(), 2 * s, (low[heads] + high[heads]) / 2)
            good = falls & ~steep
            self._move(heads[good], trial[good], value[good], gradient[good])
            turned[heads[good]] = False
            since = torch.where(self.norm < lowest, 0, since + 1)
            lowest = torch.minimum(lowest, self.norm)
            lost = heads[~good & (tries[heads] >= TRIES)]
            stuck[lost] = ~self.remembers[lost]  # not even the scaled gradient helps
            for _, _, rate in self.memory:
                rate[lost] = 0.0  # forgets, and tries that next
            self.scale[lost], self.remembers[lost] = 1.0, False
            turned[lost] = False

    def _move(self, heads: Tensor, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        change, difference = point - self.point[heads], gradient - self.gradient[heads]
        self.point[heads], self.value[heads], self.gradient[heads] = point, value, gradient
        self.norm[heads] = gradient.norm(dim=1)
        self.steps[heads] += 1
        product = _dot(change, difference)
        bent = product > 0
        if not bent.any():
            return
        heads, change, difference, product = heads[bent], change[bent], difference[bent], product[bent]
        scaled = _dot(difference, self.inverse[heads] * difference)
        self.scale[heads], self.remembers[heads] = product / scaled, True
        latest = torch.zeros_like(self.gradient), torch.zeros_like(self.gradient), torch.zeros_like(self.norm)
        for place, values in zip(latest, (change, difference, 1 / product), strict=True):
            place[heads] = values
        self.memory.append(latest)

    def _direction(self, heads: Tensor) -> Tensor:
        """The quasi-Newton directions of Nocedal and Wright, algorithm 7.4."""
        memory = [(change[heads], difference[heads], rate[heads]) for change, difference, rate in self.memory]
        direction = -self.gradient[heads]
        shares = []
        for change, difference, rate in reversed(memory):
            share = rate * _dot(change, direction)
            direction = torch.addcmul(direction, share[:, None], difference, value=-1)
            shares.append(share)
        direction = direction * self.inverse[heads] * self.scale[heads, None]
        for (change, difference, rate), share in zip(memory, reversed(shares), strict=True):
            share = share - rate * _dot(difference, direction)
            direction = torch.addcmul(direction, share[:, None], change)
        return direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _rows(features: Tensor, classes: int) -> int:
    """Rows of a block, if possible a round number, for which products are fastest."""
    rows = CHUNK.get(features.device.type, CHUNK["cuda"]) // max(features.shape[1], classes)
    return max(1, rows // 64 * 64 or rows)


def _levels(count: int) -> Iterator[range]:
    """Places of ``count`` values: every 2^i-th, four or more, then those half way between, until all are there."""
    stride = 1
    while count >= 8 * stride:
        stride *= 2
    yield range(0, count, stride)
    while stride > 1:
        yield range(stride // 2, count, stride)
        stride //= 2


def _interpolated(values: list[float], points: dict[int, Tensor], place: int) -> Tensor:
    """The value at a place of a cubic over log C through the four nearest points known."""
    nearest = sorted(points, key=lambda other: (abs(other - place), other))[:4]
    at = {other: math.log(values[other]) for other in [*nearest, place]}
    value = torch.zeros_like(points[nearest[0]])
    for one in nearest:
        shares = [(at[place] - at[other]) / (at[one] - at[other]) for other in nearest if other != one]
        value += math.prod(shares) * points[one]
    return value
