"""The BEiT variant of the ViT (Bao et al., 2022): biases on queries and values only, layer scale, and relative
position biases, here one table shared by all blocks."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.encoder import Features, InputSpec
from mimbench.models.vit import MLP, PatchEmbed, ViTShape, attention, drop_path, spread_drop_path


def relative_index(rows: int, columns: int) -> Tensor:
    """Which row of the bias table each pair of tokens reads, (1 + L, 1 + L), class token first.

    The table has (2 rows - 1)(2 columns - 1) rows for the offsets between patches, then one each for
    class-to-patch, patch-to-class and class-to-class.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()])
    offset = place[:, :, None] - place[:, None, :]
    pairs = (2 * rows - 1) * (2 * columns - 1)
    index = torch.zeros(rows * columns + 1, rows * columns + 1, dtype=torch.int64)
    index[1:, 1:] = (offset[0] + rows - 1) * (2 * columns - 1) + offset[1] + columns - 1
    index[0, :] = pairs
    index[:, 0] = pairs + 1
    index[0, 0] = pairs + 2
    return index


class RelativePositionBias(nn.Module):
    """A learned bias per head and offset between two tokens."""

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", relative_index(*grid))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Biases (heads, 1 + L, 1 + L); for another grid the table is interpolated bicubically."""
        table: Tensor = self.relative_position_bias_table
        index = self.relative_position_index
        if grid != self.grid:
            trained = (2 * self.grid[0] - 1, 2 * self.grid[1] - 1)
            target = (2 * grid[0] - 1, 2 * grid[1] - 1)
            offsets = table[:-3].T.reshape(1, -1, *trained)
            offsets = F.interpolate(offsets, size=target, mode="bicubic", align_corners=False)
            table = torch.cat([offsets.flatten(2)[0].T, table[-3:]])
            index = relative_index(*grid).to(table.device)
        return table[index].permute(2, 0, 1)


class Attention(nn.Module):
    """Self-attention with biases on queries and values only, and, if given, a bias per pair of tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, length, d = x.shape
        qkv = F.linear(
            x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        )
        q, k, v = qkv.reshape(b, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, None if bias is None else bias.to(q.dtype)[None])
        return self.proj(x.transpose(1, 2).reshape(b, length, d))


class Block(nn.Module):
    """A pre-norm block whose branches are scaled per channel (Touvron et al., 2021)."""

    def __init__(self, shape: ViTShape, layer_scale: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = MLP(shape.width, int(shape.width * shape.mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((shape.width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((shape.width,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D), with biases (heads, L, L) on their attention if given."""
        x = x + drop_path(self.gamma_1 * self.attn(self.norm1(x), bias), self.drop_path, self.training)
        return x + drop_path(self.gamma_2 * self.mlp(self.norm2(x)), self.drop_path, self.training)


class RelativeViT(nn.Module):
    """Patch embedding, class token and blocks that share one relative position bias."""

    def __init__(self, image_size: int, shape: ViTShape, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.shape = shape
        self.grid = (image_size // shape.patch_size,) * 2
        self.patch_embed = PatchEmbed(shape.patch_size, 3, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.rel_pos_bias = RelativePositionBias(self.grid, shape.heads)
        self.blocks = nn.ModuleList([Block(shape, layer_scale) for _ in range(shape.depth)])
        spread_drop_path(self.blocks, drop_path)
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=1e-6)
        self.initialise()

    def initialise(self) -> None:
        """Normal(0, 0.02) cut at one deviation; the outputs of block l divided by sqrt(2 l)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-0.02, b=0.02)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, 1):
                assert isinstance(block, Block)
                block.attn.proj.weight /= math.sqrt(2 * number)
                block.mlp.fc2.weight /= math.sqrt(2 * number)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens (B, L, D) to normed outputs (B, 1 + L, D), and the raw outputs of some blocks."""
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        bias = self.rel_pos_bias(grid)
        kept = {}
        for number, block in enumerate(self.blocks):
            x = block(x, bias)
            if number in layers:
                kept[number] = x
        return self.norm(x), [kept[n] for n in layers]


class RelativeViTEncoder(nn.Module):
    """What protocols see of it (``mimbench.encoder.Encoder``): the mean of the patch tokens."""

    def __init__(self, vit: RelativeViT, input: InputSpec) -> None:
        super().__init__()
        self.vit = vit
        self.input = input
        self.dim, self.depth, self.stride = vit.shape.width, vit.shape.depth, vit.shape.patch_size
        self.name = vit.shape.name
        self.readout = "mean of patch tokens after the final norm"
        self.fc_norm: nn.Module = nn.Identity()

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        tokens, kept = self.vit(self.vit.patch_embed(images), grid, layers)

        def as_map(x: Tensor) -> Tensor:
            return x[:, 1:].transpose(1, 2).reshape(len(x), self.dim, *grid)

        return Features(self.fc_norm(tokens[:, 1:].mean(1)), as_map(tokens), tuple(as_map(x) for x in kept))

    def for_finetuning(self, drop_path: float = 0.0) -> RelativeViTEncoder:
        """A copy whose pretraining norm is gone and whose mean of patch tokens gets a fresh norm."""
        tuned = copy.deepcopy(self)
        tuned.vit.norm = nn.Identity()
        tuned.fc_norm = nn.LayerNorm(self.dim, eps=1e-6)
        tuned.readout = "mean of patch tokens of the last block, then a fresh norm"
        spread_drop_path(tuned.vit.blocks, drop_path)
        return tuned.requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("vit.")
        if name.startswith(("cls_token", "patch_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.depth + 1
