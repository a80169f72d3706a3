"""Linear probes whose choices never see test labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimbench import config, features, registry
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError, LabelLeak
from mimbench.logistic import Problem
from mimbench.progress import quiet
from mimbench.task import Context, Task

linear = registry.load_protocol("linear")


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


QUICK = linear.Settings(c_steps=5)


def test_c_is_chosen_on_the_held_out_items_and_solved_on_all() -> None:
    x, labels = problem_of(300, 20, 3, seed=1)
    validation = torch.arange(0, 300, 3)
    fitted = linear.classify(x, labels, x[:9], 3, validation, QUICK)
    kept = torch.ones(300, dtype=torch.bool)
    kept[validation] = False
    scores = {}
    for C in (1e-6, 10**-3.25, 10**-0.5, 10**2.25, 1e5):
        hits = Problem(x[kept], labels[kept], 3).solve(C).top(x[validation])[:, 0] == labels[validation]
        scores[C] = 100 * float(hits.double().mean())
    assert [entry["top1"] for entry in fitted.details["selection"]] == pytest.approx(list(scores.values()))
    assert fitted.details["chosen_C"] == pytest.approx(max(scores, key=lambda C: scores[C]))
    final = Problem(x, labels, 3).solve(fitted.details["chosen_C"])
    certificate = {name: fitted.details[name] for name in ("objective", "gradient_norm", "duality_gap")}
    assert certificate == {name: getattr(final, name) for name in certificate}
    assert torch.equal(fitted.ranked, final.top(x[:9], 3))


def test_poor_train_splits() -> None:
    x, labels = problem_of(40, 4, 3)
    none = torch.arange(0)
    single = linear.classify(x, labels * 0 + 1, x, 3, torch.arange(4), QUICK)
    assert single.ranked[:, 0].unique().tolist() == [1]
    assert "single class" in single.warnings[0]
    one = linear.classify(x[:1], labels[:1], x, 3, none, QUICK)
    assert (one.ranked[:, 0] == labels[0]).all()
    two = linear.classify(x, labels.clamp(max=1), x, 3, torch.arange(4), QUICK)
    assert "1 of 3 classes" in two.warnings[0]
    rare = labels.clamp(max=1)
    rare[0] = 2  # a class that stands in the held-out part alone
    assert linear.classify(x, rare, x, 3, torch.tensor([0, 1]), QUICK).ranked.shape == (40, 3)
    with pytest.raises(ConfigError):
        linear.classify(x, labels, x, 3, none, linear.Settings(c_steps=0))


class Colours(nn.Module):
    """Reads the mean colour and a BatchNorm that would change in training mode."""

    dim, depth, stride, readout, input = 3, 1, 1, "mean colour", InputSpec(4)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        images = self.norm(images)
        return Features(images.mean((2, 3)), images)

    def for_finetuning(self, drop_path: float = 0.0) -> Colours:
        return self

    def layer_of(self, parameter: str) -> int:
        return 0


def split_of(count: int, part: str, seed: int, classes: int = 3) -> Split:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=draw)
    images = torch.randint(0, 120, (count, 3, 4, 4), generator=draw)
    images[torch.arange(count), labels] += 100
    names = tuple(f"class {number}" for number in range(classes))
    return Split("toy", part, InMemory(images.to(torch.uint8)), names, part, torch.arange(count), labels)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), 0, quiet(), tmp_path / "work", tmp_path / "features")


SHORT: dict[str, dict[str, Any]] = {
    "cached": {"c_steps": 5},
    "mae": {"training": {"epochs": 40, "batch_size": 64, "warmup_epochs": 1, "base_lr": 80.0}},
    "dino": {"training": {"epochs": 5, "batch_size": 32}},
}


def settings_of(recipe: str) -> Any:
    return config.build(
        linear.Settings, config.merge(linear.RECIPES[recipe], SHORT[recipe]) | {"recipe": recipe}
    )


@pytest.mark.parametrize("recipe", list(linear.RECIPES))
def test_every_recipe_scores_and_leaves_the_encoder_alone(recipe: str, context: Context) -> None:
    encoder = Colours().train()
    before = features.state_hash(encoder)
    task = Task(split_of(200, "train", 0, 7), split_of(70, "test", 1, 7))
    outcome = linear.evaluate(encoder, task, settings_of(recipe), context)
    assert outcome.metrics["top1"].value > 80
    assert outcome.metrics["top5"].value >= outcome.metrics["top1"].value
    assert outcome.metrics["top1"].n == 70
    assert outcome.details["accuracy"]["class 6"] is None
    assert outcome.correct is not None
    assert 100 * outcome.correct.mean() == pytest.approx(outcome.metrics["top1"].value)
    assert features.state_hash(encoder) == before
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    with pytest.raises(LabelLeak):
        _ = task.train


@pytest.mark.parametrize("recipe", list(linear.RECIPES))
def test_choices_do_not_depend_on_test_labels(recipe: str, context: Context, tmp_path: Path) -> None:
    train, test = split_of(120, "train", 0), split_of(40, "test", 1)
    first = linear.evaluate(Colours(), Task(train, test), settings_of(recipe), context)
    shifted = dataclasses.replace(test, all_labels=(test.labels + 1) % 3)
    elsewhere = dataclasses.replace(context, workdir=tmp_path / "again", cache=None)
    second = linear.evaluate(Colours(), Task(train, shifted), settings_of(recipe), elsewhere)
    accuracy = "accuracy"
    assert {k: v for k, v in first.details.items() if k != accuracy} == {
        k: v for k, v in second.details.items() if k != accuracy
    }
    assert not (torch.from_numpy(first.correct) & torch.from_numpy(second.correct)).any()


def test_scores_do_not_depend_on_the_forward_batch(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, test = split_of(120, "train", 0), split_of(40, "test", 1)
    for recipe in linear.RECIPES:
        monkeypatch.setattr(features, "BATCH", 256)
        whole = linear.evaluate(Colours(), Task(train, test), settings_of(recipe), context)
        monkeypatch.setattr(features, "BATCH", 7)
        bare = dataclasses.replace(context, workdir=tmp_path / "again", cache=None)
        assert (
            linear.evaluate(Colours(), Task(train, test), settings_of(recipe), bare).metrics == whole.metrics
        )


def test_heads_trained_together_are_those_trained_alone(context: Context, tmp_path: Path) -> None:
    split = split_of(96, "train", 0)
    settings = settings_of("dino")
    together, _ = linear._fitted_probe(Colours(), split, 3, (1e-3, 0.1), settings, context)
    elsewhere = dataclasses.replace(context, workdir=tmp_path / "alone")
    alone, _ = linear._fitted_probe(Colours(), split, 3, (0.1,), settings, elsewhere)
    torch.testing.assert_close(together.heads[1].weight, alone.heads[0].weight)
    assert not torch.allclose(together.heads[0].weight, alone.heads[0].weight)


def test_the_batch_norm_has_no_parameters_and_its_own_statistics(context: Context) -> None:
    probe, _ = linear._fitted_probe(
        Colours(), split_of(96, "train", 0), 3, (0.1,), settings_of("mae"), context
    )
    assert [name for name, _ in probe.named_parameters()] == ["heads.0.weight", "heads.0.bias"]
    assert probe.norm.eps == 1e-6
    assert probe.norm.num_batches_tracked == 40
    inputs = torch.randn(5, 3)
    expected = (inputs - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
    torch.testing.assert_close(
        probe.logits(inputs)[0], nn.functional.linear(expected, probe.heads[0].weight, probe.heads[0].bias)
    )
