"""Exploring Simple Siamese Representation Learning (Chen and He, CVPR 2021, arXiv 2011.10566).

Two augmented views of an image go through one encoder. A predictor on one side must match the other
side, which is treated as a constant: this stop-gradient alone keeps the encoder from collapsing.

Worth an ablation: ``--set stop_gradient=false`` (Sec. 4.1: outputs collapse to a constant, which the
logged ``z_std`` shows by falling to 0) and ``--set decay_predictor_lr=true`` (Sec. 4.2: slightly worse
than a predictor that keeps its rate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape

RECIPE = Recipe(
    epochs=100,
    batch_size=256,
    optimizer="sgd",
    base_lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    decay_vectors=True,  # biases and norms decay too (authors' code)
    schedule="cosine",
    schedule_unit="epoch",
    precision="fp32",
)


@dataclass(frozen=True)
class Views:
    """The augmentation, the same for both views (Sec. 3, "Baseline settings")."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # probability of colour jitter
    grey_p: float = 0.2  # probability of greyscale
    blur_p: float = 0.5  # probability of Gaussian blur, sigma 0.1 to 2 pixels
    flip_p: float = 0.5  # probability of a horizontal flip


@dataclass(frozen=True)
class Config:
    """The paper's ImageNet setting with ResNet-50."""

    image_size: int = 224  # side of both views, in pixels
    backbone: ResNetShape = ResNetShape()  # the encoder without its heads
    projector_layers: int = 3  # linear layers of the projection MLP; 2 on CIFAR (App. D)
    projector_hidden: int | None = None  # hidden width; none: the width of the backbone's output
    width: int = 2048  # channels of projection and prediction (d)
    predictor_hidden: int = 512  # bottleneck of the predictor, d / 4 (Sec. 3)
    stop_gradient: bool = True  # False: the collapse of Sec. 4.1
    decay_predictor_lr: bool = False  # whether the predictor's lr follows the cosine (Sec. 4.2)
    augmentation: Views = Views()  # of each view
    recipe: Recipe = RECIPE  # Sec. 3


def projection_mlp(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """Linear, norm, ReLU, ...; the last layer ends in a norm without affine parameters and without ReLU."""
    stack: list[nn.Module] = []
    for _ in range(layers - 1):
        stack += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        inputs = hidden
    # The authors keep the last bias but never train it: the norm behind it would cancel it.
    last = nn.Linear(inputs, outputs)
    last.bias.requires_grad_(False)
    return nn.Sequential(*stack, last, nn.BatchNorm1d(outputs, affine=False))


class Model(nn.Module):
    """Backbone, projector and predictor; the symmetrised negative cosine similarity (Eq. 1 and 2).

    Logs ``z_std``, the deviation of the normalised projections per channel, which tells collapse from
    health. Raises ConfigError for batches of one image, over which the norms cannot average.
    """

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.recipe.batch_size < 2:
            raise ConfigError("recipe.batch_size = 1 leaves the norms of the heads nothing to average over")
        self.config = config
        self.input = InputSpec(config.image_size)
        self.backbone = ResNet(config.backbone)
        hidden = config.projector_hidden or self.backbone.dim
        self.projector = projection_mlp(self.backbone.dim, hidden, config.width, config.projector_layers)
        self.predictor = nn.Sequential(
            nn.Linear(config.width, config.predictor_hidden, bias=False),
            nn.BatchNorm1d(config.predictor_hidden),
            nn.ReLU(),
            nn.Linear(config.predictor_hidden, config.width),
        )

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Two independent augmentations of each image."""
        draw = self.config.augmentation

        def view() -> Tensor:
            images = augment.simclr_view(
                batch,
                self.config.image_size,
                draw.crop_scale,
                jitter=draw.jitter,
                jitter_p=draw.jitter_p,
                grey_p=draw.grey_p,
                blur_p=draw.blur_p,
                blur_sigma=(0.1, 2.0),
                flip_p=draw.flip_p,
                generator=generator,
            )
            return normalise(images, self.input)

        return {"images1": view(), "images2": view()}

    def forward(self, images1: Tensor, images2: Tensor) -> dict[str, Tensor]:
        """Two normalised views (B, 3, H, W); they pass one after the other, so norms see one view at a time."""
        z1 = self.projector(self.backbone(images1))
        z2 = self.projector(self.backbone(images2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        t1, t2 = (z1.detach(), z2.detach()) if self.config.stop_gradient else (z1, z2)
        similarity = F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean()
        # 1 / sqrt(d) when the outputs are spread over the sphere, 0 when they have collapsed (Sec. 4.1).
        spread = F.normalize(z1.detach().float(), dim=1).std(0).mean()
        return {"loss": -0.5 * similarity, "z_std": spread, "p1": p1, "p2": p2, "z1": z1, "z2": z2}

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Everything decays; the predictor keeps the initial learning rate (Sec. 4.2)."""
        head = list(self.predictor.parameters())
        rest = [p for m in (self.backbone, self.projector) for p in m.parameters() if p.requires_grad]
        schedule = recipe.schedule if self.config.decay_predictor_lr else "constant"
        return [
            {"params": rest, "weight_decay": recipe.weight_decay},
            {"params": head, "weight_decay": recipe.weight_decay, "schedule": schedule},
        ]

    def encoder(self) -> ResNetEncoder:
        """The backbone; projector and predictor are discarded (Sec. 3)."""
        return ResNetEncoder(self.backbone, self.input)
