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
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.vit import Block, ViT, ViTEncoder, ViTShape, patchify, sincos_positions

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
class Decoder:
    """The transformer that turns encoded patches back into pixels."""

    width: int = 512  # channels of a token (Table 1b)
    depth: int = 8  # blocks (Table 1a)
    heads: int = 16  # attention heads per block


@dataclass(frozen=True)
class Config:
    """The paper's setting for ViT-B/16."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: Decoder = Decoder()  # discarded after pretraining
    mask_ratio: float = 0.75  # share of patches that the encoder does not see (Sec. 3)
    normalise_target: bool = True  # each patch by its own mean and deviation (Table 1d)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image (Table 8)
    flip: bool = True  # random horizontal flip (Table 8)
    pool: Literal["class", "mean"] = "class"  # what frozen probes read (App. A.1: the class token)
    recipe: Recipe = RECIPE  # Table 8


def random_masking(tokens: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the ``keep`` tokens of (B, L, D) with the smallest ``noise`` (B, L), in that order.

    Returns the kept tokens (B, keep, D), the mask (B, L) with 1 where a token was dropped, and the
    permutation (B, L) that brings [kept, dropped] back to raster order.
    """
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    kept = tokens.gather(1, shuffle[:, :keep, None].expand(-1, -1, tokens.shape[2]))
    mask = (restore >= keep).to(tokens.dtype)
    return kept, mask, restore


def patch_target(images: Tensor, patch_size: int, normalise: bool) -> Tensor:
    """The pixels to regress (B, L, p*p*C); normalised with each patch's unbiased variance (Sec. 3)."""
    target = patchify(images, patch_size)
    if not normalise:
        return target
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()


class Model(nn.Module):
    """Encoder on visible patches, decoder on all, mean squared error on the hidden ones."""

    needs = ()

    decoder_pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape, decoder = config.backbone, config.decoder
        self.backbone = ViT(config.image_size, shape)
        self.keep = int(self.backbone.tokens * (1 - config.mask_ratio))
        if not 0 < self.keep < self.backbone.tokens:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} leaves {self.keep} of {self.backbone.tokens} patches visible",
                "Choose a ratio that keeps and hides at least one patch",
            )
        self.decoder_embed = nn.Linear(shape.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        table = sincos_positions(decoder.width, *self.backbone.grid)
        self.register_buffer("decoder_pos_embed", torch.cat([torch.zeros(1, decoder.width), table])[None])
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder.width, decoder.heads) for _ in range(decoder.depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, shape.patch_size**2 * 3)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform matrices with the patch projection read as one; tokens from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.backbone.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        nn.init.normal_(self.backbone.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

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

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Predicted pixels of every patch (B, L, p*p*C) from [class, visible patches] (B, 1 + keep, D)."""
        x = self.decoder_embed(latent)
        hidden = restore.shape[1] + 1 - x.shape[1]
        patches = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1)], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L); the loss averages over hidden patches only."""
        latent, mask, restore = self.encode(images, noise)
        pred = self.decode(latent, restore)
        target = patch_target(images, self.config.backbone.patch_size, self.config.normalise_target)
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": loss, "pred": pred, "mask": mask, "latent": latent, "ids_restore": restore}

    def encoder(self) -> ViTEncoder:
        """The ViT on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
