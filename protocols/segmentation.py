"""Semantic segmentation from frozen patch features, or by training the whole encoder.

Three recipes, never compared as one:

``linear``    multinomial logistic regression on frozen patch features, read at single pixels of the training
              images by bilinear interpolation. Interpolating features and then applying a linear layer is the
              same as interpolating its logits, so this is the usual 1x1 convolution, solved to its optimum on
              a fixed sample of pixels instead of by SGD.
``knn``       each patch takes the labels of its nearest training patches (cosine, weighted as in DINO's kNN).
``finetune``  the whole encoder with a UPerNet-style head over four of its layers. Meant for a GPU: on one CPU
              core an epoch of CamVid takes minutes.

In all of them an image is resized to an input whose sides are multiples of the encoder's stride, class scores
are resized bilinearly to the image's own size, and every pixel of the mask at its own size is counted: masks
are never shrunk. Pixels with the split's ``ignore_index`` count nowhere.

Held against: scikit-learn's logistic regression and kNN on the same pixels, torchmetrics' and scikit-learn's counts
of mean IoU, and features that know the answer, which score 100 (``tests/protocols/test_segmentation.py``,
``test_iou.py``).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, iou, seeds
from mimbench.augment import chance, image_sizes, resized_crop
from mimbench.data import Batch, Split
from mimbench.encoder import Encoder, normalise, resize
from mimbench.errors import DataError
from mimbench.features import frozen
from mimbench.fit import Recipe, fit
from mimbench.logistic import Problem
from mimbench.models.upernet import UPerNet, upsample
from mimbench.neighbours import nearest
from mimbench.task import Context, Result, Task

VERSION = 1
NEEDS = ("masks",)
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "knn": {"head": "knn"},
    "finetune": {"head": "upernet"},
}
INFERENCE_BATCH = 16  # images per forward; no score depends on it
VOTES = 2_048  # patches whose neighbours' labels are held at once

# Normalised images (B, 3, h, w) to the class scores of S candidate settings: (S, B, K, h', w').
Predictor = Callable[[Tensor], Tensor]


class Fitted(NamedTuple):
    """A predictor with what a record should say of it."""

    predictor: Predictor
    facts: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score."""

    recipe: str = "linear"  # the name these settings go by
    head: Literal["linear", "knn", "upernet"] = "linear"  # what turns features into classes
    grid: int = 32  # patches along the longer side of an input, unless that would enlarge the image
    long_side: int | None = None  # longer side of an input in pixels, instead of what ``grid`` gives
    mask_resolution: Literal["full"] = "full"  # scored at each mask's own size, scores resized bilinearly
    holdout: float = 0.1  # share of the training images on which candidates are compared
    pixels: int = 100_000  # linear: training pixels, spread evenly over the images
    penalties: tuple[float, ...] = (
        1e-2,
        1e-3,
        1e-4,
        1e-5,
    )  # linear: candidates p, adding p ||W||^2 / 2 to the loss
    tolerance: float = 1e-3  # linear: gradient norm at which the solver stops
    bank: int = 100_000  # knn: training patches, spread evenly over the images
    neighbours: tuple[int, ...] = (3, 10, 30, 100)  # knn: candidates for k
    temperature: float = 0.07  # knn: a neighbour of cosine similarity s weighs exp(s / temperature)
    learning_rates: tuple[float, ...] = ()  # finetune: candidates for training.base_lr; none: that one
    head_width: int = 128  # finetune: channels of the head (512 for ViT-B in the published head)
    head_dropout: float = 0.1  # finetune: channels of the fused map that are dropped
    drop_path: float = 0.1  # finetune: stochastic depth of the last block
    crop_scale: float = 0.5  # finetune: least side of a training crop over the largest that fits the image
    flip: float = 0.5  # finetune: probability of a mirrored crop
    batch_norm: Literal["train", "eval"] = "train"  # finetune: statistics an encoder's BatchNorm trains with
    training: Recipe = Recipe(  # finetune
        epochs=50,
        batch_size=16,
        base_lr=5e-4,
        lr_batch=0,
        weight_decay=0.05,
        layer_decay=0.75,
        warmup_epochs=5,
    )

    def __post_init__(self) -> None:
        config.check(
            self,
            "segmentation",
            positive=(
                *(
                    "grid",
                    "long_side",
                    "pixels",
                    "penalties",
                    "tolerance",
                    "bank",
                    "neighbours",
                    "temperature",
                ),
                *("learning_rates", "head_width"),
            ),
            share=("holdout", "head_dropout", "drop_path", "crop_scale", "flip"),
            filled=("penalties", "neighbours"),
        )


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Mean IoU and pixel accuracy on the test split, with intervals that resample test images."""
    build: Callable[..., Fitted] = {"linear": linear, "knn": knn, "upernet": upernet}[settings.head]
    candidates: Sequence[float] = {
        "linear": settings.penalties,
        "knn": settings.neighbours,
        "upernet": settings.learning_rates or (settings.training.base_lr,),
    }[settings.head]
    details: dict[str, Any] = {"candidates": list(candidates)}
    chosen = candidates[0]
    if len(candidates) > 1:
        with context.stage("selection"):
            part, validation = task.train.holdout(settings.holdout)
            fitted = build(encoder, part, candidates, task.num_classes, settings, context)
            found = candidate_miou(fitted.predictor, encoder, validation, task.num_classes, settings, context)
        details["selection_miou"] = [100 * value for value in found]
        chosen = candidates[int(np.nanargmax(found))]
    details["chosen"] = chosen
    with context.stage("training"):
        fitted = build(encoder, task.train, (chosen,), task.num_classes, settings, context)
    with context.stage("prediction"):
        maps = predicted_maps(fitted.predictor, encoder, task.test, settings, context)
    details |= fitted.facts
    details["input_size"] = list(maps[0].input_size)
    details["predictions_sha256"] = digest_of(maps)

    per_image = areas_of(maps, task.unseal(), task.num_classes)
    metrics = iou.metrics(per_image, context.seed)
    found_iou = iou.scores(per_image.sum(0)).iou
    details["iou"] = {
        name: None if np.isnan(value) else 100 * float(value)
        for name, value in zip(task.classes, found_iou, strict=True)
    }
    return Result(metrics, "miou", details, warnings=fitted.warnings)


# Images, masks and label maps


def input_size(height: int, width: int, stride: int, settings: Settings) -> tuple[int, int]:
    """Height and width of the encoder's input for an image: its aspect kept, both multiples of ``stride``."""
    longer = settings.long_side or min(settings.grid * stride, max(height, width))
    scale = longer / max(height, width)
    return tuple(stride * max(1, int(side * scale / stride + 0.5)) for side in (height, width))  # type: ignore[return-value]


class Group(NamedTuple):
    """Images of one true size."""

    positions: Tensor  # (B,) places in the split
    images: Tensor  # (B, 3, H, W) uint8, no padding
    masks: Tensor | None  # (B, H, W) uint8


def groups(split: Split, context: Context, masks: bool, label: str) -> Iterator[Group]:
    """The whole split in batches, each divided into images of one size with their padding removed."""
    batches = split.batches(INFERENCE_BATCH, context.device, ("masks",) if masks else ())
    for batch in context.progress.track(batches, label, math.ceil(len(split) / INFERENCE_BATCH)):
        if batch.sizes is None:
            yield Group(batch.index, batch.images, batch.masks)
            continue
        for size in batch.sizes.unique(dim=0):
            rows = (batch.sizes == size).all(1).nonzero()[:, 0]
            h, w = size.tolist()
            yield Group(
                batch.index[rows.cpu()],
                batch.images[rows, :, :h, :w],
                None if batch.masks is None else batch.masks[rows, :h, :w],
            )


def prepared(images: Tensor, encoder: Encoder, settings: Settings) -> Tensor:
    """uint8 images (B, 3, H, W) as the encoder's normalised input (B, 3, h, w)."""
    size = input_size(images.shape[2], images.shape[3], encoder.stride, settings)
    return normalise(resize(images, size), encoder.input)


def full_size(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class scores (K, h, w) of one image to its label map (H, W) uint8."""
    return upsample(scores[None].float(), size)[0].argmax(0).to(torch.uint8)


def candidate_miou(
    predictor: Predictor,
    encoder: Encoder,
    split: Split,
    classes: int,
    settings: Settings,
    context: Context,
) -> list[float]:
    """Mean IoU on a labelled split of each candidate that the predictor scores."""
    total: Tensor | None = None
    for group in groups(split, context, True, "comparing candidates"):
        assert group.masks is not None
        scores = predictor(prepared(group.images, encoder, settings))
        found = torch.zeros(len(scores), classes, classes, dtype=torch.int64, device=context.device)
        for candidate, of_images in enumerate(scores):
            for image, mask in zip(of_images, group.masks, strict=True):
                label_map = full_size(image, mask.shape)
                found[candidate] += iou.confusion(label_map[None], mask[None], classes, split.ignore_index)[0]
        total = found if total is None else total + found
    assert total is not None
    return iou.scores(iou.areas(total).cpu().numpy()).miou.tolist()


class LabelMap(NamedTuple):
    """A predicted label map of one image, packed so that those of a large split fit in memory."""

    packed: bytes
    size: tuple[int, int]
    input_size: tuple[int, int]

    def unpack(self) -> Tensor:
        """(H, W) uint8."""
        values = np.frombuffer(zlib.decompress(self.packed), dtype=np.uint8)
        return torch.from_numpy(values.reshape(self.size).copy())


def digest_of(maps: list[LabelMap]) -> str:
    """A hash of predicted label maps: equal predictions give equal hashes."""
    total = hashlib.sha256()
    for label_map in maps:
        total.update(label_map.unpack().numpy().tobytes())
    return total.hexdigest()[:16]


def predicted_maps(
    predictor: Predictor, encoder: Encoder, split: Split, settings: Settings, context: Context
) -> list[LabelMap]:
    """The label map of every image of a split, in order, under the predictor's one candidate."""
    maps: dict[int, LabelMap] = {}
    for group in groups(split, context, False, "predicting"):
        inputs = prepared(group.images, encoder, settings)
        (scores,) = predictor(inputs)
        size = (group.images.shape[2], group.images.shape[3])
        for position, image in zip(group.positions.tolist(), scores, strict=True):
            label_map = full_size(image, size).cpu().numpy()
            maps[position] = LabelMap(
                zlib.compress(label_map.tobytes(), 1), size, (inputs.shape[2], inputs.shape[3])
            )
    return [maps[position] for position in range(len(split))]


def areas_of(maps: list[LabelMap], split: Split, classes: int) -> np.ndarray:
    """Areas (N, 3, K) of predicted maps against the masks of a labelled split."""
    found = []
    for position, label_map in enumerate(maps):
        batch = split.batch(torch.tensor([position]), needs=("masks",))
        assert batch.masks is not None
        h, w = label_map.size
        matrices = iou.confusion(
            label_map.unpack()[None], batch.masks[:, :h, :w], classes, split.ignore_index
        )
        found.append(iou.areas(matrices)[0].numpy())
    return np.stack(found)


# Frozen encoders


def frozen_patches(encoder: Encoder, images: Tensor) -> Tensor:
    """Patch features (B, D, h, w) in float32 of normalised images, the encoder in eval mode."""
    with frozen(encoder), torch.autocast(images.device.type, enabled=False):
        return encoder(images).patches.float()


def labelled_groups(
    encoder: Encoder, split: Split, settings: Settings, context: Context, label: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Position, patch features (D, h, w) and mask (H, W) of each image of a labelled split."""
    for group in groups(split, context, True, label):
        assert group.masks is not None
        patches = frozen_patches(encoder, prepared(group.images, encoder, settings))
        yield from zip(group.positions.tolist(), patches, group.masks, strict=True)


def pixel_features(patches: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Features (P, D) at pixels (P,) of an image of ``size``: patches (D, h, w) interpolated as ``upsample`` does."""
    y = (2 * rows + 1) / size[0] - 1
    x = (2 * columns + 1) / size[1] - 1
    where = torch.stack([x, y], dim=-1)[None, None].float()
    found = F.grid_sample(patches[None], where, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def pixel_sample(
    encoder: Encoder, split: Split, settings: Settings, context: Context
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and classes (N,) of labelled pixels: as many of each image, drawn with replacement."""
    share = max(1, settings.pixels // len(split))
    features, labels = [], []
    for position, patches, mask in labelled_groups(encoder, split, settings, context, "reading pixels"):
        counted = torch.ones_like(mask, dtype=torch.bool)
        if split.ignore_index is not None:
            counted = mask != split.ignore_index
        places = counted.flatten().nonzero()[:, 0]
        if not len(places):
            continue
        generator = seeds.generator("cpu", context.seed, "pixels", position)
        drawn = places[torch.randint(len(places), (share,), generator=generator).to(places.device)]
        rows, columns = drawn // mask.shape[1], drawn % mask.shape[1]
        features.append(pixel_features(patches, rows, columns, (mask.shape[0], mask.shape[1])))
        labels.append(mask.flatten()[drawn].long())
    if not features:
        raise DataError(f"no pixel of '{split.dataset}' has a label in its {split.part} split")
    return torch.cat(features), torch.cat(labels)


def linear(
    encoder: Encoder,
    split: Split,
    candidates: Sequence[float],
    classes: int,
    settings: Settings,
    context: Context,
) -> Fitted:
    """Logistic regression on pixels of ``split``, once per penalty; standardised features, as the solver has them."""
    problem = Problem(*pixel_sample(encoder, split, settings, context), classes)
    count = len(problem.features)
    order = sorted(candidates, reverse=True)  # each start is near the next solution
    solved = dict(
        zip(order, problem.path([1 / (p * count) for p in order], tolerance=settings.tolerance), strict=True)
    )
    weights = torch.stack([solved[p].weight / solved[p].scale for p in candidates])  # (S, K, D)
    biases = torch.stack([solved[p].bias for p in candidates]).clamp(
        min=-1e4
    )  # no -inf: interpolation would spread NaN
    biases = (biases - weights @ problem.mean).float()
    weights = weights.float()

    def predictor(images: Tensor) -> Tensor:
        patches = frozen_patches(encoder, images)
        return torch.einsum("skd,bdhw->sbkhw", weights, patches) + biases[:, None, :, None, None]

    facts = {
        "training_pixels": count,
        "objective": [solved[p].objective for p in candidates],
        "gradient_norm": [solved[p].gradient_norm for p in candidates],
    }
    warnings = [
        f"the solver stopped at a gradient norm of {solved[p].gradient_norm:.1e} for the penalty {p:g}"
        for p in candidates
        if not solved[p].converged
    ]
    return Fitted(predictor, facts, warnings)


def patch_labels(mask: Tensor, grid: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """What the pixels of each patch say: shares per class (h * w, K), and the labelled share (h * w,)."""
    hot = torch.stack([mask == label for label in range(classes)]).float()
    shares = F.adaptive_avg_pool2d(hot[None], grid)[0].flatten(1).T
    labelled = shares.sum(1)
    return shares / labelled.clamp(min=1e-12)[:, None], labelled


def patch_bank(
    encoder: Encoder, split: Split, classes: int, settings: Settings, context: Context
) -> tuple[Tensor, Tensor]:
    """Unit features (M, D) and class shares (M, K) of patches of which at least half is labelled."""
    share = max(1, settings.bank // len(split))
    keys, values = [], []
    for position, patches, mask in labelled_groups(encoder, split, settings, context, "filling the bank"):
        shares, labelled = patch_labels(mask, (patches.shape[1], patches.shape[2]), classes)
        places = (labelled >= 0.5).nonzero()[:, 0]
        generator = seeds.generator("cpu", context.seed, "bank", position)
        drawn = places[torch.randperm(len(places), generator=generator)[:share].to(places.device)]
        keys.append(F.normalize(patches.flatten(1).T[drawn], dim=1))
        values.append(shares[drawn])
    if not sum(map(len, keys)):
        raise DataError(f"no patch of '{split.dataset}' has a label in its {split.part} split")
    return torch.cat(keys), torch.cat(values)


def shares(similarities: Tensor, where: Tensor, values: Tensor, k: int, temperature: float) -> Tensor:
    """Class shares (Q, K): the mean of those of the first k neighbours, weighted by exp(similarity / temperature)."""
    found = []
    for near, at in zip(similarities[:, :k].split(VOTES), where[:, :k].split(VOTES), strict=True):
        weights = (near / temperature).softmax(1)
        found.append((weights[:, :, None] * values[at]).sum(1))
    return torch.cat(found)


def knn(
    encoder: Encoder,
    split: Split,
    candidates: Sequence[int],
    classes: int,
    settings: Settings,
    context: Context,
) -> Fitted:
    """Votes of the nearest patches of ``split``, once per k; a bank smaller than k votes as a whole."""
    keys, values = patch_bank(encoder, split, classes, settings, context)
    most = min(max(candidates), len(keys))

    def predictor(images: Tensor) -> Tensor:
        patches = frozen_patches(encoder, images)
        queries = patches.flatten(2).transpose(1, 2).flatten(0, 1)
        similarities, where = nearest(queries, keys, most)
        b, _, h, w = patches.shape
        scores = [shares(similarities, where, values, k, settings.temperature) for k in candidates]
        return torch.stack([s.view(b, h, w, classes).permute(0, 3, 1, 2) for s in scores])

    warnings = [
        f"k = {k} is more than the {len(keys)} patches of the bank" for k in candidates if k > len(keys)
    ]
    return Fitted(predictor, {"bank_patches": len(keys)}, warnings)


# Training the encoder


def shared_size(split: Split, stride: int, settings: Settings) -> tuple[int, int]:
    """One input size for all crops of a split: that of its first image."""
    batch = split.batch(torch.tensor([0]))
    h, w = batch.images.shape[2:] if batch.sizes is None else batch.sizes[0].tolist()
    return input_size(h, w, stride, settings)


def crop_boxes(sizes: Tensor, size: tuple[int, int], least: float, generator: torch.Generator) -> Tensor:
    """Boxes (B, 4) as top, left, height, width with the aspect of ``size``, inside images of ``sizes`` (B, 2).

    The side is uniform between ``least`` and 1 times that of the largest such box, the place uniform.
    """
    device = sizes.device
    aspect = torch.tensor(size, device=device, dtype=torch.float32)
    largest = (sizes / aspect).amin(1, keepdim=True) * aspect
    scale = least + (1 - least) * torch.rand(len(sizes), 1, generator=generator, device=device)
    extent = (largest * scale).round().long().clamp(min=1)
    room = sizes - extent + 1
    corner = (torch.rand(len(sizes), 2, generator=generator, device=device) * room).long()
    return torch.cat([torch.minimum(corner, room - 1), extent], dim=1)


def crop_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor) -> Tensor:
    """Each mask's box (B, H, W) resized to the nearest pixel and mirrored where ``flip`` is true: (B, *size)."""
    top, left, height, width = boxes.unbind(1)
    down = torch.arange(size[0], device=masks.device)[None]
    across = torch.arange(size[1], device=masks.device)[None]
    across = torch.where(flip[:, None], size[1] - 1 - across, across)
    rows = top[:, None] + (2 * down + 1) * height[:, None] // (2 * size[0])
    columns = left[:, None] + (2 * across + 1) * width[:, None] // (2 * size[1])
    image = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[image, rows[:, :, None], columns[:, None, :]]


class Segmenter(nn.Module):
    """A copy of the encoder with a UPerNet-style head over four layers at equal depths."""

    needs = ("masks",)

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        ignore_index: int | None,
        size: tuple[int, int],
        settings: Settings,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder.for_finetuning(settings.drop_path)
        self.settings = settings
        self.size = size
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.layers = tuple(max(0, encoder.depth * part // 4 - 1) for part in (1, 2, 3, 4))
        device = next(self.encoder.parameters()).device  # type: ignore[attr-defined]
        with frozen(self.encoder):
            maps = self.encoder(torch.zeros(1, 3, *size, device=device), self.layers).layers
        with torch.random.fork_rng(devices=[]):
            seeds.seed_everything(seed, "segmentation head")
            self.head = UPerNet(
                [m.shape[1] for m in maps],
                classes,
                settings.head_width,
                settings.head_dropout,
                rescale=len({m.shape[2:] for m in maps}) == 1,
            )

    def train(self, mode: bool = True) -> Segmenter:
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
        """Random crops of one size, mirrored at random, with their masks."""
        assert batch.masks is not None
        sizes = image_sizes(batch.images, batch.sizes)
        boxes = crop_boxes(sizes, self.size, self.settings.crop_scale, generator)
        flip = chance(len(batch), self.settings.flip, generator)
        images = resized_crop(batch.images, boxes, self.size, flip)
        masks = crop_masks(batch.masks, boxes, self.size, flip)
        return {"images": normalise(images, self.encoder.input), "masks": masks}

    def scores(self, images: Tensor) -> Tensor:
        """Class scores (B, K, h', w') of normalised images (B, 3, h, w)."""
        return self.head(self.encoder(images, self.layers).layers)

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Cross entropy over the labelled pixels (B, h, w) of the batch, and the share of them that is right."""
        scores = upsample(self.scores(images).float(), (images.shape[2], images.shape[3]))
        truth = masks.long()
        counted = truth != self.ignore_index
        pixels = counted.sum().clamp(min=1)  # a batch without any label has a loss of 0
        loss = F.cross_entropy(scores, truth, ignore_index=self.ignore_index, reduction="sum") / pixels
        right = (scores.argmax(1) == truth) & counted
        return {"loss": loss, "pixel_accuracy": right.sum() / pixels}


def upernet(
    encoder: Encoder,
    split: Split,
    candidates: Sequence[float],
    classes: int,
    settings: Settings,
    context: Context,
) -> Fitted:
    """The encoder fine-tuned on ``split``, once per base learning rate."""
    models, facts, warnings = [], {}, []
    for lr in candidates:
        size = shared_size(split, encoder.stride, settings)
        model = Segmenter(encoder, classes, split.ignore_index, size, settings, context.seed)
        history = fit(
            model,
            split,
            replace(settings.training, base_lr=lr),
            seed=context.seed,
            device=context.device,
            progress=context.progress,
            folder=context.workdir / f"{split.part}-{split.fingerprint}-lr-{lr:g}",
            name=f"fine-tuning at lr {lr:g}",
        )
        models.append(model)
        warnings += history.warnings
        facts = {"steps": history.steps, "images_seen": history.images, "curve": history.curve}

    def predictor(images: Tensor) -> Tensor:
        scores = []
        for model in models:
            model.eval()
            with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
                scores.append(model.scores(images))
        return torch.stack(scores)

    return Fitted(predictor, facts, warnings)
