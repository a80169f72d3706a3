"""The floor: a network with its initial weights, never trained.

What a probe reaches on it is owed to the architecture and the probe, not to learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mimbench.encoder import Encoder, InputSpec
from mimbench.fit import Recipe
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import ViT, ViTEncoder, ViTShape


@dataclass(frozen=True)
class Config:
    """ViT-B/16 at 224 pixels, or a ResNet-50."""

    image_size: int = 224  # side of the input, in pixels
    architecture: Literal["vit", "resnet"] = "vit"  # which of the two below is used
    vit: ViTShape = ViTShape()  # size of the ViT
    resnet: ResNetShape = ResNetShape()  # size of the ResNet
    pool: Literal["class", "mean"] = "mean"  # what probes read of a ViT
    recipe: Recipe = Recipe(epochs=0)  # nothing is trained


class Model(nn.Module):
    """A backbone, its linear layers Xavier-uniform as in MAE."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        if config.architecture == "resnet":
            self.backbone: ResNet | ViT = ResNet(config.resnet)
        else:
            self.backbone = vit = ViT(config.image_size, config.vit)
            for module in vit.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            projection = vit.patch_embed.proj.weight
            nn.init.xavier_uniform_(projection.view(len(projection), -1))
            nn.init.normal_(vit.cls_token, std=0.02)

    def encoder(self) -> Encoder:
        """The untrained backbone."""
        if isinstance(self.backbone, ResNet):
            return ResNetEncoder(self.backbone, self.input)
        return ViTEncoder(self.backbone, self.input, self.config.pool)
