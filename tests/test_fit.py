"""The training loop against loops written by hand, and training that is interrupted in every way."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import checkpoint, compiling, seeds
from mimbench import fit as fit_module
from mimbench.data.split import Batch, InMemory, Split
from mimbench.errors import CheckpointError, ConfigError, DataError, NonFiniteLoss, ResultsError
from mimbench.fit import History, Recipe, fit
from mimbench.optim import learning_rate, stage
from mimbench.progress import quiet

CPU = torch.device("cpu")


def toy_split(count: int = 42, fingerprint: str = "toy") -> Split:
    """Random images of 2x2 pixels in three classes, five frames to a scene."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.arange(count)
    return Split(
        dataset="toy",
        part="train",
        store=InMemory(torch.randint(0, 256, (count, 3, 2, 2), generator=draw).to(torch.uint8)),
        classes=("a", "b", "c"),
        fingerprint=fingerprint,
        index=rows,
        all_labels=torch.randint(0, 3, (count,), generator=draw),
        sequence=rows // 5,
        frame=rows % 5,
    )


class Toy(nn.Module):
    """A classifier with every kind of state: weights, BatchNorm, dropout, noise in its views, a teacher."""

    needs = ("labels",)

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3)
            )
        self.register_buffer("teacher", self.net[1].weight.detach().clone())
        self.pause = pause
        self.calls: list[float] = []

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.rand(batch.images.shape, generator=generator)
        return {"x": batch.images / 255 + 0.1 * noise, "y": batch.labels}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {
            "loss": F.cross_entropy(logits, y),
            "accuracy": (logits.argmax(1) == y).float().mean(),
            "logits": logits,
        }

    def after_step(self, progress: float) -> None:
        self.calls.append(progress)
        self.teacher.lerp_(self.net[1].weight, 0.5 * (1 - progress))
        time.sleep(self.pause)


RECIPE = Recipe(
    epochs=4, batch_size=8, base_lr=0.05, lr_batch=8, ema=0.9, compile=False, checkpoint_minutes=0
)


def train(model: nn.Module, recipe: Recipe = RECIPE, folder: Path | None = None, **others) -> History:
    arguments = {"split": toy_split(), "seed": 1, "device": CPU, "progress": quiet()} | others
    return fit(model, recipe=recipe, folder=folder, **arguments)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Regression(nn.Module):
    """Predicts the mean pixel of an image linearly from all of its pixels."""

    needs = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12)[None])
        self.bias = nn.Parameter(torch.tensor([0.5]))
        self.seen: list[Tensor] = []
        self.progress: list[float] = []
        self.history: list[np.ndarray] = []

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        self.seen.append(batch.index)
        self.progress.append(batch.progress)
        return {"x": batch.images.flatten(1) / 255}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        error = F.linear(x, self.weight, self.bias)[:, 0] - x.mean(1)
        return {"loss": error.square().mean(), "bias": self.bias[0] * 1.0}

    def after_step(self, progress: float) -> None:
        self.history.append(torch.cat([self.weight.flatten(), self.bias]).numpy().astype(np.float64))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_linear_regression_follows_a_loop_by_hand(optimizer: str, clip: float | None) -> None:
    recipe = Recipe(
        epochs=3,
        batch_size=10,
        base_lr=0.1,
        lr_batch=20,
        warmup_epochs=1,
        optimizer=optimizer,
        weight_decay=0.1,
        clip_norm=clip,
        ema=0.8,
    )
    model, split = Regression(), toy_split()
    history = train(model, recipe, split=split)

    pixels = split.store.images.flatten(1).double().numpy() / 255
    p = np.append(np.linspace(-1, 1, 12), 0.5)
    average, m, v = p.copy(), np.zeros(13), np.zeros(13)
    decay = np.append(np.full(12, 0.1), 0.0)
    losses = []
    for step in range(12):
        order = torch.randperm(42, generator=seeds.generator("cpu", 1, "order", step // 4)).numpy()
        x = pixels[order[step % 4 * 10 : step % 4 * 10 + 10]]
        x1 = np.hstack([x, np.ones((10, 1))])
        error = x1 @ p - x.mean(1)
        losses.append(np.mean(error**2))
        g = 2 * x1.T @ error / 10
        if clip:
            g = g * min(1, clip / np.linalg.norm(g))
        lr = 0.05 * (step / 4 if step < 4 else (1 + math.cos(math.pi * (step / 4 - 1) / 2)) / 2)
        if optimizer == "sgd":
            m = 0.9 * m + g + decay * p
            p = p - lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            p = p * (1 - lr * decay)
            p = p - lr * m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        average = 0.8 * average + 0.2 * p
        np.testing.assert_allclose(model.history[step], p, rtol=1e-4, atol=1e-5)
    final = torch.cat([model.weight.flatten(), model.bias]).detach().numpy()
    np.testing.assert_allclose(final, average, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([point["loss"] for point in history.curve], losses, rtol=1e-4)


def test_parts_add_up_to_the_whole_batch() -> None:
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", batch_size=10, base_lr=0.5, ema=None)
    whole, parts = Regression(), Regression()
    one = train(whole, recipe)
    three = train(parts, dataclasses.replace(recipe, accumulate=3))  # parts of 4, 4 and 2 images
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)
    losses = [[point["loss"] for point in history.curve] for history in (one, three)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_parts_need_an_entry_per_image() -> None:
    class Pairs(Regression):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            return {"x": super().views(batch, generator)["x"].repeat(2, 1)}

    with pytest.raises(ConfigError, match="'x' has 16 for 8 images"):
        train(Pairs(), dataclasses.replace(RECIPE, accumulate=2))


def test_average_covers_buffers() -> None:
    class Recorded(Toy):
        def after_step(self, progress: float) -> None:
            super().after_step(progress)
            states.append({k: v.double() for k, v in self.state_dict().items()})

    states: list[dict[str, Tensor]] = []
    model = Recorded()
    average = {k: v.double() for k, v in model.state_dict().items()}
    train(model)
    for state in states:
        average = {k: 0.9 * average[k] + 0.1 * v for k, v in state.items()}
    counter = "net.2.num_batches_tracked"
    assert model.state_dict()[counter] == 20  # an integer is kept, not averaged
    for name, value in model.state_dict().items():
        if name != counter:
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)


def test_a_stage_begins_before_its_first_step_and_the_same_after_a_resumption(tmp_path: Path) -> None:
    class Staged(Toy):
        def __init__(self, stop: int | None = None) -> None:
            super().__init__()
            self.register_buffer("stage", torch.tensor(0))
            self.stop, self.began = stop, []

        def before_step(self, progress: float) -> None:
            if stage(progress, 2) != self.stage:
                self.stage += 1
                self.net[1].weight.normal_()
                self.began.append(progress)

        def after_step(self, progress: float) -> None:
            super().after_step(progress)
            if len(self.calls) == self.stop:
                raise KeyboardInterrupt

    whole = Staged()
    train(whole)
    assert whole.began == [0.5]
    for stop in (10, 11, 12):  # around the first step of the second stage
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            train(Staged(stop), folder=folder)
        resumed = Staged()
        train(resumed, folder=folder)
        assert_same(resumed, whole)


def test_a_history_includes_the_cost_of_what_it_builds_on() -> None:
    both = History(steps=5, images=100, seconds=7, warnings=["b"]).include(
        History(steps=3, images=60, seconds=2, peak_memory=9, warnings=["a"]), "the tokenizer"
    )
    assert (both.steps, both.images, both.seconds, both.peak_memory) == (5, 160, 9, 9)
    assert both.warnings == ["a", "60 images and 2 s of this went into the tokenizer", "b"]


def test_epochs_are_permutations_that_differ() -> None:
    model = Regression()
    train(model, dataclasses.replace(RECIPE, epochs=2.4, checkpoint_minutes=9))
    assert [len(index) for index in model.seen] == [8] * 12
    first, second = torch.cat(model.seen[:5]), torch.cat(model.seen[5:10])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 40
    assert not torch.equal(first, second)
    assert model.progress == [step / 12 for step in range(12)]


def test_hooks_hear_of_the_progress_of_their_batch() -> None:
    model = Toy()
    train(model)
    assert model.calls == [step / 20 for step in range(20)]


def test_curve_has_means_of_windows() -> None:
    recipe = Recipe(epochs=150, batch_size=8, base_lr=0.01, schedule="constant", optimizer="sgd")
    model = Regression()
    history = train(model, recipe)
    assert history.steps == 750
    assert history.images == 6000
    assert [point["step"] for point in history.curve] == list(range(3, 751, 3))
    biases = [0.5] + [float(state[-1]) for state in model.history[:-1]]  # as each forward found it
    np.testing.assert_allclose(
        [point["bias"] for point in history.curve], np.reshape(biases, (250, 3)).mean(1), rtol=1e-6
    )
    last = history.curve[-1]
    assert last.keys() == {"step", "epoch", "images", "lr", "loss", "bias"}
    assert (last["epoch"], last["images"], last["lr"]) == (150, 6000, learning_rate(749, 5, recipe))
    assert history.seconds > 0
    assert history.peak_memory > 2**20
    ragged = train(Regression(), dataclasses.replace(recipe, epochs=60.4))
    assert [point["step"] for point in ragged.curve][-2:] == [300, 302]


def test_the_same_call_gives_the_same_weights() -> None:
    first, second, other = Toy(), Toy(), Toy()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    curve = train(first).curve
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws are not disturbed
    torch.rand(5)
    assert train(second).curve == curve
    assert_same(first, second)
    train(other, seed=2)
    assert not torch.equal(other.net[1].weight, first.net[1].weight)
    assert not first.training


def test_every_step_draws_its_own_numbers() -> None:
    class Drawing(Regression):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            drawn.append(torch.rand(1, generator=generator).item())
            return super().views(batch, generator)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            drawn.append(torch.rand(1).item())
            return super().forward(x)

    drawn: list[float] = []
    train(Drawing())
    assert len(set(drawn)) == len(drawn) == 40


def test_a_batch_larger_than_the_split(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=1000, lr_batch=100, schedule="constant")
    model = Regression()
    history = train(model, recipe)
    assert [len(index) for index in model.seen] == [42] * 4
    assert history.curve[0]["lr"] == pytest.approx(0.05 * 42 / 100)
    assert "cut to the 42 images" in history.warnings[0]


def test_a_warm_up_as_long_as_training_is_noted() -> None:
    history = train(Regression(), dataclasses.replace(RECIPE, warmup_epochs=5))
    assert "warm-up of 5 epochs covers all" in history.warnings[0]


def test_no_epochs_keep_the_initial_model(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=0)
    model = Toy()
    history = train(model, recipe, tmp_path)
    assert (history.steps, history.curve) == (0, [])
    assert_same(model, Toy())
    saved = checkpoint.load_weights(tmp_path / "model.safetensors")
    assert torch.equal(saved["net.1.weight"], model.net[1].weight)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("accumulate", 0), ("epochs", -1.0), ("epochs", math.inf), ("ema", 1.1)],
)
def test_impossible_recipes(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"recipe.{field} = {value}"):
        train(Toy(), dataclasses.replace(RECIPE, **{field: value}))


def test_data_that_does_not_serve() -> None:
    with pytest.raises(DataError, match="no labels"):
        train(Toy(), split=dataclasses.replace(toy_split(), all_labels=None))
    with pytest.raises(DataError, match="no image"):
        train(Toy(), split=toy_split().subset(torch.arange(0)))


def test_frames_are_as_far_apart_as_asked() -> None:
    class Video(Regression):
        needs = ("frames",)
        frame_gap = (2, 3)

        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            for row, position in enumerate(batch.index.tolist()):
                mate = next(n for n, image in enumerate(images) if torch.equal(image, batch.frames[row]))
                pairs.append((position, mate))
            return super().views(batch, generator)

    images, pairs = toy_split(40).store.images, []
    train(Video(), split=toy_split(40))
    assert {second // 5 for _, second in pairs} == set(range(8))
    assert all(first // 5 == second // 5 for first, second in pairs)
    assert all(2 <= abs(first - second) <= 3 or first % 5 == 2 for first, second in pairs)
    assert len(set(pairs)) > 40  # another mate in another epoch


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision: str, kind: torch.dtype) -> None:
    class Watched(Toy):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            outputs = super().forward(x, y)
            kinds.add(outputs["logits"].dtype)
            return outputs

    kinds: set[torch.dtype] = set()
    model = Watched()
    train(model, dataclasses.replace(RECIPE, precision=precision))
    assert kinds == {kind}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_compiled_forward_trains_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiled", lambda model, device: torch.compile(model, backend="eager"))
    eager, compiled = Toy(), Toy()
    train(eager)
    history = train(compiled, dataclasses.replace(RECIPE, compile=True), tmp_path)
    assert history.compiled
    assert checkpoint.load_weights(tmp_path / "model.safetensors").keys() == eager.state_dict().keys()
    torch.testing.assert_close(compiled.net[1].weight, eager.net[1].weight)


# What a recipe leaves open


def trials(seconds: dict[tuple[str, bool], float | Exception], monkeypatch: pytest.MonkeyPatch) -> list:
    """Lets a trial of (precision, compiled) take given seconds; returns the trials that were asked for."""
    asked: list = []

    def trial(self: object, precision: str, compiled: bool) -> float:
        asked.append((precision, compiled))
        taken = seconds[precision, compiled]
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(fit_module._Training, "_trial", trial)
    return asked


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (0.95, "fp32"), (2.0, "fp32")])
def test_auto_precision_is_bf16_where_it_is_clearly_faster(
    bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials({("fp32", False): 1.0, ("bf16", False): bf16}, monkeypatch)
    auto, fixed = Toy(), Toy()
    history = train(auto, dataclasses.replace(RECIPE, precision="auto"))
    assert history.precision == chosen
    train(fixed, dataclasses.replace(RECIPE, precision=chosen))
    assert_same(auto, fixed)


def test_a_trial_times_steps_and_changes_nothing(tmp_path: Path) -> None:
    auto, fixed = Toy(), Toy()
    history = train(auto, dataclasses.replace(RECIPE, precision="auto"), tmp_path)
    assert history.precision in ("fp32", "bf16")
    expected = train(fixed, dataclasses.replace(RECIPE, precision=history.precision))
    assert_same(auto, fixed)
    assert history.curve == expected.curve
    assert auto.calls == fixed.calls


def test_compiling_is_tried_where_training_is_long_and_kept_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "compiled", lambda model, device: model)
    recipe = dataclasses.replace(RECIPE, compile="auto", epochs=100)  # 500 steps
    short = dataclasses.replace(recipe, epochs=99)
    slow, fast, failing = (3.0, 4.0), (3.0, 2.0), (3.0, RuntimeError("no C++ compiler\nlong trace"))
    for eager, compiled in (slow, fast, failing):
        asked = trials({("fp32", False): eager, ("fp32", True): compiled}, monkeypatch)
        history = train(Toy(), recipe)
        assert asked == [("fp32", False), ("fp32", True)]
        assert history.compiled is (compiled == 2.0)
        assert history.warnings == (["not compiled: no C++ compiler"] if compiled == failing[1] else [])
    assert not train(Toy(), short).compiled
    asked = trials({("fp32", False): 1.0}, monkeypatch)  # 500 s: the compiler would take longer than it saves
    assert not train(Toy(), recipe).compiled
    assert asked == [("fp32", False)]


def test_a_budget_of_images_is_an_equal_number_of_epochs_with_the_same_schedule() -> None:
    recipe = dataclasses.replace(RECIPE, epochs=8, warmup_epochs=2)
    short, same = Toy(), Toy()
    history = train(short, dataclasses.replace(recipe, budget="160img"))
    assert (history.images, history.steps) == (160, 20)
    train(same, dataclasses.replace(recipe, epochs=4, warmup_epochs=1))
    assert_same(short, same)


def test_a_budget_of_time_is_the_steps_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trials({("fp32", False): 0.5}, monkeypatch)
    recipe = dataclasses.replace(RECIPE, budget="6.2s")
    history = train(Toy(), recipe)
    assert (history.steps, history.planned, asked) == (12, 12, [("fp32", False)])
    for stop in (3, 8):
        with pytest.raises(RuntimeError, match="stopped"):
            train(Stopping(stop), recipe, tmp_path)
        asked.clear()
        trials({("fp32", False): 99.0}, monkeypatch)  # a slower day: what was begun is finished as planned
    resumed, whole = Toy(), Toy()
    assert train(resumed, recipe, tmp_path).steps == 12
    train(whole, dataclasses.replace(RECIPE, epochs=12 / 5))
    assert_same(resumed, whole)


def test_what_is_not_trained_needs_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trials({}, monkeypatch)
    untrained = dataclasses.replace(RECIPE, epochs=0, precision="auto", compile="auto")
    for budget in (None, "2m", "100img"):
        model = Toy()
        history = train(model, dataclasses.replace(untrained, budget=budget))
        assert (history.steps, history.images, history.precision, asked) == (0, 0, "fp32", [])
        assert_same(model, Toy())


def test_a_real_budget_of_time_is_kept_to() -> None:
    history = train(Toy(pause=0.05), dataclasses.replace(RECIPE, budget="1s"))
    assert 1 <= history.steps == history.planned <= 20  # a step takes 50 ms and a little


def test_device_time_without_a_gpu_is_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(time, "process_time", lambda: told.append(100.0 + 7 * len(told)) or told[-1])
    history = train(Toy(pause=0.01), folder=tmp_path)
    assert history.seconds >= 0.01 * history.steps
    assert history.device_seconds == told[-1] - told[0] >= 7


@pytest.mark.parametrize("text", ["", "2", "0s", "-1m", "2 weeks", "10epochs", "nan s"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a time nor a number of images"):
        Recipe(budget=text)


# A loss that is no number


class Failing(Toy):
    """Its loss is no number at one step; or one of its weights, which no loss reads, after that step."""

    def __init__(self, step: int, weight: bool = False) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))
        self.bad = (step - 1) / 20
        self.weight = weight

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        views = super().views(batch, generator)
        if batch.progress == self.bad and not self.weight:
            views["x"][0, 0, 0, 0] = torch.inf
        return views

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if progress == self.bad and self.weight:
            self.unused[1] = torch.inf


@pytest.mark.parametrize("minutes", [0.0, 60.0])
@pytest.mark.parametrize("epochs", [4, 400])  # points of one step, and of seven
def test_the_first_bad_loss_is_named(tmp_path: Path, minutes: float, epochs: int) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=epochs, checkpoint_minutes=minutes, precision="bf16")
    model = Failing(12)
    model.bad = 11 / (epochs * 5)
    with pytest.raises(NonFiniteLoss, match=f"became nan at step 12 of {epochs * 5};") as caught:
        train(model, recipe, tmp_path)
    places = checkpoint.places(tmp_path)
    if minutes == 0:
        assert f"last good checkpoint is {tmp_path / 'step-000000011'}" in str(caught.value)
        weights = checkpoint.read_state(places[0]).weights
        assert all(torch.isfinite(value).all() for value in weights.values())
    else:
        assert "no checkpoint had been saved" in str(caught.value)
        assert not places
    for remedy in ("base_lr", "clip_norm", "precision=fp32"):
        assert remedy in caught.value.remedy
    assert not (tmp_path / "model.safetensors").exists()


def test_bad_weights_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"weights of pretraining \(unused\).*after step 7 of 20.*000006"):
        train(Failing(7, weight=True), folder=tmp_path)
    assert [place.name for place in checkpoint.places(tmp_path)] == ["step-000000006", "step-000000005"]
    with pytest.raises(NonFiniteLoss):
        train(Failing(20, weight=True), dataclasses.replace(RECIPE, checkpoint_minutes=60), tmp_path / "end")
    assert not (tmp_path / "end").exists()


# Interruption


class Stopping(Toy):
    """Raises within a step, after it has changed its own buffers."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.stop_at = step

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(x, y)
        if len(self.calls) == self.stop_at:
            raise RuntimeError("stopped")
        return outputs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "ema": None, "clip_norm": 0.1},
        {"optimizer": "lars"},
        {"accumulate": 3, "precision": "bf16"},
        {"epochs": 100},
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, changes: dict) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    uninterrupted = Toy()
    expected = train(uninterrupted, dataclasses.replace(recipe, checkpoint_minutes=60))
    for stop in (3, 8):
        with pytest.raises(RuntimeError, match="stopped"):
            train(Stopping(stop), recipe, tmp_path)
    resumed = Toy()
    history = train(resumed, dataclasses.replace(recipe, checkpoint_minutes=60), tmp_path)
    assert_same(resumed, uninterrupted)
    assert history.curve == expected.curve
    assert (history.resumed, history.steps, history.images) == (2, expected.steps, expected.images)

    assert sorted(os.listdir(tmp_path)) == ["history.json", "model.safetensors"]
    again = Toy()
    assert train(again, recipe, tmp_path) == history
    assert not again.calls
    assert_same(again, uninterrupted)


def test_ctrl_c_saves_and_ends(tmp_path: Path) -> None:
    class Interrupted(Toy):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            if len(self.calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return super().views(batch, generator)

    recipe = dataclasses.replace(RECIPE, checkpoint_minutes=60)
    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(model, recipe, tmp_path)
    assert len(model.calls) == 7  # the step is finished
    assert [place.name for place in checkpoint.places(tmp_path)] == ["step-000000007"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed, uninterrupted = Toy(), Toy()
    train(resumed, recipe, tmp_path)
    train(uninterrupted, recipe)
    assert_same(resumed, uninterrupted)


def slowly(folder: str) -> None:
    """Trains in a process of its own, to be killed."""
    train(Toy(pause=0.05), folder=Path(folder))


def test_kill_at_any_moment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fit; test_fit.slowly"
    )
    for _ in range(3):
        latest = checkpoint.places(folder)[:1]
        child = subprocess.Popen(
            [sys.executable, "-c", f"{program}({str(folder)!r})"],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        deadline = time.monotonic() + 100
        while checkpoint.places(folder)[:1] == latest and not (folder / "history.json").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.2))
        child.kill()
        child.wait()
    resumed, uninterrupted = Toy(), Toy()
    history = train(resumed, folder=folder)
    expected = train(uninterrupted)
    assert_same(resumed, uninterrupted)
    assert history.resumed >= 1
    assert history.curve == expected.curve
    assert sorted(os.listdir(folder)) == ["history.json", "model.safetensors"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        train(Stopping(9), folder=tmp_path)
    newest = checkpoint.places(tmp_path)[0]
    file = newest / "trainer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    resumed, uninterrupted = Toy(), Toy()
    history = train(resumed, folder=tmp_path)
    train(uninterrupted)
    assert_same(resumed, uninterrupted)
    assert str(file) in history.warnings[0]

    with pytest.raises(RuntimeError):
        train(Stopping(9), folder=tmp_path / "both")
    for place in checkpoint.places(tmp_path / "both"):
        (place / "trainer.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=r"step-000000008/trainer\.json cannot be read"):
        train(Toy(), folder=tmp_path / "both")


def test_a_full_disk_stops_training_and_costs_nothing(tmp_path: Path) -> None:
    from test_checkpoint import files_of_at_most

    with pytest.raises(RuntimeError):
        train(Stopping(5), folder=tmp_path)
    with files_of_at_most(100), pytest.raises(ResultsError, match="step-000000006 could not be written"):
        train(Toy(), folder=tmp_path)
    resumed, uninterrupted = Toy(), Toy()
    train(resumed, folder=tmp_path)
    train(uninterrupted)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, finished: bool) -> None:
    if finished:
        train(Toy(), folder=tmp_path)
    else:
        with pytest.raises(RuntimeError):
            train(Stopping(5), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"recipe\.base_lr was 0\.05 and is now 0\.1"):
        train(Toy(), dataclasses.replace(RECIPE, base_lr=0.1), tmp_path)
    with pytest.raises(CheckpointError, match="seed was 1 and is now 2"):
        train(Toy(), folder=tmp_path, seed=2)
    with pytest.raises(CheckpointError, match="data was 'toy' and is now 'other'"):
        train(Toy(), folder=tmp_path, split=toy_split(fingerprint="other"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit.*lacks unused"):
        train(Failing(99), folder=tmp_path)
    train(
        Toy(), dataclasses.replace(RECIPE, checkpoint_minutes=7), tmp_path
    )  # changes nothing in the weights
