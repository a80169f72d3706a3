"""Classification by fine-tuning the whole encoder with a fresh linear head.

``light`` is the default: mirrored crops and label smoothing, one epoch but at least 200 steps, so that CIFAR-10
with a small ViT takes minutes on a CPU. It ranks encoders; it is no substitute for a published recipe. A GPU
affords more: ``--set finetune.training.epochs=50``.
``light-1pct`` and ``light-10pct`` are the same on a fixed, label-balanced part of the training labels.
``mae`` is the recipe of MAE (He et al., 2022, appendix A.1 and table 9, as for ViT-B and ViT-L); published
numbers were made with it or with something close to it.

The encoder that is passed in is copied, never changed. Test images are resized and cropped once: there is no
test-time augmentation.

Held against: the paper's recipe, setting by setting, learning rates that decay by layer counted by hand, and runs
repeated to the last digit (``tests/protocols/test_finetune.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, seeds, stats
from mimbench.augment import (
    crop_and_flip,
    rand_augment,
    random_erasing,
    random_mix,
    resize_and_center_crop,
)
from mimbench.data import Batch, Split
from mimbench.encoder import Encoder, normalise
from mimbench.fit import History, Recipe, fit
from mimbench.task import Context, Metric, Result, Task

VERSION = 1
NEEDS = ("labels",)
_MAE: dict[str, Any] = {
    "crop_scale": [0.08, 1.0],
    "rand_augment": 9,
    "mixup": 0.8,
    "cutmix": 1.0,
    "random_erasing": 0.25,
    "drop_path": 0.1,
    "eval_crop": 0.875,
    "least_steps": 0,
    "training": {"epochs": 100, "batch_size": 1024, "base_lr": 1e-3, "min_lr": 2.5e-7, "warmup_epochs": 5},
}
RECIPES: dict[str, dict[str, Any]] = {
    "light": {},
    "light-1pct": {"label_share": 0.01},
    "light-10pct": {"label_share": 0.1},
    "mae": _MAE,
}
INFERENCE_BATCH = 256  # images per forward; no score depends on it
SUBSET_SEED = 20200213  # fixes which images keep their labels, whatever the run's seed


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score. The defaults are those of ``light``."""

    recipe: str = "light"  # the name these settings go by
    label_share: float = 1.0  # share of the training images used, equally many of each class, at least one
    learning_rates: tuple[float, ...] = ()  # candidates for training.base_lr; none: that one
    holdout: float = 0.1  # share of these images on which candidates are compared
    crop_scale: tuple[float, float] = (0.6, 1.0)  # area of a training crop over the image's
    flip: float = 0.5  # probability of a mirrored crop
    rand_augment: float = 0.0  # magnitude of RandAugment, two operations per image; 0: none
    rand_augment_std: float = 0.5  # spread of the magnitude
    random_erasing: float = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # alpha of mixup's beta distribution; 0: none
    cutmix: float = 0.0  # alpha of cutmix's; with both, each batch takes one of them
    label_smoothing: float = 0.1  # share of a target that is spread evenly over all classes
    drop_path: float = 0.0  # stochastic depth of the last block
    head_std: float = 2e-5  # of the head's first weights, a truncated normal; its bias starts at 0
    batch_norm: Literal["train", "eval"] = "train"  # statistics an encoder's BatchNorm trains with
    eval_crop: float = 1.0  # side of the central test crop over the shorter side of the resized image
    least_steps: int = (
        200  # where training.epochs make fewer optimizer steps, epochs and warm-up are stretched to this
    )
    training: Recipe = Recipe(
        epochs=1,
        batch_size=128,
        base_lr=4e-3,
        weight_decay=0.05,
        layer_decay=0.75,
        warmup_epochs=0.1,
    )

    def __post_init__(self) -> None:
        config.check(
            self,
            "finetune",
            positive=("label_share", "learning_rates", "crop_scale", "eval_crop"),
            not_negative=("rand_augment", "rand_augment_std", "mixup", "cutmix", "head_std", "least_steps"),
            share=("label_share", "holdout", "flip", "random_erasing", "label_smoothing", "drop_path"),
        )


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Top-1 (and top-5 of more than five classes) on the test split, with Wilson intervals."""
    classes = task.num_classes
    train = labelled_part(task.train, settings.label_share)
    candidates = settings.learning_rates or (settings.training.base_lr,)
    details: dict[str, Any] = {"train_images": len(train), "learning_rates": list(candidates)}
    chosen = candidates[0]
    if len(candidates) > 1:
        with context.stage("selection"):
            part, validation = train.holdout(settings.holdout)
            found = []
            for lr in candidates:
                model, _ = tuned(encoder, part, classes, lr, settings, context)
                right = predict(model, validation, context)[:, 0] == validation.labels
                found.append(100 * float(right.float().mean()))
        details["selection_top1"] = found
        chosen = candidates[found.index(max(found))]
    details["chosen_learning_rate"] = chosen
    with context.stage("training"):
        model, history = tuned(encoder, train, classes, chosen, settings, context)
    details |= {"steps": history.steps, "images_seen": history.images, "curve": history.curve}
    with context.stage("prediction"):
        ranked = predict(model, task.test, context)

    labels = task.unseal().labels
    hits = ranked == labels[:, None]
    metrics: dict[str, Metric] = {"top1": stats.accuracy(hits[:, 0])}
    if classes > 5:
        metrics["top5"] = stats.accuracy(hits.any(1))
    details["accuracy"] = {
        name: 100 * float(hits[labels == number, 0].float().mean()) if (labels == number).any() else None
        for number, name in enumerate(task.classes)
    }
    return Result(metrics, "top1", details, correct=hits[:, 0].numpy(), warnings=history.warnings)


def labelled_part(split: Split, share: float) -> Split:
    """The same ``share`` of a split for every run: equally many images of each class, at least one.

    A class with fewer images than that gives all that it has.
    """
    if share == 1:
        return split
    labels = split.labels
    present = labels.unique()
    each = max(1, round(share * len(split) / len(present)))
    order = torch.randperm(len(split), generator=seeds.generator("cpu", SUBSET_SEED, split.dataset))
    kept = [order[labels[order] == label][:each] for label in present]
    return split.subset(torch.cat(kept).sort().values)


def tuned(
    encoder: Encoder, split: Split, classes: int, lr: float, settings: Settings, context: Context
) -> tuple[Classifier, History]:
    """A copy of the encoder with a head, trained on ``split``."""
    recipe = settings.training
    planned = recipe.epochs * max(1, len(split) // recipe.batch_size)
    longer = max(1.0, settings.least_steps / planned) if planned else 1.0
    recipe = replace(
        recipe, base_lr=lr, epochs=recipe.epochs * longer, warmup_epochs=recipe.warmup_epochs * longer
    )
    model = Classifier(encoder, classes, settings, context.seed)
    history = fit(
        model,
        split,
        recipe,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.workdir / f"{split.part}-{split.fingerprint}-lr-{lr:g}",
        name=f"fine-tuning at lr {lr:g}",
    )
    return model, history


def predict(model: Classifier, split: Split, context: Context) -> Tensor:
    """The best classes (N, 5 or all) of each image, best first, in float32."""
    best = min(5, model.head.out_features)
    found = []
    model.eval()
    batches = split.batches(INFERENCE_BATCH, context.device)
    total = -(-len(split) // INFERENCE_BATCH)
    for batch in context.progress.track(batches, "predicting", total):
        with torch.inference_mode(), torch.autocast(context.device.type, enabled=False):
            found.append(model.logits(model.test_view(batch)).topk(best).indices.cpu())
    return torch.cat(found)


class Classifier(nn.Module):
    """A copy of the encoder with a linear head on its fine-tuning readout."""

    needs = ("labels",)

    def __init__(self, encoder: Encoder, classes: int, settings: Settings, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.for_finetuning(settings.drop_path)
        self.settings = settings
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(
            self.head.weight, std=settings.head_std, generator=seeds.generator("cpu", seed, "head")
        )
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        """As usual, but BatchNorm keeps its pretrained statistics where the settings say so."""
        super().train(mode)
        if self.settings.batch_norm == "eval":
            for module in self.encoder.modules():  # type: ignore[attr-defined]
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def layer_of(self, parameter: str) -> int:
        """The encoder's own layers, and the head on top of them."""
        name, inner = parameter.split(".", 1)
        return self.encoder.layer_of(inner) if name == "encoder" else self.encoder.depth + 1

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Augmented images (B, 3, S, S) and soft targets (B, K), which hold smoothing and mixing already."""
        chosen, spec = self.settings, self.encoder.input
        images = crop_and_flip(batch, spec.size, chosen.crop_scale, generator, flip_p=chosen.flip)
        if chosen.rand_augment:
            images = rand_augment(
                images,
                generator,
                magnitude=chosen.rand_augment,
                magnitude_std=chosen.rand_augment_std,
                fill=spec.mean,
            )
        images = normalise(images, spec)
        if chosen.random_erasing:
            images = random_erasing(images, generator, erase_p=chosen.random_erasing)
        assert batch.labels is not None
        images, targets = random_mix(
            images,
            batch.labels,
            self.head.out_features,
            generator,
            mixup_alpha=chosen.mixup,
            cutmix_alpha=chosen.cutmix,
            smoothing=chosen.label_smoothing,
        )
        return {"images": images, "targets": targets}

    def test_view(self, batch: Batch) -> Tensor:
        """The central crop of each image, as the encoder expects it: (B, 3, S, S)."""
        side = self.encoder.input.size
        resized = round(side / self.settings.eval_crop)
        images = resize_and_center_crop(batch.images, resized, side, batch.sizes)
        return normalise(images, self.encoder.input)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, K) of normalised images (B, 3, S, S)."""
        return self.head(self.encoder(images).pooled)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross entropy against soft targets (B, K), and how often the likeliest class is the target's."""
        logits = self.logits(images).float()
        loss = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
        return {"loss": loss, "accuracy": (logits.argmax(1) == targets.argmax(1)).float().mean()}
