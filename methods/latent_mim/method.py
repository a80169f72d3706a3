"""Towards Latent Masked Image Modeling (Wei, Gupta, Morgado, ECCV 2024, arXiv 2407.15837).

A tenth of the patches is encoded; a decoder predicts what a momentum encoder makes of the others. Four things
keep this from a trivial solution: the targets' encoder is an average; a prediction must tell its own patch from
the others of its image; gaps between patches, few visible ones and a goal for how alike tokens are keep
neighbours from giving the answer away; and the decoder reads the visible latents by cross-attention.

Worth an ablation: ``--set loss=regression``, ``--set patch_gap=0``, ``--set similarity_weight=0``,
``--set cues=false``, ``--set target_sees=all``. The logged ``avg_sim_*`` rise to 1 when tokens collapse.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.config import check
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import standardise
from mimbench.models.vit import ViTEncoder, ViTShape

from .model import Decoder, Head, LatentDecoder, ProjectedViT

RECIPE = Recipe(
    epochs=800,
    batch_size=4096,  # 256 on each of 8 GPUs, twice accumulated
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    warmup_lr=3.75e-5,  # the rise starts where the cosine ends, at a quarter of the peak
    min_lr=3.75e-5,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The authors' published command for ViT-B/16 on ImageNet-1k."""

    image_size: int = 224  # side of the patches put side by side, in pixels; the crop is larger by the gaps
    backbone: ViTShape = ViTShape()  # of both encoders
    head: Head = Head()  # projects both encoders' tokens
    decoder: Decoder = Decoder()  # its MLPs widen as the backbone's do
    patch_gap: int = 4  # pixels between patches on average; each shifts by 0 to gap - 1 (authors' command)
    visible: int = 20  # patches that the online encoder sees, of 196 (authors' config)
    target_sees: Literal["hidden", "all"] = "hidden"  # patches in the momentum encoder (authors' mask_target)
    cues: bool = True  # whether queries start from the visible tokens near them (authors' avg_vis_mask_token)
    loss: Literal["discrimination", "regression"] = "discrimination"  # regression: of standardised targets
    temperature: float = 0.2  # of the patch discrimination (authors' config)
    similarity_weight: float = 0.1  # of the two similarity terms (authors' command; 0 in their config)
    similarity_goal: tuple[float, float] = (0.75, 0.25)  # mean cosine, first to last (authors' config)
    momentum: float = 0.99  # of the target's average at first; a cosine takes it to 1 (authors' config)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, share of the image (authors' config)
    flip: bool = True  # random horizontal flip (authors' code)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read (authors' evaluation)
    recipe: Recipe = RECIPE  # authors' command

    def __post_init__(self) -> None:
        check(
            self,
            "config",
            positive=("temperature", "visible"),
            not_negative=("patch_gap", "similarity_weight"),
            share=("momentum",),
        )


def take_patches(images: Tensor, offsets: Tensor, patch_size: int, gap: int) -> Tensor:
    """One patch from each cell of p + gap pixels, put side by side: (B, 3, H, W) without the gaps.

    ``offsets`` (B, 2, rows, columns) are the patches' places within their cells, in pixels down and right.
    """
    rows, columns = offsets.shape[2:]
    cell, pixel = patch_size + gap, torch.arange(patch_size, device=images.device)
    first_row = torch.arange(rows, device=images.device)[:, None] * cell + offsets[:, 0]
    first_column = torch.arange(columns, device=images.device) * cell + offsets[:, 1]
    row = first_row[:, :, None, :, None] + pixel[:, None, None]  # (B, rows, p, columns, 1)
    column = first_column[:, :, None, :, None] + pixel  # (B, rows, 1, columns, p)
    place = (row * images.shape[3] + column).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, place).unflatten(2, (rows * patch_size, columns * patch_size))


def patch_discrimination(pred: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each prediction's target among those of the same image, times 2 temperature.

    Predictions (B, M, D) are first standardised over the patches of their image, then both are normalised.
    """
    pred = (pred - pred.mean(1, keepdim=True)) / (pred.std(1, keepdim=True) + 1e-4)
    scores = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).transpose(1, 2) / temperature
    own = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    return 2 * temperature * F.cross_entropy(scores.flatten(0, 1), own.flatten())


def regression(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error to targets (B, M, D) standardised over their channels: the loss found to be trivial."""
    return F.mse_loss(pred, standardise(target))


def average_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine of all pairs of an image's tokens (B, n, D), which is the squared norm of their mean direction."""
    return F.normalize(tokens, dim=-1).mean(1).square().sum(-1).mean()


def anneal(first: float, last: float, progress: float) -> float:
    """From ``first`` to ``last`` along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


class BlockOutput(ViTEncoder):
    """The ViT without its final norm, as the authors evaluate it."""

    readouts = {
        **ViTEncoder.readouts,
        "class": "class token of the last block, no norm",
        "mean": "mean of patch tokens of the last block, no norm",
    }


class Model(nn.Module):
    """Online encoder, its average as the target, decoder. Logs how alike predictions, latents and targets are."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.online = ProjectedViT(config.image_size, config.backbone, config.head)
        self.grid = self.online.vit.grid
        tokens = self.online.vit.tokens
        if config.visible > tokens - 2:
            raise ConfigError(
                f"visible = {config.visible} leaves {max(tokens - config.visible, 0)} of {tokens} patches hidden",
                "Two at least must be hidden to be told apart; the paper shows a tenth",
            )
        self.decoder = LatentDecoder(config.backbone, config.decoder, self.grid[0], config.cues)
        self.initialise()
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def initialise(self) -> None:
        """Xavier-uniform matrices with the patch projection read as one; class tokens from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.online.vit.cls_token, self.decoder.cls_token):
            nn.init.normal_(token, std=0.02)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, a patch from each of its cells, the noise that ranks these, and today's goal."""
        config, device = self.config, batch.images.device
        patch_size, gap = config.backbone.patch_size, config.patch_gap
        size = self.grid[0] * (patch_size + gap)
        crop = augment.crop_and_flip(batch, size, config.crop_scale, generator, flip_p=0.5 * config.flip)
        # Offsets never reach the gap (authors' code).
        shape = (len(batch), 2, *self.grid)
        offsets = torch.randint(max(gap, 1), shape, generator=generator, device=device)
        noise = torch.rand(len(batch), self.online.vit.tokens, generator=generator, device=device)
        return {
            "images": normalise(take_patches(crop, offsets, patch_size, gap), self.input),
            "noise": noise,
            "goal": torch.full((), anneal(*config.similarity_goal, batch.progress), device=device),
        }

    def forward(self, images: Tensor, noise: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """Normalised patches side by side (B, 3, H, W), noise (B, L), the mean cosine asked for as a scalar."""
        config = self.config
        order = noise.argsort(dim=1)
        visible, hidden = order[:, : config.visible], order[:, config.visible :]
        with torch.no_grad():
            seen = hidden if config.target_sees == "hidden" else order
            target = self.target(images, seen)[:, -hidden.shape[1] :]
        latent = self.online(images, visible)
        pred = self.decoder(latent, visible, hidden)
        pred, latent, target = pred.float(), latent.float(), target.float()
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round the scores to 1/32
            if config.loss == "discrimination":
                loss = patch_discrimination(pred, target, config.temperature)
            else:
                loss = regression(pred, target)
        alike_pred, alike_vis = average_similarity(pred), average_similarity(latent[:, 1:])
        constraint = (alike_pred - goal).square() + (alike_vis - goal).square()
        return {
            "loss": loss + config.similarity_weight * constraint,
            "avg_sim_pred": alike_pred,
            "avg_sim_vis": alike_vis,
            "avg_sim_trg": average_similarity(target),
            "mask": torch.zeros_like(noise).scatter(1, hidden, 1.0),
            "pred": pred,
            "latent": latent,
            "target": target,
        }

    def after_step(self, progress: float) -> None:
        """The target follows the online encoder, ever more slowly."""
        share = 1 - anneal(self.config.momentum, 1.0, progress)
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), share)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The two input projections do not decay (authors' code)."""
        embeddings = [self.online.vit.patch_embed.proj.weight, self.decoder.embed.weight]
        ids = {id(p) for p in embeddings}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        return [{"params": embeddings, "weight_decay": 0.0}, {"params": rest}]

    def encoder(self) -> BlockOutput:
        """The online ViT on full images, without final norm and projection."""
        return BlockOutput(self.online.vit, self.input, self.config.pool)
