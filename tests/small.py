"""A little data and short settings, for tests that run whole protocols."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mimbench import config, data, progress, registry
from mimbench.data import Split
from mimbench.task import Context, Result, Task

# Makes a protocol quick without leaving out any of its stages. One that is not named here runs as it is.
SHRINK: dict[str, dict[str, Any]] = {
    "finetune": {"least_steps": 2, "training": {"epochs": 1, "batch_size": 32}},
    "knn": {"ks": [3, 10]},
    "label_propagation": {"size": [16, 16]},
    "linear": {
        "c_steps": 5,
        "c_powers": [-4.0, 2.0],
        "gradient_norm": 1e-3,
        "training": {"epochs": 2, "batch_size": 32, "warmup_epochs": 1},
    },
    "robustness": {
        "corruptions": ["fog", "contrast"],
        "severities": [1, 3],
        "limit": 20,
        "attack_limit": 10,
        "pgd_steps": 2,
        "epsilons": [2.0],
    },
    "throughput": {
        "batch_size": 4,
        "precisions": ["fp32"],
        "compile": False,
        "warmup": 1,
        "repeats": 2,
        "repeat_seconds": 0.0,
        "latency_calls": 2,
    },
    "segmentation": {
        "grid": 4,
        "pixels": 300,
        "bank": 200,
        "neighbours": [1, 5],
        "head_width": 8,
        "learning_rates": [1e-3, 1e-2],
        "training": {"epochs": 1, "warmup_epochs": 0},
    },
}


def some(split: Split, count: int) -> Split:
    """The first of every three images, so that scenes are not all of one sequence."""
    return split.subset(torch.arange(count) * 3)


def parts(protocol: str) -> tuple[Split, Split]:
    """(train, test): a little of the data that the protocol needs."""
    if any("masks" in need for need in registry.protocol(protocol).needs):
        dataset = data.load("digit-scenes")
        return some(dataset.train, 24), some(dataset.test, 8)
    dataset = data.load("digits")
    return some(dataset.train, 150), some(dataset.test, 60)


def evaluate(encoder: Any, protocol: str, recipe: str, task: Task, folder: Path) -> Result:
    """Runs a protocol with short settings."""
    module = registry.load_protocol(protocol)
    known = {field.name for field in dataclasses.fields(module.Settings)}
    table = config.merge(module.RECIPES[recipe], SHRINK.get(protocol, {}))
    assert known.issuperset(table)
    settings = config.build(module.Settings, table | {"recipe": recipe})
    context = Context(torch.device("cpu"), 0, progress.quiet(), workdir=folder)
    return module.evaluate(encoder, task, settings, context)
