"""Images drawn from nothing: how far their features lie from those of real test images.

The Fréchet distance of Heusel et al. (2017) between two Gaussians, |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), fitted
to the features of as many generated images and of the test images, in percent of the total variance tr(C) of
training images. It is not FID, whose features come from one Inception network: here they come from an encoder that
the recipe names. Numbers of different encoders cannot be compared.

``random_init``  a ResNet-18 of 16 to 128 channels with the weights of one fixed seed. It needs no labels and is the
                 same everywhere. Blur, noise, shuffled patches and repeated images move it, objects as such do not.
``supervised``   the suite's classifier (``methods/supervised``), trained on the labels of the training split first.
                 Its weights, and so the distance, vary a little from machine to machine.

``generation.features=timm:NAME`` reads a published encoder instead.

A distance between finite samples is above 0 even where the distributions agree. ``frechet_train``, that of as many
training images, is what a generator as good as the data would reach. Intervals are those of the delete-a-group
jackknife over both samples; the distribution of the encoder's weights is not in them.

Only encoders with ``generate(count, steps, temperature, generator)``, which gives images (count, 3, H, W) in [0, 1],
can be scored.

Held against: torchmetrics' and SciPy's Fréchet distance of the same features, and blurred, noisy and repeated images,
which score worse than good ones (``tests/protocols/test_generation.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimbench import config, registry, seeds
from mimbench.data import Split
from mimbench.encoder import Encoder
from mimbench.errors import ConfigError
from mimbench.features import extract, frozen, prepare
from mimbench.fit import fit
from mimbench.stats import Z
from mimbench.task import Context, Metric, Result, Task

VERSION = 1
NEEDS = ()
RECIPES: dict[str, dict[str, Any]] = {
    "random_init": {},
    "supervised": {"features": "supervised"},
}
READER_SEED = 20170626  # fixes the encoder that reads images, whatever the run's seed
SUBSET_SEED = 20170626  # fixes which training images the distance is compared with
BATCH = 100  # images drawn at once; the draws depend on it, so it is one number for everybody
GROUPS = 20  # of the jackknife
RANDOM_INIT = {
    "architecture": "resnet",
    "resnet": {"block": "basic", "layers": [2, 2, 2, 2], "widths": [16, 32, 64, 128], "stem": "cifar"},
}


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``random_init``."""

    recipe: str = "random_init"  # the name these settings go by
    features: str = "random_init"  # whose features: random_init, supervised or timm:NAME
    size: int = 32  # side of the images that random_init reads, in pixels
    preset: str = "laptop"  # of the supervised classifier
    count: int | None = None  # images to generate; none: as many as there are test images
    steps: int = 20  # of the generation (MAGE's published command)
    temperature: float = 6.0  # of the generation (MAGE's published command)

    def __post_init__(self) -> None:
        config.check(self, "generation", positive=("size", "count", "steps"), not_negative=("temperature",))
        if self.count is not None and self.count < 2 * GROUPS:
            raise ConfigError(f"generation.count = {self.count} is too few for an interval", "Use 40 or more")
        if self.features not in RECIPES and not self.features.startswith("timm:"):
            raise ConfigError(
                f"generation.features = {self.features} is no known encoder",
                f"Use {', '.join(RECIPES)} or timm:NAME",
            )


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """The distance of generated images to the test images, and that of training images to them."""
    generate = getattr(encoder, "generate", None)
    if generate is None:
        raise ConfigError(
            f"{encoder.name} does not generate images", "Choose a method that does, such as mage"
        )
    with context.stage("feature encoder"):
        reader = feature_encoder(task, settings, context)
    count = settings.count or len(task.test)
    with context.stage("generation"):
        made = generated_features(generate, reader, count, settings, context)
    with context.stage("features"):
        test = extract(reader, task.test, context)
        train = extract(reader, some(task.train, count), context)
    with context.stage("distance"):
        variance = float(train.double().var(0).sum())
        test, train, made = (x.double() * (100 / variance) ** 0.5 for x in (test, train, made))
        metrics = {"frechet_distance": distance(made, test), "frechet_train": distance(train, test)}
    details = {
        "encoder": reader.name,
        "readout": reader.readout,
        "features": test.shape[1],
        "input_size": reader.input.size,
        "train_images": len(train),
        "variance": variance,
        "between_means": float((made.mean(0) - test.mean(0)).square().sum()),
    }
    warnings = []
    if min(count, len(test)) <= test.shape[1]:
        warnings.append(
            f"covariances of {test.shape[1]} features from {min(count, len(test))} images are not of full rank"
        )
    return Result(metrics, "frechet_distance", details, warnings=warnings)


def feature_encoder(task: Task, settings: Settings, context: Context) -> Encoder:
    """The encoder whose features are compared, on the device and in eval mode."""
    name, _, model_name = settings.features.partition(":")
    module = registry.load_method(name)
    table: dict[str, Any] = {"name": model_name}
    if name == "random_init":
        table = RANDOM_INIT | {"image_size": settings.size}
    elif name == "supervised":
        table = registry.method(name).preset(settings.preset)
    chosen = config.build(module.Config, table)
    if name == "supervised":
        chosen = dataclasses.replace(chosen, classes=task.num_classes)
    with torch.random.fork_rng(devices=[]):
        seeds.seed_everything(READER_SEED, "features")
        model = module.Model(chosen)
    if name == "supervised":
        fit(
            model,
            task.train,
            chosen.recipe,
            seed=READER_SEED,
            device=context.device,
            progress=context.progress,
            folder=context.workdir / "supervised",
            name="training the feature encoder",
        )
    encoder: Encoder = model.to(context.device).eval().encoder()
    return encoder


def generated_features(
    generate: Callable[[int, int, float, torch.Generator], Tensor],
    reader: Encoder,
    count: int,
    settings: Settings,
    context: Context,
) -> Tensor:
    """The features (count, D) of images drawn in batches and rounded to 8 bits, on the CPU."""
    generator = seeds.generator(context.device, context.seed, "generation")
    found = []
    batches = range(math.ceil(count / BATCH))
    for _ in context.progress.track(batches, "generating", len(batches)):
        with frozen(reader), torch.autocast(context.device.type, enabled=False):
            images = generate(BATCH, settings.steps, settings.temperature, generator)
            pixels = (images * 255).round().to(torch.uint8)
            found.append(reader(prepare(pixels, None, reader.input)).pooled.float().cpu())
    return torch.cat(found)[:count]


def some(split: Split, count: int) -> Split:
    """A fixed random choice of a split's images; all of them where there are fewer."""
    order = torch.randperm(len(split), generator=seeds.generator("cpu", SUBSET_SEED, split.dataset))
    return split.subset(order[:count].sort().values)


def distance(first: Tensor, second: Tensor) -> Metric:
    """The Fréchet distance of two samples (N, D) and (M, D) in float64, with its jackknife interval.

    The interval adds the variances over either sample, each left without one of its groups at a time.
    """
    a, b = (_moments(x, second.mean(0)) for x in (first, second))
    whole_a, whole_b = _fitted(a), _fitted(b)
    value = frechet(whole_a, whole_b)
    variance = 0.0
    for parts, other in ((a, whole_b), (b, whole_a)):
        without = torch.tensor([frechet(_fitted(parts, group), other) for group in range(GROUPS)])
        variance += float((GROUPS - 1) * without.double().var(unbiased=False))
    half = Z * math.sqrt(variance)
    return Metric(value, max(0.0, value - half), value + half, len(first))


Gaussian = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D)


def frechet(first: Gaussian, second: Gaussian) -> float:
    """|m - m'|^2 + tr(C) + tr(C') - 2 tr((C C')^(1/2)) (Dowson and Landau, 1982).

    The last trace is the sum of the roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric, so that
    covariances without full rank do no harm.
    """
    (mean, cov), (other_mean, other_cov) = first, second
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    gap = (mean - other_mean).square().sum()
    return float(gap + cov.trace() + other_cov.trace() - 2 * shared)


def _moments(features: Tensor, centre: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Count, sum and sum of products of the centred features of each group, every ``GROUPS``-th image in one."""
    parts = [features[group::GROUPS] - centre for group in range(GROUPS)]
    return [(len(part), part.sum(0), part.T @ part) for part in parts]


def _fitted(parts: list[tuple[int, Tensor, Tensor]], left_out: int | None = None) -> Gaussian:
    kept = [part for group, part in enumerate(parts) if group != left_out]
    count = sum(part[0] for part in kept)
    total, products = (torch.stack([part[i] for part in kept]).sum(0) for i in (1, 2))  # type: ignore[misc]
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)
