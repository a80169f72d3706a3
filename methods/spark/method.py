"""SparK: Sparse and Hierarchical Masked Modeling for convolutional networks (Tian et al., ICLR 2023, arXiv 2301.03580).

A convolution slides visible pixels into hidden cells, layer by layer, until no mask is left to fill. SparK treats
the visible pixels as a sparse image: every layer of the encoder computes on visible positions alone. A light UNet
decoder gets the encoder's maps at several scales, with mask embeddings in the empty places, and regresses the pixels
of the hidden cells, each cell normalised. What remains is an ordinary dense network, a ResNet or a ConvNeXt.

Worth an ablation: ``--set sparse=false`` (hidden pixels are zeros, and a dense network smears them) and
``--set hierarchy=false`` (the decoder sees the last map alone).
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
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import standardise
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import patchify

from .model import ChannelNorm, ConvNeXt, ConvNeXtEncoder, ConvNeXtShape, batch_norm, resnet_stages, visible

RECIPE = Recipe(
    epochs=1600,
    batch_size=4096,
    base_lr=2e-4,
    betas=(0.9, 0.95),  # (0.9, 0.999) for ConvNeXt
    weight_decay=0.12,  # the mean of the authors' rise from 0.04 to 0.2
    warmup_epochs=40,
    warmup_lr=1e-6,  # 0.005 of the peak
    min_lr=2e-7,  # 0.001 of the peak
    clip_norm=5.0,
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' code for ResNet-50."""

    image_size: int = 224  # side of the training crop, in pixels (arg_util.py)
    architecture: Literal["resnet", "convnext"] = "resnet"  # which of the next two is trained
    resnet: ResNetShape = ResNetShape()  # the ResNet; the authors' default is ResNet-50
    convnext: ConvNeXtShape = ConvNeXtShape()  # the ConvNeXt
    drop_path: float = 0.05  # stochastic depth of the last block (models/__init__.py; 0.2 for ConvNeXt-S)
    mask_ratio: float = 0.6  # share of cells hidden, a cell being the network's stride squared (arg_util.py)
    sparse: bool = True  # False: a dense network on an image with zeros in the hidden cells
    hierarchy: bool = True  # the decoder gets a map at each of its scales; False: the last one alone
    decoder_width: int = 768  # channels at the coarsest scale, halved at each further one (decoder.py)
    crop_scale: tuple[float, float] = (0.67, 1.0)  # area of the crop, share of the image (utils/imagenet.py)
    flip: bool = True  # random horizontal flip (utils/imagenet.py)
    recipe: Recipe = RECIPE  # arg_util.py, lr_control.py


class Densify(nn.Module):
    """A sparse map made dense for the decoder: norm, a mask embedding in the empty places, projection."""

    def __init__(self, norm: nn.BatchNorm2d | ChannelNorm, width: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.norm = norm
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-0.02, b=0.02))
        # At the coarsest scale (kernel 1) nothing is projected where the widths agree, as with ConvNeXt-S.
        same = kernel == 1 and width == outputs
        self.proj = nn.Identity() if same else nn.Conv2d(width, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, active: Tensor, sparse: bool) -> Tensor:
        """A map (B, C, H, W) and its mask (B, 1, f, f), 1 = visible, to (B, D, H, W)."""
        if isinstance(self.norm, nn.BatchNorm2d):
            x = batch_norm(self.norm, x, active if sparse else None)
        else:
            x = self.norm(x)
        empty = F.interpolate(active, size=x.shape[2:]) == 0
        return self.proj(torch.where(empty, self.mask_token[:, None, None].to(x.dtype), x))


class UpBlock(nn.Module):
    """Twice the resolution and half the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(x))


class Decoder(nn.Module):
    """The authors' LightDecoder: one block per halving of the encoder, then a 1x1 convolution to colours."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UpBlock(width >> n) for n in range(count))
        self.proj = nn.Conv2d(width >> count, 3, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Dense maps, coarsest first, each added before the block of its scale; to images (B, 3, H, W)."""
        x = maps[0]
        for number, block in enumerate(self.blocks):
            if 0 < number < len(maps):
                x = x + maps[number]
            x = block(x)
        return self.proj(x)


class Model(nn.Module):
    """Sparse encoder, densified maps, UNet decoder, mean squared error on the hidden cells.

    Raises ConfigError for a ratio that hides or keeps all cells, images that cells do not tile, a network that halves
    nothing or more often than the decoder's width allows, and batches that leave a norm one visible position.
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone: ResNet | ConvNeXt
        if config.architecture == "resnet":
            self.backbone = ResNet(config.resnet)
            expansion = 4 if config.resnet.block == "bottleneck" else 1
            widths = [expansion * width for width in config.resnet.widths]
        else:
            self.backbone = ConvNeXt(config.convnext, config.drop_path)
            widths = list(config.convnext.widths)
        self.stride = self.backbone.stride
        self.grid = config.image_size // self.stride
        if self.stride == 1:
            raise ConfigError(
                "stride 1 leaves the decoder nothing to enlarge", "Set convnext.stem to 2 or more"
            )
        if config.image_size % self.stride or not self.grid:
            raise ConfigError(f"image size {config.image_size} is not a multiple of the stride {self.stride}")
        if not 0 <= config.drop_path < 1:
            raise ConfigError(f"drop_path = {config.drop_path} should lie in [0, 1)")
        cells = self.grid**2
        self.keep = round(cells * (1 - config.mask_ratio))  # rounded, where MAE truncates
        if not 0 < self.keep < cells:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} leaves {self.keep} of {cells} cells visible",
                "Choose a ratio that keeps and hides at least one cell",
            )
        if config.architecture == "resnet" and config.recipe.batch_size * self.keep < 2:
            raise ConfigError(
                f"recipe.batch_size = {config.recipe.batch_size} leaves the norms one position to average over"
            )
        scales = self.stride.bit_length() - 1
        if config.decoder_width < 1 or config.decoder_width % 2**scales:
            raise ConfigError(
                f"decoder_width = {config.decoder_width} cannot be halved {scales} times",
                f"Choose a multiple of {2**scales}",
            )
        # A CIFAR stem's first map has full resolution, at which no block of the decoder begins.
        levels = min(len(widths), scales) if config.hierarchy else 1
        self.densify = nn.ModuleList()
        for level, width in enumerate(widths[::-1][:levels]):
            norm = nn.BatchNorm2d(width) if config.architecture == "resnet" else ChannelNorm(width, eps=1e-6)
            outputs = config.decoder_width >> level
            self.densify.append(Densify(norm, width, outputs, kernel=3 if level else 1))
        self.decoder = Decoder(config.decoder_width, scales)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the noise that ranks its cells."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(len(batch), self.grid**2, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    def encode(self, images: Tensor, active: Tensor) -> list[Tensor]:
        """The maps of all stages, finest first, of the visible cells of normalised images (B, 3, H, W)."""
        shown = visible(images, active)
        mask = active if self.config.sparse else None
        if isinstance(self.backbone, ResNet):
            return resnet_stages(self.backbone, shown, mask, self.config.drop_path)
        return self.backbone.maps(shown, mask)

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, f * f); the loss averages over the batch's hidden cells."""
        kept = noise.argsort(dim=1)[:, : self.keep]
        mask = torch.ones_like(noise).scatter_(1, kept, 0.0)
        active = (1 - mask).reshape(-1, 1, self.grid, self.grid)
        maps = self.encode(images, active)
        dense = [
            densify(x, active, self.config.sparse)
            for densify, x in zip(self.densify, reversed(maps), strict=False)
        ]
        pred = patchify(self.decoder(dense), self.stride)
        target = standardise(patchify(images, self.stride))
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        latents = {f"latent{number}": x for number, x in enumerate(maps)}
        return {"loss": loss, "pred": pred, "mask": mask, **latents}

    def encoder(self) -> ResNetEncoder | ConvNeXtEncoder:
        """The network, dense again, on full images; its norms keep the statistics of visible positions."""
        if isinstance(self.backbone, ResNet):
            return ResNetEncoder(self.backbone, self.input)
        return ConvNeXtEncoder(self.backbone, self.input)
