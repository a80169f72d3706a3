"""Making the 15 common corruptions, beside one forward of a ViT-Tiny over the same batch; also an attack's step.

Each corruption is made at the middle severity. The loops over single images are what one writes with NumPy or
Pillow for the same result.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimbench import attacks, features
from mimbench.corruptions import CORRUPTIONS, NAMES, corrupt
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import MimbenchError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.speed import Bar, Comparison, Limit, Timing, main, measure, version

SEVERITY = 3
OURS, FORWARD = "mimbench, mean of 15 corruptions", "forward"
NOISE_LOOP, JPEG_LOOP = "gaussian_noise by NumPy, image by image", "jpeg by Pillow, image by image"


def noise_loop(images: Tensor, std: float) -> Tensor:
    draw = np.random.default_rng(0)
    made = []
    for image in images.numpy():
        noisy = image / 255.0 + draw.normal(scale=std, size=image.shape)
        made.append((np.clip(noisy, 0, 1) * 255).astype(np.uint8))
    return torch.from_numpy(np.stack(made))


def jpeg_loop(images: Tensor, quality: float) -> Tensor:
    made = []
    for image in images.permute(0, 2, 3, 1).numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=int(quality))
        made.append(np.asarray(Image.open(stream)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def compare(side: int, patch: int, count: int, options: argparse.Namespace) -> Comparison:
    device = torch.device(options.device)
    torch.manual_seed(0)
    depth = 2 if options.quick else 12
    encoder = ViTEncoder(ViT(side, ViTShape(patch, 192, depth, 3)), InputSpec(side), "mean").to(device).eval()
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    images, positions = (255 * smooth).to(torch.uint8).to(device), torch.arange(count)

    def make(name: str, batch: Tensor = images, where: Tensor = positions) -> Tensor:
        return corrupt(batch, name, SEVERITY, seed=0, positions=where)

    def forward() -> Tensor:
        with features.frozen(encoder):
            return encoder(features.prepare(images, None, encoder.input)).pooled

    for name in NAMES:
        if not torch.equal(make(name)[1:3], make(name, images[1:3], positions[1:3])):
            raise MimbenchError(f"{name} depends on the batch")
    strengths = {name: CORRUPTIONS[name].strength(SEVERITY, side)[0] for name in ("gaussian_noise", "jpeg")}
    theirs = jpeg_loop(images.cpu(), strengths["jpeg"])
    off = (make("jpeg").cpu().int() - theirs.int()).abs()
    if float((off <= 1).double().mean()) < 0.99:
        raise MimbenchError(f"jpeg differs from Pillow's by up to {int(off.max())} of 255")
    spread = [
        float((made.cpu().float() - images.cpu().float()).std())
        for made in (make("gaussian_noise"), noise_loop(images.cpu(), strengths["gaussian_noise"]))
    ]
    if abs(spread[0] / spread[1] - 1) > 0.05:
        raise MimbenchError(f"the noise has a deviation of {spread[0]:.2f} of 255, NumPy's {spread[1]:.2f}")
    agreement = [
        "each corrupted image is the same whatever batch it is in",
        f"jpeg equals Pillow's within 1 of 255 for {float((off <= 1).double().mean()):.2%} of the values",
        f"gaussian_noise has a deviation of {spread[0]:.2f} of 255, NumPy's {spread[1]:.2f}",
    ]

    labels = torch.zeros(count, dtype=torch.long, device=device)
    pixels = images.float() / 255

    def classify(inputs: Tensor) -> Tensor:
        return encoder(normalise(inputs, encoder.input)).pooled

    calls: dict[str, Callable[[], object]] = {name: lambda name=name: make(name) for name in NAMES}
    calls[FORWARD] = forward
    calls["FGSM, one gradient"] = lambda: attacks.fgsm(classify, pixels, labels, 1 / 255)
    if device.type == "cpu":
        calls[NOISE_LOOP] = lambda: noise_loop(images, strengths["gaussian_noise"])
        calls[JPEG_LOOP] = lambda: jpeg_loop(images, strengths["jpeg"])
    for name in NAMES:
        make(name)
    taken = measure(calls, options.rounds, options.device)
    usual = sorted(taken[FORWARD])[len(taken[FORWARD]) // 2]
    mean = [sum(rounds) / len(NAMES) for rounds in zip(*(taken[name] for name in NAMES), strict=True)]
    about = {NOISE_LOOP: f"NumPy {np.__version__}", JPEG_LOOP: f"Pillow {version('pillow')}"}
    timings = [Timing(OURS, mean, version("mimbench"))]
    costs = {name: sorted(taken[name])[len(taken[name]) // 2] / usual for name in NAMES}
    worst = max(costs, key=costs.__getitem__)
    agreement.append(f"the costliest corruption, {worst}, takes {costs[worst]:.2f} forwards; the bar is 2")
    for name, seconds in taken.items():
        middle = sorted(seconds)[len(seconds) // 2]
        timings.append(Timing(name, seconds, about.get(name, ""), f"{middle / usual:.2f} forwards"))
    return Comparison(
        name=f"corruptions-{side}",
        title=f"Common corruptions at {side} pixels",
        work=f"{count} images, severity {SEVERITY}; {encoder.name} at {side} pixels, float32",
        ours=OURS,
        timings=timings,
        agreement=agreement,
        limit=Limit("the forward of the encoder over the same batch, which has to follow", usual),
        bars=[Bar(FORWARD, 0.5)],
    )


def run(options: argparse.Namespace) -> Iterable[Comparison]:
    for side, patch, count in ((32, 4, 125), (224, 16, 24)):
        yield compare(side, patch, count // (8 if options.quick else 1), options)


if __name__ == "__main__":
    main(run, __doc__)
