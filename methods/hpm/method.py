"""Hard Patches Mining for Masked Image Modeling (Wang et al., CVPR 2023, arXiv 2304.05919).

An MAE with a second decoder that predicts how badly each patch will be reconstructed. An averaged copy of
the model, the teacher, predicts this for the whole image; the patches that it finds hardest are hidden
from the student. Their share of the mask grows over training, the rest of the mask stays random.

Worth an ablation: ``--set hard_share=[0,0]`` (random masks, the loss still predicted), ``[0.5,0.5]`` (as
hard from the start), ``[0.5,0]`` (hard to easy), and ``--set relative=false`` (predict values, not order).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimbench import augment, config
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import DecoderShape, initialise, standardise, take
from mimbench.models.vit import Block, ViT, ViTEncoder, ViTShape, patchify, sincos_positions

RECIPE = Recipe(
    epochs=200,  # PRETRAIN.md; the long runs take 800
    batch_size=2048,  # PRETRAIN.md: 32 images x 8 GPUs x 8 accumulated parts
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' PRETRAIN.md for ViT-B/16; sources are files of their code."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: DecoderShape = DecoderShape()  # of each of the two (models_mae_learn_loss.py)
    mask_ratio: float = 0.75  # share of patches that the student does not see (PRETRAIN.md)
    hard_share: tuple[float, float] = (0.0, 0.5)  # share of the mask mined, first to last (generate_mask)
    relative: bool = True  # learn the order of patch losses, not their values (PRETRAIN.md)
    normalise_target: bool = False  # patches by own mean and deviation (main_pretrain.py: off by default)
    momentum: tuple[float, float] = (0.999, 0.9999)  # teacher's decay per step (engine_pretrain.py)
    momentum_epochs: float = 100  # epochs over which the decay rises (engine_pretrain.py)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share (mask_transform.py)
    flip: bool = True  # random horizontal flip (mask_transform.py)
    pool: Literal["class", "mean"] = "class"  # what frozen probes read (main_linprob.py, main_knn.py)
    recipe: Recipe = RECIPE  # PRETRAIN.md, main_pretrain.py

    def __post_init__(self) -> None:
        config.check(self, "config", positive=("momentum_epochs",), share=("hard_share", "momentum"))


def mine_mask(predicted: Tensor, hard: Tensor, noise: Tensor, keep: int) -> Tensor:
    """A mask (B, L) in raster order, 1 where hidden, that leaves ``keep`` patches of each image visible.

    The ``hard[i]`` patches of image i with the largest ``predicted`` loss (B, L) are hidden. Of the others
    those with the smallest ``noise`` (B, L) are kept. With ``hard`` = 0 this is the random mask of MAE.
    """
    rank = predicted.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    order = noise.masked_fill(rank < hard[:, None], math.inf).argsort(dim=1)
    return torch.ones_like(noise).scatter(1, order[:, :keep], 0.0)


def order_loss(predicted: Tensor, error: Tensor) -> Tensor:
    """How badly ``predicted`` (B, M) orders the patches of each image by their ``error`` (B, M).

    Over all pairs with error_i > error_j, the mean of -log(sigmoid(predicted_i - predicted_j) + 1e-6). The
    authors sum over both orders of a pair, which gives every term twice. Without such a pair the loss is 0.
    """
    harder = error[:, :, None] > error[:, None, :]
    gap = predicted[:, :, None] - predicted[:, None, :]
    return -((gap.sigmoid() + 1e-6).log() * harder).sum() / harder.sum().clamp(min=1)


def value_loss(predicted: Tensor, error: Tensor) -> Tensor:
    """Squared distance of ``predicted`` (B, M) to the errors (B, M), standardised within each image."""
    return (predicted - standardise(error)).square().mean()


class Decoder(nn.Module):
    """Transformer blocks, a norm, and p*p*C outputs for every patch."""

    def __init__(self, shape: DecoderShape, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [Block(shape.width, shape.heads, shape.mlp_ratio) for _ in range(shape.depth)]
        )
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.pred = nn.Linear(shape.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))[:, 1:]


class Network(nn.Module):
    """A ViT on visible patches, and two decoders of one sequence: pixels, and the loss at every patch."""

    decoder_pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape, decoder = config.backbone, config.decoder
        pixels = shape.patch_size**2 * 3
        self.backbone = ViT(config.image_size, shape)
        self.decoder_embed = nn.Linear(shape.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        table = sincos_positions(decoder.width, *self.backbone.grid)
        self.register_buffer("decoder_pos_embed", torch.cat([torch.zeros(1, decoder.width), table])[None])
        self.reconstructor = Decoder(decoder, pixels)
        self.loss_predictor = Decoder(decoder, pixels)
        initialise(self)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normed outputs on [class, patches at ``visible`` (B, N)]."""
        return self.backbone(take(self.backbone.embed(images), visible))

    def sequence(self, latent: Tensor, order: Tensor) -> Tensor:
        """What both decoders read: [class, visible, mask tokens], each with the position of its own place.

        ``order`` (B, L) names the places, visible ones first; nothing is brought back to raster order.
        """
        x = self.decoder_embed(latent)
        hidden = order.shape[1] + 1 - x.shape[1]
        patches = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1)], dim=1)
        positions = self.decoder_pos_embed
        return torch.cat([x[:, :1] + positions[:, :1], patches + positions[0, 1:][order]], dim=1)

    def predict_losses(self, sequence: Tensor) -> Tensor:
        """One number per patch (B, L): the mean of the outputs, in float32, for ranks need fine steps."""
        return self.loss_predictor(sequence).float().mean(-1)


class Model(nn.Module):
    """Student and teacher; the loss is the reconstruction's on hidden patches plus the loss predictor's."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.student = Network(config)
        patches = self.student.backbone.tokens
        self.keep = int(patches * (1 - config.mask_ratio))
        if not 0 < self.keep < patches - 1:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} leaves {self.keep} of {patches} patches visible",
                "Choose a ratio that keeps at least one patch and hides at least two, which can be ordered",
            )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def epoch(self, progress: float) -> int:
        """The epoch, counted from 0, that a share of training falls into; schedules move with epochs."""
        return int(progress * self.config.recipe.epochs + 1e-9)  # step / steps * epochs may fall short

    def hard_patches(self, progress: float) -> int:
        """How many patches are mined: a share of the hidden ones that goes from easy to hard."""
        start, end = self.config.hard_share
        done = (self.epoch(progress) + 1) / max(math.ceil(self.config.recipe.epochs), 1)
        return int((self.student.backbone.tokens - self.keep) * (start + (end - start) * done))

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, the noise that ranks patches, and how many hard ones to hide instead."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        shape = (len(batch), self.student.backbone.tokens)
        noise = torch.rand(shape, generator=generator, device=images.device)
        hard = torch.full((len(batch),), self.hard_patches(batch.progress), device=images.device)
        return {"images": normalise(images, self.input), "noise": noise, "hard": hard}

    @torch.no_grad()
    def difficulty(self, images: Tensor) -> Tensor:
        """The losses (B, L) that the teacher predicts for each patch, seeing the whole image."""
        teacher = self.teacher
        everywhere = torch.arange(teacher.backbone.tokens, device=images.device).expand(len(images), -1)
        latent = teacher.encode(images, everywhere)
        return teacher.predict_losses(teacher.sequence(latent, everywhere))

    def forward(self, images: Tensor, noise: Tensor, hard: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W), noise (B, L) and the number of hard patches (B,).

        ``pred`` (B, L, p*p*C) and ``loss_pred`` (B, L) list the visible patches first, then the hidden ones.
        """
        config, student = self.config, self.student
        difficulty = self.difficulty(images)
        mask = mine_mask(difficulty, hard, noise, self.keep)
        order = mask.argsort(dim=1, stable=True)  # visible, then hidden, each in raster order
        visible, hidden = order[:, : self.keep], order[:, self.keep :]

        latent = student.encode(images, visible)
        sequence = student.sequence(latent, order)
        pred, loss_pred = student.reconstructor(sequence), student.predict_losses(sequence)

        target = take(patchify(images, config.backbone.patch_size), hidden)
        if config.normalise_target:
            target = standardise(target)
        error = (pred[:, self.keep :] - target).square().mean(-1)
        learn = order_loss if config.relative else value_loss
        # The errors are constants here, but the encoder learns from predicting them.
        predictor = learn(loss_pred[:, self.keep :], error.detach())
        return {
            "loss": error.mean() + predictor,
            "loss_reconstruction": error.mean(),
            "loss_predictor": predictor,
            "pred": pred,
            "loss_pred": loss_pred,
            "loss_matrix": error,
            "mask": mask,
            "latent": latent,
            "teacher_loss_pred": difficulty,
        }

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student; the decay rises over the first epochs."""
        start, end = self.config.momentum
        decay = start + (end - start) * min(self.epoch(progress) / self.config.momentum_epochs, 1.0)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - decay)

    def encoder(self) -> ViTEncoder:
        """The student's ViT on full images; both decoders and the teacher are discarded."""
        return ViTEncoder(self.student.backbone, self.input, self.config.pool)
