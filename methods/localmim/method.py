"""Masked Image Modeling with Local Multi-Scale Reconstruction (Wang et al., CVPR 2023, arXiv 2303.05251).

An MAE that is supervised at several of its layers. The outputs of low and high blocks each go through a norm and
a small decoder of their own, and reconstruct the hidden patches at a scale of their own: low layers on a grid
finer than the tokens', high layers on a coarser one. What is reconstructed are histograms of oriented gradients.

Worth an ablation: ``--set target=pixels``, ``--set layers=[-1] --set scales=[1]`` (the last layer alone, at the
scale of the tokens) and ``--set scales=[1,1,1,1]`` (several layers, one scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment, config
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.hog import hog
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
    epochs=1600,  # ViT/README.md; the authors' 100-epoch runs warm up for 10
    batch_size=2048,
    base_lr=2e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    min_lr=1.25e-7,  # 1e-6 at a batch of 2048 (run_pretrain.py)
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' ViT/README.md for ViT-B/16; sources are files of their code."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: DecoderShape = DecoderShape(256, 1, 8)  # of each layer's own (ViT/models_mim.py)
    layers: tuple[int, ...] = (2, 4, -3, -1)  # blocks supervised, -1 the last (ViT/models_mim.py)
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)  # of their grids over the tokens' (ViT/models_mim.py)
    target: Literal["hog", "pixels"] = "hog"  # pixels: each cell standardised (ViT: hog; Swin offers both)
    bins: int = 9  # orientations of a histogram; 18 for ViT-L (ViT/README.md)
    hog_bias: bool = False  # a fixed random offset of the gradients; true for ViT-L (ViT/README.md)
    mask_ratio: float = 0.75  # share of patches that the encoder does not see (ViT/README.md)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share (ViT/run_pretrain.py)
    flip: bool = True  # random horizontal flip (ViT/run_pretrain.py)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read (ours: the authors only fine-tune)
    recipe: Recipe = RECIPE  # ViT/README.md, ViT/run_pretrain.py

    def __post_init__(self) -> None:
        config.check(self, "config", positive=("bins",), filled=("layers",))


def block_numbers(layers: tuple[int, ...], depth: int) -> list[int]:
    """The supervised blocks, counted from 1. Raises ConfigError unless they ascend and end at the last block."""
    numbers = [layer if layer > 0 else depth + 1 + layer for layer in layers]
    if numbers != sorted(set(numbers)) or numbers[0] < 1 or numbers[-1] != depth:
        raise ConfigError(
            f"layers = {list(layers)} are blocks {numbers} of {depth}",
            "Name different blocks in rising order; the last must be -1, or blocks above it would not learn",
        )
    return numbers


def cell_size(config: Config, scale: float) -> int:
    """The side in pixels of what one prediction covers. Raises ConfigError for a scale that cannot work."""
    patch, grid = config.backbone.patch_size, config.image_size // config.backbone.patch_size
    if scale not in (4, 2, 1, 0.5) or patch % scale or (grid * scale) % 1:
        raise ConfigError(
            f"scales = {list(config.scales)} do not fit {grid} x {grid} patches of {patch} pixels",
            "Choose among 4, 2, 1 and 0.5; patches must be a multiple of the scale, the grid of its inverse",
        )
    cell = int(patch / scale)
    if config.target == "hog" and cell == 1:
        raise ConfigError(
            f"a histogram needs more than the one pixel of a cell at scale {scale:g} with patches of {patch} pixels",
            "Choose a lower scale, or target=pixels",
        )
    return cell


def hidden_share(mask: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """How much of each cell of a scale is hidden (B, L * scale^2), from the mask of the tokens (B, L).

    A cell inside a token has the token's 0 or 1, a cell over four tokens their mean.
    """
    rows, columns = (int(side * scale) for side in grid)
    return F.adaptive_avg_pool2d(mask.unflatten(1, grid)[:, None], (rows, columns)).flatten(1)


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def prediction_head(width: int, scale: float, outputs: int) -> nn.Sequential:
    """From a map of tokens (B, W, h, w) to predictions (B, outputs, h * scale, w * scale)."""
    double = [nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
    again = [
        ChannelNorm(width // 2, eps=1e-6),
        nn.GELU(),
        nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
    ]
    steps: dict[float, list[nn.Module]] = {4: [*double, *again], 2: [*double], 1: [], 0.5: [nn.AvgPool2d(2)]}
    return nn.Sequential(*steps[scale], nn.Conv2d(int(width / max(scale, 1)), outputs, 1))


class LocalDecoder(Decoder):
    """MAE's decoder for one layer of the encoder; a few convolutions predict at this layer's scale."""

    def __init__(self, shape: DecoderShape, encoder: ViT, scale: float, outputs: int) -> None:
        super().__init__(shape, encoder, outputs)
        del self.pred
        self.grid = encoder.grid
        self.head = prediction_head(shape.width, scale, outputs)

    def forward(self, latent: Tensor, restore: Tensor, *memory: Tensor) -> Tensor:
        """Predictions for every cell (B, L * scale^2, outputs), in raster order."""
        tokens = self.tokens(latent, restore, *memory)[:, 1:]
        return self.head(tokens.mT.unflatten(2, self.grid)).flatten(2).mT


class Model(nn.Module):
    """Encoder on visible patches; for each supervised layer a decoder on all and a loss on the hidden ones."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        if len(config.layers) != len(config.scales):
            raise ConfigError(
                f"layers = {list(config.layers)} and scales = {list(config.scales)} differ in length",
                "Give each supervised layer its scale",
            )
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ViT(config.image_size, config.backbone)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        self.supervised = block_numbers(config.layers, config.backbone.depth)
        self.cells = [cell_size(config, scale) for scale in config.scales]
        # The last supervised layer has the backbone's own norm.
        width = config.backbone.width
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for _ in self.supervised[:-1]])
        self.decoders = nn.ModuleList(
            [
                LocalDecoder(
                    *(config.decoder, self.backbone, scale),
                    outputs=3 * (config.bins if config.target == "hog" else cell**2),
                )
                for scale, cell in zip(config.scales, self.cells, strict=True)
            ]
        )
        # The authors leave the bias of the layer that computes gradients as torch draws it, and never train it.
        self.offsets: Tensor | None
        offsets = torch.empty(len(self.cells), 2).uniform_(-1 / 3, 1 / 3) if config.hog_bias else None
        self.register_buffer("offsets", offsets)
        initialise(self)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the noise that ranks its patches."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    def encode(self, images: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Normed outputs (B, 1 + keep, D) of the supervised blocks, the mask and the restoring permutation."""
        visible, mask, restore = random_masking(self.backbone.embed(images), noise, self.keep)
        x = self.backbone.with_class_token(visible)
        norms = [*self.norms, self.backbone.norm]
        latents: list[Tensor] = []
        for number, block in enumerate(self.backbone.blocks, 1):
            x = block(x)
            if number in self.supervised:  # the next block gets the output before this norm
                latents.append(norms[len(latents)](x))
        return latents, mask, restore

    @torch.no_grad()
    def target(self, images: Tensor, head: int) -> Tensor:
        """What a head should predict (B, L * scale^2, outputs): histograms of R, then G, then B, or pixels."""
        cell = self.cells[head]
        if self.config.target == "pixels":
            return standardise(patchify(images, cell))
        offset = None if self.offsets is None else self.offsets[head, :, None]
        return hog(images, cell, self.config.bins, offset).flatten(1, 2).flatten(2).mT

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L); the losses of all heads are added.

        ``loss_block<n>`` is that of the head at block n; ``pred<k>`` and ``target<k>`` (B, L * scale^2, outputs)
        are those of the k-th head, counted from 0.
        """
        latents, mask, restore = self.encode(images, noise)
        outputs = {"mask": mask, "latent": torch.stack(latents, dim=1), "ids_restore": restore}
        losses = {}
        for head, (block, decoder) in enumerate(zip(self.supervised, self.decoders, strict=True)):
            pred, target = decoder(latents[head], restore), self.target(images, head)
            weight = hidden_share(mask, self.backbone.grid, self.config.scales[head])
            error = (pred - target).square().mean(-1)
            losses[f"loss_block{block}"] = (error * weight).sum() / weight.sum()
            outputs |= {f"pred{head}": pred, f"target{head}": target}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, **outputs}

    def encoder(self) -> ViTEncoder:
        """The ViT on full images, with the norm of its last block; decoders and other norms are discarded."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
