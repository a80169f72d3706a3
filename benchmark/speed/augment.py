"""Augmentation: a random resized crop with a flip, and the view of SimSiam, from uint8 images to floats in [0, 1].

The classes of torchvision draw their parameters as ours do, so all pay for random numbers too. Before that, crops
at fixed parameters are compared pixel by pixel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench import augment, machine
from mimbench.compat import torchvision
from mimbench.data.split import Batch
from mimbench.errors import MimbenchError
from mimbench.speed import Bar, Comparison, Limit, Timing, main, measure, version

SCALE = (0.2, 1.0)  # of a crop's area
LEVELS = 1.5  # of 255: torchvision rounds to 8 bits twice, ours never


def pictures(count: int, side: int) -> Tensor:
    """uint8 images (count, 3, side, side), smooth with some noise."""
    draw = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(count, 3, 8, 8, generator=draw), size=(side, side), mode="bilinear")
    noisy = 255 * coarse + 8 * torch.randn(coarse.shape, generator=draw)
    return noisy.clamp(0, 255).to(torch.uint8)


def agree(images: Tensor, size: int) -> str:
    """Compares crops at fixed parameters with torchvision's; raises where they differ."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as v2

    draw = torch.Generator().manual_seed(1)
    images = images[:32]
    boxes = augment.random_resized_crop_boxes(augment.image_sizes(images), SCALE, draw)
    worst = {"floats": 0.0, "bytes": 0.0}
    for name, given in (("floats", images / 255), ("bytes", images)):
        ours = augment.resized_crop(given, boxes, size)
        for image, box, got in zip(given, boxes.tolist(), ours, strict=True):
            theirs = v2.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
            exact = theirs.clamp(0, 1) if theirs.is_floating_point() else theirs / 255
            worst[name] = max(worst[name], 255 * float((got - exact).abs().max()))
    if worst["floats"] > 255e-5 or worst["bytes"] > LEVELS:
        raise MimbenchError(f"crops differ from torchvision's by {worst} of 255")
    return (
        f"crops at fixed parameters differ from torchvision's by {worst['floats']:.1g} of 255 on floats"
        f" and {worst['bytes']:.2f} on bytes, which it rounds"
    )


def agree_on_colours(images: Tensor, size: int) -> str:
    """The same for colour jitter, in each image's order, and blur, on floats."""
    from torchvision.transforms.v2 import functional as v2

    draw = torch.Generator().manual_seed(1)
    pixels, kernel = images[:16] / 255, augment.blur_kernel_size(size)
    factors, orders = augment.random_jitter(16, (0.4, 0.4, 0.4, 0.1), draw)
    sigma = augment.uniform(16, (0.1, 2.0), draw)
    ours = augment.gaussian_blur(augment.colour_jitter(pixels, factors, orders), sigma, kernel)
    change = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)
    worst = 0.0
    for row, image in enumerate(pixels):
        for step in orders[row].tolist():
            image = change[step](image, float(factors[row, step]))
        blurred = v2.gaussian_blur(image, [kernel, kernel], [float(sigma[row])] * 2)
        worst = max(worst, 255 * float((ours[row] - blurred).abs().max()))
    if worst > 255 * 2e-5:
        raise MimbenchError(f"jitter and blur differ from torchvision's by {worst} of 255")
    return f"jitter and blur at fixed parameters differ from torchvision's by {worst:.1g} of 255 on floats"


def recipes(size: int) -> dict[str, tuple[Callable[[Batch, torch.Generator], Tensor], list[Any]]]:
    """Per work: ours, and torchvision's transforms for it, but for the conversion to floats."""
    from torchvision.transforms import v2

    def crop(interpolation: v2.InterpolationMode) -> list[Any]:
        return [v2.RandomResizedCrop(size, SCALE, interpolation=interpolation), v2.RandomHorizontalFlip()]

    mode = v2.InterpolationMode
    colours = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(augment.blur_kernel_size(size), (0.1, 2.0))], 0.5),
    ]
    return {
        "crop": (lambda batch, draw: augment.crop_and_flip(batch, size, SCALE, draw), crop(mode.BICUBIC)),
        "view": (
            lambda batch, draw: augment.simclr_view(batch, size, SCALE, draw),
            crop(mode.BILINEAR) + colours,
        ),
    }


def lightly_view(size: int) -> Callable[[Any], Tensor]:
    """lightly's SimSiam view, without the normalisation that others leave out."""
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    return SimSiamViewTransform(
        input_size=size,
        cj_strength=1.0,
        min_scale=SCALE[0],
        sigmas=(0.1, 2.0),
        normalize=None,  # type: ignore[arg-type]
    )


def compare(
    work: str, size: int, source: int, count: int, options: argparse.Namespace, write: float
) -> Comparison:
    from torchvision.transforms import v2

    images = pictures(count, source)
    agreement = [agree(images, size)]
    if work == "view":
        agreement.append(agree_on_colours(images, size))
    ours, parts = recipes(size)[work]
    batch, draw = Batch(images, None, torch.arange(count)), torch.Generator().manual_seed(2)
    floats = v2.ToDtype(torch.float32, scale=True)
    loop, classic = v2.Compose([*parts, floats]), v2.Compose([*parts, v2.ToImage(), floats])
    photos = [v2.functional.to_pil_image(image) for image in images]
    calls: dict[str, Callable[[], object]] = {
        "mimbench": lambda: ours(batch, draw),
        "torchvision v2, tensors": lambda: torch.stack([loop(image) for image in images]),
        "torchvision v2, PIL": lambda: torch.stack([classic(photo) for photo in photos]),
    }
    about = {"mimbench": version("mimbench")} | dict.fromkeys(list(calls)[1:], version("torchvision"))
    skipped = {}
    if work == "view":
        try:
            theirs = lightly_view(size)
        except ImportError:
            skipped["lightly, PIL"] = "lightly is not installed"
        else:
            calls["lightly, PIL"] = lambda: torch.stack([theirs(photo) for photo in photos])
            about["lightly, PIL"] = version("lightly")
    timings = [
        Timing(name, seconds, about[name], f"{1e6 * min(seconds) / count:.0f} us an image at best")
        for name, seconds in measure(calls, options.rounds).items()
    ]
    title = {"crop": "Random resized crop and flip", "view": "The view of SimSiam"}[work]
    return Comparison(
        name=f"augment-{work}-{size}",
        title=f"{title} at {size} pixels",
        work=f"{count} images of {source} x {source} pixels to floats of {size} x {size}",
        ours="mimbench",
        timings=timings,
        agreement=agreement,
        limit=Limit("writing the result to fresh memory", write * images.shape[1] * count * size**2),
        bars=[Bar(name, 1.0) for name in ("torchvision v2, tensors", "lightly, PIL") if name in calls],
        skipped=skipped,
    )


def run(options: argparse.Namespace) -> Iterable[Comparison]:
    torchvision()
    device = torch.device("cpu")
    values = 2**22 if options.quick else 2**25
    writes = [machine.seconds(lambda: torch.ones(values), device) for _ in range(5)]
    for size, source, count in ((32, 32, 512), (224, 256, 64)):
        count //= 8 if options.quick else 1
        for work in ("crop", "view"):
            yield compare(work, size, source, count, options, min(writes) / values)


if __name__ == "__main__":
    main(run, __doc__)
