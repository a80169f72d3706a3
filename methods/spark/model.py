"""Networks that compute on visible positions only, without a sparse library.

A submanifold sparse layer is the dense one with its output cleared where nothing is visible. So a dense network runs
as it is, a mask beside it, and the weights are those of the plain network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError
from mimbench.models.resnet import BasicBlock, Bottleneck, ResNet
from mimbench.models.vit import drop_path, gelu


def spread(active: Tensor, like: Tensor) -> Tensor:
    """The mask of cells (B, 1, f, f), 1 = visible, at the resolution and in the dtype of a map (B, C, H, W)."""
    return F.interpolate(active, size=like.shape[2:]).to(like.dtype)


def visible(x: Tensor, active: Tensor | None) -> Tensor:
    """A map (B, C, H, W) with zeros in hidden cells; no mask hides nothing."""
    return x if active is None else x * spread(active, x)


def batch_norm(norm: nn.BatchNorm2d, x: Tensor, active: Tensor | None) -> Tensor:
    """``norm`` on the visible positions of a map (B, C, H, W), zeros elsewhere.

    In training the mean and variance are those of visible positions, and so are the running ones, by torch's rule:
    the variance that is kept is unbiased. Sums under a mask give the same as gathering, with shapes that stay fixed.
    """
    if active is None:
        return norm(x)
    if not norm.training:
        return visible(norm(x), active)
    mask = spread(active, x).float()
    count = mask.sum()
    mean = (x * mask).sum((0, 2, 3)) / count
    centred = (x - mean[:, None, None]) * mask
    var = centred.square().sum((0, 2, 3)) / count
    with torch.no_grad():
        assert norm.momentum is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return (centred * scale[:, None, None] + norm.bias[:, None, None] * mask).to(x.dtype)


def resnet_stages(net: ResNet, images: Tensor, active: Tensor | None, drop: float = 0.0) -> list[Tensor]:
    """The maps of a ResNet's four stages, its layers on visible positions only.

    A norm clears what the convolution before it spilled into hidden cells, before anything else reads it. Stochastic
    depth rises linearly from 0 at the first block to ``drop`` at the last (timm).
    """
    x = F.relu(batch_norm(net.bn1, net.conv1(images), active))
    if net.shape.stem == "imagenet":
        x = visible(F.max_pool2d(x, 3, stride=2, padding=1), active)
    total = sum(net.shape.layers)
    rates = iter([drop * number / max(total - 1, 1) for number in range(total)])
    maps = []
    for stage in (net.get_submodule(f"layer{n}") for n in range(1, 5)):
        for block in stage.children():
            assert isinstance(block, BasicBlock | Bottleneck)
            branch = F.relu(batch_norm(block.bn1, block.conv1(x), active))
            branch = batch_norm(block.bn2, block.conv2(branch), active)
            if isinstance(block, Bottleneck):
                branch = batch_norm(block.bn3, block.conv3(F.relu(branch)), active)
            if block.downsample:
                conv, norm = block.downsample
                assert isinstance(norm, nn.BatchNorm2d)
                x = batch_norm(norm, conv(x), active)
            x = F.relu(drop_path(branch, next(rates), net.training) + x)
        maps.append(x)
    return maps


@dataclass(frozen=True)
class ConvNeXtShape:
    """The size of a ConvNeXt (Liu et al., 2022); the default is ConvNeXt-S, the smallest that the authors train."""

    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks per stage
    widths: tuple[int, ...] = (96, 192, 384, 768)  # channels per stage
    stem: int = 4  # side and stride of the first convolution, in pixels
    layer_scale: float = 1e-6  # initial factor on every residual branch

    @property
    def name(self) -> str:
        """The usual name where there is one."""
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
            ((3, 3, 9, 3), (96, 192, 384, 768)): "t",
            ((3, 3, 27, 3), (96, 192, 384, 768)): "s",
            ((3, 3, 27, 3), (128, 256, 512, 1024)): "b",
            ((3, 3, 27, 3), (192, 384, 768, 1536)): "l",
        }
        size = f"{'.'.join(map(str, self.depths))} width {self.widths[0]}"
        size = known.get((self.depths, self.widths), size)
        return f"convnext-{size}{'' if self.stem == 4 else f' (stem {self.stem})'}"


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W), at every position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, norm, and an MLP at every position, scaled per channel, beside a shortcut."""

    def __init__(self, width: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = 0.0

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.gamma * self.pwconv2(gelu(self.pwconv1(branch)))
        # Behind the convolution nothing mixes positions, so clearing hidden ones once, at the end, is enough.
        branch = visible(branch.permute(0, 3, 1, 2), active)
        return x + drop_path(branch, self.drop_path, self.training)


class ConvNeXt(nn.Module):
    """Stages of blocks with a strided convolution before each, without the classifier's final norm.

    Names are those of its authors' checkpoints. Raises ConfigError for shapes that make no network.
    """

    def __init__(self, shape: ConvNeXtShape, drop_path: float = 0.0) -> None:
        super().__init__()
        if (
            len(shape.depths) != len(shape.widths)
            or not shape.widths
            or min(*shape.depths, *shape.widths) < 1
        ):
            raise ConfigError(f"a ConvNeXt of {shape} needs a depth and a width above 0 for every stage")
        if shape.stem < 1 or shape.stem & (shape.stem - 1):
            raise ConfigError(f"convnext.stem = {shape.stem} is not a power of two")
        self.shape = shape
        self.dim = shape.widths[-1]
        self.stride = shape.stem * 2 ** (len(shape.widths) - 1)
        first = shape.widths[0]
        stem = nn.Sequential(nn.Conv2d(3, first, shape.stem, shape.stem), ChannelNorm(first, eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in zip(shape.widths, shape.widths[1:], strict=False):
            self.downsample_layers.append(
                nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2))
            )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, shape.layer_scale) for _ in range(depth)))
            for depth, width in zip(shape.depths, shape.widths, strict=True)
        )
        self.set_drop_path(drop_path)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth, rising linearly from 0 at the first block to ``rate`` at the last."""
        blocks = [m for m in self.modules() if isinstance(m, ConvNeXtBlock)]
        for number, block in enumerate(blocks):
            block.drop_path = rate * number / max(len(blocks) - 1, 1)

    def maps(self, images: Tensor, active: Tensor | None = None) -> list[Tensor]:
        """The feature maps of all stages; with a mask (B, 1, f, f) computed on visible positions only."""
        x, maps = images, []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            # The convolution before a stage covers no two cells, so it spills nothing but its bias.
            x = visible(downsample(x), active)
            for block in stage.children():
                x = block(x, active)
            maps.append(x)
        return maps


class ConvNeXtEncoder(nn.Module):
    """A ConvNeXt as protocols see it (``mimbench.encoder.Encoder``); its patch grid is the last feature map."""

    def __init__(self, convnext: ConvNeXt, input: InputSpec, finetune: bool = False) -> None:
        super().__init__()
        self.convnext = convnext
        self.input = input
        self.readout = f"global average of the last feature map{', then a fresh norm' if finetune else ''}"
        self.name = convnext.shape.name
        self.dim = convnext.dim
        self.depth = len(convnext.stages)
        self.stride = convnext.stride
        self.fc_norm: nn.Module = nn.LayerNorm(self.dim, eps=1e-6) if finetune else nn.Identity()

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``. A layer's map is the output of that stage, at that stage's own resolution."""
        maps = self.convnext.maps(images)
        return Features(self.fc_norm(maps[-1].mean((2, 3))), maps[-1], tuple(maps[n] for n in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> ConvNeXtEncoder:
        """A trainable copy with ConvNeXt's own readout, where pretraining leaves no norm behind the mean."""
        tuned = ConvNeXtEncoder(copy.deepcopy(self.convnext), self.input, finetune=True)
        tuned.convnext.set_drop_path(drop_path)
        return tuned.requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("convnext.")
        if name.startswith("downsample_layers.0."):
            return 0
        if name.startswith(("downsample_layers.", "stages.")):
            return int(name.split(".")[1]) + 1
        return self.depth + 1
