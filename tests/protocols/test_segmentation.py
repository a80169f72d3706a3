"""Segmentation: exact features score 100, noise scores chance, masks are never shrunk nor seen too early."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, registry
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec
from mimbench.errors import DataError
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.task import Context, Task

segmentation = registry.load_protocol("segmentation")
CLASSES = 4
VOID = 9


class Stub(nn.Module):
    """Patch features that are either the patch's class, one-hot, or noise that ignores the image."""

    dim, depth, stride, readout, name = CLASSES, 4, 4, "none", "stub"
    input = InputSpec(16, (0.0,) * 3, (1.0,) * 3)

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        # images are grey with the value of the class times 60
        level = (F.avg_pool2d(images.mean(1), 4) * 255 / 60).round().long().clamp(0, CLASSES - 1)
        patches = F.one_hot(level, CLASSES).permute(0, 3, 1, 2).float()
        if self.noise:
            patches = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
        return Features(patches.mean((2, 3)), patches)


class Ragged:
    """A store of images of two sizes, padded to the larger."""

    def __init__(self, images: Tensor, sizes: Tensor) -> None:
        self.images, self.sizes = images, sizes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images[index], self.sizes[index]


def masks_of(count: int, seed: int, block: int = 16, void: bool = True) -> Tensor:
    """Masks (N, 48, 64) of blocks of one class each, some of them void."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.tensor([*range(CLASSES)] * 3 + ([VOID] if void else []))
    cells = choice[torch.randint(len(choice), (count, 48 // block, 64 // block), generator=generator)]
    return cells.repeat_interleave(block, 1).repeat_interleave(block, 2).to(torch.uint8)


def split(part: str, masks: Tensor, sizes: Tensor | None = None) -> Split:
    images = torch.where(masks == VOID, 0, masks * 60)[:, None].repeat(1, 3, 1, 1)
    layers = masks[:, None].repeat(1, 3, 1, 1)
    return Split(
        "blocks",
        part,
        InMemory(images) if sizes is None else Ragged(images, sizes),
        ("a", "b", "c", "d"),
        f"{part}",
        torch.arange(len(masks)),
        all_masks=InMemory(layers) if sizes is None else Ragged(layers, sizes),
        ignore_index=VOID,
    )


def settings(recipe: str, **changes: Any) -> Any:
    table = config.merge(segmentation.RECIPES[recipe], changes)
    return config.build(segmentation.Settings, table | {"recipe": recipe})


def evaluate(encoder: nn.Module, train: Split, test: Split, chosen: Any, folder: Path) -> Any:
    context = Context(torch.device("cpu"), 0, quiet(), folder / "work")
    return segmentation.evaluate(encoder, Task(train, test), chosen, context)


@pytest.mark.parametrize("recipe", ["linear", "knn"])
def test_exact_features_score_100(recipe: str, tmp_path: Path) -> None:
    # a patch is exactly one block of the mask, so only borders, which interpolation rounds, are to be lost
    train, test = split("train", masks_of(20, 0, void=False)), split("test", masks_of(10, 1, void=False))
    result = evaluate(Stub(), train, test, settings(recipe, pixels=4000, long_side=64), tmp_path)
    assert result.metrics["miou"].value > 99
    assert result.metrics["pixel_accuracy"].value > 99
    assert result.metrics["miou"].n == 10
    assert result.details["input_size"] == [48, 64]


@pytest.mark.parametrize("recipe", ["linear", "knn"])
def test_noise_scores_chance(recipe: str, tmp_path: Path) -> None:
    train, test = split("train", masks_of(20, 0)), split("test", masks_of(10, 1))
    result = evaluate(Stub(noise=True), train, test, settings(recipe, pixels=4000), tmp_path)
    assert 15 < result.metrics["pixel_accuracy"].value < 35  # 25 in the mean
    assert result.metrics["miou"].value < 20


@pytest.mark.parametrize("recipe", ["linear", "knn", "finetune"])
def test_predictions_know_nothing_of_test_masks(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(ViT(16, ViTShape(patch_size=8, width=16, depth=4, heads=2)), InputSpec(16), "class")
    quick = {"pixels": 500, "bank": 500, "head_width": 16, "training": {"epochs": 1, "batch_size": 4}}
    train, test = split("train", masks_of(10, 0)), split("test", masks_of(6, 1))
    wrong = dataclasses.replace(test, all_masks=InMemory(test.all_masks.images.roll(1, dims=0)))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first, again, other = (
        evaluate(encoder, train, part, settings(recipe, **quick), tmp_path / str(number))
        for number, part in enumerate((test, test, wrong))
    )
    assert first.details["predictions_sha256"] == other.details["predictions_sha256"]
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["linear", "knn"])
def test_scores_do_not_depend_on_the_inference_batch(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(ViT(16, ViTShape(patch_size=8, width=16, depth=2, heads=2)), InputSpec(16), "class")
    found = []
    for size in (16, 3):
        monkeypatch.setattr(segmentation, "INFERENCE_BATCH", size)
        result = evaluate(
            encoder,
            split("train", masks_of(10, 0)),
            split("test", masks_of(6, 1)),
            settings(recipe, pixels=500),
            tmp_path,
        )
        found.append(result.metrics["miou"].value)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_masks_are_scored_at_their_own_size(tmp_path: Path) -> None:
    """One-pixel stripes: what any shrunk mask could hide costs half of the pixels."""
    masks = torch.zeros(6, 48, 64, dtype=torch.uint8)
    masks[:, ::2] = 1
    train, test = split("train", masks), split("test", masks)
    result = evaluate(Stub(), train, test, settings("linear", pixels=2000, long_side=16), tmp_path)
    assert result.metrics["pixel_accuracy"].value == pytest.approx(50)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    full = masks_of(12, 0, void=False)
    sizes = torch.tensor([[48, 64], [32, 48], [48, 64]] * 4)
    padded = full.clone()
    for row, (h, w) in enumerate(sizes.tolist()):
        padded[row, h:], padded[row, :, w:] = 0, 0  # padding looks like class 0 and must count nowhere
    result = evaluate(
        Stub(), split("train", padded, sizes), split("test", padded, sizes), settings("knn"), tmp_path
    )
    assert result.metrics["miou"].value > 99
    assert result.details["input_size"] == [48, 64]
    part = split("train", padded, sizes)
    found = {
        int(position): (tuple(images.shape[2:]), mask)
        for positions, images, masks in segmentation.groups(
            part, Context(torch.device("cpu"), 0, quiet(), tmp_path), True, ""
        )
        for position, images, mask in zip(positions, images[:, None], masks, strict=True)
    }
    for row, size in enumerate(sizes.tolist()):
        assert found[row][0] == tuple(size)
        torch.testing.assert_close(found[row][1], full[row, : size[0], : size[1]])


@pytest.mark.parametrize(
    ("size", "stride", "changes", "expected"),
    [
        ((360, 480), 4, {}, (96, 128)),  # CamVid under a patch of 4: 24 x 32 patches
        ((360, 480), 16, {}, (368, 480)),  # never enlarged beyond rounding
        ((64, 64), 4, {}, (64, 64)),
        ((500, 375), 16, {"grid": 16}, (256, 192)),
        ((64, 64), 8, {"long_side": 128}, (128, 128)),
        ((10, 200), 16, {}, (16, 208)),  # at least one patch
    ],
)
def test_input_size(size: tuple[int, int], stride: int, changes: Any, expected: tuple[int, int]) -> None:
    assert segmentation.input_size(*size, stride, settings("linear", **changes)) == expected


def test_pixel_features_are_those_of_upsampled_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(5, 6, 8, generator=generator)
    whole = F.interpolate(patches[None], size=(37, 50), mode="bilinear", align_corners=False)[0]
    rows, columns = torch.arange(37).repeat_interleave(50), torch.arange(50).repeat(37)
    ours = segmentation.pixel_features(patches, rows, columns, (37, 50))
    torch.testing.assert_close(ours, whole.flatten(1).T, rtol=1e-4, atol=1e-5)


def vit(seed: int = 0) -> ViTEncoder:
    torch.manual_seed(seed)
    return ViTEncoder(ViT(16, ViTShape(patch_size=8, width=16, depth=2, heads=2)), InputSpec(16), "class")


def test_linear_is_logistic_regression_on_pixels(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), 0, quiet(), tmp_path)
    chosen = settings("linear", pixels=800, tolerance=1e-7)
    train = split("train", masks_of(8, 0))
    features, labels = segmentation.pixel_sample(vit(), train, chosen, context)
    assert VOID not in labels
    assert len(features) == 800
    fitted = segmentation.linear(vit(), train, (1e-1, 1e-3), CLASSES, chosen, context)
    images = segmentation.prepared(split("test", masks_of(3, 1)).store.images, vit(), chosen)
    scores = fitted.predictor(images)
    assert scores.shape == (2, 3, CLASSES, 6, 8)
    mean, std = features.mean(0), features.std(0, correction=0)
    patches = vit().eval()(images).patches.detach().permute(0, 2, 3, 1).flatten(0, 2)
    for penalty, ours in zip((1e-1, 1e-3), scores, strict=True):
        theirs = LogisticRegression(C=1 / (penalty * 800), tol=1e-8, max_iter=5000)
        theirs.fit(((features - mean) / std).double().numpy(), labels.numpy())
        expected = theirs.predict_proba(((patches - mean) / std).double().numpy())
        found = ours.permute(0, 2, 3, 1).flatten(0, 2).softmax(1)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_knn_votes_as_scikit_learn_does(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), 0, quiet(), tmp_path)
    chosen = settings("knn")
    train = split("train", masks_of(8, 0, block=8, void=False))  # a patch of 8 pixels has one class
    keys, values = segmentation.patch_bank(vit(), train, CLASSES, chosen, context)
    assert len(keys) == 8 * 48
    assert set(values.unique().tolist()) == {0.0, 1.0}
    fitted = segmentation.knn(vit(), train, (1, 7), CLASSES, chosen, context)
    images = segmentation.prepared(split("test", masks_of(3, 1)).store.images, vit(), chosen)
    patches = F.normalize(vit().eval()(images).patches.detach(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    for k, ours in zip((1, 7), fitted.predictor(images), strict=True):
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        theirs.fit(keys.numpy(), values.argmax(1).numpy())
        expected = theirs.predict_proba(patches.numpy())
        np.testing.assert_allclose(ours.permute(0, 2, 3, 1).flatten(0, 2).numpy(), expected, atol=1e-4)


def test_patch_labels_are_shares_of_labelled_pixels() -> None:
    mask = torch.tensor([[0, 1, VOID, VOID], [1, 1, VOID, 2], [0, 0, 3, 3], [0, 0, 3, 3]], dtype=torch.uint8)
    found, labelled = segmentation.patch_labels(mask, (2, 2), CLASSES)
    expected = [[0.25, 0.75, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(labelled.numpy(), [1, 0.25, 1, 1])


def test_crops_of_image_and_mask_agree() -> None:
    """The image holds its own mask, so a nearest-neighbour reading of the crop must give the crop of the mask."""
    part = split("train", masks_of(8, 3, void=False))
    batch = part.batch(torch.arange(8), needs=("masks",))
    encoder = vit()
    encoder.input = InputSpec(16, (0.0,) * 3, (1.0,) * 3)
    model = segmentation.Segmenter(encoder, CLASSES, VOID, (48, 64), settings("finetune", head_width=16), 0)
    views = model.views(batch, torch.Generator().manual_seed(1))
    assert views["images"].shape == (8, 3, 48, 64)
    assert views["masks"].dtype == torch.uint8
    read = (views["images"][:, 0] * 255 / 60).round().to(torch.uint8)
    assert float((read == views["masks"]).float().mean()) > 0.9  # all but interpolated borders
    assert not torch.equal(views["masks"], batch.masks)


def test_crop_boxes_stay_inside_and_keep_the_aspect() -> None:
    sizes = torch.tensor([[48, 64], [30, 200], [200, 30]]).repeat(200, 1)
    boxes = segmentation.crop_boxes(sizes, (48, 64), 0.5, torch.Generator().manual_seed(0))
    top, left, height, width = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    assert ((width - height * 64 / 48).abs() <= 1.5).all()
    assert float(height[::3].float().min()) >= 24
    assert left[::3].max() + width[::3].max() > 60  # every place is reached


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_finetuning_learns_blocks(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder: nn.Module = ViTEncoder(
        ViT(16, ViTShape(patch_size=8, width=16, depth=4, heads=2)), InputSpec(16), "class"
    )
    if kind == "resnet":
        shape = ResNetShape("basic", (1, 1, 1, 1), (8, 8, 16, 16), "cifar")
        encoder = ResNetEncoder(ResNet(shape), InputSpec(16))
    train, test = split("train", masks_of(16, 0)), split("test", masks_of(6, 1))
    training = {"epochs": 25, "batch_size": 4, "base_lr": 5e-3, "warmup_epochs": 1, "layer_decay": 1.0}
    chosen = settings("finetune", head_width=16, head_dropout=0.0, drop_path=0.0, training=training)
    result = evaluate(encoder, train, test, chosen, tmp_path)
    assert result.metrics["miou"].value > 75
    assert result.details["steps"] == 100


def test_a_batch_without_labels_has_no_loss_and_no_gradient_of_nan() -> None:
    model = segmentation.Segmenter(vit(), CLASSES, VOID, (48, 64), settings("finetune", head_width=16), 0)
    outputs = model(torch.zeros(2, 3, 48, 64), torch.full((2, 48, 64), VOID, dtype=torch.uint8))
    outputs["loss"].backward()
    assert float(outputs["loss"].detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("recipe", ["linear", "knn"])
def test_nothing_labelled_is_refused(recipe: str, tmp_path: Path) -> None:
    void = torch.full((6, 48, 64), VOID, dtype=torch.uint8)
    with pytest.raises(DataError, match="has a label"):
        evaluate(Stub(), split("train", void), split("test", void), settings(recipe), tmp_path)


def test_a_class_missing_from_train_is_never_predicted(tmp_path: Path) -> None:
    masks = masks_of(12, 0, void=False)
    masks[masks == 3] = 2
    test = masks_of(6, 1, void=False)
    result = evaluate(
        Stub(), split("train", masks), split("test", test), settings("linear", pixels=2000), tmp_path
    )
    assert result.details["iou"]["d"] == 0
    assert result.details["iou"]["a"] > 90


def test_real_road_scenes(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few CamVid images through the default recipe: colours alone tell the sky from the road."""
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    from mimbench.data import load

    data = load("camvid")
    train, test = data.train.subset(torch.arange(0, 360, 60)), data.test.subset(torch.arange(0, 230, 60))
    result = evaluate(vit(), train, test, settings("linear", pixels=3000, long_side=128), tmp_path)
    assert result.details["iou"]["sky"] > 40
    assert result.details["input_size"] == [96, 128]
    assert set(result.details["iou"]) == set(data.test.classes)
