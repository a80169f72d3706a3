"""Scoring features that were computed elsewhere, and holding our probes against stored references."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimbench import config, foreign, neighbours, npz, registry, seeds, stats
from mimbench.data.split import HOLDOUT_SEED
from mimbench.errors import ConfigError, DataError, UnknownName
from mimbench.logistic import Problem
from mimbench.progress import Progress, quiet
from mimbench.task import Metric, Result

PROTOCOLS = ("knn", "linear")  # those that read nothing but features
ARRAYS = ("train", "train_labels", "test", "test_labels")
MOST_CLASSES = 50_000  # unless there are as many rows
OBJECTIVE_TOLERANCE = 1e-6  # relative
_TIE = 1e-6  # relative difference of two scores below which float32 cannot tell them apart
_KNN = re.compile(r"knn_(cosine|euclid)_k([1-9]\d{0,8})_(?:T(\d+(?:\.\d+)?)|(uniform|distance))", re.ASCII)
_LINEAR = re.compile(r"linear_C(\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?)", re.ASCII)


@dataclass(frozen=True)
class Scored:
    """What one protocol says of the features."""

    protocol: str
    recipe: str
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    primary: str
    details: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class Agreement:
    """Our predictions beside stored ones for the same settings."""

    case: str  # as named in the file, without "pred/"
    n: int  # test rows
    different: int  # rows with another predicted class
    ties: int  # those of them in which both classes are equally good
    top1: float  # ours, in percent
    objective: float | None = None  # linear: mean negative log-likelihood plus penalty, ours
    reference_objective: float | None = None  # linear: from expected.json beside the file

    @property
    def objective_difference(self) -> float | None:
        """Relative difference of the objectives."""
        if self.objective is None or self.reference_objective is None:
            return None
        apart = abs(self.objective - self.reference_objective)
        return apart / abs(self.reference_objective) if self.reference_objective else apart

    @property
    def passed(self) -> bool:
        """Same classes but for ties, and the same objective to 1e-6."""
        return self.different == self.ties and (self.objective_difference or 0.0) <= OBJECTIVE_TOLERANCE


@dataclass(frozen=True)
class Arrays:
    """The content of a file of features, checked."""

    train: Tensor  # (N, D) float32
    train_labels: Tensor  # (N,) int64
    test: Tensor  # (M, D) float32
    test_labels: Tensor  # (M,) int64
    predictions: dict[str, Tensor] = field(default_factory=dict)  # (M,) int64 per reference case
    objectives: dict[float, float] = field(default_factory=dict)  # per C, from expected.json

    @property
    def num_classes(self) -> int:
        """Classes of both splits together."""
        return 1 + max(int(self.train_labels.max()), int(self.test_labels.max()))


def score(
    file: Path,
    protocols: Sequence[str],
    overrides: Iterable[str] = (),
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[list[Scored], list[Agreement]]:
    """Runs protocols ("knn", "linear", "knn:sklearn" ...) on the features in ``file``.

    ``overrides`` are settings as ``protocol.key=value``. Where the file holds reference predictions
    ``pred/knn_cosine_k10_T0.07``, ``pred/knn_euclid_k5_uniform``, ``pred/knn_euclid_k20_distance`` or
    ``pred/linear_C0.01``, exactly these settings of the protocols asked for are run too and compared.
    """
    chosen = choices(protocols, config.parse_overrides(overrides))
    arrays = read(file)
    show = progress or quiet()
    results = [_run(name, settings, arrays, device, show) for name, settings in chosen]
    return results, _compare(arrays, {name for name, _ in chosen}, device, show)


def read(file: Path) -> Arrays:
    """The arrays of an ``.npz`` file. Raises DataError for what cannot be scored, and says why."""
    file = Path(file)
    if not file.is_file():
        raise DataError(f"there is no file {file}", f"Expected an .npz with the arrays {', '.join(ARRAYS)}")
    try:
        with file.open("rb") as raw:
            beginning = raw.read(6)
    except OSError as fault:
        raise DataError(f"{file} cannot be read as .npz: {fault.strerror}") from None
    if beginning == b"\x93NUMPY":
        raise DataError(f"{file} is a single array", f"Save {', '.join(ARRAYS)} with numpy.savez")
    found = npz.read(file, lambda name: name in ARRAYS or name[:5] == "pred/")
    if missing := [name for name in ARRAYS if name not in found]:
        raise DataError(f"{file} lacks {', '.join(missing)}", f"Expected {', '.join(ARRAYS)}")
    train, test = (_features(found[name], name, file) for name in ("train", "test"))
    if train.shape[1] != test.shape[1]:
        raise DataError(
            f"train has {train.shape[1]} channels and test {test.shape[1]} in {file}",
            "Both need to come from one encoder",
        )
    labels = {
        name: _labels(found[name], name, rows, file)
        for name, rows in (("train_labels", len(train)), ("test_labels", len(test)))
    }
    rows, classes = len(train) + len(test), 1 + max(int(each.max()) for each in labels.values())
    if classes > max(MOST_CLASSES, rows):
        raise DataError(
            f"the labels in {file} make {classes:,} classes of {rows:,} rows",
            "Number the classes without gaps",
        )
    predictions = {
        name[5:]: _labels(found[name], name, len(test), file) for name in found if name[:5] == "pred/"
    }
    objectives = _objectives(file.with_name("expected.json")) if predictions else {}
    return Arrays(train, labels["train_labels"], test, labels["test_labels"], predictions, objectives)


def _features(array: np.ndarray, name: str, file: Path) -> Tensor:
    if array.ndim != 2 or not array.size:
        raise DataError(f"'{name}' in {file} has the shape {array.shape}", "Expected (items, channels)")
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"'{name}' in {file} holds {array.dtype}", "Expected float16, float32 or float64")
    with np.errstate(over="ignore"):  # what is too large becomes infinite and is reported as such
        features = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if broken := int((~features.isfinite().all(1)).sum()):
        raise DataError(f"{broken} of {len(features)} rows of '{name}' in {file} are not finite in float32")
    return features


def _labels(array: np.ndarray, name: str, rows: int, file: Path) -> Tensor:
    if array.shape != (rows,):
        raise DataError(f"'{name}' in {file} has the shape {array.shape}", f"Expected ({rows},)")
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"'{name}' in {file} holds {array.dtype}", "Expected integers")
    if int(array.min()) < 0:
        raise DataError(f"'{name}' in {file} holds the negative label {array.min()}", "Classes count from 0")
    if int(array.max()) >= 1_000_000:
        raise DataError(f"'{name}' in {file} holds the label {array.max()}", "Classes count from 0")
    return torch.from_numpy(array.astype(np.int64))


def _objectives(file: Path) -> dict[float, float]:
    if not file.is_file():
        return {}
    try:
        table = foreign.decode_json(foreign.read_text(file))["linear"]
        return {float(key.removeprefix("C=")): float(entry["objective"]) for key, entry in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as fault:
        raise DataError(f"{file} cannot be read: {fault!r}") from None


def choices(protocols: Sequence[str], overrides: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each protocol of ``protocols`` ("knn", "knn:sklearn") by name, with its settings.

    Raises UnknownName and ConfigError for what does not exist, or needs more than features.
    """
    found = []
    for text in protocols:
        name, _, recipe = text.partition(":")
        if name not in PROTOCOLS:
            registry.protocol(name)  # an unknown name gets suggestions
            raise ConfigError(
                f"the protocol '{name}' needs images, not only features", f"Choose {' or '.join(PROTOCOLS)}"
            )
        module = registry.load_protocol(name)
        recipe = recipe or next(iter(module.RECIPES))
        if recipe not in module.RECIPES:
            raise UnknownName(f"recipe of {name}", recipe, module.RECIPES)
        table = config.merge(module.RECIPES[recipe], overrides.get(name, {})) | {"recipe": recipe}
        settings = config.build(module.Settings, table, name)
        if getattr(settings, "solver", "lbfgs") != "lbfgs":
            raise ConfigError(f"{name}:{recipe} trains on images, not only features", f"Use {name}:cached")
        found.append((name, settings))
    for name in overrides:
        if name not in {name for name, _ in found}:
            raise ConfigError(f"a setting of '{name}' was given", "Write PROTOCOL.KEY=VALUE")
    return found


def evaluate(
    name: str, settings: Any, arrays: Arrays, device: torch.device | str, progress: Progress
) -> Result:
    """What a protocol finds on the features of a file."""
    module = registry.load_protocol(name)
    classes = arrays.num_classes
    given = (arrays.train, arrays.train_labels, arrays.test, classes)
    if name == "knn":
        found: Result = module.result(module.classify(*given, settings, device), arrays.test_labels)
        return found
    n = len(arrays.train)
    order = torch.randperm(n, generator=seeds.generator("cpu", HOLDOUT_SEED, "features"))
    validation = order[: max(1, round(n * settings.holdout))] if n > 1 else order[:0]
    fitted = module.classify(*given, validation, settings, device, progress)
    found = module.result(fitted, arrays.test_labels, [str(number) for number in range(classes)])
    return found


def _run(name: str, settings: Any, arrays: Arrays, device: torch.device | str, progress: Progress) -> Scored:
    result = evaluate(name, settings, arrays, device, progress)
    return Scored(
        name,
        settings.recipe,
        config.to_dict(settings),
        result.metrics,
        result.primary,
        result.details,
        result.warnings,
    )


def _compare(
    arrays: Arrays, protocols: set[str], device: torch.device | str, progress: Progress
) -> list[Agreement]:
    """The stored reference cases of the protocols asked for."""
    cases = []
    for case in arrays.predictions:
        knn, linear = _KNN.fullmatch(case), _LINEAR.fullmatch(case)
        if not ((knn and float(knn[3] or 1)) or (linear and float(linear[1]))):
            raise DataError(
                f"the reference 'pred/{case}' names no known setting",
                "Known: knn_cosine_k10_T0.07, knn_euclid_k5_uniform, knn_euclid_k20_distance, linear_C0.01",
            )
        if ("knn" if knn else "linear") in protocols:
            cases.append((case, knn, linear))
    problem = None
    found = []
    searched: dict[str, tuple[Tensor, Tensor]] = {}
    for case, knn, linear in progress.track(cases, "reference cases") if cases else []:
        if knn:
            metric: neighbours.Metric = "cosine" if knn[1] == "cosine" else "euclidean"
            if metric not in searched:
                reach = max(int(k[2]) for _, k, _ in cases if k and k[1] == knn[1])
                searched[metric] = _search(arrays, metric, reach, device)
            found.append(_compare_knn(case, knn, arrays, *searched[metric]))
        elif linear:
            problem = problem or Problem(
                arrays.train.to(device), arrays.train_labels.to(device), arrays.num_classes
            )
            found.append(_compare_linear(case, float(linear[1]), arrays, problem))
    return found


def _search(
    arrays: Arrays, metric: neighbours.Metric, k: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """One neighbour more than k, where there is one: it shows whether the last place was a tie."""
    if k > len(arrays.train):
        raise DataError(f"a reference with k = {k} needs more than {len(arrays.train)} training items")
    reach = min(k + 1, len(arrays.train))
    return neighbours.nearest(arrays.test.to(device), arrays.train.to(device), reach, metric)


def _compare_knn(
    case: str, match: re.Match[str], arrays: Arrays, distances: Tensor, where: Tensor
) -> Agreement:
    k = int(match[2])
    weighting: neighbours.Weighting = "exponential" if match[3] else "uniform"
    if match[4] == "distance":
        weighting = "inverse"
    temperature = float(match[3] or 1)
    labels = arrays.train_labels.to(where.device)
    inside, classes = distances[:, :k], labels[where[:, :k]]
    ours = neighbours.vote(inside, where[:, :k], labels, arrays.num_classes, [k], weighting, temperature)[k]
    theirs = arrays.predictions[case].to(ours.device)
    rows = (ours != theirs).nonzero()[:, 0]
    weights = neighbours.weigh(inside[rows].double(), weighting, temperature)
    for_ours, for_theirs = (
        (weights * (classes[rows] == choice[rows, None])).sum(1) for choice in (ours, theirs)
    )
    tied = for_ours - for_theirs <= _TIE * for_ours
    if distances.shape[1] > k:
        last, beyond = distances[rows, k - 1], distances[rows, k]
        tied |= (last - beyond).abs() <= _TIE * last.abs()
    return _agreement(case, ours, theirs, tied, arrays)


def _compare_linear(case: str, C: float, arrays: Arrays, problem: Problem) -> Agreement:
    solution = problem.solve(C)
    test = arrays.test.to(problem.features.device)
    ours = solution.top(test)[:, 0]
    theirs = arrays.predictions[case].to(ours.device)
    rows = (ours != theirs).nonzero()[:, 0]
    logits = solution.logits(test[rows])
    best, other = logits.gather(1, ours[rows, None]), logits.gather(1, theirs[rows, None])
    tied = (best - other)[:, 0] <= _TIE * logits.abs().amax(1)
    agreement = _agreement(case, ours, theirs, tied, arrays)
    return replace(agreement, objective=solution.objective, reference_objective=arrays.objectives.get(C))


def _agreement(case: str, ours: Tensor, theirs: Tensor, tied: Tensor, arrays: Arrays) -> Agreement:
    top1 = stats.accuracy(ours.cpu() == arrays.test_labels).value
    return Agreement(case, len(ours), int((ours != theirs).sum()), int(tied.sum()), top1)
