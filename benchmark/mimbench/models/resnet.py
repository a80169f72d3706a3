"""Residual networks (He et al., 2016) with torchvision's names, and the small stem used on 32-pixel images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.encoder import Features, InputSpec


@dataclass(frozen=True)
class ResNetShape:
    """The size of a ResNet; the default is ResNet-50."""

    block: Literal["basic", "bottleneck"] = "bottleneck"  # two 3x3 convolutions, or 1x1-3x3-1x1
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # blocks per stage
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)  # channels of the 3x3 convolutions per stage
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7/2 and max-pool, or one 3x3/1 convolution

    @property
    def name(self) -> str:
        """The usual name where there is one."""
        known = {
            ("basic", (2, 2, 2, 2)): "resnet-18",
            ("basic", (3, 4, 6, 3)): "resnet-34",
            ("bottleneck", (3, 4, 6, 3)): "resnet-50",
            ("bottleneck", (3, 4, 23, 3)): "resnet-101",
        }
        name = known.get((self.block, self.layers), f"resnet-{self.block}-{'.'.join(map(str, self.layers))}")
        narrow = "" if self.widths == (64, 128, 256, 512) else f" width {self.widths[0]}"
        return f"{name}{narrow}{' (cifar stem)' if self.stem == 'cifar' else ''}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + (self.downsample(x) if self.downsample else x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + (self.downsample(x) if self.downsample else x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with norm where the shape changes, nothing where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Stem and four stages; He initialisation, the last norm of each block starting at zero (Goyal et al., 2017)."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.shape = shape
        small = shape.stem == "cifar"
        self.conv1 = nn.Conv2d(
            3, shape.widths[0], 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False
        )
        self.bn1 = nn.BatchNorm2d(shape.widths[0])
        block = BasicBlock if shape.block == "basic" else Bottleneck
        inputs = shape.widths[0]
        for number, (count, width) in enumerate(zip(shape.layers, shape.widths, strict=True), 1):
            blocks = []
            for position in range(count):
                blocks.append(block(inputs, width, stride=2 if number > 1 and position == 0 else 1))
                inputs = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.dim = inputs
        self.stride = 8 if small else 32
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The feature maps of the four stages."""
        x = F.relu(self.bn1(self.conv1(images)))
        if self.shape.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the globally averaged last map (B, D)."""
        return self.stages(images)[-1].mean((2, 3))


class ResNetEncoder(nn.Module):
    """A ResNet as protocols see it (``mimbench.encoder.Encoder``); its patch grid is the last feature map."""

    readout = "global average of the last feature map"
    depth = 4

    def __init__(self, resnet: ResNet, input: InputSpec) -> None:
        super().__init__()
        self.resnet = resnet
        self.input = input
        self.name = resnet.shape.name
        self.dim = resnet.dim
        self.stride = resnet.stride

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``. A layer's map is the output of that stage, at that stage's own resolution."""
        maps = self.resnet.stages(images)
        return Features(maps[-1].mean((2, 3)), maps[-1], tuple(maps[n] for n in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> ResNetEncoder:
        """A trainable copy. ``drop_path`` belongs to transformer recipes and is not applied."""
        return copy.deepcopy(self).requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("resnet.")
        return int(name[5]) if name.startswith("layer") else 0
