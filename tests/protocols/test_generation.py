"""The generation score: its distance against torchmetrics and SciPy, its interval, what it tells apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from mimbench import config, data, registry
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError
from mimbench.features import state_hash
from mimbench.fit import History
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.task import Context, Result, Task

generation = registry.load_protocol("generation")
CPU = torch.device("cpu")
Generate = Callable[[int, int, float, torch.Generator], Tensor]


def samples(count: int, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) + 0.1 * seed
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mixing.double() + 0.2 * seed


class AsItIs(nn.Module):
    """Features that are the first pixels of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_features]


@pytest.mark.parametrize("count", [400, 45])
def test_the_distance_is_that_of_torchmetrics_and_scipy(count: int) -> None:
    """Also where there are fewer images than features, so that covariances are singular."""
    first, second = samples(count, 60, 0), samples(300, 60, 1)
    found = generation.distance(first, second).value

    theirs = FrechetInceptionDistance(feature=AsItIs(60), normalize=True)
    theirs.set_dtype(torch.float64)
    for real, part in ((False, first), (True, second)):
        # it keeps moments of what its network gives, here the very features
        theirs.inception.forward = lambda images, part=part: part
        theirs.update(torch.zeros(len(part), 3, 8, 8), real=real)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)

    a, b = np.cov(first.numpy().T), np.cov(second.numpy().T)
    gap = (first.mean(0) - second.mean(0)).square().sum()
    shared = np.trace(linalg.sqrtm(a @ b)).real
    assert found == pytest.approx(float(gap) + np.trace(a + b) - 2 * shared, rel=1e-5 if count > 60 else 1e-3)


def test_the_interval_is_the_jackknife_over_both_samples() -> None:
    first, second = samples(530, 4, 0), samples(490, 4, 1)
    found = generation.distance(first, second)

    def plain(a: Tensor, b: Tensor) -> float:
        fits = [(x.mean(0), torch.from_numpy(np.cov(x.numpy().T))) for x in (a, b)]
        return generation.frechet(*fits)

    variance = 0.0
    for which in (0, 1):
        values = []
        for group in range(20):
            parts = [first, second]
            parts[which] = parts[which][torch.arange(len(parts[which])) % 20 != group]
            values.append(plain(*parts))
        variance += 19 * np.var(values)
    half = 1.959963984540054 * variance**0.5
    assert found.value == pytest.approx(plain(first, second))
    assert (found.low, found.high) == pytest.approx((max(0, found.value - half), found.value + half))
    assert found.n == 530


class Painter(ViTEncoder):
    """An encoder whose images come from a function."""

    def __init__(self, generate: Generate | None) -> None:
        torch.manual_seed(0)
        super().__init__(ViT(32, ViTShape(8, 16, 1, 2)), InputSpec(32), "mean")
        self.generate = generate


def evaluate(generate: Generate | None, tmp_path: Path, **changes: Any) -> Result:
    found = data.load("digits")
    train, test = found.train.subset(torch.arange(300)), found.test.subset(torch.arange(250))
    settings = config.build(generation.Settings, {"size": 8} | changes, "generation")
    context = Context(CPU, 0, quiet(), tmp_path)
    return generation.evaluate(Painter(generate), Task(train, test), settings, context)


def from_training_images(change: Callable[[Tensor], Tensor]) -> Generate:
    """Draws training images and changes them."""
    split = data.load("digits").train

    def generate(count: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(split), generator=generator)[:count]
        return change(split.batch(chosen).images.float() / 255)

    return generate


def test_it_tells_good_images_from_blurred_noisy_and_repeated_ones(tmp_path: Path) -> None:
    scores = {
        name: evaluate(from_training_images(change), tmp_path).metrics
        for name, change in {
            "real": lambda x: x,
            "blurred": lambda x: nn.functional.avg_pool2d(x, 3, 1, 1),
            "noisy": lambda x: (x + 0.2 * torch.randn(x.shape)).clamp(0, 1),
            "repeated": lambda x: x[:10].repeat(10, 1, 1, 1),
        }.items()
    }
    floor = scores["real"]["frechet_train"]
    assert all(found["frechet_train"] == floor for found in scores.values())
    distances = {name: found["frechet_distance"].value for name, found in scores.items()}
    assert distances["real"] < 2 * floor.value
    assert min(distances[name] for name in ("blurred", "noisy", "repeated")) > 3 * floor.value


def test_it_asks_for_as_many_images_as_said_and_says_what_it_did(tmp_path: Path) -> None:
    asked: list[tuple[int, int, float]] = []

    def generate(count: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
        asked.append((count, steps, temperature))
        return torch.rand(count, 3, 16, 16, generator=generator)

    result = evaluate(generate, tmp_path, count=200, steps=8, temperature=4.5)
    assert asked == [(100, 8, 4.5)] * 2
    assert result.primary == "frechet_distance"
    assert result.metrics["frechet_distance"].n == 200
    assert result.details["train_images"] == 200
    assert result.details["encoder"] == "resnet-18 width 16 (cifar stem)"
    assert result.warnings == []
    again = evaluate(generate, tmp_path, count=200, steps=8, temperature=4.5)
    assert again.metrics == result.metrics
    few = evaluate(generate, tmp_path, count=40)
    assert "not of full rank" in few.warnings[0]


def test_the_encoder_that_reads_is_fixed_and_leaves_random_numbers_alone(tmp_path: Path) -> None:
    found = data.load("digits")
    hashes = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        context = Context(CPU, seed, quiet(), tmp_path)
        reader = generation.feature_encoder(Task(found.train, found.test), generation.Settings(), context)
        hashes.add(state_hash(reader))
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(module.training for module in reader.resnet.modules())
    assert len(hashes) == 1


def test_the_classifier_is_trained_on_the_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def fit(model: Any, split: Any, recipe: Any, **options: Any) -> History:
        trained.append((model.config.classes, split.part, recipe.epochs, options["folder"]))
        return History()

    monkeypatch.setattr(generation, "fit", fit)
    table = generation.RECIPES["supervised"] | {"preset": "smoke"}
    result = evaluate(from_training_images(lambda x: x), tmp_path, **table)
    assert trained == [(10, "train", 20, tmp_path / "supervised")]
    assert result.details["encoder"] == "vit-64x4/4"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"features": "inception"}, "no known encoder"),
        ({"count": 10}, "too few"),
        ({"steps": 0}, "steps"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        evaluate(lambda *_: torch.zeros(1), tmp_path, **changes)


def test_an_encoder_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not generate images"):
        evaluate(None, tmp_path)
