"""ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders (Hinojosa et al., ECCV 2024).

MAE drops the patches that white noise picks. Here the noise is filtered first, so that what is dropped has a spatial
scale: red noise (low-pass) hides large regions, blue (high-pass) an even scatter, green (band-pass) clumps between
them, purple (band-stop) all but those. All else is MAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimbench import augment, seeds
from mimbench.config import check
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import (
    Decoder,
    DecoderShape,
    initialise,
    random_masking,
    standardise,
    visible_patches,
)
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, patchify

Colour = Literal["green", "red", "blue", "purple", "white"]

RECIPE = Recipe(
    epochs=800,  # 300, 800 and 1600 are published; the abstract's +2.72 mIoU is at 800
    batch_size=4096,
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    warmup_lr=1.5e-8,
    precision="bf16",
)


@dataclass(frozen=True)
class Sigmas:
    """Deviations of the Gaussian blurs, in patches, the weaker blur first.

    They are not published. These put the bands where the periodograms in assets/proposed.png of the authors'
    repository have them, and give purple about as much of low as of high frequencies.
    """

    red: float = 4.5  # of the blur that is the noise: the cut-off in the figure
    blue: float = 0.5  # of the blur that is taken away: what is left in the corners of the figure
    green: tuple[float, float] = (1.1, 1.5)  # of both blurs: the ring in the figure, 0.19 cycles a patch
    purple: tuple[float, float] = (0.35, 5.0)  # of both blurs: the core and the corners in the figure

    def __post_init__(self) -> None:
        check(self, "sigmas", positive=("red", "blue", "green", "purple"))
        for colour, (weak, strong) in {"green": self.green, "purple": self.purple}.items():
            if weak >= strong:
                raise ConfigError(
                    f"sigmas.{colour} = [{weak}, {strong}] leaves no band between the blurs",
                    "Give the deviation of the weaker blur first",
                )

    def of(self, colour: Colour) -> tuple[float, ...]:
        """The deviations that a colour takes; none for white."""
        found = getattr(self, colour, ())
        return found if isinstance(found, tuple) else (found,)


@dataclass(frozen=True)
class Config:
    """The authors' setting for ViT-B/16 and green noise."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: DecoderShape = DecoderShape()  # discarded after pretraining (authors' logs/pretrain)
    mask_ratio: float = 0.75  # share of patches that the encoder does not see (authors' configs)
    colour: Colour = "green"  # of the noise (authors' configs); white is MAE
    sigmas: Sigmas = Sigmas()  # widths of the filters
    noise_images: int = 3072  # noise images to cut masks from (ours, after the names of the authors' files)
    noise_size: int = 64  # side of a noise image, in patches (ours, unpublished)
    normalise_target: bool = True  # each patch by its own mean and deviation (authors' logs/pretrain)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image (ibid.)
    flip: bool = True  # random horizontal flip of the image (ibid.)
    recipe: Recipe = RECIPE  # authors' logs/pretrain


def blur(noise: Tensor, sigma: float) -> Tensor:
    """Noise (N, S, S) convolved with a Gaussian of deviation ``sigma``, in cells; its borders meet, as on a torus."""
    place = torch.arange(noise.shape[-1], device=noise.device)
    distance = (place[:, None] - place).abs()
    distance = torch.minimum(distance, len(place) - distance).to(noise.dtype)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)
    kernel = kernel.masked_fill(kernel < 1e-9, 0.0)  # lost in float32 sums, and denormals are slow
    kernel = kernel / kernel.sum(1)
    return ((noise @ kernel).mT @ kernel).mT


def colour_noise(white: Tensor, colour: Colour, sigmas: Sigmas) -> Tensor:
    """White noise W (N, S, S) filtered to a colour, with Gaussians G of the colour's own deviations.

    red = G W passes low frequencies, blue = W - G W high ones, green = G1 W - G2 W a band of them, and
    purple = W - (G1 W - G2 W) all but a band; G1 is the weaker blur.
    """
    blurred = [blur(white, sigma) for sigma in sigmas.of(colour)]
    if colour == "red":
        return blurred[0]
    if colour == "blue":
        return white - blurred[0]
    if colour == "white":
        return white
    band = blurred[0] - blurred[1]
    return band if colour == "green" else white - band


def cut_windows(noise: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Windows (count, side, side) of noise (N, S, S): each of a noise image, a place and two flips of its own.

    A window may run over the border and go on at the opposite side, so that every cell is as likely in every place.
    """

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=noise.device)

    number = draw(len(noise), count, 1, 1)
    step = 1 - 2 * draw(2, 2, count, 1)  # a flipped window is read backwards
    start = draw(noise.shape[-1], 2, count, 1)
    rows, columns = (start + step * torch.arange(side, device=noise.device)) % noise.shape[-1]
    return noise[number, rows[:, :, None], columns[:, None, :]]


class Model(nn.Module):
    """MAE with the noise that ranks its patches cut from filtered noise images, which are made once."""

    needs = ()

    noise: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ViT(config.image_size, config.backbone)
        # Fixed, as the authors' downloaded arrays are: the same in every run, and no part of the weights.
        self.register_buffer("noise", self.make_noise(), persistent=False)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        self.decoder = Decoder(config.decoder, self.backbone, config.backbone.patch_size**2 * 3)
        initialise(self)

    def make_noise(self) -> Tensor:
        """The filtered noise images (N, S, S). Raises ConfigError for sizes or deviations that make no noise."""
        config, side = self.config, self.backbone.grid[0]
        if config.noise_images < 1 or config.noise_size < side:
            raise ConfigError(
                f"{config.noise_images} noise images of side {config.noise_size} hold no window of {side} patches",
                f"Set noise_images to 1 or more and noise_size to {side} or more",
            )
        widest = max(config.sigmas.of(config.colour), default=0.0)
        if widest > config.noise_size / 8:
            raise ConfigError(
                f"a blur of {widest} patches meets its own tail in noise images of side {config.noise_size}",
                f"Set noise_size to {math.ceil(8 * widest)} or more",
            )
        shape = (config.noise_images, config.noise_size, config.noise_size)
        white = torch.randn(shape, generator=seeds.generator("cpu", "colour noise"))
        return colour_noise(white, config.colour, config.sigmas)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The class and the mask token do not decay either (authors' logs/pretrain)."""
        tokens = [self.backbone.cls_token, self.decoder.mask_token]
        rest = [p for name, p in self.named_parameters() if not name.endswith(("cls_token", "mask_token"))]
        return [{"params": tokens, "weight_decay": 0.0}, {"params": rest}]

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the window of noise that ranks its patches, which knows nothing of the image."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = cut_windows(self.noise, len(batch), self.backbone.grid[0], generator)
        return {"images": normalise(images, self.input), "noise": noise}

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, rows, columns), whose strongest patches stay visible."""
        visible, mask, restore = random_masking(self.backbone.embed(images), -noise.flatten(1), self.keep)
        latent = self.backbone(visible)
        pred = self.decoder(latent, restore)
        target = patchify(images, self.config.backbone.patch_size)
        if self.config.normalise_target:
            target = standardise(target)
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": loss, "pred": pred, "mask": mask, "latent": latent, "ids_restore": restore}

    def encoder(self) -> ViTEncoder:
        """The ViT on full images."""
        return ViTEncoder(self.backbone, self.input, "mean")
