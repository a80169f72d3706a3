"""Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

Three quarters of the patches are dropped. A ViT encodes what is left, without mask tokens; a small
decoder, which sees mask tokens in the empty places, regresses the pixels of the dropped patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
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

RECIPE = Recipe(
    epochs=1600,  # Table 3; the ablations of Table 1 use 800
    batch_size=4096,
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The paper's setting for ViT-B/16."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: DecoderShape = DecoderShape()  # discarded after pretraining
    mask_ratio: float = 0.75  # share of patches that the encoder does not see (Sec. 3)
    normalise_target: bool = True  # each patch by its own mean and deviation (Table 1d)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image (Table 8)
    flip: bool = True  # random horizontal flip (Table 8)
    pool: Literal["class", "mean"] = "class"  # what frozen probes read (App. A.1: the class token)
    recipe: Recipe = RECIPE  # Table 8


def patch_target(images: Tensor, patch_size: int, normalise: bool) -> Tensor:
    """The pixels to regress (B, L, p*p*C), each patch by its own mean and deviation if asked to (Sec. 3)."""
    target = patchify(images, patch_size)
    return standardise(target) if normalise else target


class Model(nn.Module):
    """Encoder on visible patches, decoder on all, mean squared error on the hidden ones."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ViT(config.image_size, config.backbone)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        self.decoder = Decoder(config.decoder, self.backbone, config.backbone.patch_size**2 * 3)
        initialise(self)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the noise that ranks its patches."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed outputs on [class, visible patches], the mask and the restoring permutation."""
        visible, mask, restore = random_masking(self.backbone.embed(images), noise, self.keep)
        return self.backbone(visible), mask, restore

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L); the loss averages over hidden patches only."""
        latent, mask, restore = self.encode(images, noise)
        pred = self.decoder(latent, restore)
        target = patch_target(images, self.config.backbone.patch_size, self.config.normalise_target)
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": loss, "pred": pred, "mask": mask, "latent": latent, "ids_restore": restore}

    def encoder(self) -> ViTEncoder:
        """The ViT on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
