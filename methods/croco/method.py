"""CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion (Weinzaepfel et al.,
NeurIPS 2022, arXiv 2210.10716).

Nine tenths of an image are hidden, and are rebuilt from the rest and from a second image of the same scene
taken from elsewhere, which is seen in full. What one view leaves open the other settles, if the network
knows how the two are related: geometry is learnt instead of what things usually look like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import DecoderShape, initialise, standardise
from mimbench.models.vit import ViTShape, patchify

from .model import Backbone, Decoder, Encoder, Kind

RECIPE = Recipe(
    epochs=400,
    batch_size=256,  # 64 pairs on each of 4 GPUs
    base_lr=1.5e-4,
    cosine_share=360 / 760,  # planned over 800 epochs, of which 40 warm up, and stopped at 400
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    precision="bf16",
)
LEAST_OVERLAP = 0.5  # of two crops that stand in for two views: the least co-visibility of the paper's pairs

Pairs = Literal["frames", "crops", "same", "other"]


@dataclass(frozen=True)
class Config:
    """The setting of the authors' pretrain.py, ViT-B/16."""

    image_size: int = 224  # side of both views, in pixels
    backbone: ViTShape = ViTShape()  # the siamese encoder (authors' CroCoNet)
    decoder: DecoderShape = DecoderShape()  # 8 cross-attending blocks of width 512 (authors' CroCoNet)
    positions: Kind = "sincos"  # added to tokens; rope, in all attention, is CroCo v2 (arXiv 2211.10408)
    rope_base: float = 100.0  # of the frequencies of rope (authors' RoPE100)
    mask_ratio: float = 0.9  # share of the first image's patches that are hidden; the second keeps all
    normalise_target: bool = True  # each patch by its own mean and deviation (authors' norm_pix_loss)
    pairs: Pairs = "frames"  # the second image: another view; "same" and "other" (image) are controls
    frame_gap: tuple[int, int] = (1, 1)  # frames between two views; ours, as the paper renders its pairs
    crop: tuple[float, float] = (0.875, 0.875)  # sides of the crops over the image's: 224 of 256 pixels
    jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)  # brightness, contrast, saturation (authors' acolor)
    recipe: Recipe = RECIPE  # authors' pretrain.py and README


def random_mask(noise: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """A mask (B, L) that hides ``hidden`` patches, 1 = hidden, and the others (B, L - hidden) in raster order.

    The authors compare the sorting permutation of the noise itself, not ranks, with the number to hide.
    """
    mask = noise.argsort(dim=1) < hidden
    return mask, mask.int().argsort(dim=1, stable=True)[:, : noise.shape[1] - hidden]


class Model(nn.Module):
    """One encoder for both images, a decoder from the masked one to the other, error on hidden patches.

    Raises ConfigError for a ratio that hides or keeps every patch, and for crops that could share too little.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.needs = ("frames",) if config.pairs == "frames" else ()
        self.frame_gap = config.frame_gap
        self.backbone = Backbone(config.image_size, config.backbone, config.positions, config.rope_base)
        self.decoder = Decoder(config.decoder, self.backbone)
        total = self.backbone.tokens
        self.hidden = int(config.mask_ratio * total)
        if not 0 < self.hidden < total:
            raise ConfigError(f"mask_ratio = {config.mask_ratio} hides {self.hidden} of {total} patches")
        self.check_crops()
        initialise(self)

    def check_crops(self) -> None:
        """Two crops of side s of one square, each in a corner, share (2 - 1 / s)^2 of their area."""
        least, most = self.config.crop
        if not 0 < least <= most <= 1:
            raise ConfigError(f"crop = {[least, most]} should be two shares of the side above 0 that rise")
        if self.config.pairs == "crops" and max(2 - 1 / least, 0) ** 2 < LEAST_OVERLAP:
            raise ConfigError(
                f"two crops of {least:g} of the side may share less than half of their area",
                "Set the first entry of crop to 0.774 or more",
            )

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both images, and the noise that chooses what is hidden of the first."""
        pairs, count = self.config.pairs, len(batch)
        windows = self.windows(augment.image_sizes(batch.images, batch.sizes), generator)
        first = self.view(batch.images, windows, generator)
        if pairs == "same":
            second = first
        elif pairs == "other":
            second = self.view(batch.images.roll(1, 0), windows.roll(1, 0), generator)
        elif pairs == "crops":
            second = self.view(batch.images, windows, generator)
        else:
            assert batch.frames is not None
            second = self.view(batch.frames, windows, generator)
        noise = torch.rand(count, self.backbone.tokens, generator=generator, device=first.device)
        return {
            "images2": normalise(second, self.input),
            "images1": normalise(first, self.input),
            "noise": noise,
        }

    def windows(self, sizes: Tensor, generator: torch.Generator) -> Tensor:
        """Top, left and side (B, 3) of the largest square in images of ``sizes`` (B, 2), placed at random.

        Both crops of a pair come from one window, or those of long images would miss each other.
        """
        side = sizes.amin(1)
        return torch.cat([self.place(sizes - side[:, None], generator), side[:, None]], dim=1)

    def place(self, room: Tensor, generator: torch.Generator) -> Tensor:
        """Integers (B, 2) drawn uniformly from 0 to ``room`` (B, 2)."""
        draws = torch.rand(room.shape, generator=generator, device=generator.device)
        return torch.minimum((draws * (room + 1)).long(), room)

    def view(self, images: Tensor, windows: Tensor, generator: torch.Generator) -> Tensor:
        """A crop at a place of its own in each window (B, 3), with a colour jitter of its own, never mirrored."""
        config, count = self.config, len(images)
        share = augment.uniform(count, config.crop, generator)
        side = torch.minimum((share * windows[:, 2]).ceil().long(), windows[:, 2])[:, None]
        corner = windows[:, :2] + self.place((windows[:, 2:] - side).expand(-1, 2), generator)
        crops = augment.resized_crop(images, torch.cat([corner, side, side], dim=1), config.image_size)
        return augment.colour_jitter(crops, *augment.random_jitter(count, (*config.jitter, 0.0), generator))

    def forward(self, images1: Tensor, images2: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L); the loss averages over hidden patches of the first."""
        mask, visible = random_mask(noise, self.hidden)
        latent, _ = self.backbone(images1, visible)
        memory, _ = self.backbone(images2)
        pred = self.decoder(latent, visible, memory)
        target = patchify(images1, self.config.backbone.patch_size)
        if self.config.normalise_target:
            target = standardise(target)
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": loss, "pred": pred, "mask": mask.to(pred.dtype), "latent": latent, "latent2": memory}

    def encoder(self) -> Encoder:
        """The siamese encoder on full images; the decoder, which two-image tasks keep, is left out."""
        return Encoder(self.backbone, self.input, "mean")
