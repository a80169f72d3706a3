"""Learning with Unmasked Tokens Drives Stronger Vision Learners (Kim et al., ECCV 2024, arXiv 2310.13593).

MAE trains the visible tokens only through what the decoder makes of them. Here they also learn on their own,
from broader context: the mean of the few visible patches of one view must predict what an averaged teacher
makes of the whole other view. The two views never show the encoder the same places.

Worth an ablation: ``--set bc_weight=0`` (MAE on these views).
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
from mimbench.augment.geometry import resample, resampling_taps
from mimbench.augment.views import where
from mimbench.config import check
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import Decoder, DecoderShape, initialise, standardise, take, visible_patches
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, patchify

PAPER_BATCH = 4096  # where the authors' rule for the learning rate equals the linear one

RECIPE = Recipe(
    epochs=1600,
    batch_size=PAPER_BATCH,  # 128 images x 8 GPUs x 4 accumulated parts
    accumulate=4,  # so that BatchNorm averages over 1024 images, as theirs over 8 GPUs
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    precision="bf16",
)


@dataclass(frozen=True)
class Heads:
    """The projector and the predictor, two MLPs that end at the encoder's width."""

    hidden: int = 4096  # channels between linear layers (PRETRAIN.md)
    norm: Literal["batch", "layer", "none"] = "batch"  # before each activation (PRETRAIN.md)
    activation: Literal["relu", "gelu"] = "relu"  # between linear layers (PRETRAIN.md)
    projector_layers: int = 2  # linear layers of the projector, 0 for none (PRETRAIN.md)
    predictor_layers: int = 2  # linear layers of the predictor, 0 for none (PRETRAIN.md)


@dataclass(frozen=True)
class Config:
    """The recommended command of the authors' PRETRAIN.md for ViT-B/16; other sources are files of their code."""

    image_size: int = 224  # side of both views, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: DecoderShape = DecoderShape()  # models_lut.py; discarded after pretraining
    heads: Heads = Heads()  # discarded after pretraining
    mask_ratio: float = 0.75  # share of patches that the student does not see of each view (main_lut.py)
    normalise_target: bool = True  # patches by their own mean and deviation (PRETRAIN.md)
    mae_weight: float = 1.0  # of MAE's loss on view 1 (main_lut.py)
    bc_weight: float = 0.25  # of the broader contextualisation loss (PRETRAIN.md)
    momentum: float = 0.996  # teacher's decay per step at first; a cosine takes it to 1 (PRETRAIN.md)
    padding: int = 4  # mirrored pixels around the image that crops may reach into (main_lut.py)
    flip: bool = True  # random horizontal flip of each view (main_lut.py)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # view 2's colour jitter (main_lut.py)
    jitter_p: float = 0.8  # probability of that jitter (main_lut.py)
    blur: tuple[float, float] = (0.1, 2.0)  # deviation of view 2's blur, in pixels (util/augs.py)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read (main_finetune.py)
    recipe: Recipe = RECIPE  # PRETRAIN.md

    def __post_init__(self) -> None:
        check(
            self,
            "config",
            positive=("blur",),
            not_negative=("mae_weight", "bc_weight", "padding", "jitter"),
            share=("momentum", "jitter_p"),
        )
        if self.padding >= self.image_size:
            raise ConfigError(
                f"padding = {self.padding} mirrors more than the {self.image_size} pixels of a view",
                "Choose a padding below image_size",
            )


def simple_crop(batch: Batch, size: int, padding: int, flip_p: float, generator: torch.Generator) -> Tensor:
    """A random square with little left out: floats (B, 3, size, size) in [0, 1].

    The shorter side is resized to ``size``, ``padding`` pixels are mirrored at each border, and a square of
    ``size`` is cut at random and flipped with probability ``flip_p``. Equal to torchvision's ``Resize``
    (bicubic), ``RandomCrop(padding_mode="reflect")`` and ``RandomHorizontalFlip`` but for rounding to 8 bits.
    """
    images, device = batch.images, batch.images.device
    lengths = augment.image_sizes(images, batch.sizes)
    target = lengths * size // lengths.amin(dim=1, keepdim=True)
    room = target + 2 * padding - size + 1
    draws = torch.rand(len(batch), 2, generator=generator, device=device)
    first = torch.minimum((draws * room).long(), room - 1) - padding
    mirrored = augment.chance(len(batch), flip_p, generator)
    down = torch.arange(size, device=device).expand(len(batch), -1)
    across = torch.where(mirrored[:, None], size - 1 - down, down)
    last = target[:, :, None] - 1
    places = first[:, :, None] + torch.stack([down, across], dim=1)
    places = last - (last - places.abs()).abs()  # a place beyond the border reads the one it mirrors
    step = lengths / target
    largest = min(images.shape[2:]) / max(size - 1, 0.5)  # the truncation of the target makes steps longer
    start = torch.zeros(len(batch), device=device)
    rows, columns = (
        resampling_taps(start, step[:, axis], lengths[:, axis], places[:, axis], "bicubic", largest)
        for axis in (0, 1)
    )
    return resample(images, rows, columns, overshoots=True)


def mlp(width: int, layers: int, heads: Heads) -> nn.Sequential:
    """Linear layers without biases, a norm and an activation after each but the last."""
    stack: list[nn.Module] = []
    inputs = width
    for _ in range(layers - 1):
        stack.append(nn.Linear(inputs, heads.hidden, bias=False))
        if heads.norm != "none":
            batch = heads.norm == "batch"
            stack.append(nn.BatchNorm1d(heads.hidden) if batch else nn.LayerNorm(heads.hidden, eps=1e-6))
        stack.append(nn.ReLU() if heads.activation == "relu" else nn.GELU())
        inputs = heads.hidden
    if layers:
        stack.append(nn.Linear(inputs, width, bias=False))
    return nn.Sequential(*stack)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """2 - 2 cos of each image's vectors (B, D), averaged over images."""
    a, b = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return (2 - 2 * (a * b).sum(-1)).mean()


class Model(nn.Module):
    """MAE on view 1; across both views, the student's mean visible token predicts the teacher's mean token.

    Raises ConfigError where view 2 has no places of its own, or BatchNorm nothing to average over.
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ViT(config.image_size, config.backbone)
        patches = self.backbone.tokens
        self.keep = visible_patches(patches, config.mask_ratio)
        if 2 * self.keep > patches:
            raise ConfigError(
                f"mask_ratio = {config.mask_ratio} shows {self.keep} of {patches} patches of each view, "
                "but the views may not show the same places",
                "Choose a ratio of 0.5 or more",
            )
        parts = 1 if config.recipe.accumulate == "auto" else config.recipe.accumulate
        if config.heads.norm == "batch" and config.recipe.batch_size < 2 * parts:
            raise ConfigError(
                f"recipe.batch_size = {config.recipe.batch_size} in {parts} parts leaves "
                "the heads' BatchNorm nothing to average over",
                "Use larger parts or heads.norm=layer",
            )
        self.decoder = Decoder(config.decoder, self.backbone, config.backbone.patch_size**2 * 3)
        heads, width = config.heads, config.backbone.width
        self.projector = mlp(width, heads.projector_layers, heads)
        self.predictor = mlp(width, heads.predictor_layers, heads)
        initialise(self)
        averaged = nn.ModuleDict({"backbone": self.backbone, "projector": self.projector})
        self.teacher = copy.deepcopy(averaged).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Model:
        """The teacher stays in eval mode: its BatchNorm reads the averaged statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Two crops per image, the second with its colours changed, and the noise that ranks both's patches."""
        config = self.config

        def crop() -> Tensor:
            return simple_crop(batch, config.image_size, config.padding, 0.5 * config.flip, generator)

        plain, coloured = crop(), self.change_colours(crop(), generator)
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=plain.device)
        return {
            "coloured": normalise(coloured, self.input),
            "images": normalise(plain, self.input),
            "noise": noise,
        }

    def change_colours(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Colour jitter, then greyscale, solarisation or blur, one of the three for each image."""
        config, count = self.config, len(images)
        jitter = augment.random_jitter(count, config.jitter, generator)
        jittered = augment.chance(count, config.jitter_p, generator)
        effect = torch.randint(3, (count,), generator=generator, device=images.device)
        sigma = augment.uniform(count, config.blur, generator)
        reach = min(math.ceil(3 * max(config.blur)), config.image_size - 1)

        def blur(images: Tensor, sigma: Tensor) -> Tensor:
            return augment.gaussian_blur(images, sigma, 2 * reach + 1)

        images = where(jittered, augment.colour_jitter, images, *jitter)
        images = where(effect == 0, augment.greyscale, images)
        # Between the 8-bit levels 127 and 128.
        images = where(effect == 1, augment.solarise, images, torch.full_like(sigma, 0.5))
        return where(effect == 2, blur, images, sigma)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normed outputs on [class, patches at ``visible`` (B, N)]: (B, 1 + N, D)."""
        return self.backbone(take(self.backbone.embed(images), visible))

    def contextualise(self, latent: Tensor) -> Tensor:
        """The prediction (B, D) of a view's outputs (B, 1 + N, D): pooled first, the class token left out."""
        return self.predictor(self.projector(latent[:, 1:].mean(1)))

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's projection (B, D) of whole images."""
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, ViT)
        return self.teacher["projector"](backbone(backbone.embed(images))[:, 1:].mean(1))

    def forward(self, images: Tensor, coloured: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised views 1 (``images``) and 2 (``coloured``), (B, 3, H, W), and noise (B, L).

        ``student`` and ``teacher`` (2B, D) list view 1 first; ``mask2`` is that of view 2.
        """
        config, keep = self.config, self.keep
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        # View 1 shows the first places of the order, view 2 the next ones.
        latent, latent2 = (
            self.encode(images, order[:, :keep]),
            self.encode(coloured, order[:, keep : 2 * keep]),
        )
        mask = (restore >= keep).to(noise.dtype)

        pred = self.decoder(latent, restore)
        target = patchify(images, config.backbone.patch_size)
        if config.normalise_target:
            target = standardise(target)
        mae = ((pred - target).square().mean(-1) * mask).sum() / mask.sum()

        # One view after the other, so that BatchNorm averages over one view at a time.
        student1, student2 = self.contextualise(latent), self.contextualise(latent2)
        teacher1, teacher2 = self.teach(images), self.teach(coloured)
        bc = (distance(student1, teacher2) + distance(student2, teacher1)) / 2
        return {
            "loss": config.mae_weight * mae + config.bc_weight * bc,
            "loss_mae": mae,
            "loss_bc": bc,
            "pred": pred,
            "student": torch.cat([student1, student2]),
            "teacher": torch.cat([teacher1, teacher2]),
            "latent": latent,
            "latent2": latent2,
            "mask": mask,
            "mask2": ((restore < keep) | (restore >= 2 * keep)).to(noise.dtype),
            "ids_restore": restore,
        }

    def after_step(self, progress: float) -> None:
        """The teacher follows the student, BatchNorm statistics included, ever more slowly."""
        share = (1 - self.config.momentum) * (1 + math.cos(math.pi * progress)) / 2
        own, averaged = self.state_dict(), self.teacher.state_dict()
        names = [name for name, value in averaged.items() if value.is_floating_point()]
        torch._foreach_lerp_([averaged[n] for n in names], [own[n] for n in names], share)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """lr = base_lr sqrt(batch) / 4 instead of the linear rule; ``recipe.lr_batch`` = 0 turns both off."""
        scale = math.sqrt(PAPER_BATCH / recipe.batch_size) if recipe.lr_batch else 1.0
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": scale}]

    def encoder(self) -> ViTEncoder:
        """The student's ViT on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
