"""SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv 2111.09886).

Sixty per cent of the image, in squares larger than a patch, is replaced by one learned token after the
patch embedding. The encoder sees the whole grid; a single linear layer predicts the raw pixels under the
squares, and the loss is their mean absolute error.

Against MAE: mask tokens enter the encoder, so its sequence has full length whatever the ratio; the target
is not normalised; nothing but one layer is thrown away. The encoder is a ViT with relative position biases
and layer scale (``model.py``), as in the authors' ViT recipe.

Worth an ablation: ``--set mask_unit=4`` on a patch of 4 (squares as small as a patch can be filled in from
their neighbours) and ``--set mask_ratio=0.3``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.beit import RelativeViT, RelativeViTEncoder
from mimbench.models.vit import ViTShape

RECIPE = Recipe(
    epochs=800,
    batch_size=2048,
    base_lr=1e-4,
    lr_batch=512,  # not the usual 256
    weight_decay=0.05,
    schedule="multistep",
    milestones=(700,),
    gamma=0.1,
    warmup_epochs=10,
    warmup_lr=5e-7,
    clip_norm=5.0,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' ViT-B recipe (800 epochs)."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    mask_unit: int = 32  # side of a masked square, in pixels; a multiple of the patch size (Sec. 3.2)
    mask_ratio: float = 0.6  # share of the squares that are masked, rounded up (Sec. 3.2)
    layer_scale: float = 0.1  # initial value of the per-channel branch scales (authors' config)
    drop_path: float = 0.1  # stochastic depth at the last block (authors' ViT-B config)
    crop_scale: tuple[float, float] = (0.67, 1.0)  # area of the crop, share of the image (authors' code)
    flip: bool = True  # random horizontal flip
    recipe: Recipe = RECIPE  # authors' ViT-B config


def square_masks(noise: Tensor, ratio: float, repeat: int) -> Tensor:
    """Masks on the patch grid (B, h, w), 1 = masked, from noise per square (B, rows, columns).

    In every image the ``ceil(ratio * squares)`` squares with the smallest noise are masked; each covers
    ``repeat`` x ``repeat`` patches.
    """
    b, rows, columns = noise.shape
    count = math.ceil(ratio * rows * columns)
    rank = noise.flatten(1).argsort(1).argsort(1)
    mask = (rank < count).reshape(b, rows, columns)
    return mask.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)


class Model(nn.Module):
    """Mask token at the input, full-length encoder, one-layer head, L1 on masked pixels.

    Raises ConfigError for squares that patches do not tile or that do not tile the image, and for a ratio
    outside (0, 1].
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        patch = config.backbone.patch_size
        if config.mask_unit % patch or config.image_size % config.mask_unit:
            raise ConfigError(
                f"mask_unit = {config.mask_unit} must be a multiple of the patch size {patch} "
                f"and divide the image size {config.image_size}"
            )
        if not 0 < config.mask_ratio <= 1:
            raise ConfigError(f"mask_ratio = {config.mask_ratio} is not in (0, 1]")
        self.backbone = RelativeViT(config.image_size, config.backbone, config.layer_scale, config.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.backbone.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # PixelShuffle fixes the order of the outputs: (colour, row, column) inside a patch.
        self.decoder = nn.Sequential(
            nn.Conv2d(config.backbone.width, patch**2 * 3, kernel_size=1), nn.PixelShuffle(patch)
        )

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and a mask drawn on the crop."""
        config = self.config
        images = augment.crop_and_flip(
            batch,
            config.image_size,
            config.crop_scale,
            generator,
            flip_p=0.5 * config.flip,
            interpolation="bilinear",
        )
        squares = config.image_size // config.mask_unit
        noise = torch.rand(len(batch), squares, squares, generator=generator, device=images.device)
        mask = square_masks(noise, config.mask_ratio, config.mask_unit // config.backbone.patch_size)
        return {"images": normalise(images, self.input), "mask": mask}

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """The normed feature map (B, D, h, w) of images (B, 3, H, W) with masks (B, h, w), 1 = masked.

        Masked patches are overwritten before the blocks; the class token is dropped after them.
        """
        tokens = self.backbone.patch_embed(images)
        hidden = mask.flatten(1).to(tokens.dtype)[..., None]
        tokens = tokens * (1 - hidden) + self.mask_token * hidden
        grid = (mask.shape[1], mask.shape[2])
        normed, _ = self.backbone(tokens, grid)
        return normed[:, 1:].transpose(1, 2).reshape(len(images), -1, *grid)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and masks (B, h, w), 1 = masked; only masked pixels count."""
        latent = self.encode(images, mask)
        pred = self.decoder(latent)
        patch = self.config.backbone.patch_size
        hidden = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None].to(pred.dtype)
        loss = ((images - pred).abs() * hidden).sum() / (hidden.sum() + 1e-5) / images.shape[1]
        return {"loss": loss, "pred": pred, "mask": mask, "latent": latent}

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The class token does not decay (authors' code); the rest follows the usual rule."""
        token = self.backbone.cls_token
        rest = [p for p in self.parameters() if p is not token]
        return [{"params": [token], "weight_decay": 0.0}, {"params": rest}]

    def encoder(self) -> RelativeViTEncoder:
        """The ViT on full images, without mask tokens."""
        return RelativeViTEncoder(self.backbone, self.input)
