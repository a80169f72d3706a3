"""Context Autoencoder for Self-Supervised Representation Learning (Chen et al., 2022, arXiv 2202.03026).

The encoder represents visible patches and does nothing else. A regressor predicts the latents of hidden patches
by cross-attention, and a decoder, which never meets a visible patch, turns predicted latents into the codes that
a frozen tokenizer gives those patches. An alignment loss pulls the predictions to what the encoder makes of the
hidden patches, so that predicting happens in the space that the encoder represents in.

Worth an ablation: ``--set align_weight=0`` and ``--set decoder.depth=0``.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.augment.masks import block_masks
from mimbench.config import check
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import DecoderShape, take
from mimbench.models.vit import ViTEncoder, ViTShape
from mimbench.models.vq import Tokenised, Tokenizer, TokenizerConfig, fit_on_codes

from .model import Decoder, Encoder, Regressor, positions

RECIPE = Recipe(
    epochs=800,  # their script for ViT-B; there are others for 300 and 1600 epochs
    batch_size=2048,  # 64 on each of 32 GPUs
    base_lr=1.5e-3,
    lr_batch=2048,  # the rate is given for this batch
    weight_decay=0.05,
    warmup_epochs=20,  # 10 for 300 epochs, 40 for 1600
    warmup_lr=0.0,  # their option of 1e-6 never reaches the schedule
    min_lr=1e-5,
    clip_norm=3.0,
    precision="bf16",
)
TOKENIZER = TokenizerConfig(codes=8192, width=256, depth=4)  # as many codes as DALL-E's; the rest is ours


@dataclass(frozen=True)
class Config:
    """The authors' ``cae_base_800e.sh`` (ViT-B/16); sources are their scripts and their options' defaults."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    regressor_depth: int = 4  # blocks of cross-attention, of the decoder's width and heads (script)
    decoder: DecoderShape = DecoderShape(width=768, depth=4, heads=12)  # discarded, as the regressor (script)
    layer_scale: float = 0.1  # initial scale of branches in all three networks; 1e-5 for ViT-L (script)
    drop_path: float = 0.1  # stochastic depth at the last block of each of the three (script)
    mask_ratio: float = 0.5  # share of the patches that is hidden: 98 of 196 (script)
    smallest_block: int = 16  # patches of the smallest block to hide (min_mask_patches_per_block)
    align_weight: float = 2.0  # of the alignment loss; 0 trains without (script)
    tokenizer: TokenizerConfig = TOKENIZER  # gives the codes to predict, and says how it is trained
    tokenizer_weights: str = ""  # a file of tokenizer weights to use; none: a tokenizer is trained first
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, share of the image (default)
    flip: bool = True  # random horizontal flip (datasets.py)
    pool: Literal["class", "mean"] = "class"  # what frozen probes read (run_linear.py)
    recipe: Recipe = RECIPE  # of the method, not of the tokenizer

    def __post_init__(self) -> None:
        check(
            self,
            "config",
            positive=("regressor_depth", "smallest_block"),
            not_negative=("align_weight",),
            share=("drop_path", "mask_ratio"),
        )


class Model(Tokenised):
    """Encoder, regressor, decoder, and two frozen networks that make targets: the encoder's copy and the tokenizer.

    Raises ConfigError for a ratio that hides no patch or all of them, and CheckpointError for a tokenizer's file
    that does not fit.
    """

    needs = ()
    tokenizer: Tokenizer
    places: Tensor  # positions of all patches for regressor and decoder, (1, L, W)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape, decoder, branch = config.backbone, config.decoder, (config.layer_scale, config.drop_path)
        self.backbone = Encoder(config.image_size, shape, *branch)
        self.hidden = round(self.backbone.tokens * config.mask_ratio)
        if not 0 < self.hidden < self.backbone.tokens:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} hides {self.hidden} of {self.backbone.tokens} patches",
                "The paper hides half of them",
            )
        wide = ViTShape(shape.patch_size, decoder.width, decoder.depth, decoder.heads, decoder.mlp_ratio)
        self.project: nn.Module = nn.Identity()
        if decoder.width != shape.width:
            norm = nn.LayerNorm(decoder.width, eps=1e-6)
            self.project = nn.Sequential(nn.Linear(shape.width, decoder.width), norm)
        self.regressor = Regressor(dataclasses.replace(wide, depth=config.regressor_depth), *branch)
        self.decoder = Decoder(wide, *branch, config.tokenizer.codes)
        self.register_buffer("places", positions(decoder.width, self.backbone.grid)[None])
        self.initialise()
        self.alignment = copy.deepcopy(self.backbone).requires_grad_(False)
        tokenizer = Tokenizer(config.tokenizer, config.image_size, shape.patch_size, config.flip)
        self.take_tokenizer(tokenizer, config.tokenizer_weights)

    def initialise(self) -> None:
        """Xavier-uniform matrices, zero biases; patch projection and tokens from a narrow normal (authors' code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.backbone.patch_embed.proj
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
        for parameter in (patches.weight, self.backbone.cls_token, self.regressor.mask_token):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, the blocks to hide, and the codes of its patches, always in full precision."""
        config = self.config
        flip = 0.5 * config.flip
        images = augment.crop_and_flip(batch, config.image_size, config.crop_scale, generator, flip_p=flip)
        grid = self.backbone.grid
        mask = block_masks(len(batch), grid, self.hidden, config.smallest_block, generator)
        return {
            "images": normalise(images, self.input),
            "mask": mask,
            "tokens": self.tokenizer.tokens(images),
        }

    def forward(self, images: Tensor, mask: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W), masks (B, L) that hide as many patches of each, and all codes (B, L).

        Logs both terms of the loss, the share of codes that are right, and the targets' deviation over images
        and patches: near 0 it tells of collapse.
        """
        order = mask.int().argsort(dim=1, stable=True)  # visible patches first, both in raster order
        visible, hidden = order.split([order.shape[1] - self.hidden, self.hidden], dim=1)
        latent = self.project(self.backbone(take(self.backbone.embed(images), visible)))
        with torch.no_grad():
            target = self.project(self.alignment(take(self.alignment.embed(images), hidden)))[:, 1:].float()

        places = self.places.expand(len(images), -1, -1)
        predicted = self.regressor(latent[:, 1:], take(places, hidden), take(places, visible))
        logits = self.decoder(predicted, take(places, hidden)).float()

        codes = tokens.gather(1, hidden)
        loss_main = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        loss_align = self.config.align_weight * F.mse_loss(predicted.float(), target)
        return {
            "loss": loss_main + loss_align,
            "loss_main": loss_main,
            "loss_align": loss_align,
            "accuracy": (logits.argmax(-1) == codes).float().mean(),
            "target_deviation": target.flatten(0, 1).std(0).mean(),
            "mask": mask,
            "pred": logits,
            "latent": latent,
            "latent_predict": predicted,
            "latent_target": target,
        }

    def after_step(self, progress: float) -> None:
        """The alignment encoder has no momentum: it is the encoder itself."""
        torch._foreach_copy_(list(self.alignment.parameters()), list(self.backbone.parameters()))

    def encoder(self) -> ViTEncoder:
        """The ViT on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)


pretrain = fit_on_codes  # the tokenizer first
