"""The contract between the harness and a protocol.

A protocol is a file in ``protocols/`` with::

    VERSION = 1                      # raised whenever its numbers may change
    NEEDS = ("labels",)              # what the data must offer: labels, masks, points, frames, or
                                     # one of several, as in "masks or points"
    RECIPES = {"cached": {...}, ...} # named settings; the first is the default

    @dataclass(frozen=True)
    class Settings: ...              # everything that can move the score

    def idle(settings) -> names      # optional: the settings without effect beside the others

    def evaluate(encoder, task, settings, context) -> Result

Test labels are sealed until the protocol calls ``task.unseal()``, which also takes the training split
away: after it nothing can be chosen any more. A recipe that takes the best of several scores on the test split,
as some authors do, says of how many, ``task.unseal(looks=4)``, and writes ``"chosen_on": "test"`` into its
details, by which its rows are marked. What label propagation is given, the masks or
points of first frames, comes from ``task.clips()``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimbench.errors import LabelLeak

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from mimbench.data import Split
    from mimbench.progress import Progress


@dataclass(frozen=True)
class Metric:
    """A number with its uncertainty: a 95 % interval over the ``n`` test items."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = "%"


@dataclass
class Result:
    """What a protocol found."""

    metrics: dict[str, Metric]
    primary: str  # the metric that ranks
    details: dict[str, Any] = field(default_factory=dict)  # JSON: choices made, per class, certificates
    correct: np.ndarray | None = None  # (N,) bool, per test item, where the metric is an accuracy
    warnings: list[str] = field(default_factory=list)


class Task:
    """Training data to choose and fit on, test images to predict, and test labels under seal."""

    def __init__(self, train: Split, test: Split) -> None:
        self._train: Split | None = train
        self._test = test
        self._clips_given = False
        self.reads = 0  # of the test labels, so far
        self.test = test.without_labels()
        self.name = test.dataset
        self.classes = test.classes
        self.num_classes = len(test.classes)

    @property
    def train(self) -> Split:
        """The training split, until the test labels are opened."""
        if self._train is None:
            raise LabelLeak("the training split was asked for after the test labels had been opened")
        return self._train

    def clips(self, length: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """The test split as clips of ``length`` frames, or whole sequences, for label propagation.

        Each is its positions in ``test`` in order of time, and of its first frame the points (J, 2) where the
        data have some, else the mask (H, W). All other labels stay sealed; so this is allowed once, as another
        length would show other frames.
        """
        if self._clips_given or (length is not None and length < 2):
            raise LabelLeak("labels of more than the first frame of each clip were asked for")
        self._clips_given = True
        labels = self._test.masks if self._test.all_points is None else self._test.points
        return [(clip, labels(clip[:1])[0]) for clip in self._test.clips(length)]

    def unseal(self, looks: int = 1) -> Split:
        """The test split with its labels. Allowed once, when everything has been chosen and fitted.

        ``looks`` is the number of predictions that the labels are held against: more than one where they choose.
        """
        if self._train is None:
            raise LabelLeak("the test labels were opened twice")
        self._train = None
        self.reads += looks
        return self._test


@dataclass
class Context:
    """Where and how a protocol runs."""

    device: torch.device
    seed: int
    progress: Progress
    workdir: Path  # this run's own folder, for checkpoints of what the protocol trains
    cache: Path | None = None  # features of this encoder are kept here; None keeps nothing
    pretrain_step: Callable[[int], Callable[[], Tensor]] | None = None  # batch size -> one training step
    seconds: dict[str, float] = field(default_factory=dict)  # wall time per stage

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the device is waited for, so the time is the device's too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                import torch

                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
