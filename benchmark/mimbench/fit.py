"""The training loop that pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mimbench import checkpoint, config, distributed, machine, record, seeds
from mimbench.data import Batch, InMemory, Split
from mimbench.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MimbenchError,
    NonFiniteLoss,
    OutOfMemory,
    ResultsError,
    ran_out_of_memory,
)
from mimbench.optim import learning_rate, make_optimizer, scaled, set_learning_rates
from mimbench.progress import Progress, quiet

FORMAT = 1  # of saved training state; raised when its meaning changes
POINTS = 300  # most points of a curve
CHECK_EVERY = 50  # steps after which losses are fetched from the device
TRIAL = 4  # steps of a timed trial, of which the first is dropped
WORTH = 1.15  # how much faster bf16 must be to be chosen: a trial on a busy machine is that unsure
LONG = 500  # steps below which compiling is not tried
COMPILE_PAYS = {
    "cpu": 600.0,
    "cuda": 60.0,
}  # seconds of training left from which compiling can pay for itself


@dataclass(frozen=True)
class Recipe:
    """How something is trained. A method's ``Config.recipe`` gives the paper's values."""

    epochs: float = 100  # passes over the training split
    budget: str | None = None  # trains for "90s", "2m", "1.5h" or "200000img" (images seen) instead of epochs
    batch_size: int = 256  # images per optimizer step, over all accumulated parts
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    base_lr: float = 1e-3  # learning rate at a batch of lr_batch images
    lr_batch: int = 256  # lr = base_lr * batch_size / lr_batch; 0: lr = base_lr
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    momentum: float = 0.9  # SGD, LARS
    weight_decay: float = 0.05  # decoupled for AdamW, L2 for SGD and LARS
    decay_vectors: bool = False  # whether biases and norm weights decay too
    layer_decay: float = 1.0  # factor on the lr per layer below the top (needs layer_of)
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    cosine_share: float = 1.0  # how much of the cosine's fall training covers; below 1 it stops early
    stages: int = 1  # how often the schedule starts again, warm-up included; each takes epochs / stages
    schedule_unit: Literal["step", "epoch"] = "step"  # how often the lr changes after warm-up
    warmup_epochs: float = 0  # linear rise to the peak
    warmup_lr: float = 0.0  # base lr that the rise starts from, scaled like base_lr
    min_lr: float = 0.0  # base lr that the cosine ends at, scaled like base_lr
    milestones: tuple[float, ...] = ()  # multistep: epochs at which the lr is multiplied by gamma
    gamma: float = 0.1  # multistep
    clip_norm: float | None = None  # largest global gradient norm
    accumulate: int | Literal["auto"] = (
        1  # parts that a batch is split into, to save memory; auto: as few as fit
    )
    ema: float | None = None  # decay of an average of the weights, which then replaces them at the end
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # bf16 is autocast; auto: the faster in a trial
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: where a trial says that it pays
    checkpoint_minutes: float = 5.0  # how often training state is saved

    def __post_init__(self) -> None:
        config.check(
            self,
            "recipe",
            positive=(
                *("batch_size", "clip_norm", "layer_decay", "stages"),
                *(() if self.accumulate == "auto" else ("accumulate",)),
            ),
            not_negative=(
                *("epochs", "base_lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "momentum"),
                *("lr_batch", "milestones", "gamma", "checkpoint_minutes"),
            ),
            share=("ema", "cosine_share"),
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"recipe.betas = {list(self.betas)} should lie in [0, 1)")
        if self.budget is not None:
            parse_budget(self.budget)


def parse_budget(text: str) -> tuple[float, Literal["seconds", "images"]]:
    """What a budget such as "90s", "2m", "1.5h" or "200000img" allows. Raises ConfigError for other texts."""
    units = {"s": 1, "m": 60, "h": 3600}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|img)", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(
            f"the budget '{text}' is neither a time nor a number of images",
            "Write 90s, 2m, 1.5h or 200000img",
        )
    amount = float(found[1])
    return (amount, "images") if found[2] == "img" else (amount * units[found[2]], "seconds")


class Trainable(Protocol):
    """What ``fit`` trains, an ``nn.Module``: a method's model, or a backbone with a head.

    All that changes while it trains must be in its ``state_dict``, or an interrupted run would not go on
    as it was. It may also have

    - ``frame_gap``: least and most distance of ``Batch.frames``, in frames;
    - ``parameter_groups(recipe)`` and ``layer_of(name)``: see ``mimbench.optim.parameter_groups``;
    - ``before_step(progress)`` and ``after_step(progress)``: called without gradient around every optimizer
      step, with the share of training done before it, as in ``Batch.progress``. A new stage begins in the
      former; averaged teachers move in the latter.
    """

    needs: tuple[str, ...]  # of "labels", "masks", "frames": what views() reads beside the images

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Augmented inputs and every random tensor, as keyword arguments of the forward.

        With ``recipe.accumulate`` > 1 each tensor is cut along its first dimension, one entry per image.
        """
        ...

    def __call__(self, **views: Tensor) -> Mapping[str, Tensor]:
        """At least ``loss``, a mean over images; other scalars are logged.

        Where several processes train, each calls it with its own images of a batch. BatchNorm and ``vq.Quantiser``
        see those of all; what else is computed over images goes through ``mimbench.distributed``.
        """
        ...


@dataclass
class History:
    """What a training run leaves besides the weights."""

    # each entry is a mean over the steps since the one before: loss and logged scalars, with the step, epoch,
    # images and lr at its end
    curve: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    images: int = 0  # images seen
    seconds: float = 0.0  # wall time of training, over all resumed parts
    device_seconds: float = 0.0  # the same summed over GPUs; without one, processor time summed over cores
    resumed: int = 0  # how many times training went on from a checkpoint
    precision: str = ""  # what it ran in, fp32 or bf16
    compiled: bool = False
    parts: int = 0  # that "auto" split a batch into; 0 where it did not
    planned: int = 0  # steps that the recipe or its budget came to; 0 until that is settled
    peak_memory: int = 0  # bytes on the GPU, or of the process
    warnings: list[str] = field(default_factory=list)

    def include(self, earlier: History, what: str) -> History:
        """This history with the cost of an earlier training that it builds on, such as a tokenizer's."""
        note = f"{earlier.images} images and {earlier.seconds:.0f} s of this went into {what}"
        return dataclasses.replace(
            self,
            images=earlier.images + self.images,
            seconds=earlier.seconds + self.seconds,
            device_seconds=earlier.device_seconds + self.device_seconds,
            resumed=earlier.resumed + self.resumed,
            peak_memory=max(earlier.peak_memory, self.peak_memory),
            warnings=[*earlier.warnings, note, *self.warnings],
        )


def fit(
    model: Any,
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    folder: Path | None = None,
    name: str = "pretraining",
) -> History:
    """Trains ``model`` (see ``Trainable``) in place and leaves it on ``device``, in eval mode.

    With a ``folder`` the training state is saved there every ``recipe.checkpoint_minutes``, when the user
    interrupts, and at the end as ``model.safetensors`` and ``history.json``. The same call goes on where an
    earlier one stopped, with the result that an uninterrupted run gives (bit for bit on a CPU), and
    returns at once where an earlier one finished.

    The last images of an epoch that do not fill a batch are left out; images are in another order in each
    epoch. A batch larger than the split is cut to it, and the learning rate with it.

    Within ``mimbench.distributed.together`` all processes make this call with the same arguments and share every
    batch; the first of them alone reads and writes the folder. Their number may change when training goes on.

    Raises NonFiniteLoss at the first loss or weight that is not a number, CheckpointError when the folder
    holds another run or a damaged one, ResultsError when it cannot be written.
    """
    machine.keep_pages()
    return _Training(model, split, recipe, seed, device, progress, folder, name).run()


class _Training:
    """One run of ``fit``."""

    def __init__(
        self,
        model: Any,
        split: Split,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        progress: Progress,
        folder: Path | None,
        name: str,
    ) -> None:
        if not len(split):
            raise DataError(f"'{split.dataset}' has no image in its part '{split.part}'")
        self.history = History()
        settings = config.to_dict(recipe)
        del settings["checkpoint_minutes"]  # changes nothing in the weights
        self.identity = {"format": FORMAT, "recipe": settings, "seed": seed, "data": split.fingerprint}
        if len(split) < recipe.batch_size:
            self.history.warnings.append(
                f"a batch of {recipe.batch_size} was cut to the {len(split)} images there are"
            )
            recipe = dataclasses.replace(recipe, batch_size=len(split))
        if recipe.budget is None and 0 < recipe.epochs <= recipe.warmup_epochs:
            self.history.warnings.append(
                f"the warm-up of {recipe.warmup_epochs:g} epochs covers all of training ({recipe.epochs:g})"
            )
        self.model: nn.Module = model.to(device)
        self.split = _resident(split, device)
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.progress = progress
        self.folder = folder
        self.name = name
        self.steps_per_epoch = len(split) // recipe.batch_size
        # This process's rows of each part of a batch; all of them where there is one process.
        if recipe.accumulate == "auto" and distributed.size() > 1:
            raise ConfigError(
                "recipe.accumulate = 'auto' is for one process", "Set a number, such as recipe.accumulate=2"
            )
        parts = 1 if recipe.accumulate == "auto" else recipe.accumulate
        self.shares = distributed.own_rows(recipe.batch_size, parts)
        self.rows = torch.tensor([row for rows in self.shares for row in rows])
        self.apart = False  # whether only these rows are read and augmented, not the whole batch
        self.total = 0
        self.forward: Callable[..., Mapping[str, Tensor]] = model
        self.average = _copy(model) if recipe.ema is not None else {}
        self.step = 0
        self.window: dict[str, tuple[float, int]] = {}  # sum and count of each scalar since the last point
        self.pending: list[dict[str, Tensor]] = []  # scalars of the latest steps, still on the device
        self.saved: Path | None = None

    def _make_optimizer(self) -> None:
        """Not at once: torch takes a second to import what an optimizer needs, and one that has finished needs none."""
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(self) -> History:
        if distributed.share(self.folder is not None and (self.folder / "history.json").exists()):
            assert self.folder is not None
            return self._finished(self.folder)
        self._make_optimizer()
        self._begin()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.train()
        with _forked_rng(self.device), _deferred_interrupt() as interrupted, _over_all_processes(self.model):
            self._try_apart()
            if not self.history.planned:
                self._plan()
            self._follow_plan()
            self.before, self.before_devices = self.history.seconds, self.history.device_seconds
            self.began = self.last_save = time.perf_counter()
            self.began_working = self._working()
            steps = self.progress.track(self._batches(), self.name, total=self.total, start=self.step)
            with contextlib.closing(steps):
                for batch in steps:
                    self._train(batch)
                    due = time.perf_counter() - self.last_save >= self.recipe.checkpoint_minutes * 60
                    stop, due = distributed.any_of([interrupted(), due and distributed.first()])
                    if stop or due:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
        self._finish()
        return self.history

    def _plan(self) -> None:
        """Settles what the recipe leaves open by steps of a copy, which are timed and thrown away."""
        recipe, history = self.recipe, self.history
        size, per_epoch = recipe.batch_size, self.steps_per_epoch
        on_gpu = self.device.type == "cuda"
        history.precision, history.compiled = recipe.precision, recipe.compile is True
        if not recipe.epochs:  # what is not trained needs no budget either
            history.precision = "fp32" if recipe.precision == "auto" else recipe.precision
            return
        amount, unit = parse_budget(recipe.budget) if recipe.budget else (recipe.epochs * per_epoch, "steps")
        steps = max(1, round(amount / size if unit == "images" else amount))
        taken: float | None = None  # seconds of a step
        if recipe.precision == "auto" and on_gpu:
            history.precision = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        elif recipe.precision == "auto":
            fp32, bf16 = (self._trial(name, False) for name in ("fp32", "bf16"))
            history.precision, taken = ("bf16", bf16) if bf16 * WORTH < fp32 else ("fp32", fp32)
        if unit == "seconds" or (recipe.compile == "auto" and steps >= LONG):
            taken = taken or self._trial(history.precision, history.compiled)
            remaining = amount if unit == "seconds" else steps * taken
            if recipe.compile == "auto" and remaining > COMPILE_PAYS[self.device.type]:
                try:
                    compiled = self._trial(history.precision, True)
                except Exception as fault:  # the compiler is not there, or cannot take this model
                    reason = str(fault).strip().partition("\n")[0] or type(fault).__name__
                    history.warnings.append(f"not compiled: {reason}")
                else:
                    history.compiled = compiled < taken
                    taken = min(taken, compiled)
            if unit == "seconds":
                steps = max(1, int(amount / taken))
        history.planned = steps

    def _trial(self, precision: str, compiled: bool) -> float:
        """Seconds of a training step, by a copy of the model that takes a few."""
        recipe = dataclasses.replace(self.recipe, compile=compiled, budget=None)
        twin = _Training(
            *(copy.deepcopy(self.model), self.split, recipe, self.seed, self.device, quiet(), None, self.name)
        )
        twin.history.precision, twin.history.compiled, twin.history.planned = precision, compiled, TRIAL
        twin.apart = self.apart
        twin._make_optimizer()
        twin._follow_plan()
        taken = []
        for step in range(TRIAL):
            batch = twin._read(step)
            taken.append(machine.seconds(functools.partial(twin._optimise, batch), self.device))
        return distributed.share(min(taken[1:]))  # all processes must draw the same conclusion

    def _follow_plan(self) -> None:
        """Adopts what was settled. A budget shortens or stretches the schedule, warm-up and milestones with it."""
        recipe, history = self.recipe, self.history
        self.total = history.planned
        changes: dict[str, Any] = {"precision": history.precision}
        if recipe.budget and recipe.epochs:
            epochs = self.total / self.steps_per_epoch
            stretch = epochs / recipe.epochs
            changes |= {
                "epochs": epochs,
                "warmup_epochs": recipe.warmup_epochs * stretch,
                "milestones": tuple(milestone * stretch for milestone in recipe.milestones),
            }
        self.recipe = dataclasses.replace(recipe, **changes)
        if history.compiled:
            from mimbench.compiling import compiled

            self.forward = compiled(self.model, self.device)

    def _batches(self) -> Iterator[Batch]:
        """The batches of all steps to come; the next is read while one is trained on."""
        first, last = self.step, self.total
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            ahead = reader.submit(self._read, first) if first < last else None
            for step in range(first, last):
                assert ahead is not None
                try:
                    batch = ahead.result()
                except Exception:  # the data have gone; what was learned from them is kept
                    self._keep()
                    raise
                ahead = reader.submit(self._read, step + 1) if step + 1 < last else None
                yield batch

    def _read(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        positions = _permutation(len(self.split), self.seed, epoch)[place * size : (place + 1) * size]
        with self._for_own_rows():
            batch = self.split.batch(
                positions[self.rows] if self.apart else positions,
                self.device,
                self.model.needs,  # type: ignore[arg-type]
                getattr(self.model, "frame_gap", (1, 1)),
                seeds.generator("cpu", self.seed, "frames", step),
            )
        batch.progress = step / self.total if self.total else 0.0
        return batch

    def _for_own_rows(self) -> contextlib.AbstractContextManager[object]:
        """Where this process's rows are alone, they get the random numbers that they have in the whole batch."""
        if not self.apart:
            return contextlib.nullcontext()
        return distributed.DrawnForAll(self.rows, self.recipe.batch_size)

    def _views(self, batch: Batch) -> dict[str, Tensor]:
        """The views of this process's rows."""
        count = len(batch)
        generator = seeds.generator(self.device, self.seed, "views", self.step)
        with torch.no_grad(), self._for_own_rows():
            views: dict[str, Tensor] = self.model.views(batch, generator)  # type: ignore[operator]
        if len(self.rows) == count and len(self.shares) == 1:
            return views
        for key, value in views.items():
            if value.ndim and len(value) != count:
                parts = len(self.shares) > 1
                raise ConfigError(
                    f"{'recipe.accumulate' if parts else 'training by several processes'} needs one entry per "
                    f"image in every view, but '{key}' has {len(value)} for {count} images",
                    "Set recipe.accumulate to 1" if parts else "Train in one process",
                )
        if len(self.rows) == count:
            return views
        return {key: v[self.rows.to(v.device)] if v.ndim else v for key, v in views.items()}

    def _try_apart(self) -> None:
        """Settles whether each process may read and augment its own rows of a batch alone, which saves time.

        It may where this gives the same views as the whole batch does: not where images see each other, or where
        random numbers are drawn until something holds for all of them. Tried at the first step.
        """
        if distributed.size() == 1 or not self.recipe.epochs:
            return
        found = []
        for self.apart in (True, False):
            found.append(self._views(self._read(self.step)))
        self.apart = not distributed.any_of([not _same(*found)])[0]

    def _train(self, batch: Batch) -> None:
        """One optimizer step, logged."""
        scalars, lr = self._optimise(batch)
        self._log(scalars, lr)

    def _optimise(self, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """One optimizer step. Returns what it logs, on the device, and its learning rate."""
        recipe, model = self.recipe, self.model
        with torch.no_grad():
            if before_step := getattr(model, "before_step", None):
                seeds.seed_everything(self.seed, "stage", self.step)
                before_step(batch.progress)
        views = self._views(batch)
        buffers = [buffer.clone() for buffer in model.buffers()]
        while (scalars := self._gradients(views)) is None:  # memory did not suffice
            self._forget_gradients()
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._split_more(views)
        distributed.add_gradients(self.trained)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm)
        lr = learning_rate(self.step, self.steps_per_epoch, recipe)
        set_learning_rates(self.optimizer, lr, scaled(recipe.base_lr, recipe))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if after_step := getattr(model, "after_step", None):
                after_step(batch.progress)
            if recipe.ema is not None:
                _move(self.average, model, recipe.ema)
        self.step += 1
        return scalars, lr

    def _gradients(self, views: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Adds up the gradients of all parts of a batch. Returns what is logged, or None where memory ran out."""
        other = [distributed.rank()] if distributed.rank() else []  # so that no two processes drop the same
        seeds.seed_everything(self.seed, "model", self.step, *other)
        scalars: dict[str, Tensor] = {}
        try:
            for part, share in _parts(views, [len(rows) for rows in self.shares], self.recipe.batch_size):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
                ):
                    outputs = self.forward(**part)
                (outputs["loss"] * share).backward()
                for key, value in outputs.items():
                    if value.ndim == 0 and value.is_floating_point():
                        value = value.detach().to(self.device, torch.float32) * share
                        scalars[key] = scalars[key] + value if key in scalars else value
        except (RuntimeError, MemoryError) as fault:
            if not ran_out_of_memory(fault):
                raise
            return None
        return scalars

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _split_more(self, views: dict[str, Tensor]) -> None:
        """Splits batches into twice as many parts, if that was asked for; else raises OutOfMemory.

        The message then says what fits, by trial.
        """
        asked, size = len(self.shares), self.recipe.batch_size
        problem = (
            f"memory ran out in step {self.step + 1} of {self.name}, with {_images(size, asked)} at once"
        )
        if distributed.size() > 1:
            raise OutOfMemory(problem, "Use more processes or a larger recipe.accumulate")
        if any(value.ndim and len(value) != size for value in views.values()):
            raise OutOfMemory(
                problem, "Take a smaller recipe.batch_size: these views cannot be cut into parts"
            )
        if self.recipe.accumulate == "auto" and self._set_parts(2 * asked):
            note = f"of {size} images of a batch no more than {_images(size, 2 * asked)} fitted into memory at once"
            warnings = self.history.warnings
            warnings[:] = [text for text in warnings if not text.endswith("fitted into memory at once")]
            warnings.append(note)
            self.history.parts = 2 * asked
            self.progress.say(f"{note}: going on with {2 * asked} parts")
            return
        if not hasattr(self.model, "before_step"):  # which has been called for this step
            self._keep()
        fits = False
        while not fits and self.recipe.accumulate != "auto" and self._set_parts(2 * len(self.shares)):
            fits = self._gradients(views) is not None
            self._forget_gradients()
        parts = len(self.shares)
        if not fits:
            raise OutOfMemory(
                problem, f"Not even {_images(size, parts)} fit: take a smaller model or smaller images"
            )
        raise OutOfMemory(
            problem,
            f"{_images(size, parts)} fit: set accumulate to {parts} in its recipe, with --set recipe.accumulate="
            f"{parts} for a method, or to auto, which finds that out",
        )

    def _set_parts(self, parts: int) -> bool:
        """Splits batches into so many parts from now on; False where these have less than two images."""
        if self.recipe.batch_size < 2 * parts:
            return False
        self.shares = distributed.own_rows(self.recipe.batch_size, parts)
        return True

    def _log(self, scalars: dict[str, Tensor], lr: float) -> None:
        self.pending.append(scalars)
        every = math.ceil(self.total / POINTS)
        at_point = self.step % every == 0 or self.step == self.total
        if at_point or len(self.pending) == CHECK_EVERY:
            self._fetch()
        if at_point:
            means = {key: total / count for key, (total, count) in self.window.items()}
            self.window = {}
            self.history.curve.append(
                means
                | {
                    "step": self.step,
                    "epoch": self.step / self.steps_per_epoch,
                    "images": self.step * self.recipe.batch_size,
                    "lr": lr,
                }
            )
            self.progress.note(f"loss {means['loss']:.4f}")

    def _fetch(self) -> None:
        """Brings the pending scalars to the host in one transfer and stops at the first bad loss."""
        if not self.pending:
            return
        shares = torch.stack([value for scalars in self.pending for value in scalars.values()])
        flat = iter(distributed.batch_sum(shares).tolist())
        first = self.step - len(self.pending)
        for step, scalars in enumerate(self.pending, first + 1):
            for key in scalars:
                value = next(flat)
                if math.isfinite(value):
                    total, count = self.window.get(key, (0.0, 0))
                    self.window[key] = (total + value, count + 1)
                elif key == "loss":
                    raise self._not_finite(f"the loss of {self.name} became {value} at step {step}")
        self.pending = []

    def _not_finite(self, problem: str) -> NonFiniteLoss:
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint had been saved"
        remedies = ["a lower recipe.base_lr"]
        if self.recipe.clip_norm is None:
            remedies.append("recipe.clip_norm=1")
        if self.recipe.precision != "fp32":
            remedies.append("recipe.precision=fp32")
        return NonFiniteLoss(f"{problem} of {self.total}; {kept}", f"Try {' or '.join(remedies)}")

    def _settle(self) -> None:
        """Makes sure that losses and weights are finite and brings the history up to date."""
        self._fetch()
        bad = [name for name, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise self._not_finite(
                f"weights of {self.name} ({bad[0]}) were not finite after step {self.step}"
            )
        self.history.steps = self.step
        self.history.images = self.step * self.recipe.batch_size
        self.history.seconds = self.before + time.perf_counter() - self.began
        worked = self._working() - self.began_working
        self.history.device_seconds = self.before_devices + worked * distributed.size()
        self.history.peak_memory = max(self.history.peak_memory, _peak_memory(self.device))

    def _working(self) -> float:
        """The clock by which training costs: beside other processes, one that waits for a core costs nothing."""
        return time.perf_counter() if self.device.type == "cuda" else time.process_time()

    def _save(self) -> None:
        """Saves the training state, if there is a folder for it."""
        if self.folder is None:
            return
        self._settle()
        self.last_save = time.perf_counter()
        if not distributed.first():
            return
        optimizer = checkpoint.optimizer_tensors(self.model, self.optimizer)
        trainer = {f"optimizer/{key}": v for key, v in optimizer.items()}
        trainer |= {f"average/{key}": v for key, v in self.average.items()}
        state = checkpoint.State(
            self.step,
            self.model.state_dict(),
            trainer,
            {
                "identity": self.identity,
                "history": dataclasses.asdict(self.history),
                "window": self.window,
            },
        )
        self.saved = checkpoint.write_state(self.folder, state)
        self.last_save = time.perf_counter()

    def _keep(self) -> None:
        """Saves the training state before a fault ends training between two steps."""
        if self.step and distributed.size() == 1:
            with contextlib.suppress(MimbenchError):  # the fault says more
                self._save()

    def _begin(self) -> None:
        """Goes back to the newest training state in the folder, if there is one; in all processes, to the same."""
        found = self._newest(self.folder) if self.folder and distributed.first() else None
        name = distributed.share(found[0].name if found else "")
        if not name:
            if distributed.size() > 1:  # should their machines have drawn other weights
                self.model.load_state_dict(distributed.share_tensors(self.model.state_dict()))
            return
        assert self.folder is not None
        state = found[1] if found else checkpoint.State(0, {}, {}, {})
        state = checkpoint.State(
            distributed.share(state.step),
            distributed.share_tensors(state.weights),
            distributed.share_tensors(state.trainer),
            distributed.share(state.progress),
        )
        self._restore(self.folder / name, state)

    def _newest(self, folder: Path) -> tuple[Path, checkpoint.State] | None:
        """The newest training state in a folder that can be read, and its place."""
        for place in checkpoint.places(folder):
            try:
                state = checkpoint.read_state(place)
            except CheckpointError as fault:
                if place == checkpoint.places(folder)[-1]:
                    raise
                self.history.warnings.append(f"{fault} Went on from the checkpoint before it.")
                shutil.rmtree(place)
                continue
            self._same_run(state.progress.get("identity"), place)
            return place, state
        return None

    def _restore(self, place: Path, state: checkpoint.State) -> None:
        warnings = self.history.warnings
        self.history = _read_history(state.progress, place)
        self.history.warnings += [text for text in warnings if text not in self.history.warnings]
        self.history.resumed += 1
        self.window = _read_window(state.progress, place)
        self.step = state.step
        self.saved = place
        if self.history.parts and self.recipe.accumulate == "auto":
            self._set_parts(self.history.parts)
        checkpoint.load_strictly(self.model, state.weights, place / "model.safetensors")
        file = place / "trainer.safetensors"
        groups: dict[str, dict[str, Tensor]] = {"optimizer": {}, "average": {}}
        for key, value in state.trainer.items():
            kind, _, rest = key.partition("/")
            if kind not in groups:
                raise CheckpointError(f"{file} does not fit the model: it has {key}")
            groups[kind][rest] = value
        checkpoint.restore_optimizer(self.model, self.optimizer, groups["optimizer"], file)
        if groups["average"].keys() != self.average.keys():
            raise CheckpointError(f"{file} does not fit the model: it averages other weights")
        for key, value in groups["average"].items():
            if value.shape != self.average[key].shape:
                raise CheckpointError(f"{file} does not fit the model: it averages another {key}")
            self.average[key].copy_(value)

    def _finish(self) -> None:
        """Swaps the averaged weights in and leaves ``model.safetensors`` and ``history.json``."""
        self._settle()
        self.history = History(**distributed.share(dataclasses.asdict(self.history)))  # times differ
        if self.average and self.step:
            self.model.load_state_dict(self.model.state_dict() | self.average)
        self.model.eval()
        if self.folder is None or not distributed.first():
            return
        checkpoint.save_tensors(self.folder / "model.safetensors", self.model.state_dict())
        # history.json comes last: a folder that has it is complete
        content = {"identity": self.identity, "history": dataclasses.asdict(self.history)}
        checkpoint.save_json(self.folder / "history.json", content)
        checkpoint.remove_states(self.folder)

    def _finished(self, folder: Path) -> History:
        content: dict[str, Any] = {}
        weights: dict[str, Tensor] = {}
        file = folder / "model.safetensors"
        if distributed.first():
            content = checkpoint.load_json(folder / "history.json")
            _read_history(content, folder)
            self._same_run(content.get("identity"), folder)
            weights = checkpoint.load_tensors(file)
            checkpoint.remove_states(folder)  # left when the run was killed at its very end
        content = distributed.share(content)
        checkpoint.load_strictly(self.model, distributed.share_tensors(weights), file)
        self.model.eval()
        return _read_history(content, folder)

    def _same_run(self, theirs: Any, place: Path) -> None:
        if theirs == self.identity:
            return
        was, now = _flat(theirs if isinstance(theirs, dict) else {}), _flat(self.identity)
        changed = [
            f"{key} was {was.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        raise CheckpointError(
            f"{place} holds another run: {'; '.join(changed)}", "Use another folder or delete this one"
        )


def _read_history(content: Any, place: Path) -> History:
    """The history in the JSON beside a training state. Raises CheckpointError for a damaged one."""
    try:
        found: History = record.parse(
            dataclasses.asdict(History()) | content["history"], History, "its history"
        )
    except (KeyError, TypeError, ResultsError) as fault:
        raise CheckpointError(f"{place} is damaged: {fault}", "Delete it to begin anew") from None
    return found


def _read_window(content: dict[str, Any], place: Path) -> dict[str, tuple[float, int]]:
    """Sums and counts since the last point of the curve. Raises CheckpointError for damaged ones."""
    try:
        window = {str(key): (float(total), int(count)) for key, (total, count) in content["window"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise CheckpointError(f"{place} is damaged: {fault!r}", "Delete it to begin anew") from None
    return window


def _resident(split: Split, device: torch.device) -> Split:
    """The split with its images on the GPU, where they take less than a quarter of the free memory."""
    if device.type != "cuda" or not isinstance(split.store, InMemory):
        return split
    if split.store.images.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return split
    return dataclasses.replace(split, store=InMemory(split.store.images.to(device)))


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeds.generator("cpu", seed, "order", epoch))


def _parts(
    views: dict[str, Tensor], lengths: list[int], count: int
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Views in parts of so many images, each with its share of the ``count`` images of the batch."""
    if len(lengths) == 1:
        yield views, lengths[0] / count
        return
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        yield {key: v[rows] if v.ndim else v for key, v in views.items()}, length / count
        begin += length


def _images(size: int, parts: int) -> str:
    """The images of the largest part of a batch, in words."""
    return f"{math.ceil(size / parts)} images"


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two sets of views agree: floats but for rounding, all else exactly."""

    def agree(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    return ours.keys() == theirs.keys() and all(agree(ours[key], theirs[key]) for key in ours)


def _over_all_processes(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    if distributed.size() == 1:
        return contextlib.nullcontext()
    from mimbench.batchwide import over_all_processes  # which knows networks that are trained by this loop

    return over_all_processes(model)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is averaged: parameters and floating-point buffers such as BatchNorm statistics."""
    return {key: v.detach().clone() for key, v in model.state_dict().items() if v.is_floating_point()}


def _move(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model."""
    state = model.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[key] for key in average], 1 - decay)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{key}.{name}" if name else key: item
        for key, value in tables.items()
        for name, item in (value.items() if isinstance(value, dict) else [("", value)])
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or the process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Gives the caller's random state back at the end."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back until the step is done, as a step cut short cannot be resumed; not a second one."""
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual:
            signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread, which no Ctrl-C reaches
        usual = False
    try:
        yield lambda: asked
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
