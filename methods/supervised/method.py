"""The ceiling: the same backbones trained on the labels, by cross-entropy.

The ResNet presets follow He et al. (CVPR 2016, arXiv 1512.03385) on ImageNet and the recipe that is usual
for 32-pixel images; they check the pipeline, since their published accuracy is well known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import Encoder, InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import ViT, ViTEncoder, ViTShape

RECIPE = Recipe(
    epochs=90,
    batch_size=256,
    optimizer="sgd",
    base_lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    decay_vectors=True,
)


@dataclass(frozen=True)
class Config:
    """ResNet-50 on ImageNet."""

    image_size: int = 224  # side of the training crop, in pixels
    architecture: Literal["vit", "resnet"] = "resnet"  # which of the two below is trained
    vit: ViTShape = ViTShape()  # size of the ViT
    resnet: ResNetShape = ResNetShape()  # size of the ResNet
    pool: Literal["class", "mean"] = "mean"  # what head and probes read of a ViT
    classes: int | None = None  # outputs of the head; none: as many as the data has
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, share of the image
    shift: int = 0  # pixels padded on each side before a crop of the original size; 0: resized crops
    flip: bool = True  # random horizontal flip
    label_smoothing: float = 0.0  # share of the target spread over all classes
    recipe: Recipe = RECIPE  # how it is trained


class Model(nn.Module):
    """A backbone and a linear head."""

    needs = ("labels",)

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.classes is None:
            raise ConfigError("the number of classes is not known", "Set classes, or train on labelled data")
        self.config = config
        self.input = InputSpec(config.image_size)
        if config.architecture == "resnet":
            backbone = ResNet(config.resnet)
            self.body: ResNetEncoder | ViTEncoder = ResNetEncoder(backbone, self.input)
        else:
            vit = ViT(config.image_size, config.vit)
            for module in vit.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            nn.init.normal_(vit.cls_token, std=0.02)
            self.body = ViTEncoder(vit, self.input, config.pool)
        self.head = nn.Linear(self.body.dim, config.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and its label."""
        config = self.config
        mirror = 0.5 * config.flip
        if config.shift:
            images = augment.shift_and_flip(batch, generator, padding=config.shift, flip_p=mirror)
        else:
            images = augment.crop_and_flip(
                batch, config.image_size, config.crop_scale, generator, flip_p=mirror
            )
        assert batch.labels is not None
        return {"images": normalise(images, self.input), "labels": batch.labels}

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and labels (B,)."""
        logits = self.head(self.body(images).pooled)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {
            "loss": loss,
            "accuracy": (logits.detach().argmax(1) == labels).float().mean(),
            "logits": logits,
        }

    def encoder(self) -> Encoder:
        """The trained backbone without its head."""
        return self.body
