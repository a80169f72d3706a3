"""Masked Frequency Modeling for Self-Supervised Visual Pre-Training (Xie et al., ICLR 2023, arXiv 2206.07706).

An image loses frequencies instead of patches: a coin decides whether it keeps the low ones, a small disc around
the centre of its spectrum, or all the others. The encoder sees the filtered image in full, one linear layer turns
its feature map into pixels, and the loss compares the spectra of prediction and image where they were hidden.

There is no mask token, no decoder and no second network, so the same lines train a ViT and a ResNet.

Worth an ablation: ``--set low_pass=0`` or ``1`` (one filter alone) and ``--set hidden_only=false`` (the loss
over the whole spectrum).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import Block, ViT, ViTEncoder, ViTShape

RECIPE = Recipe(
    epochs=300,
    batch_size=2048,
    base_lr=3e-4,
    lr_batch=512,  # not the usual 256
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=20,
    warmup_lr=2.5e-7,
    min_lr=2.5e-6,
    clip_norm=3.0,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' ViT-B config (300 epochs)."""

    image_size: int = 224  # side of the training crop, in pixels
    architecture: Literal["vit", "resnet"] = "vit"  # which of the next two is trained
    backbone: ViTShape = ViTShape()  # the ViT (authors' ViT-B config)
    resnet: ResNetShape = ResNetShape()  # the ResNet (authors' ResNet-50 config)
    radius: float = 16.0  # of the disc of low frequencies, in steps of the spectrum (authors' configs)
    low_pass: float = 0.5  # share of images that keep the disc; 0.3 for ResNet-50 (authors' configs)
    hidden_only: bool = True  # the loss counts hidden frequencies; False: all (authors' configs)
    gamma: float = 1.0  # power of the distance between two coefficients (authors' config.py)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, share of the image (authors' config.py)
    flip: bool = True  # random horizontal flip (authors' code)
    recipe: Recipe = RECIPE  # authors' ViT-B config and main_mfm.py


def low_frequencies(size: int, radius: float) -> Tensor:
    """(size, size) bool, true in the open disc of ``radius`` around the zero frequency, which is at size // 2."""
    step = torch.arange(size, device="cpu") - size // 2
    return (step[:, None] ** 2 + step**2) < radius**2


def filtered(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] without the frequencies at which ``mask`` (B, H, W) is false, clamped to [0, 1].

    The mask is centred: its zero frequency is at (H // 2, W // 2).
    """
    kept = torch.fft.ifftshift(mask, dim=(1, 2))[:, None]
    return torch.fft.ifft2(torch.fft.fft2(images) * kept).real.clamp(0, 1)


def frequency_distance(pred: Tensor, target: Tensor, gamma: float) -> Tensor:
    """|F(pred) - F(target)|^gamma per channel and coefficient (B, 3, H, W), the zero frequency in the corner.

    F is the orthonormal transform, linear, so that one of the difference is enough; always in float32.
    """
    difference = torch.view_as_real(torch.fft.fft2((pred - target).float(), norm="ortho"))
    # The authors' 1e-12 keeps the gradient of the root finite where both agree.
    return (difference.square().sum(-1) + 1e-12).sqrt() ** gamma


class QKV(nn.Linear):
    """Queries, keys and values (B, L, 3 D) of tokens (B, L, D), with biases on queries and values alone (BEiT)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.weight, bias)


class LearnedViT(ViT):
    """The authors' ViT: BEiT's without relative biases and layer scale, its positions learned."""

    def __init__(self, image_size: int, shape: ViTShape) -> None:
        super().__init__(image_size, shape)
        del self.pos_embed
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.tokens, shape.width))
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.qkv = QKV(shape.width)
        self.initialise()

    def initialise(self) -> None:
        """Normal(0, 0.02) cut at one deviation; the outputs of block l divided by sqrt(2 l)."""
        matrices = [m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for tensor in (self.pos_embed, self.cls_token, *(m.weight for m in matrices)):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
        for bias in (m.bias for m in matrices if m.bias is not None):
            nn.init.zeros_(bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, 1):
                assert isinstance(block, Block)
                block.attn.proj.weight /= math.sqrt(2 * number)
                block.mlp.fc2.weight /= math.sqrt(2 * number)


class Model(nn.Module):
    """Filter, encoder on the full filtered image, one-layer head, distance between hidden frequencies.

    Raises ConfigError for a disc that hides nothing in one of the two modes, a share of low-pass images outside
    [0, 1], a power of 0 or less, and images that patches or the ResNet's stride do not tile.
    """

    needs = ()

    disc: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        if not 0 <= config.low_pass <= 1:
            raise ConfigError(f"low_pass = {config.low_pass} is not in [0, 1]")
        if not config.gamma > 0:
            raise ConfigError(f"gamma = {config.gamma} should be above 0")
        disc = low_frequencies(config.image_size, config.radius)
        if disc.all() or not config.radius > 0:
            raise ConfigError(
                f"radius = {config.radius} puts {int(disc.sum())} of {disc.numel()} frequencies in the disc",
                f"Choose one above 0 and below half of the image size, {config.image_size}",
            )
        self.register_buffer("disc", disc, persistent=False)
        self.backbone: LearnedViT | ResNet
        if config.architecture == "vit":
            self.backbone = LearnedViT(config.image_size, config.backbone)
            width, stride = config.backbone.width, config.backbone.patch_size
        else:
            self.backbone = ResNet(config.resnet)
            width, stride = self.backbone.dim, self.backbone.stride
            if config.image_size % stride:
                raise ConfigError(
                    f"image size {config.image_size} is not a multiple of the ResNet's stride {stride}"
                )
        # PixelShuffle fixes the order of the outputs: (colour, row, column) inside a patch.
        self.decoder = nn.Sequential(nn.Conv2d(width, stride**2 * 3, kernel_size=1), nn.PixelShuffle(stride))

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, the frequencies that it keeps, and what is left of it then."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        low = augment.chance(len(batch), config.low_pass, generator)
        mask = self.disc == low[:, None, None]  # the disc where low, else all but the disc
        # Filtered before normalising: clamping to [0, 1] means something for pixels only.
        corrupted = filtered(images, mask)
        return {
            "images": normalise(images, self.input),
            "corrupted": normalise(corrupted, self.input),
            "mask": mask,
        }

    def encode(self, images: Tensor) -> Tensor:
        """The last feature map (B, D, h, w) of normalised images (B, 3, H, W); a ViT's is normed, without its class."""
        if isinstance(self.backbone, ResNet):
            return self.backbone.stages(images)[-1]
        tokens = self.backbone(self.backbone.embed(images))[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, self.backbone.grid)

    def forward(self, images: Tensor, corrupted: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Normalised images, whole and filtered (B, 3, H, W), and what was kept (B, H, W), centred, true = kept.

        The loss is a mean over the hidden coefficients of the whole batch, not of each image: a low-pass image has
        far more of them than a high-pass one, whose few are far larger.
        """
        latent = self.encode(corrupted)
        pred = self.decoder(latent)
        distance = frequency_distance(pred, images, self.config.gamma)
        counted = torch.fft.ifftshift(~mask, dim=(1, 2)) if self.config.hidden_only else torch.ones_like(mask)
        loss = (distance * counted[:, None]).sum() / counted.sum() / images.shape[1]
        return {"loss": loss, "pred": pred, "latent": latent}

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Class token and positions do not decay (authors' code); the rest follows the usual rule."""
        exempt = ("backbone.cls_token", "backbone.pos_embed")
        named = dict(self.named_parameters())
        return [
            {"params": [p for n, p in named.items() if n in exempt], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if n not in exempt]},
        ]

    def encoder(self) -> ViTEncoder | ResNetEncoder:
        """The backbone on full, unfiltered images."""
        if isinstance(self.backbone, ResNet):
            return ResNetEncoder(self.backbone, self.input)
        return ViTEncoder(self.backbone, self.input, "mean")
