"""Features computed elsewhere: stored references are met, and what cannot be scored is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mimbench.errors import ConfigError, DataError, UnknownName
from mimbench.score import Agreement, read, score

QUICK = ["linear.c_steps=3"]


def arrays_of(train: int = 300, test: int = 90, classes: int = 3, dtype: str = "float32") -> dict[str, Any]:
    draw = np.random.default_rng(0)
    labels = [draw.integers(0, classes, count) for count in (train, test)]
    centres = draw.normal(size=(classes, 8))
    inputs = [(centres[y] + draw.normal(size=(len(y), 8))).astype(dtype) for y in labels]
    return {"train": inputs[0], "train_labels": labels[0], "test": inputs[1], "test_labels": labels[1]}


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "features.npz", **arrays)
    return folder / "features.npz"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_results_are_those_of_scikit_learn(tmp_path: Path, dtype: str) -> None:
    arrays = arrays_of(dtype=dtype)
    results, agreements = score(saved(tmp_path, **arrays), ["knn:sklearn", "linear", "knn"], QUICK)
    x, y, t, truth = (arrays[name].astype("f8") if name[-6:] != "labels" else arrays[name] for name in arrays)
    reference = KNeighborsClassifier(5, algorithm="brute").fit(x, y)
    assert [made.protocol for made in results] == ["knn", "linear", "knn"]
    assert [made.recipe for made in results] == ["sklearn", "cached", "dino"]
    assert results[0].metrics["top1"].value == pytest.approx(100 * reference.score(t, truth))
    scaler = StandardScaler().fit(x)
    C = results[1].details["chosen_C"]
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=500)
    model.fit(scaler.transform(x), y)
    assert results[1].metrics["top1"].value == pytest.approx(
        100 * model.score(scaler.transform(t), truth), abs=1.2
    )
    assert results[1].settings["c_steps"] == 3
    assert not agreements


def test_stored_references_are_compared_at_their_own_settings(tmp_path: Path) -> None:
    arrays = arrays_of()
    x, y, t = (arrays[name] for name in ("train", "train_labels", "test"))
    right = KNeighborsClassifier(20, algorithm="brute", weights="distance").fit(x.astype("f8"), y)
    wrong = right.predict(t.astype("f8"))
    wrong[:4] = (wrong[:4] + 1) % 3
    scaler = StandardScaler().fit(x.astype("f8"))
    z = scaler.transform(x.astype("f8"))
    model = LogisticRegression(C=0.01, solver="newton-cholesky", tol=1e-10).fit(z, y)
    loss = -model.predict_log_proba(z)[np.arange(len(y)), y].mean()
    objective = loss + (model.coef_**2).sum() / (2 * 0.01 * len(y))
    (tmp_path / "expected.json").write_text(json.dumps({"linear": {"C=0.01": {"objective": objective}}}))
    references = {
        "pred/knn_euclid_k20_distance": right.predict(t.astype("f8")),
        "pred/knn_euclid_k20_uniform": wrong,
        "pred/linear_C0.01": model.predict(scaler.transform(t.astype("f8"))),
    }
    file = saved(tmp_path, **arrays, **references)
    _, (knn, bad, linear) = score(file, ["knn", "linear"], QUICK)
    assert knn.passed
    assert (knn.n, knn.different) == (90, 0)
    assert not bad.passed
    assert bad.different >= 3
    assert linear.passed
    assert linear.objective_difference is not None
    assert linear.objective_difference < 1e-8
    assert [made.case for made in score(file, ["knn"])[1]] == [
        "knn_euclid_k20_distance",
        "knn_euclid_k20_uniform",
    ]


def test_an_exact_tie_is_not_a_disagreement(tmp_path: Path) -> None:
    arrays = {
        "train": np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]], "float32"),
        "train_labels": np.array([0, 1, 2]),
        "test": np.array([[0.0, 0.0], [4.0, 5.0]], "float32"),
        "test_labels": np.array([0, 2]),
    }
    file = saved(tmp_path, **arrays, **{"pred/knn_euclid_k2_uniform": np.array([1, 1])})
    _, (made,) = score(file, ["knn"])
    assert (made.different, made.ties) == (2, 1) or (made.different, made.ties) == (1, 1)


def test_a_wrong_objective_fails() -> None:
    assert Agreement("x", 5, 0, 0, 90.0, 1.0, 1.0 + 5e-7).passed
    assert not Agreement("x", 5, 0, 0, 90.0, 1.0, 1.0 + 5e-6).passed
    assert not Agreement("x", 5, 1, 0, 90.0).passed


def test_classes_may_be_missing_from_either_split(tmp_path: Path) -> None:
    arrays = arrays_of()
    arrays["test_labels"] = np.where(arrays["test_labels"] == 1, 6, arrays["test_labels"])
    arrays["train_labels"] = np.where(arrays["train_labels"] == 2, 4, arrays["train_labels"])
    for made in score(saved(tmp_path, **arrays), ["knn", "linear"], QUICK)[0]:
        assert 0 < made.metrics["top1"].value < 60
    one_test_class = {**arrays_of(), "test_labels": np.zeros(90, int)}
    for made in score(saved(tmp_path, **one_test_class), ["knn", "linear"], QUICK)[0]:
        assert made.metrics["top1"].n == 90


def test_a_single_class_and_a_large_k(tmp_path: Path) -> None:
    single = {**arrays_of(train=12), "train_labels": np.ones(12, np.uint8)}
    knn, linear = score(saved(tmp_path, **single), ["knn:lightly", "linear"], QUICK)[0]
    share = 100 * float((single["test_labels"] == 1).mean())
    assert knn.metrics["top1"].value == linear.metrics["top1"].value == pytest.approx(share)
    assert any("k = 200 is too large for 12" in text for text in knn.warnings)
    assert any("single class" in text for text in linear.warnings)


def broken(**changes: Any) -> dict[str, Any]:
    arrays = {**arrays_of(), **changes}
    return {name: value for name, value in arrays.items() if value is not None}


def holed() -> np.ndarray:
    features = arrays_of()["train"]
    features[3, 2] = np.nan
    features[5, 0] = np.inf
    return features


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(test_labels=None), "lacks test_labels"),
        (broken(train=holed()), "2 of 300 rows of 'train'"),
        (broken(test=np.full((90, 8), 1e300)), "90 of 90 rows of 'test'"),
        (broken(train=np.zeros((300, 2, 4), "f4")), "shape"),
        (broken(train=np.zeros((0, 8), "f4")), "shape"),
        (broken(train=np.zeros((300, 8), int)), "holds int64"),
        (broken(test=np.zeros((90, 7), "f4")), "8 channels and test 7"),
        (broken(train_labels=np.zeros(299, int)), "shape"),
        (broken(train_labels=np.zeros(300)), "holds float64"),
        (broken(test_labels=np.full(90, -1)), "negative"),
        (broken(test_labels=np.full(90, 2**40)), "label 1099511627776"),
        (broken(**{"pred/svm_C1": np.zeros(90, int)}), "names no known setting"),
        (broken(**{"pred/knn_euclid_k400_uniform": np.zeros(90, int)}), "k = 400 needs"),
        (broken(**{"pred/linear_C1": np.zeros(9, int)}), "shape"),
    ],
)
def test_what_cannot_be_scored_says_why(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(saved(tmp_path, **arrays), ["knn", "linear"], QUICK)


def test_files_that_are_no_features(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "features.npz")
    (tmp_path / "text.npz").write_text("hello")
    file = saved(tmp_path, **arrays_of())
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:500])
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", **{**arrays_of(), "train": np.array([{}], dtype=object)})
    for name in ("text.npz", "cut.npz", "single.npy", "objects.npz"):
        with pytest.raises(DataError):
            read(tmp_path / name)


def test_names_and_settings_are_checked_first(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.npz"
    for protocols, overrides, fault in [
        (["kmn"], [], UnknownName),
        (["finetune"], [], ConfigError),
        (["knn:dinosaur"], [], UnknownName),
        (["linear:mae"], [], ConfigError),
        (["knn"], ["knn.kay=3"], UnknownName),
        (["knn"], ["linear.c_steps=3"], ConfigError),
        (["knn"], ["ks=3"], ConfigError),
    ]:
        with pytest.raises(fault):
            score(missing, protocols, overrides)


def test_the_reference_vectors() -> None:
    place = os.environ.get("MIMBENCH_PARITY") or str(Path(__file__).parents[2] / "shared" / "parity")
    file = Path(place) / "protocols" / "features.npz"
    if not file.is_file():
        pytest.skip(
            "no reference vectors: set MIMBENCH_PARITY to the folder that holds protocols/features.npz"
        )
    _, agreements = score(file, ["knn:sklearn", "linear"], ["linear.c_steps=1"])
    assert len(agreements) == 10
    for made in agreements:
        assert made.passed, made
    assert sum(made.objective_difference is not None for made in agreements) == 3
