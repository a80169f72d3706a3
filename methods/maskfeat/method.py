"""Masked Feature Prediction for Self-Supervised Visual Pre-Training (Wei et al., CVPR 2022, arXiv 2112.09133).

Two fifths of the patches, in blocks, are replaced by one learned token. The whole sequence goes through the
ViT, and one linear layer predicts histograms of oriented gradients (HOG) of what was hidden: a descriptor made
by hand, with no tokenizer, teacher or decoder.

Worth an ablation: ``--set target=pixels`` or ``normalised_pixels`` (regress the colours instead), and
``--set mask_ratio=0.75``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimbench import augment, config
from mimbench.augment.masks import block_masks
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.hog import hog
from mimbench.models.mae import standardise
from mimbench.models.vit import PatchEmbed, ViT, ViTEncoder, ViTShape

RECIPE = Recipe(
    epochs=300,  # the weights that the authors publish are of epoch 1600
    batch_size=256,  # per machine of 8 GPUs; more machines raise the learning rates in proportion
    base_lr=2e-4,
    weight_decay=0.05,  # the class token, the positions and the mask token decay too (ZERO_DECAY_POS_CLS)
    warmup_epochs=30,
    warmup_lr=1e-6,
    min_lr=1e-6,
    clip_norm=0.02,
    precision="fp32",  # TRAIN.MIXED_PRECISION is off by default
)


@dataclass(frozen=True)
class Config:
    """The authors' ``in1k_VIT_B_MaskFeat_PT.yaml`` (ViT-B/16); sources are files of their code."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    mask_ratio: float = 0.4  # most patches that blocks cover, as a share (AUG.MASK_RATIO)
    target: Literal["hog", "pixels", "normalised_pixels"] = "hog"  # what to predict (MASK.PRED_HOG)
    cell: int = 8  # side of the square that one histogram describes, in pixels (masked.py)
    bins: int = 9  # orientations of a histogram, over half a turn (masked.py)
    crop_scale: tuple[float, float] = (0.5, 1.0)  # area of the crop, share (TRAIN_JITTER_SCALES_RELATIVE)
    flip: bool = True  # random horizontal flip (transforms_imagenet_train)
    recipe: Recipe = RECIPE  # SOLVER

    def __post_init__(self) -> None:
        config.check(self, "config", positive=("cell", "bins"), share=("mask_ratio",))


def per_patch(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, C, h, w) cut into patches (B, L, values), each flattened as (channel, row, column)."""
    rows, columns = grid
    cut = image.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (B, C, rows, h', columns, w')
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Model(nn.Module):
    """Mask token at the input, full-length encoder, a norm and one layer, squared error on hidden patches.

    Raises ConfigError for a ratio that hides no patch or all of them, and for cells that do not tile a patch.
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape = config.backbone
        self.backbone = ViT(config.image_size, shape)
        patches = self.backbone.tokens
        self.hidden = round(patches * config.mask_ratio)
        if not 0 < self.hidden < patches:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} hides {self.hidden} of {patches} patches",
                "Choose a ratio that keeps and hides at least one patch",
            )
        values = shape.patch_size**2
        if config.target == "hog":
            if shape.patch_size % config.cell:
                raise ConfigError(
                    f"cells of {config.cell} pixels do not tile patches of {shape.patch_size}",
                    "Choose a cell that divides backbone.patch_size",
                )
            values = config.bins * (shape.patch_size // config.cell) ** 2

        # Positions are learned, that of the class token too, and the encoder has no final norm of its own: the
        # one before the prediction goes with the head. Frozen probes get a norm without weights in its place.
        self.backbone.pos_embed = nn.Parameter(torch.zeros_like(self.backbone.pos_embed))
        self.backbone.norm = nn.LayerNorm(shape.width, eps=1e-6, elementwise_affine=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.head = nn.Sequential(nn.LayerNorm(shape.width, eps=1e-6), nn.Linear(shape.width, 3 * values))
        self.initialise()

    def initialise(self) -> None:
        """Matrices, tokens and positions from N(0, 0.02); the encoder's biases 0.02, also those of its norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.bias, 0.02)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.constant_(module.bias, 0.02)
            elif isinstance(module, PatchEmbed):
                nn.init.trunc_normal_(module.proj.weight, std=0.02)
        for layer in self.head:
            nn.init.zeros_(layer.get_parameter("bias"))
        for table in (self.backbone.cls_token, self.backbone.pos_embed, self.mask_token):
            nn.init.trunc_normal_(table, std=0.02)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and blocks of patches to hide: as many as asked for, or fewer where none fits."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        smallest = self.hidden // 5  # patches of a block (datasets/imagenet.py)
        mask = block_masks(len(batch), self.backbone.grid, self.hidden, smallest, generator, exact=False)
        return {"images": normalise(images, self.input), "mask": mask}

    def target(self, images: Tensor) -> Tensor:
        """What normalised images (B, 3, H, W) ask for at each patch (B, L, values).

        A patch of HOG is flattened as (colour, bin, cell row, cell column), one of pixels as (colour, row,
        column). ``normalised_pixels`` are standardised within the patch, as the authors' code does by default.
        """
        config = self.config
        if config.target == "hog":
            images = hog(images, config.cell, config.bins).flatten(1, 2)
        patches = per_patch(images, self.backbone.grid)
        return standardise(patches) if config.target == "normalised_pixels" else patches

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Outputs of the last block (B, 1 + L, D), not normed, for masks (B, L), True where hidden.

        The token is put in before positions are added, so that hidden patches keep their places.
        """
        vit = self.backbone
        tokens = torch.where(mask[..., None], self.mask_token, vit.patch_embed(images))
        x = vit.with_class_token(tokens + vit.pos_embed[:, 1:])
        for block in vit.blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and masks (B, L), True where hidden.

        The loss is the mean over all hidden patches of the batch: images with more of them count for more.
        """
        latent = self.encode(images, mask)
        pred = self.head(latent)[:, 1:]
        target = self.target(images)
        error = (pred - target).square().mean(-1)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": loss, "pred": pred, "target": target, "mask": mask, "latent": latent}

    def encoder(self) -> ViTEncoder:
        """The ViT on full images, without mask tokens and head."""
        return ViTEncoder(self.backbone, self.input, "mean")
