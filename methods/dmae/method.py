"""Masked Autoencoders Enable Efficient Knowledge Distillers (Bai et al., CVPR 2023, arXiv 2208.12256).

A small MAE learns from a large, frozen one while it pretrains. Both see the same few patches; besides regressing
the hidden pixels, the student imitates a middle layer of the teacher through a linear layer. The teacher works on
visible patches and up to that layer only, which makes it cheap.

Worth an ablation: ``--set distill_weight=0``, which is MAE on unnormalised pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench import config as settings
from mimbench.data import Batch
from mimbench.encoder import Encoder, InputSpec, normalise
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
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, patchify

RECIPE = Recipe(
    epochs=100,
    batch_size=4096,  # 128 on each of 8 GPUs, accumulated 4 times
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=20,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The authors' command for a ViT-B/16 that learns from a ViT-L/16 (pretrain.sh)."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the student
    decoder: DecoderShape = DecoderShape()  # the student's, discarded after pretraining
    teacher: str = "mae_visualize_vit_large.pth"  # an MAE on plain pixels: run:SLUG KEY=VALUE ..., or a file
    teacher_backbone: ViTShape = ViTShape(width=1024, depth=24, heads=16)  # the teacher's size, ViT-L/16
    student_layers: tuple[int, ...] = (8,)  # blocks, counted from 0, whose output imitates a teacher's
    teacher_layers: tuple[int, ...] = (17,)  # the block that each of them imitates
    distill_weight: float = 1.0  # of the imitation beside the reconstruction (engine_distill.py adds them)
    mask_ratio: float = 0.75  # share of patches that neither student nor teacher sees
    normalise_target: bool = False  # each patch by its own mean and deviation; should be as in the teacher
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop (main_distill.py)
    flip: bool = True  # random horizontal flip (main_distill.py)
    pool: Literal["class", "mean"] = "mean"  # what frozen probes read; the authors only fine-tune
    recipe: Recipe = RECIPE  # pretrain.sh, main_distill.py

    def __post_init__(self) -> None:
        layers = ("student_layers", "teacher_layers")
        settings.check(self, "config", not_negative=(*layers, "distill_weight"), filled=layers)
        if len(self.student_layers) != len(self.teacher_layers):
            raise ConfigError(
                f"{len(self.student_layers)} student_layers cannot imitate {len(self.teacher_layers)} teacher_layers",
                "Give each layer of the student the one of the teacher that it imitates",
            )
        for name, depth in zip(layers, (self.backbone.depth, self.teacher_backbone.depth), strict=True):
            if max(getattr(self, name)) >= depth:
                raise ConfigError(
                    f"{name} = {list(getattr(self, name))} goes beyond the {depth} blocks, counted from 0",
                    f"The paper takes three quarters of the depth, here [{max(round(0.75 * depth) - 1, 0)}]",
                )
        if self.backbone.patch_size != self.teacher_backbone.patch_size:
            raise ConfigError(
                f"the student's patches of {self.backbone.patch_size} pixels are not the teacher's of "
                f"{self.teacher_backbone.patch_size}",
                "Give backbone and teacher_backbone the same patch_size",
            )
        if self.distill_weight and not self.teacher:
            raise ConfigError(
                "there is nothing to distil without a teacher",
                "Write --set teacher=run:mae, or also --set distill_weight=0",
            )


def block_outputs(vit: ViT, tokens: Tensor, blocks: int) -> list[Tensor]:
    """What each of the first ``blocks`` blocks makes of [class, tokens] (B, 1 + N, D), before any final norm."""
    outputs = [vit.with_class_token(tokens)]
    for block in vit.blocks[:blocks]:
        outputs.append(block(outputs[-1]))
    return outputs[1:]


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of features (B, N, D) whose tokens are scaled to unit length.

    About 1.1 / sqrt(D) for unrelated features, so small beside the reconstruction.
    """
    return F.l1_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1))


class Model(nn.Module):
    """The student, a linear layer for each of its layers that imitates, and the frozen teacher.

    The teacher starts with random weights and gets its own from ``load_teacher``. Raises ConfigError for a mask
    that leaves nothing to see or to reconstruct.
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ViT(config.image_size, config.backbone)
        self.keep = visible_patches(self.backbone.tokens, config.mask_ratio)
        self.decoder = Decoder(config.decoder, self.backbone, config.backbone.patch_size**2 * 3)
        initialise(self)
        # These keep PyTorch's initial weights: the authors make them after initialising the rest.
        width = config.teacher_backbone.width
        self.projections = nn.ModuleList(
            [nn.Linear(config.backbone.width, width) for _ in config.student_layers]
        )
        self.teacher = ViT(config.image_size, config.teacher_backbone).requires_grad_(False)

    def load_teacher(self, encoder: Encoder) -> None:
        """Takes the weights of a pretrained ViT. Raises ConfigError for any other network, size or input."""
        vit = getattr(encoder, "vit", encoder)
        if type(vit) is not ViT:  # other networks, and ViTs with tokens, positions or blocks of their own
            raise ConfigError(
                f"the teacher {encoder.name} ({type(vit).__name__}) is not MAE's plain ViT",
                "Write --set teacher=run:mae, or give a checkpoint that 'mimbench weights' reads as mae",
            )
        wanted = self.config.teacher_backbone
        if vit.shape != wanted:
            raise ConfigError(
                f"the teacher is {vit.shape}, but teacher_backbone is {wanted}",
                "Set teacher_backbone, or the backbone of the teacher's run, to the shape of the other",
            )
        if encoder.input != self.input:
            raise ConfigError(
                f"the teacher takes {encoder.input}, the student {self.input}",
                "Give both the same image_size; pixels must be normalised alike",
            )
        # Some encoders have no final norm; this one's is never run.
        self.teacher.load_state_dict(self.teacher.state_dict() | vit.state_dict())

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the noise that ranks its patches for student and teacher."""
        config = self.config
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    @torch.no_grad()
    def teach(self, images: Tensor, noise: Tensor) -> list[Tensor]:
        """The teacher's features (B, 1 + keep, D) at its layers, of [class, visible patches]; it stops there."""
        visible, _, _ = random_masking(self.teacher.embed(images), noise, self.keep)
        layers = self.config.teacher_layers
        outputs = block_outputs(self.teacher, visible, max(layers) + 1)
        return [outputs[layer] for layer in layers]

    def distil(self, outputs: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
        """The distances of the student's projected block outputs to the teacher's features, added over layers."""
        layers = zip(self.config.student_layers, self.projections, taught, strict=True)
        return torch.stack([distance(project(outputs[n]), target) for n, project, target in layers]).sum()

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L).

        Pixels are compared where patches are hidden, features where they are visible and at the class token.
        """
        config, vit = self.config, self.backbone
        visible, mask, restore = random_masking(vit.embed(images), noise, self.keep)
        outputs = block_outputs(vit, visible, config.backbone.depth)
        latent = vit.norm(outputs[-1])
        pred = self.decoder(latent, restore)

        target = patchify(images, config.backbone.patch_size)
        if config.normalise_target:
            target = standardise(target)
        error = (pred - target).square().mean(-1)
        reconstruction = (error * mask).sum() / mask.sum()
        loss, logged = reconstruction, {"loss_reconstruction": reconstruction}
        if config.distill_weight:
            logged["loss_distillation"] = self.distil(outputs, self.teach(images, noise))
            loss = loss + config.distill_weight * logged["loss_distillation"]
        return {"loss": loss, **logged, "pred": pred, "mask": mask, "latent": latent, "ids_restore": restore}

    def encoder(self) -> ViTEncoder:
        """The student's ViT on full images; decoder, projections and teacher are discarded."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
