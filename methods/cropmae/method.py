"""Efficient Image Pre-Training with Siamese Cropped Masked Autoencoders (Eymaël et al., ECCV 2024, arXiv 2403.17823).

Two crops of one image: a global one, seen in full, and a local one cut out of it, of which two patches
stay visible. A decoder that attends from the local crop to the global one reconstructs the hidden
patches, so the encoder learns to find correspondences without any video. Fed with two frames and a
ratio of 95 % the same network is SiamMAE (Gupta et al., NeurIPS 2023), which this paper compares with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, attention, dropout, gelu, patchify

RECIPE = Recipe(
    epochs=400,
    batch_size=2048,
    base_lr=1e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=20,  # 5 % of the epochs
    precision="bf16",
)


Pairs = Literal["global_to_local", "local_to_global", "random", "same", "frames"]


@dataclass(frozen=True)
class CrossDecoder:
    """Cross- and self-attention blocks from the masked view to the full one."""

    width: int = 256  # channels of a token (authors' scripts)
    depth: int = 4  # blocks (authors' scripts; ablated 2, 4, 8)
    heads: int = 8  # attention heads (authors' scripts)
    hidden: int = 2048  # width inside the MLP, whatever the decoder's width (authors' code)
    dropout: float = 0.1  # on attention, MLP and residual branches (authors' code)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' ImageNet script, ViT-S/16."""

    image_size: int = 224  # side of both views, in pixels
    backbone: ViTShape = ViTShape(16, 384, 12, 6)  # the siamese encoder
    decoder: CrossDecoder = CrossDecoder()  # discarded after pretraining
    mask_ratio: float = 0.985  # share of the second view's patches that are hidden: 2 of 196 stay
    pairs: Pairs = "global_to_local"  # the two views (Sec. 3.2 and its ablation)
    global_scale: tuple[float, float] = (0.1, 1.0)  # area of the global crop, share of the image
    local_scale: tuple[float, float] = (0.3, 0.6)  # area of the local crop, share of the global crop
    frame_gap: tuple[int, int] = (4, 48)  # frames between the two views when pairs = "frames" (SiamMAE)
    flip: bool = True  # random horizontal flip, drawn for each view (for both at once with frames)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read; the paper propagates patch tokens
    recipe: Recipe = RECIPE  # authors' ImageNet script


class Attention(nn.MultiheadAttention):
    """From tokens (B, L, D) to tokens (B, M, D), with torch's parameters and the shared operator."""

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query, memory, memory), weights, biases, strict=True)
        )
        found = attention(q, k, v, drop=self.dropout if self.training else 0.0)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Cross-attention, then MLP, then self-attention, each followed by its norm."""

    def __init__(self, decoder: CrossDecoder) -> None:
        super().__init__()
        width = decoder.width
        self.rate = decoder.dropout
        self.multihead_attn = Attention(width, decoder.heads, self.rate)
        self.linear1 = nn.Linear(width, decoder.hidden)
        self.linear2 = nn.Linear(decoder.hidden, width)
        self.self_attn = Attention(width, decoder.heads, self.rate)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)  # after self-attention; numbered as in the authors' code
        self.norm2 = nn.LayerNorm(width, eps=1e-6)  # after cross-attention
        self.norm3 = nn.LayerNorm(width, eps=1e-6)  # after the MLP

    def drop(self, tokens: Tensor) -> Tensor:
        return dropout(tokens, self.rate, self.training)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Tokens of the masked view (B, 1 + L, D) that look at those of the full view (B, 1 + L, D)."""
        query = self.norm2(query + self.drop(self.multihead_attn(query, memory)))
        hidden = self.drop(gelu(self.linear1(query)))
        query = self.norm3(query + self.drop(self.linear2(hidden)))
        return self.norm1(query + self.drop(self.self_attn(query, query)))


class Model(nn.Module):
    """One encoder for both views, a decoder from the masked view to the full one, MAE's loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.needs = ("frames",) if config.pairs == "frames" else ()
        self.frame_gap = config.frame_gap
        shape, decoder = config.backbone, config.decoder
        self.backbone = ViT(config.image_size, shape)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        size, pixels = DecoderShape(decoder.width, decoder.depth, decoder.heads), shape.patch_size**2 * 3
        self.decoder = Decoder(size, self.backbone, pixels, lambda: DecoderBlock(decoder))
        initialise(self)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The view seen in full, the view to reconstruct, and the noise that ranks the latter's patches."""
        config, size = self.config, self.config.image_size

        def crop(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
            return augment.resized_crop(images, boxes, size, flip=flip, interpolation="bilinear")

        def boxes(extent: Tensor, scale: tuple[float, float]) -> Tensor:
            return augment.random_resized_crop_boxes(extent, scale, generator)

        def flips() -> Tensor:
            return augment.chance(len(batch), 0.5 * config.flip, generator)

        extent = augment.image_sizes(batch.images, batch.sizes)
        box, flip = boxes(extent, config.global_scale), flips()
        if config.pairs == "frames":
            assert batch.frames is not None
            first, second = crop(batch.images, box, flip), crop(batch.frames, box, flip)
        elif config.pairs == "same":
            first = second = crop(batch.images, box, flip)
        elif config.pairs == "random":
            first = crop(batch.images, box, flip)
            second = crop(batch.images, boxes(extent, config.global_scale), flips())
        else:
            # The local crop is cut from the resized global crop, before either is flipped.
            whole = crop(batch.images, box, torch.zeros_like(flip))
            inner = boxes(torch.full_like(extent, size), config.local_scale)
            first = torch.where(flip[:, None, None, None], whole.flip(3), whole)
            second = crop(whole, inner, flips())
            if config.pairs == "local_to_global":
                first, second = second, first
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=batch.images.device)
        return {
            "images1": normalise(first, self.input),
            "images2": normalise(second, self.input),
            "noise": noise,
        }

    def forward(self, images1: Tensor, images2: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Both normalised views (B, 3, H, W) and noise (B, L); squared error on the hidden, normalised patches."""
        memory = self.backbone(self.backbone.embed(images1))
        visible, mask, restore = random_masking(self.backbone.embed(images2), noise, self.keep)
        latent = self.backbone(visible)
        pred = self.decoder(latent, restore, self.decoder.embed(memory))  # which gets no positions
        target = standardise(patchify(images2, self.config.backbone.patch_size))
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        outputs = {"loss": loss, "pred": pred, "mask": mask, "latent": latent}
        return {**outputs, "latent1": memory, "ids_restore": restore}

    def encoder(self) -> ViTEncoder:
        """The siamese encoder on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
