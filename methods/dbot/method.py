"""Exploring Target Representations for Masked Autoencoders (Liu et al., ICLR 2024, arXiv 2209.03917): dBOT.

A masked autoencoder that regresses a teacher's features, and a teacher that need not know anything: the first is a
random network. Once a student has learned from it, the student becomes the teacher of a new student, which starts
from new random weights. Within a stage the teacher never moves.

Worth an ablation: ``--set recipe.stages=1|2|3`` (each stage takes its part of the same epochs) and
``--set first_teacher_depth=0`` (the first target is a random linear map of each patch).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment, optim
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import (
    Decoder,
    DecoderShape,
    initialise,
    random_masking,
    standardise,
    visible_patches,
)
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, spread_drop_path

RECIPE = Recipe(
    epochs=1600,  # two stages of 800
    stages=2,
    batch_size=4096,  # 128 on each of 8 GPUs of 4 machines
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,  # in each stage (util/lr_sched.py)
    clip_norm=3.0,  # for ViT-B only
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' PRETRAIN.md for ViT-B/16; other sources are files of their code."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the student and, from the second stage on, the teacher
    decoder: DecoderShape = DecoderShape()  # discarded after each stage (models_mae.py)
    first_teacher_depth: int = 12  # blocks of the random teacher (PRETRAIN.md; 0 for ViT-L and ViT-H)
    mask_ratio: float = 0.75  # share of patches that the student does not see (PRETRAIN.md)
    normalise_target: bool = True  # each token by its own mean and deviation (PRETRAIN.md)
    drop_path: float = 0.2  # of the student's last block and the decoder's (PRETRAIN.md; 0.3 for ViT-H)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share (main_pretrain.py)
    flip: bool = True  # random horizontal flip (main_pretrain.py)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read (main_finetune.py: global_pool)
    recipe: Recipe = RECIPE  # PRETRAIN.md, main_pretrain.py, run.sh

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"config.drop_path = {self.drop_path} should be at least 0 and below 1")
        if not 0 <= self.first_teacher_depth <= self.backbone.depth:
            raise ConfigError(
                f"config.first_teacher_depth = {self.first_teacher_depth} does not fit a backbone of "
                f"{self.backbone.depth} blocks",
                f"Choose a depth from 0 to {self.backbone.depth}",
            )


def networks(config: Config) -> tuple[ViT, Decoder]:
    """An encoder and its decoder with new random weights, drawn on the CPU."""
    backbone = ViT(config.image_size, config.backbone)
    decoder = Decoder(config.decoder, backbone, config.backbone.width)
    initialise(nn.ModuleList([backbone, decoder]))
    return backbone, decoder


class Model(nn.Module):
    """Student on visible patches, teacher on all; the loss is where the student did not see, and the class token."""

    needs = ()
    stage: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone, self.decoder = networks(config)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        # The first teacher is the student as it starts, without its last blocks if it is to be shallower.
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        spread_drop_path(self.backbone.blocks, config.drop_path)
        spread_drop_path(self.decoder.blocks, config.drop_path)
        self.register_buffer("stage", torch.tensor(0))
        self.note_stage(0)
        self.register_load_state_dict_post_hook(lambda model, _: model.note_stage(int(model.stage)))

    def note_stage(self, number: int) -> None:
        """Keeps the buffer ``stage`` as a number too, because reading it from a GPU would make each step wait."""
        self.reached = number
        self.teacher_depth = self.config.backbone.depth if number else self.config.first_teacher_depth

    def before_step(self, progress: float) -> None:
        """At the first step of a new stage the student becomes the teacher and gets new random weights.

        Weights change in place: the optimizer keeps its moments, as in the authors' code.
        """
        number = optim.stage(progress, self.config.recipe.stages)
        if number <= self.reached:
            return
        self.teacher.load_state_dict(self.backbone.state_dict())
        for network, fresh in zip((self.backbone, self.decoder), networks(self.config), strict=True):
            network.load_state_dict(fresh.state_dict())
        self.stage.fill_(number)
        self.note_stage(number)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, for student and teacher alike, and the noise that ranks its patches."""
        config, shape = self.config, (len(batch), self.backbone.tokens)
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(shape, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's tokens (B, 1 + L, D) of the whole image after its last block, without the final norm."""
        x = self.teacher.with_class_token(self.teacher.embed(images))
        for block in self.teacher.blocks[: self.teacher_depth]:
            x = block(x)
        return x

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L).

        ``pred`` and ``target`` (B, 1 + L, D) begin with the class token, which counts as hidden; ``mask`` (B, L)
        is that of the patches.
        """
        visible, mask, restore = random_masking(self.backbone.embed(images), noise, self.keep)
        latent = self.backbone(visible)
        pred = self.decoder.pred(self.decoder.tokens(latent, restore))
        target = self.target(images)
        wanted = standardise(target.float()) if self.config.normalise_target else target.float()
        error = F.smooth_l1_loss(pred.float(), wanted, beta=2.0, reduction="none").mean(-1)
        counted = F.pad(mask, (1, 0), value=1.0)
        return {
            "loss": (error * counted).sum() / counted.sum(),
            "pred": pred,
            "target": target,
            "mask": mask,
            "latent": latent,
            "ids_restore": restore,
        }

    def encoder(self) -> ViTEncoder:
        """The student of the last stage on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
