"""Class labels of any kind as numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimbench.data.split import Split
from mimbench.errors import DataError

TEST_SHARE = 0.2  # of data that come without a test part


def encode(
    parts: Sequence[Sequence[Any]], names: tuple[str, ...], where: str
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Labels of several parts as int64 tensors over one list of classes.

    Strings, and integers without ``names``, are numbered in sorted order over all parts, so a class may be
    missing from any of them. Integers with ``names`` must lie within these.
    """
    distinct = {value for part in parts for value in part}
    if all(isinstance(value, int) for value in distinct):
        bad = {value for value in distinct if value < 0 or (names and value >= len(names))}
        if bad:
            count = sum(value in bad for part in parts for value in part)
            expected = f"0 to {len(names) - 1} are" if names else "0 and up is"
            raise DataError(
                f"{count} label(s) of {where} are out of range, such as {min(bad)} where {expected} expected",
                "Repair them, or leave the label column out to use the images without labels",
            )
        if names:
            return [torch.tensor(part, dtype=torch.int64) for part in parts], names
    classes = sorted(distinct)
    place = {value: number for number, value in enumerate(classes)}
    tensors = [torch.tensor([place[value] for value in part], dtype=torch.int64) for part in parts]
    return tensors, tuple(map(str, classes))


def stable_split(keys: Sequence[bytes], labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions (train, test) of a division that depends on each image's key and class alone.

    In each class the fifth of the images whose keys hash lowest is for testing, so new images move few others.
    """
    rank = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row]).digest())
    groups: dict[int, list[int]] = {}
    for row in rank:
        groups.setdefault(int(labels[row]) if labels is not None else 0, []).append(row)
    test = {row for group in groups.values() for row in group[: round(len(group) * TEST_SHARE)]}
    chosen = torch.tensor([row in test for row in range(len(keys))], dtype=torch.bool)
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def divide(whole: Split, keys: Sequence[bytes]) -> dict[str, Split]:
    """Training and test parts of data that come as one."""
    train, test = stable_split(keys, whole.all_labels)
    if not len(train) or not len(test):
        raise DataError(
            f"'{whole.dataset}' has {len(whole)} image(s), too few to set some of each class aside for testing",
            "Give more images, or a test part of their own",
        )
    return {"train": whole.subset(train, "train"), "test": whole.subset(test, "test")}
