"""The logistic-regression solver against scikit-learn, autograd and the certificate that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimbench import logistic
from mimbench.errors import DataError
from mimbench.logistic import Problem, Search


def problem_of(n: int, d: int, classes: int, seed: int = 0, decay: float = 3.0) -> tuple[Tensor, Tensor]:
    """Correlated features whose spread falls over ``decay`` powers of ten, and noisy labels."""
    draw = torch.Generator().manual_seed(seed)
    spread = 10 ** -torch.linspace(0, decay, d)
    mix = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
    latent = torch.randn(n, d, generator=draw)
    labels = (
        latent @ torch.randn(d, classes, generator=draw) + torch.randn(n, classes, generator=draw)
    ).argmax(1)
    return (latent * spread) @ mix * 5 + 3, labels


def by_scikit_learn(x: Tensor, labels: Tensor, C: float) -> tuple[LogisticRegression, np.ndarray, float]:
    """Their solution on standardised float64 features, and our objective at it."""
    z = StandardScaler().fit_transform(x.double().numpy())
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=200).fit(z, labels.numpy())
    logits = torch.from_numpy(z @ model.coef_.T + model.intercept_)
    _, places = labels.unique(return_inverse=True)
    penalty = float((model.coef_**2).sum()) / (2 * C * len(x))
    return model, z, float(nn.functional.cross_entropy(logits, places)) + penalty


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 1e3])
def test_the_solver_finds_scikit_learns_optimum(C: float) -> None:
    x, labels = problem_of(600, 12, 4)
    model, _, objective = by_scikit_learn(x, labels, C)
    solution = Problem(x, labels, 4).solve(C, tolerance=1e-8)
    assert solution.converged
    assert solution.gradient_norm <= 1e-8
    assert solution.objective == pytest.approx(objective, rel=1e-9)
    np.testing.assert_allclose(solution.weight.numpy(), model.coef_, rtol=1e-3, atol=1e-4)
    expected = model.predict(StandardScaler().fit(x.double()).transform(x.double()))
    assert np.array_equal(solution.top(x)[:, 0].numpy(), expected)


def test_two_classes_are_scikit_learns_with_twice_the_penalty() -> None:
    x, labels = problem_of(300, 6, 2)
    z = StandardScaler().fit_transform(x.double().numpy())
    model = LogisticRegression(C=0.2, solver="newton-cholesky", tol=1e-10).fit(z, labels.numpy())
    solution = Problem(x, labels, 2).solve(0.1, tolerance=1e-9)
    difference = solution.weight[1] - solution.weight[0]
    np.testing.assert_allclose(difference.numpy(), model.coef_[0], rtol=1e-5, atol=1e-7)


def test_the_stated_gradient_and_objective_are_autograds() -> None:
    x, labels = problem_of(200, 5, 3)
    solution = Problem(x, labels, 3).solve(0.3, tolerance=1e-3)
    weight, bias = solution.weight.clone().requires_grad_(), solution.bias.clone().requires_grad_()
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    loss = nn.functional.cross_entropy(z @ weight.T + bias, labels) + weight.square().sum() / (2 * 0.3 * 200)
    loss.backward()
    norm = torch.cat([weight.grad.flatten(), bias.grad]).norm()
    assert solution.objective == pytest.approx(loss.item(), rel=1e-12)
    assert solution.gradient_norm == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("penalties", [[1e-4, 1e-2, 1.0, 100.0], [10 ** (i / 4 - 4) for i in range(26)]])
def test_a_path_ends_where_single_solutions_do(
    penalties: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = problem_of(300, 10, 5, decay=2)
    problem = Problem(x, labels, 5)
    asked = [*penalties[::-1], penalties[1]]  # any order, and twice the same
    together = list(problem.path(asked, tolerance=1e-8))
    monkeypatch.setattr(logistic, "WIDTH", 1)
    one_by_one = list(problem.path(asked, tolerance=1e-8))
    assert [solution.C for solution in together] == asked
    for path in (together, one_by_one):
        for solution in path[:: len(path) // 4]:
            single = problem.solve(solution.C, tolerance=1e-8)
            assert solution.converged
            assert solution.objective == pytest.approx(single.objective, rel=1e-10)


def test_a_path_costs_less_than_its_solutions_one_by_one() -> None:
    x, labels = problem_of(500, 10, 5, decay=2)
    problem = Problem(x, labels, 5)
    penalties = [10 ** (i / 4 - 4) for i in range(32)]
    alone = sum(problem.solve(C).evaluations for C in penalties)
    assert sum(solution.evaluations for solution in problem.path(penalties)) < 0.9 * alone


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
def test_the_gap_bounds_what_is_left(C: float) -> None:
    x, labels = problem_of(300, 8, 4, seed=2)
    labels[labels == 3] = (torch.arange(300)[labels == 3] % 5 == 0).long() * 3  # a rare class
    _, _, least = by_scikit_learn(x, labels, C)
    problem = Problem(x, labels, 4)
    gaps = []
    for steps in (0, 1, 2, 4, 8, 16, 1_000):
        solution = problem.solve(C, tolerance=1e-9, max_iterations=steps)
        assert solution.objective - least <= solution.duality_gap + 1e-12
        gaps.append(solution.duality_gap)
    assert gaps[0] > 1e-3  # of no weights at all
    assert gaps[-1] < 1e-7


def test_the_gap_is_that_of_a_feasible_dual_point() -> None:
    x, labels = problem_of(200, 5, 3)
    ridge = 1 / (0.3 * 200)
    solution = Problem(x, labels, 3).solve(0.3, max_iterations=3)
    z = (x.double() - solution.mean) / solution.scale
    chances, hot = solution.logits(x).softmax(1), nn.functional.one_hot(labels, 3).double()
    excess = chances.mean(0) - hot.mean(0)
    share = float((excess / chances.mean(0)).max())
    constant = chances.mean(0) - excess / share
    mixed = (1 - share) * chances + share * constant
    torch.testing.assert_close(mixed.mean(0), hot.mean(0))
    assert mixed.min() >= -1e-15
    pull = (mixed - hot).T @ z / 200
    entropy = (1 - share) * torch.special.entr(chances).sum(1).mean() + share * torch.special.entr(
        constant
    ).sum()
    dual = float(entropy - pull.square().sum() / (2 * ridge))
    assert dual <= float(torch.special.entr(mixed).sum(1).mean() - pull.square().sum() / (2 * ridge))
    assert solution.duality_gap == pytest.approx(solution.objective - dual, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float32_passes_do_not_limit_the_solution(dtype: torch.dtype) -> None:
    x, labels = problem_of(400, 10, 4)
    x = (x * 20 + 300).to(dtype)  # far from zero, where float32 has few digits left for differences
    _, _, objective = by_scikit_learn(x, labels, 1.0)
    solution = Problem(x, labels, 4).solve(1.0, tolerance=1e-10)
    assert solution.converged
    assert solution.objective == pytest.approx(objective, rel=1e-11)


def test_separable_classes_with_a_weak_penalty() -> None:
    x, _ = problem_of(200, 12, 3, decay=1)
    labels = (x @ torch.randn(12, 3, generator=torch.Generator().manual_seed(5))).argmax(1)
    _, _, least = by_scikit_learn(x, labels, 1e5)
    solution = Problem(x, labels, 3).solve(1e5, tolerance=1e-8)
    assert solution.converged
    assert -1e-12 <= solution.objective - least <= solution.duality_gap + 1e-12


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation allocates."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def test_features_may_be_a_file_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logistic.CHUNK, "cpu", 10_000)
    monkeypatch.setattr(logistic, "SAMPLE", 500)
    x, labels = problem_of(20_000, 40, 3, decay=1)
    x.numpy().tofile(tmp_path / "features")
    mapped = torch.from_file(str(tmp_path / "features"), size=x.numel()).view_as(x)
    with Largest(mapped) as largest:
        solutions = list(Problem(mapped, labels, 3).path([1e-3, 1.0]))
        best = solutions[1].top(mapped)
    assert largest.bytes <= 20_000 * 8 * 3  # labels, and the classes ranked; the features are 3.2 MB
    assert torch.equal(best, Problem(x, labels, 3).solve(1.0).top(x))


def test_bad_conditioning_costs_few_evaluations() -> None:
    x, labels = problem_of(2_000, 40, 5, decay=5)
    solution = Problem(x, labels, 5).solve(1e-2)
    assert solution.converged
    assert solution.evaluations < 60


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = problem_of(500, 8, 3)
    whole = Problem(x, labels, 3).solve(0.1, tolerance=1e-10)
    monkeypatch.setitem(logistic.CHUNK, "cpu", 37 * 8)
    parts = Problem(x, labels, 3).solve(0.1, tolerance=1e-10)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(parts.logits(x), whole.logits(x), rtol=0, atol=1e-6)


def test_the_same_problem_gives_the_same_digits() -> None:
    x, labels = problem_of(400, 8, 3)
    first, second = (Problem(x, labels, 3).solve(1.0) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.objective == second.objective


def test_constant_and_repeated_features() -> None:
    x, labels = problem_of(300, 6, 3)
    wide = torch.cat([x, torch.full((300, 1), 0.1), torch.zeros(300, 1), x[:, :2]], 1)
    _, _, objective = by_scikit_learn(wide, labels, 0.5)
    solution = Problem(wide, labels, 3).solve(0.5, tolerance=1e-9)
    assert solution.objective == pytest.approx(objective, rel=1e-9)
    assert solution.weight[:, 6:8].abs().max() < 1e-12
    nothing = Problem(torch.ones(300, 2), labels, 3).solve(0.5)
    frequency = torch.bincount(labels).double() / 300
    torch.testing.assert_close(nothing.logits(torch.ones(1, 2)).softmax(1)[0], frequency, rtol=0, atol=1e-5)


def test_more_features_than_items() -> None:
    x, labels = problem_of(30, 80, 3, decay=1)
    _, _, objective = by_scikit_learn(x, labels, 1.0)
    assert Problem(x, labels, 3).solve(1.0, tolerance=1e-8).objective == pytest.approx(objective, rel=1e-8)


def test_classes_absent_from_train_are_never_predicted() -> None:
    x, labels = problem_of(300, 6, 3)
    labels = labels * 2 + 1  # 1, 3, 5 of seven
    solution = Problem(x, labels, 7).solve(0.1)
    logits = solution.logits(x)
    assert logits[:, [0, 2, 4, 6]].isneginf().all()
    assert solution.top(x, 5)[:, :3].unique().tolist() == [1, 3, 5]
    assert solution.top(x, 5).shape == (300, 5)
    dense = Problem(x, labels // 2, 3).solve(0.1)
    assert solution.objective == dense.objective


def test_one_class_is_a_constant_predictor() -> None:
    x, _ = problem_of(50, 4, 2)
    solution = Problem(x, torch.full((50,), 2), 4).solve(1.0)
    assert solution.converged
    assert solution.objective == 0
    assert solution.top(x)[:, 0].unique().tolist() == [2]


def test_what_cannot_be_solved_says_why() -> None:
    x, labels = problem_of(20, 4, 3)
    bad = x.clone()
    bad[3, 1] = float("nan")
    for args, message in [
        ((bad, labels, 3), "not finite"),
        ((x[:0], labels[:0], 3), "nothing to fit"),
        ((x, labels[:-1], 3), "do not fit"),
        ((x, labels, 2), "labels run"),
        ((x, labels - 1, 3), "labels run"),
    ]:
        with pytest.raises(DataError, match=message):
            Problem(*args)
    with pytest.raises(DataError, match="C must be"):
        Problem(x, labels, 3).solve(0.0)


def test_running_out_of_steps_is_reported() -> None:
    x, labels = problem_of(300, 10, 5)
    solution = Problem(x, labels, 5).solve(10.0, max_iterations=2)
    assert not solution.converged
    assert solution.iterations == 2


def test_searches_at_once_are_searches_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(3, 12, 12, generator=draw, dtype=torch.float64)
    bend = root @ root.mT + torch.tensor([0.1, 1.0, 10.0])[:, None, None] * torch.eye(12)
    target = torch.randn(3, 12, generator=draw, dtype=torch.float64)

    def quadratics(point: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        pull = (bend[heads] @ (point - target[heads])[..., None])[..., 0]
        return (pull * (point - target[heads])).sum(1) / 2, pull

    start = torch.zeros(3, 12, dtype=torch.float64)
    search = Search(start, torch.full_like(start, 0.1), 500)
    search.run(quadratics, 1e-10)
    torch.testing.assert_close(search.point, target, rtol=0, atol=1e-8)
    for head in range(3):
        alone = Search(start[:1], torch.full_like(start[:1], 0.1), 500)
        alone.run(lambda point, heads, head=head: quadratics(point, heads + head), 1e-10)
        torch.testing.assert_close(alone.point[0], search.point[head], rtol=0, atol=1e-9)
        assert abs(int(alone.steps[0] - search.steps[head])) <= 5  # those that wait remember a little less


def test_a_search_that_cannot_get_on_stops() -> None:
    def wrong(point: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        return point.square().sum(1), -2 * point

    start = torch.ones(1, 3, dtype=torch.float64)
    search = Search(start, start, 1_000)
    search.run(wrong, 1e-6)
    assert search.steps[0] == 0
    assert torch.equal(search.point, start)

    def noisy(point: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        gradient = 2 * point
        return point.square().sum(1), gradient + 1e-3 * gradient.sign() * (1 + (1e6 * point).sin())

    search = Search(start, start, 1_000)
    search.run(noisy, 1e-9, rounding=1e-6, patience=5)
    assert search.calls[0] < 60
    assert search.norm[0] < 1e-2
