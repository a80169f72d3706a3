"""Batched augmentation against torchvision, PIL and timm applied image by image at the same parameters."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data import auto_augment, mixup, random_erasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mimbench import augment, seeds
from mimbench.augment import geometry
from mimbench.data.split import Batch
from mimbench.errors import ConfigError, DataError


def generator(seed: int = 0) -> torch.Generator:
    return seeds.generator("cpu", seed, "test")


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 images with flat areas, edges and noise, each with its own range of values."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((count, 3, height // 4 + 1, width // 4 + 1)).repeat(4, 2).repeat(4, 3)
    noisy = blocks[:, :, :height, :width] + 0.1 * rng.standard_normal((count, 3, height, width))
    low, high = 0.3 * rng.random((count, 3, 1, 1)), 0.7 + 0.3 * rng.random((count, 3, 1, 1))
    return torch.from_numpy((255 * (low + (high - low) * noisy)).clip(0, 255).astype(np.uint8))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def boxes_inside(sizes: Tensor, seed: int = 0) -> Tensor:
    return augment.random_resized_crop_boxes(sizes, (0.05, 1.0), generator(seed), (0.4, 2.5))


@pytest.mark.parametrize("way", ["at once", "in blocks"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (47, 61, 24), (20, 33, (40, 56)), (150, 90, 17)]
)
def test_resized_crop_and_flip_equal_torchvision(
    height: int,
    width: int,
    size: int | tuple[int, int],
    interpolation: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geometry, "SMALL", 10**9 if way == "at once" else 0)
    images = pictures(12, height, width)
    boxes = boxes_inside(augment.image_sizes(images))
    boxes[0] = torch.tensor([0, 0, height, width])
    flip = torch.arange(12) % 2 == 0
    from_floats = augment.resized_crop(images / 255, boxes, size, flip, interpolation)
    from_bytes = augment.resized_crop(images, boxes, size, flip, interpolation)
    target = [size, size] if isinstance(size, int) else list(size)
    mode = v2.InterpolationMode(interpolation)
    for i, box in enumerate(boxes.tolist()):
        exact = TF.resized_crop(images[i] / 255, *box, target, mode, antialias=True).clamp(0, 1)
        coarse = TF.resized_crop(images[i], *box, target, mode, antialias=True)
        if flip[i]:
            exact, coarse = exact.flip(2), coarse.flip(2)
        torch.testing.assert_close(from_floats[i], exact, atol=1e-5, rtol=0)
        assert (255 * from_bytes[i] - coarse).abs().max() < 1.5  # theirs rounds twice, ours never


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("images", [pictures(21, 70, 83), pictures(21, 70, 83) / 255])
def test_both_ways_to_resample_agree_and_images_do_not_depend_on_each_other(
    images: Tensor, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = torch.randint(40, 71, (21, 2), generator=generator()) if ragged else augment.image_sizes(images)
    boxes = boxes_inside(sizes)
    flip = torch.arange(21) % 2 == 0
    views = {}
    for way, small in (("at once", 10**9), ("in blocks", 0)):
        monkeypatch.setattr(geometry, "SMALL", small)
        crop = augment.resized_crop(images, boxes, (50, 45), flip)
        assert torch.equal(crop[7:8], augment.resized_crop(images[7:8], boxes[7:8], (50, 45), flip[7:8]))
        views[way] = crop, augment.resize_and_center_crop(images, 41, 37, sizes)
    for dense, blocked in zip(*views.values(), strict=True):
        torch.testing.assert_close(blocked, dense, atol=1e-6, rtol=0)


def test_resized_crop_ignores_the_padding_of_ragged_batches() -> None:
    sizes = torch.tensor([[20, 31], [32, 18], [9, 32]])
    images = pictures(3, 32, 32) / 255
    boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    boxes[0] = torch.tensor([5, 7, 15, 24])  # touches the padding
    whole = augment.resized_crop(images, boxes, 16)
    for image, box, got in zip(images, boxes.tolist(), whole, strict=True):
        expected = TF.resized_crop(image, *box, [16, 16], v2.InterpolationMode.BICUBIC).clamp(0, 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (60, 200, (0.08, 1.0), (3 / 4, 4 / 3)),  # wide: many tries fail
        (64, 64, (0.9, 1.0), (2.0, 3.0)),  # never fits: always the fallback
        (200, 50, (0.5, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_crop_boxes_are_distributed_as_torchvision_draws_them(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 3000
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    ours = augment.random_resized_crop_boxes(sizes, scale, generator(), ratio)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale, ratio)
    drawn = [crop.make_params([torch.empty(3, height, width)]) for _ in range(count)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    assert (ours >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= sizes).all()
    readings = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "free corner": lambda b: b[:, 0] / (height - b[:, 2] + 1),
    }
    for name, reading in readings.items():
        p = stats.ks_2samp(reading(ours).numpy(), reading(theirs).numpy()).pvalue
        assert p > 1e-3, (name, p)


def test_crop_boxes_of_one_image_do_not_depend_on_the_others() -> None:
    sizes = torch.randint(20, 90, (16, 2), generator=generator())
    others = sizes.clone()
    others[1:] += 7
    first = augment.random_resized_crop_boxes(sizes, (0.2, 1.0), generator(3))
    second = augment.random_resized_crop_boxes(others, (0.2, 1.0), generator(3))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resized", "size"), [(32, 28), (25, 25), (64, 41)])
def test_evaluation_view_equals_resize_and_center_crop(resized: int, size: int, interpolation: str) -> None:
    sizes = torch.tensor([[40, 61], [53, 38], [44, 44], [37, 60]])
    images = pictures(4, 53, 61) / 255
    ours = augment.resize_and_center_crop(images, resized, size, sizes, interpolation)
    for image, (height, width), got in zip(images, sizes.tolist(), ours, strict=True):
        mode = v2.InterpolationMode(interpolation)
        whole = TF.resize(image[:, :height, :width], [resized], mode, antialias=True)
        expected = TF.center_crop(whole, [size, size]).clamp(0, 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="does not fit"):
        augment.resize_and_center_crop(images, 24, 25)


def test_flip_and_pad_and_crop() -> None:
    images = pictures(6, 12, 15)
    flip = torch.tensor([True, False, True, True, False, False])
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [7, 1]])
    mirrored = augment.horizontal_flip(images, flip)
    shifted = augment.pad_and_crop(images, offsets, 4, flip)
    assert shifted.dtype == torch.uint8
    for i, image in enumerate(images):
        assert torch.equal(mirrored[i], TF.horizontal_flip(image) if flip[i] else image)
        crop = TF.crop(TF.pad(image, [4]), *offsets[i].tolist(), 12, 15)
        assert torch.equal(shifted[i], TF.horizontal_flip(crop) if flip[i] else crop)


def test_crop_and_flip_repeats_with_the_seed_and_flips_half() -> None:
    images = pictures(400, 16, 16)
    batch = Batch(images, None, torch.arange(400))
    view = augment.crop_and_flip(batch, 16, (1.0, 1.0), generator(), ratio=(1.0, 1.0))
    assert torch.equal(view, augment.crop_and_flip(batch, 16, (1.0, 1.0), generator(), ratio=(1.0, 1.0)))
    flipped = (view - images.flip(3) / 255).abs().amax((1, 2, 3)) < 1e-5
    straight = (view - images / 255).abs().amax((1, 2, 3)) < 1e-5
    assert (flipped ^ straight).all()
    assert 160 < int(flipped.sum()) < 240


COLOUR_OPERATIONS: dict[str, tuple[Callable, Callable, tuple[float, ...]]] = {
    "brightness": (augment.adjust_brightness, TF.adjust_brightness, (0.0, 0.4, 1.0, 1.9)),
    "contrast": (augment.adjust_contrast, TF.adjust_contrast, (0.0, 0.4, 1.0, 1.9)),
    "saturation": (augment.adjust_saturation, TF.adjust_saturation, (0.0, 0.4, 1.0, 1.9)),
    "sharpness": (augment.adjust_sharpness, TF.adjust_sharpness, (0.0, 0.4, 1.0, 1.9)),
    "hue": (augment.adjust_hue, TF.adjust_hue, (-0.5, -0.1, 0.0, 0.37)),
    "solarise": (augment.solarise, TF.solarize, (0.0, 0.3, 0.8, 1.0)),
}


@pytest.mark.parametrize("name", COLOUR_OPERATIONS)
def test_colour_operations_equal_torchvision(name: str) -> None:
    ours, theirs, parameters = COLOUR_OPERATIONS[name]
    images = pictures(4, 21, 30) / 255
    images[1, :, 5:9] = images[1, :1, 5:9]  # grey areas have no hue
    images[2, 1] = images[2, 0]  # two channels share the maximum
    expected = torch.stack([theirs(i, p) for i, p in zip(images, parameters, strict=True)])
    torch.testing.assert_close(ours(images, torch.tensor(parameters)), expected, atol=2e-6, rtol=0)


def test_colour_operations_without_parameters_equal_torchvision() -> None:
    images = pictures(4, 21, 30)
    images[1, 2] = 77  # a flat channel
    floats = images / 255
    close = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(augment.greyscale(floats), TF.rgb_to_grayscale(floats), **close)
    torch.testing.assert_close(augment.invert(floats), TF.invert(floats), **close)
    torch.testing.assert_close(augment.autocontrast(floats), TF.autocontrast(floats), **close)
    torch.testing.assert_close(augment.equalise(floats) * 255, TF.equalize(images).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(8, 9), (32, 32), (64, 50)])
def test_equalise_follows_pillow(size: tuple[int, int]) -> None:
    images = pictures(4, *size)
    images[0, 0] = 9
    images[1] //= 100  # a few levels only
    expected = torch.stack([from_pil(ImageOps.equalize(to_pil(image))) for image in images])
    assert torch.equal((augment.equalise(images / 255) * 255).round().byte(), expected)


def test_posterise_keeps_bits_of_8_bit_levels() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(9, 3, 1, 1)
    expected = torch.stack([TF.posterize(image, bits) for bits, image in enumerate(images)])
    assert torch.equal((augment.posterise(images / 255, torch.arange(9)) * 255).round().byte(), expected)


def test_colour_jitter_equals_torchvision_in_every_order() -> None:
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[orders.sort(1).values.eq(torch.arange(4)).all(1)]
    assert len(orders) == 24
    images = pictures(24, 10, 12) / 255
    factors, _ = augment.random_jitter(24, (0.8, 0.8, 0.8, 0.4), generator())
    ours = augment.colour_jitter(images, factors, orders)
    apply = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for image, values, order, got in zip(images, factors.tolist(), orders.tolist(), ours, strict=True):
        for operation in order:
            image = apply[operation](image, values[operation])
        torch.testing.assert_close(got, image, atol=1e-5, rtol=0)


def test_jitter_is_distributed_as_torchvision_draws_it() -> None:
    factors, order = augment.random_jitter(40000, (0.4, 1.5, 0.2, 0.1), generator())
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(40000, 4))
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    assert stats.chisquare(codes.unique(return_counts=True)[1]).pvalue > 1e-3
    jitter = v2.ColorJitter(0.4, 1.5, 0.2, 0.1)
    limits = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for column, (low, high) in zip(factors.T, limits, strict=True):
        assert stats.kstest(column.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("size", "kernel"), [((32, 32), 3), ((30, 24), 23), ((16, 41), 9)])
def test_gaussian_blur_equals_torchvision(size: tuple[int, int], kernel: int) -> None:
    images = pictures(5, *size) / 255
    sigma = torch.tensor([0.1, 0.3, 0.9, 2.0, 5.0])
    expected = torch.stack(
        [TF.gaussian_blur(i, kernel, s) for i, s in zip(images, sigma.tolist(), strict=True)]
    )
    torch.testing.assert_close(augment.gaussian_blur(images, sigma, kernel), expected, atol=2e-6, rtol=0)


def test_blur_kernel_is_simclrs() -> None:
    assert [augment.blur_kernel_size(size) for size in (32, 96, 224)] == [3, 9, 23]


def test_affine_follows_pillow() -> None:
    images = pictures(8, 31, 44)
    maps = torch.eye(2, 3) + 0.4 * torch.randn(8, 2, 3, generator=generator())
    maps[:, :, 2] *= 20
    maps[0] = torch.eye(2, 3)
    fill = (30, 120, 200)
    ours = augment.affine(images / 255, maps, torch.tensor(fill) / 255) * 255
    for image, matrix, got in zip(images, maps, ours, strict=True):
        expected = to_pil(image).transform(
            (44, 31),
            Image.Transform.AFFINE,
            matrix.flatten().tolist(),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
        difference = (got - from_pil(expected)).abs()
        assert difference.max() < 1.01  # Pillow drops the fraction of a level


TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalise": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterise": "PosterizeIncreasing",
    "solarise": "SolarizeIncreasing",
    "solarise_add": "SolarizeAdd",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
# In 8-bit levels. Pillow rounds grey values, and their mean, before it blends with them; its contrast
# stretch and blends then drop fractions.
TOLERANCE = {"contrast": 2.0, "saturation": 2.0, "sharpness": 2.0}


def test_rand_augment_has_timms_increasing_operations() -> None:
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [operation.name for operation in theirs.ops] == [TIMM_NAMES[name] for name in augment.OPERATIONS]
    assert (theirs.num_layers, theirs.ops[0].prob, theirs.ops[0].magnitude) == (2, 0.5, 9)
    assert theirs.ops[0].magnitude_std == 0.5


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_rand_augment_operations_follow_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(8, 32, 40)
    top = 9.99 if name == "posterise" else 10.0  # Pillow no longer keeps 0 bits
    magnitude = torch.tensor([0.0, 2.4, 5.0, 7.7, 8.6, 9.0, 9.4, top])
    sign = torch.tensor([1, -1] * 4)
    index = list(augment.OPERATIONS).index(name)
    fill = (124, 116, 104)
    floats = images / 255
    ours = augment.apply_operations(
        floats, torch.full((8,), index), magnitude, sign, tuple(channel / 255 for channel in fill)
    )
    assert torch.equal(floats, images / 255)  # the input is left alone
    for image, level, side, got in zip(images, magnitude.tolist(), sign.tolist(), ours, strict=True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, side=side: side * value)
        hints = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        theirs = auto_augment.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=level, hparams=hints)
        difference = (got * 255 - from_pil(theirs(to_pil(image)))).abs()
        assert difference.max() < TOLERANCE.get(name, 1.01), (level, side)


def test_each_image_gets_its_own_operation() -> None:
    images = pictures(17, 16, 16) / 255
    choice = torch.tensor([3, -1, 14, 0, 0, 7, 2, 2, 9, 1, 5, 4, 6, 8, 10, 11, 12])
    magnitude, sign = torch.linspace(4, 10, 17), 1 - 2 * (torch.arange(17) % 2)
    together = augment.apply_operations(images, choice, magnitude, sign)
    assert torch.equal(together[1], images[1])
    for i in range(17):
        alone = augment.apply_operations(
            images[i : i + 1], choice[i : i + 1], magnitude[i : i + 1], sign[i : i + 1]
        )
        torch.testing.assert_close(together[i], alone[0], atol=1e-6, rtol=0)


def test_rand_augment_draws() -> None:
    # Black is there but not white: neither stretching the contrast nor solarising equals another operation.
    images = (0.8 * pictures(1, 16, 16) / 255).repeat(4000, 1, 1, 1)
    images[..., 0, 0] = 0
    out = augment.rand_augment(images, generator())
    assert torch.equal(out, augment.rand_augment(images, generator()))
    assert not torch.equal(out, augment.rand_augment(images, generator(1)))
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    untouched = (out - images).abs().amax((1, 2, 3)) < 1e-6
    inverted = (out - (1 - images)).abs().amax((1, 2, 3)) < 1e-6
    topmost = stats.norm.sf((10 - 9) / 0.5)  # then solarising, too, inverts everything
    chances = {"both skipped": 0.25, "one inverts": 2 * 0.5 * 0.5 * (1 + topmost) / 15}
    chances["both invert"] = (0.5 * (1 + topmost) / 15) ** 2
    assert (
        stats.binomtest(int(untouched.sum()), 4000, chances["both skipped"] + chances["both invert"]).pvalue
        > 1e-3
    )
    assert stats.binomtest(int(inverted.sum()), 4000, chances["one inverts"]).pvalue > 1e-3


def test_erase_equals_torchvision() -> None:
    images = pictures(3, 20, 24) / 255
    boxes = torch.tensor([[0, 0, 5, 7], [4, 6, 16, 18], [3, 3, 0, 0]])
    noise = torch.randn(3, 3, 20, 24, generator=generator())
    for filling in (noise, 0.0):
        ours = augment.erase(images, boxes, filling)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            patch = noise[i, :, top : top + height, left : left + width]
            patch = patch if isinstance(filling, Tensor) else torch.zeros_like(patch)
            assert torch.equal(ours[i], TF.erase(images[i], top, left, height, width, patch))


@pytest.mark.parametrize(
    ("size", "area", "ratio"),
    [
        ((32, 24), (0.02, 1 / 3), (0.3, 1 / 0.3)),
        ((6, 6), (0.4, 1.1), (0.5, 1.2)),
    ],  # the second often fails to fit
)
def test_random_erasing_is_distributed_as_timms(
    size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]
) -> None:
    images = torch.full((3000, 1, *size), 9.0)
    ours = augment.random_erasing(images, generator(), erase_p=0.7, area=area, ratio=ratio, noise=False)
    random.seed(0)
    theirs = random_erasing.RandomErasing(0.7, *area, *ratio, mode="const", device="cpu")(images.clone())
    for extent in (lambda x: (x == 0).any(3).sum((1, 2)), lambda x: (x == 0).sum((1, 2, 3))):
        assert stats.ks_2samp(extent(ours).numpy(), extent(theirs).numpy()).pvalue > 1e-3
    middle = [(x == 0).float().mean((0, 1)) for x in (ours, theirs)]
    assert (middle[0] - middle[1]).abs().max() < 0.04


def test_random_erasing_fills_with_normal_noise() -> None:
    noisy = augment.random_erasing(torch.full((400, 1, 32, 24), 9.0), generator(), erase_p=1.0)
    erased = noisy[noisy != 9]
    assert stats.kstest(erased[:5000].numpy(), "norm").pvalue > 1e-3


def test_mixup_and_cutmix_equal_torchvision() -> None:
    images, labels = pictures(6, 20, 28) / 255, torch.tensor([0, 3, 2, 2, 1, 4])
    partner = torch.arange(6).roll(1)
    targets = augment.soft_targets(labels, 5)

    blended, soft = augment.mix(images, targets, torch.full((20, 28), 0.3), partner)
    reference = v2.MixUp(num_classes=5)
    params = {"labels": labels, "batch_size": 6, "lam": 0.3}
    torch.testing.assert_close(blended, reference.transform(images, params))
    torch.testing.assert_close(soft, reference.transform(labels, params))

    centre = torch.tensor([3, 20])
    weight = augment.cutmix_weight(
        torch.tensor(0.36), centre, 20, 28
    )  # 16 x 22, cut off at the top and right
    pasted, soft = augment.mix(images, targets, weight, partner)
    reference = v2.CutMix(num_classes=5)
    box = (20 - 11, 0, 28, 3 + 8)
    share = 1 - 11 * 19 / (20 * 28)
    params = {"labels": labels, "batch_size": 6, "box": box, "lam_adjusted": share}
    assert torch.equal(pasted, reference.transform(images, params))
    torch.testing.assert_close(soft, reference.transform(labels, params))


@pytest.mark.parametrize("kept", [0.0, 0.13, 0.5, 0.77, 0.999])
def test_cutmix_box_and_targets_equal_timms(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for centre in ((0, 0), (10, 13), (18, 26)):
        numbers = iter(centre)
        monkeypatch.setattr(mixup.np.random, "randint", lambda *_, numbers=numbers, **__: next(numbers))
        (top, bottom, left, right), share = mixup.cutmix_bbox_and_lam((3, 19, 27), kept)
        expected = torch.ones(19, 27)
        expected[top:bottom, left:right] = 0
        weight = augment.cutmix_weight(torch.tensor(kept), torch.tensor(centre), 19, 27)
        assert torch.equal(weight, expected)
        labels = torch.tensor([0, 1, 1, 3])
        _, soft = augment.mix(
            torch.zeros(4, 3, 19, 27), augment.soft_targets(labels, 4, 0.1), weight, torch.arange(4).flip(0)
        )
        torch.testing.assert_close(soft, mixup.mixup_target(labels, 4, share, 0.1))


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0])
def test_beta_draws(alpha: float) -> None:
    source = generator()
    draws = torch.stack([augment.draw_beta(alpha, source) for _ in range(2000)])
    # Near 1 float32 is too coarse to tell the draws apart, so each half is looked at from its own end.
    law = stats.beta(alpha, alpha)
    lower = draws[draws < 0.5]
    assert stats.binomtest(len(lower), 2000, 0.5).pvalue > 1e-3
    assert stats.kstest(lower.numpy(), lambda x: 2 * law.cdf(x)).pvalue > 1e-3
    with pytest.raises(ConfigError, match="alpha"):
        augment.draw_beta(1.5, source)


def test_random_mix() -> None:
    labels = torch.arange(8)
    images = labels.view(-1, 1, 1, 1).float().expand(8, 1, 16, 16)
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    for seed in range(200):
        mixed, targets = augment.random_mix(images, labels, 8, generator(seed), mix_p=0.8, smoothing=0.0)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        # Images are their label, so the mean pixel is the label that the targets expect.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ labels.float(), atol=1e-4, rtol=0)
        constant = bool((mixed == mixed[:, :, :1, :1]).all())
        kind = "none" if torch.equal(mixed, images) else "mixup" if constant else "cutmix"
        kinds[kind] += 1
    assert all(
        stats.binomtest(n, 200, p).pvalue > 1e-3 for n, p in zip(kinds.values(), (0.4, 0.4, 0.2), strict=True)
    )
    unmixed, hard = augment.random_mix(
        images, labels, 8, generator(), mixup_alpha=0, cutmix_alpha=0, smoothing=0.2
    )
    assert torch.equal(unmixed, images)
    torch.testing.assert_close(hard, 0.8 * torch.eye(8) + 0.2 / 8)


def test_shift_and_flip_draws_all_offsets_and_refuses_padded_batches() -> None:
    images = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    out = augment.shift_and_flip(Batch(images, None, torch.arange(4000)), generator(), flip_p=0.0)
    places = out[:, 0].flatten(1).argmax(1)[out[:, 0].sum((1, 2)) > 0]
    assert out.max() == 1
    assert stats.chisquare(places.bincount(minlength=64)).pvalue > 1e-3
    with pytest.raises(DataError, match="one size"):
        augment.shift_and_flip(Batch(images, torch.full((4000, 2), 8), torch.arange(4000)), generator())


def test_simclr_view_applies_each_part_with_its_probability() -> None:
    batch = Batch(pictures(1, 40, 40).expand(600, -1, -1, -1), None, torch.arange(600))
    view = augment.simclr_view(batch, 32, (0.2, 1.0), generator(), jitter_p=0.5, blur_p=0.5)
    assert torch.equal(
        view, augment.simclr_view(batch, 32, (0.2, 1.0), generator(), jitter_p=0.5, blur_p=0.5)
    )
    assert view.shape == (600, 3, 32, 32)
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1
    grey = (view == view[:, :1]).all(dim=(1, 2, 3)).sum()
    assert stats.binomtest(int(grey), 600, 0.2).pvalue > 1e-3
    # Drawn first, crops and flips are the same whatever follows them.
    plain = augment.simclr_view(batch, 32, (0.2, 1.0), generator(), jitter_p=0, grey_p=0, blur_p=0)
    crops = augment.crop_and_flip(batch, 32, (0.2, 1.0), generator(), interpolation="bilinear")
    assert torch.equal(plain, crops)
    for parts in ({"jitter_p": 0.3}, {"blur_p": 0.3}):
        probabilities = {"jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, **parts}
        view = augment.simclr_view(batch, 32, (0.2, 1.0), generator(), **probabilities)
        changed = (view != plain).any(dim=(1, 2, 3)).sum()
        assert stats.binomtest(int(changed), 600, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("cached", [1, 5 * 3 * 24 * 24, 2**30])
def test_simclr_view_does_not_depend_on_the_portions_and_equals_its_masked_form(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(pictures(13, 40, 40), None, torch.arange(13))
    draws = generator()
    expected = augment.crop_and_flip(batch, 24, (0.2, 1.0), draws, interpolation="bilinear")

    def where(operation: Callable[..., Tensor], chosen: Tensor, *parameters: Tensor | int) -> Tensor:
        return torch.where(chosen.view(-1, 1, 1, 1), operation(expected, *parameters), expected)

    factors, order = augment.random_jitter(13, (0.4, 0.4, 0.4, 0.1), draws)
    expected = where(augment.colour_jitter, augment.chance(13, 0.8, draws), factors, order)
    expected = where(augment.greyscale, augment.chance(13, 0.2, draws))
    sigma = augment.uniform(13, (0.1, 2.0), draws)
    expected = where(augment.gaussian_blur, augment.chance(13, 0.5, draws), sigma, 3)
    monkeypatch.setattr(geometry, "CACHED", cached)
    view = augment.simclr_view(batch, 24, (0.2, 1.0), generator())
    torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(geometry, "CACHED", 2**18)
    assert torch.equal(view, augment.simclr_view(batch, 24, (0.2, 1.0), generator()))
