"""Cluster and Predict Latents Patches for Improved Masked Image Modeling (Darcet et al., TMLR 2025, arXiv 2502.08769).

A momentum teacher encodes the whole image, and an online clustering assigns each of its patches to prototypes,
evenly over the batch at every position. The student sees one rectangle of patches; a predictor that attends to
its latents says to which prototypes some of the hidden patches belong. Nothing else is learnt from.

Worth an ablation: ``--set positionwise=false`` (even over all patches at once, Table 1i), ``--set roll=false``,
``--set masking=random`` and ``masking=block`` (Table 1b), ``--set pool=mean`` (what the predictor's readout gives).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.config import check
from mimbench.data import Batch
from mimbench.distributed import batch_max, batch_sum
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import take
from mimbench.models.vit import ViTShape

from .model import Backbone, BackboneEncoder

RECIPE = Recipe(
    epochs=6410,  # 500,000 steps of 78 to an epoch of ImageNet-1k
    batch_size=16384,  # 512 on each of 32 GPUs
    base_lr=1e-3,
    lr_batch=0,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    warmup_epochs=641,  # 50,000 steps
    cosine_share=0.8,  # of the momentum's schedule, too
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The authors' default_pretrain_config.yaml for ViT-L/14, which sources are from where none is named."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape(14, 1024, 24, 16)  # of student and teacher
    registers: int = 16  # tokens beside the patches, on the border of what is visible (model.py)
    predictor: int = 12  # blocks of cross-attention, as wide as the backbone; the readout keeps the first
    drop_path: float = 0.2  # share of images that skip a branch, in each block of the student
    prototypes: int = 16384  # clusters; as many as images in a batch
    mask_ratio: float = 0.65  # share of patches that the student does not see
    masking: Literal["inverse_block", "block", "random"] = "inverse_block"  # a block is visible, or hidden
    roll: bool = True  # whether the block may go on at the opposite border
    predicted: float = 0.05  # share of the hidden patches that are predicted
    student_temperature: float = 0.12  # of the student's softmax over prototypes
    target_temperature: float = 0.06  # of the assignments
    clustering_temperature: float = 0.12  # of the clustering's own softmax
    sinkhorn_iterations: int = 3  # that make the assignments even
    positionwise: bool = True  # even at each position for itself, or over all of them at once (Table 1i)
    momentum: float = 0.999  # of the teacher: from 1 to this in the warm-up, then back along a cosine
    clustering_lr: float = 0.5  # learning rate of the clustering over that of the student (5e-4 over 1e-3)
    clustering_weight_decay: float = 0.01  # unset, so AdamW's own, for the bias too
    crop_scale: tuple[float, float] = (0.6, 1.0)  # area of the random crop, share of the image
    flip: bool = True  # random horizontal flip
    pool: Literal["predictor", "mean"] = "predictor"  # what frozen probes read (model.py)
    recipe: Recipe = RECIPE  # how student and clustering are trained

    def __post_init__(self) -> None:
        temperatures = ("student_temperature", "target_temperature", "clustering_temperature")
        check(
            self,
            "config",
            positive=("image_size", "prototypes", "sinkhorn_iterations", "clustering_lr", *temperatures),
            not_negative=("clustering_weight_decay",),
            share=("drop_path", "mask_ratio", "predicted", "momentum"),
        )
        if self.drop_path == 1:
            raise ConfigError("config.drop_path = 1.0 leaves no branch to train", "Choose a share below 1")
        if self.recipe.accumulate != 1:
            raise ConfigError(
                f"recipe.accumulate = {self.recipe.accumulate} would even out assignments over parts of a batch",
                "Set recipe.accumulate to 1, and take a smaller recipe.batch_size",
            )


def blocks(count: int, side: int, cells: int, roll: bool, generator: torch.Generator) -> Tensor:
    """True in ``cells`` patches of each image (count, side * side): a rectangle whose last row may be cut short.

    Height over width is log-uniform from 1/2 to 2, as far as the rectangle fits. With ``roll`` it may go on at the
    opposite border. After the authors' data.py, for all images at once.
    """
    device = generator.device

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, generator=generator, device=device)

    low, high = max(-math.log(2), math.log(cells / side**2)), min(math.log(2), math.log(side**2 / cells))
    ratio = (low + (high - low) * uniform()).exp()
    height, width = ((cells * r).sqrt().ceil().clamp(max=side) for r in (ratio, 1 / ratio))
    room = (side, side) if roll else (side - height + 1, side - width + 1)
    top, left = ((uniform() * places).floor() for places in room)
    line = torch.arange(side, device=device)
    row, column = (line[:, None] - top) % side, (line - left) % side
    return ((column < width) & (row * width + column < cells)).flatten(1)


@torch.no_grad()
def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Assignments (..., B, K) of B rows to K prototypes from their scores, by Sinkhorn and Knopp's iterations.

    Rows add up to 1, and columns to nearly the same: the batch, of all processes, is spread evenly over the
    prototypes.
    """
    shares = (scores - batch_max(scores.amax(-2, keepdim=True)) + 50).exp()
    for _ in range(iterations):
        shares /= batch_sum(shares.sum(-2, keepdim=True)) + 1e-8
        shares /= shares.sum(-1, keepdim=True) + 1e-8
    return shares


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Of the softmax of ``logits`` (..., K) over ``temperature`` to the shares ``target`` (..., K), the mean."""
    return -(target * (logits / temperature).log_softmax(-1)).sum(-1).mean()


class Head(nn.Module):
    """Logits of a direction: its products with the prototypes' directions, each times a gain."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, width), std=0.02))
        self.gain = nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.direction * (self.gain / (self.direction.norm(dim=1, keepdim=True) + 1e-8))
        return F.linear(F.normalize(x, dim=-1, eps=1e-12), weight)


class Clustering(nn.Module):
    """The online clustering: prototypes that are not normalised, and a bias. It learns from its own assignments."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.backbone.width, config.prototypes)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments (B, L, K), without gradient, of patches (B, L, D), and the loss of the prototypes."""
        config = self.config
        logits = self.layer(F.normalize(patches, dim=-1, eps=1e-7)).float()
        scores = logits.detach() / config.target_temperature
        if config.positionwise:
            shares = sinkhorn(scores.transpose(0, 1), config.sinkhorn_iterations).transpose(0, 1)
        else:
            shares = sinkhorn(scores.flatten(0, 1), config.sinkhorn_iterations).view_as(scores)
        return shares, cross_entropy(shares, logits, config.clustering_temperature)


class Model(nn.Module):
    """Student, its head, the teacher that averages it, and the clustering of what the teacher sees."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape = config.backbone
        self.student = Backbone(shape, config.registers, config.predictor, config.drop_path)
        self.head = Head(shape.width, config.prototypes)
        self.teacher = Backbone(shape, config.registers, config.predictor, drop_path=0.0)
        self.teacher.requires_grad_(False).load_state_dict(self.student.state_dict())
        self.clustering = Clustering(config)
        if config.image_size % shape.patch_size:
            raise ConfigError(
                f"image size {config.image_size} is not a multiple of the patch size {shape.patch_size}"
            )
        self.side = config.image_size // shape.patch_size
        self.patches = self.side**2
        self.hidden = int(self.patches * config.mask_ratio)
        self.predicted = int(self.hidden * config.predicted)
        if not (self.predicted > 0 and self.hidden < self.patches):
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} hides {self.hidden} of {self.patches} patches, of which "
                f"predicted = {config.predicted} predicts {self.predicted}",
                "Choose shares that show and predict at least one patch each",
            )

    def draw_hidden(self, count: int, generator: torch.Generator) -> Tensor:
        """True (count, L) where a patch is hidden from the student."""
        side, roll, shown = self.side, self.config.roll, self.patches - self.hidden
        if self.config.masking == "inverse_block":
            return ~blocks(count, side, shown, roll, generator)
        if self.config.masking == "block":
            return blocks(count, side, self.hidden, roll, generator)
        noise = torch.rand(count, self.patches, generator=generator, device=generator.device)
        return noise.argsort(1) < self.hidden  # a permutation, and as random as its inverse

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and which of its patches are visible and predicted, in raster and in random order."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        hidden = self.draw_hidden(len(batch), generator)
        noise = torch.rand(hidden.shape, generator=generator, device=hidden.device)
        return {
            "images": normalise(images, self.input),
            "visible": hidden.int().argsort(dim=1, stable=True)[:, : self.patches - self.hidden],
            "predicted": noise.masked_fill(~hidden, 2.0).argsort(1)[:, : self.predicted],
        }

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's assignments (B, L, K) of all patches, and the loss that trains the clustering alone."""
        with torch.no_grad():
            latent, _ = self.teacher.encode(images)
        return self.clustering(latent[:, self.config.registers :])

    def forward(self, images: Tensor, visible: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and places of patches, ``visible`` (B, n) and ``predicted`` (B, m)."""
        config, student = self.config, self.student
        assignments, loss_clustering = self.assign(images)
        target = take(assignments, predicted)
        latent, places = student.encode(images, visible)
        prediction = student.predict(student.grid(images)[0][predicted], latent, places)
        logits = self.head(prediction).float()
        loss = cross_entropy(target, logits, config.student_temperature)
        return {
            "loss": loss + loss_clustering,  # no parameter has a gradient from both
            "loss_capi": loss,
            "loss_clustering": loss_clustering,
            "target_entropy": -torch.xlogy(target, target).sum(-1).mean(),
            "mask": torch.ones(len(images), self.patches, device=images.device).scatter(1, visible, 0.0),
            "target": target,
            "latent": latent[:, config.registers :],
            "pred_before_head": prediction,
            "pred": logits,
        }

    def teacher_momentum(self, progress: float) -> float:
        """From 1 down to ``momentum`` over the warm-up, then back along a cosine that stops early, like the rate's."""
        recipe, least = self.config.recipe, self.config.momentum
        warmup = min(recipe.warmup_epochs / recipe.epochs, 1.0)
        if progress < warmup:
            return 1 + (least - 1) * progress / warmup
        share = recipe.cosine_share * (progress - warmup) / max(1 - warmup, 1e-12)
        return 1 + (least - 1) * (1 + math.cos(math.pi * share)) / 2

    def after_step(self, progress: float) -> None:
        """The teacher follows the student, predictor included."""
        share = 1 - self.teacher_momentum(progress)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), share)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The clustering is an optimizer's work of its own: other rate and decay, and no gradient is shared.

        The patch projection learns at a fifth of the rate, norms decay by a tenth (authors' config).
        """
        norms: list[nn.Parameter] = []
        rest = list(self.head.parameters())
        for name, parameter in self.student.named_parameters():
            if not name.startswith("patch_embed"):
                (norms if ".norm" in name else rest).append(parameter)
        return [
            {
                "params": self.clustering.parameters(),
                "lr_scale": self.config.clustering_lr,
                "weight_decay": self.config.clustering_weight_decay,
            },
            {"params": self.student.patch_embed.parameters(), "lr_scale": 0.2},
            {"params": norms, "weight_decay": 0.1 * recipe.weight_decay},
            {"params": rest},
        ]

    def encoder(self) -> BackboneEncoder:
        """The teacher on full images, as the authors release and evaluate it."""
        return BackboneEncoder(self.teacher, self.input, self.config.pool)
