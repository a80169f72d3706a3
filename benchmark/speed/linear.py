"""A linear probe on cached features: logistic regression solved to its minimum, for one penalty and for 45.

Every contender minimises the same objective, mean cross entropy plus ||W||^2 / (2 C n) with C = 1, over the same
standardised float32 features, as a user would call it. Ours standardises within its time and stops at a gradient
norm of 1e-4, where its objective is the least to some 1e-8; protocols/linear.py goes on to 1e-6, which is timed as
well and tells how far above the least each contender ends. The slow ones run once, and ours before each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import data, machine
from mimbench.errors import DataError, MimbenchError
from mimbench.logistic import Problem, Solution
from mimbench.speed import ROUNDS, Bar, Comparison, Limit, Scale, Timing, main, measure, version

DIM, CLASSES, C = 192, 10, 1.0
RATE = 0.3  # of SGD: best of 0.03, 0.1, 0.3 on ill-conditioned features; not tuned on CIFAR-10
PENALTIES = [10.0 ** (-6 + i / 4) for i in range(45)]  # those of protocols/linear.py
Found = tuple[Tensor, Tensor]  # weights (K, D) and biases (K,) on standardised features


@dataclass(frozen=True)
class Work:
    """Features (N, D) and labels (N,) of two splits, raw and standardised."""

    train: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor
    inputs: Tensor
    trials: Tensor

    @classmethod
    def of(cls, train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> Work:
        mean, scale = train.mean(0), train.std(0, correction=0)
        return cls(train, labels, test, truth, (train - mean) / scale, (test - mean) / scale)

    @property
    def conditioning(self) -> float:
        spread = torch.linalg.eigvalsh(self.inputs.T.double() @ self.inputs.double())
        return float(spread[-1] / spread[0])


def correlated(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (count, DIM) whose spread falls as a power of the axis, all axes mixed, and noisy labels."""
    draw = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, DIM + 1)[:, None]
    mix = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0] / ranks
    weight = torch.randn(DIM, CLASSES, generator=draw) / ranks.sqrt()
    draw.manual_seed(seed)
    latent = torch.randn(count, DIM, generator=draw)
    scores = latent @ weight + torch.randn(count, CLASSES, generator=draw)
    return latent @ mix, scores.argmax(1)


def patches(quick: bool) -> Work:
    """CIFAR-10 as DIM numbers: the rectified answers to 48 of its own patches, averaged in quarters.

    Raises DataError where CIFAR-10 cannot be had.
    """
    if not os.environ.get("MIMBENCH_DATA"):
        raise DataError("MIMBENCH_DATA does not name a folder with CIFAR-10")
    found = data.load("cifar10")
    splits = found.train, found.test
    images = [split.store.read(split.index[: 2_000 if quick else None])[0] for split in splits]
    corners = torch.randint(0, 27, (DIM // 4, 2), generator=torch.Generator().manual_seed(0)).tolist()
    filters = torch.stack([images[0][i, :, y : y + 6, x : x + 6] for i, (y, x) in enumerate(corners)]).float()
    filters = F.normalize((filters - filters.mean((1, 2, 3), keepdim=True)).flatten(1)).view_as(filters)
    train, test = (
        torch.cat(
            [
                F.adaptive_avg_pool2d(
                    (F.conv2d(some / 127.5 - 1, filters, stride=2) - 0.5).relu(), 2
                ).flatten(1)
                for some in part.split(500)
            ]
        )
        for part in images
    )
    labels, truth = (split.labels[: len(part)] for split, part in zip(splits, images, strict=True))
    return Work.of(train, labels, test, truth)


def uncorrelated(work: Work) -> Work:
    """The same on its principal axes: standardised, these are as well-conditioned as can be."""
    axes = torch.linalg.eigh(work.inputs.T @ work.inputs).eigenvectors
    return Work.of(work.inputs @ axes, work.labels, work.trials @ axes, work.truth)


def by_sklearn(work: Work, solver: str, tolerance: float) -> Found:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in float32 its line search gives up at some point
        model = LogisticRegression(C=C, solver=solver, tol=tolerance, max_iter=10_000)
        model.fit(work.inputs.numpy(), work.labels.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


def by_torch(work: Work) -> Found:
    """Autograd and the L-BFGS that torch has."""
    layer = nn.Linear(DIM, CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    search = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=2_000,
        max_eval=1_000,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        penalty = layer.weight.square().sum() / (2 * C * len(work.labels))
        loss = F.cross_entropy(layer(work.inputs), work.labels) + penalty
        loss.backward()
        return loss

    search.step(closure)
    return layer.weight.detach(), layer.bias.detach()


def by_sgd(work: Work, rate: float, epochs: int) -> Found:
    """Batches of 256, momentum 0.9, a cosine from ``rate`` to zero; the gradient is written out."""
    draw = torch.Generator().manual_seed(0)
    count = len(work.labels)
    weight, bias = torch.zeros(CLASSES, DIM), torch.zeros(CLASSES)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    steps = epochs * (count // 256)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=draw).split(256)[: count // 256]:
            inputs, labels = work.inputs[rows], work.labels[rows]
            rest = torch.addmm(bias, inputs, weight.T).softmax(1)
            rest[torch.arange(256), labels] -= 1
            now = rate * (1 + math.cos(math.pi * step / steps)) / 2
            speeds[0].mul_(0.9).addmm_(rest.T, inputs, alpha=1 / 256).add_(weight, alpha=1 / (C * count))
            speeds[1].mul_(0.9).add_(rest.mean(0))
            weight.sub_(speeds[0], alpha=now)
            bias.sub_(speeds[1], alpha=now)
            step += 1
    return weight, bias


def excess(work: Work, found: Found, best: Solution) -> float:
    """By which part of it an objective lies above ours, in float64."""
    weight, bias = (part.double() for part in found)
    total = sum(
        float(F.cross_entropy(part.double() @ weight.T + bias, labels, reduction="sum"))
        for part, labels in zip(work.inputs.split(5_000), work.labels.split(5_000), strict=True)
    )
    count = len(work.labels)
    return (total / count + float(weight.square().sum()) / (2 * C * count)) / best.objective - 1


def compare(
    name: str,
    title: str,
    what: str,
    work: Work,
    bars: dict[str, float],
    options: argparse.Namespace,
    leave_out: tuple[str, ...] = (),
) -> Comparison:
    device = torch.device("cpu")
    skipped: dict[str, str] = {}
    peers: dict[str, tuple[str, Callable[[], Found]]] = {}
    theirs = version("scikit-learn")
    for solver, tolerance in (("lbfgs", 1e-5), ("newton-cholesky", 1e-4)):
        if theirs:
            peers[f"scikit-learn {solver}"] = theirs, partial(by_sklearn, work, solver, tolerance)
        else:
            skipped[f"scikit-learn {solver}"] = "it is not installed"
    peers["torch.optim.LBFGS"] = torch.__version__, partial(by_torch, work)
    epochs = 3 if options.quick else 90
    peers["SGD"] = torch.__version__, partial(by_sgd, work, RATE, epochs)
    if options.rounds <= ROUNDS and not options.quick and peers.pop("scikit-learn newton-cholesky", None):
        skipped["scikit-learn newton-cholesky"] = f"as slow as lbfgs; runs with more than {ROUNDS} rounds"
    for peer in leave_out:
        if peers.pop(peer, None):
            skipped[peer] = "timed on the ill-conditioned features only"

    strict = partial(solve, (work.train, work.labels))
    loose = partial(strict, tolerance=1e-4)
    best, near = strict(), loose()
    if not best.converged:
        raise MimbenchError(f"ours stopped at a gradient norm of {best.gradient_norm:.1e}")

    if near.objective / best.objective > 1 + 1e-6:
        raise MimbenchError("at a gradient norm of 1e-4 our objective is not the minimum to 1e-6")
    if not torch.equal(strict().weight, best.weight):
        raise MimbenchError("ours gives other digits when it is run again")
    own: dict[str, list[float]] = {"mimbench": [], "mimbench to 1e-6": []}
    timings, agreement = [], []
    for peer, (peer_version, call) in peers.items():
        own["mimbench"].append(machine.seconds(loose, device))
        kept: list[Found] = []
        seconds = machine.seconds(lambda call=call, kept=kept: kept.append(call()), device)
        over = excess(work, kept[0], best)
        if over * best.objective < -best.duality_gap - 1e-7:
            raise MimbenchError(f"{peer} has a lower objective than ours, by {-over:.1e} of it")
        weight, bias = kept[0]
        right = float(
            ((work.trials @ weight.float().T + bias.float()).argmax(1) == work.truth).double().mean()
        )
        recipe = f"{epochs} epochs, batch 256, learning rate {RATE:g}; " if peer == "SGD" else ""
        note = f"{recipe}once; objective {over:.1e} above the least; accuracy {right:.2%}"
        timings.append(Timing(peer, [seconds], peer_version, note))
        if peer == "scikit-learn lbfgs":
            agreement.append(
                f"scikit-learn's objective is within {over:.1e} of the least, at its tol=1e-5, ours within"
                f" {near.objective / best.objective - 1:.1e}"
            )
    for one, seconds in measure({"mimbench": loose, "mimbench to 1e-6": strict}, options.rounds).items():
        own[one] += seconds
    ours = []
    for (one, seconds), found in zip(own.items(), (near, best), strict=True):
        right = float((found.top(work.test)[:, 0] == work.truth).double().mean())
        over = found.objective / best.objective - 1
        note = (
            f"gradient norm {found.gradient_norm:.0e}, {found.evaluations} evaluations;"
            f" objective {over:.1e} above the least; accuracy {right:.2%}"
        )
        ours.append(Timing(one, seconds, version("mimbench"), note))
    agreement.append(
        f"the least: gradient norm {best.gradient_norm:.1e}, duality gap {best.duality_gap:.1e};"
        " equal digits when repeated"
    )
    peak = machine.matmul_peak(device, "fp32").flops
    passes = near.evaluations * 4 * work.train.numel() * CLASSES
    return Comparison(
        name=name,
        title=title,
        work=what,
        ours="mimbench",
        timings=[*ours, *timings],
        agreement=agreement,
        limit=Limit(
            f"the matrix products of {near.evaluations} evaluations at {peak / 1e9:.0f} GFLOP/s",
            passes / peak,
        ),
        bars=[Bar(peer, ratio) for peer, ratio in bars.items()],
        skipped=skipped,
    )


def growth(base: int) -> list[Scale]:
    found = []
    for times in (1, 2, 4):
        call = partial(solve, correlated(times * base, 3))
        seconds = statistics.median(machine.seconds(call, torch.device("cpu")) for _ in range(3))
        _, memory = machine.memory_growth(call, torch.device("cpu"))
        found.append(Scale(f"{times}x: {times * base:,} x {DIM}", seconds, memory))
    return found


def solve(data: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> Solution:
    """What is timed as ours: preparation, solution and certificate."""
    return Problem(*data, CLASSES).solve(C, tolerance=tolerance)


def sweep(work: Work, what: str, rounds: int) -> Comparison:
    """All penalties against one, both with their preparation."""
    solutions = list(Problem(work.train, work.labels, CLASSES).path(PENALTIES))
    if not all(solution.converged for solution in solutions):
        raise MimbenchError("a penalty of the sweep was not solved to its tolerance")
    place = 24
    single = Problem(work.train, work.labels, CLASSES).solve(PENALTIES[place])
    apart = abs(solutions[place].objective / single.objective - 1)
    if apart > 1e-8:
        raise MimbenchError(f"swept and solved alone, objectives differ by {apart:.1e}")
    calls: dict[str, Callable[[], object]] = {
        "one value": partial(solve, (work.train, work.labels)),
        "45 values": lambda: list(Problem(work.train, work.labels, CLASSES).path(PENALTIES)),
    }
    found = measure(calls, rounds)
    counts = {"one value": single.evaluations, "45 values": sum(s.evaluations for s in solutions)}
    timings = [
        Timing(name, seconds, version("mimbench"), f"{counts[name]} evaluations")
        for name, seconds in found.items()
    ]
    ratio = timings[1].median / timings[0].median
    worst = max(solution.gradient_norm for solution in solutions)
    return Comparison(
        name="linear-sweep",
        title="Logistic regression for 45 penalties",
        work=f"C from 1e-6 to 1e5; {what}",
        ours="one value",
        timings=timings,
        agreement=[
            f"bar: 45 values at most 20x the cost of one: {'reached' if ratio <= 20 else 'missed'} ({ratio:.1f}x)",
            f"every gradient norm is at most {worst:.1e}; swept and solved alone, objectives agree to {apart:.0e}",
        ],
    )


def linear(options: argparse.Namespace) -> Iterable[Comparison]:
    if options.device != "cpu":
        raise MimbenchError("this comparison is for CPUs")
    base = 1_000 if options.quick else 50_000
    work = Work.of(*correlated(base, 1), *correlated(base // 5, 2))
    what = f"{base:,} x {DIM}, {CLASSES} classes, condition number {work.conditioning:,.0f}, C = {C:g}"
    first = compare(
        "linear",
        "Logistic regression to its minimum, ill-conditioned features",
        what,
        work,
        {"scikit-learn lbfgs": 40.0, "SGD": 10.0},
        options,
    )
    yield dataclasses.replace(first, growth=growth(base))
    yield sweep(work, what, 2 if options.quick else min(options.rounds, 4))
    try:
        real = patches(options.quick)
    except MimbenchError as fault:
        print(f"linear-cifar10 is skipped: {fault}")
        return
    for name, suffix, data_set in (
        ("linear-cifar10", "features of CIFAR-10", real),
        ("linear-cifar10-uncorrelated", "uncorrelated features of CIFAR-10", uncorrelated(real)),
    ):
        yield compare(
            name,
            f"Logistic regression to its minimum, {suffix}",
            f"{len(real.train):,} x {DIM} answers to random patches, {CLASSES} classes, condition number"
            f" {data_set.conditioning:,.0f}, C = {C:g}",
            data_set,
            {"scikit-learn lbfgs": 6.0} if data_set is real else {},
            options,
            ("torch.optim.LBFGS",),
        )


if __name__ == "__main__":
    main(linear, __doc__)
