"""A plain Vision Transformer (Dosovitskiy et al., 2021), with the names its public checkpoints use."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError

LARGEST_EXPLICIT = 512 * 512  # attention weights of one head above which they are never written out


@dataclass(frozen=True)
class ViTShape:
    """The size of a ViT; the default is ViT-B/16."""

    patch_size: int = 16  # side of a square patch, in pixels
    width: int = 768  # channels of a token
    depth: int = 12  # transformer blocks
    heads: int = 12  # attention heads per block
    mlp_ratio: float = 4.0  # hidden width of the MLP over width

    @property
    def name(self) -> str:
        """The usual name where there is one, else width x depth / patch."""
        known = {
            (192, 12): "vit-ti",
            (384, 12): "vit-s",
            (768, 12): "vit-b",
            (1024, 24): "vit-l",
            (1280, 32): "vit-h",
        }
        size = known.get((self.width, self.depth), f"vit-{self.width}x{self.depth}")
        return f"{size}/{self.patch_size}"


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W) as patches (B, L, p*p*C), raster order, each flattened as (row, column, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of ``patchify``; the grid (rows, columns) is taken as square when not given."""
    b, length, d = patches.shape
    p = patch_size
    rows, columns = grid or (int(length**0.5), int(length**0.5))
    x = patches.reshape(b, rows, columns, p, p, d // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, columns * p)


def sincos_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (rows * columns, width) in raster order, in float32.

    Half of the channels encode the column, half the row; in each half the sines come first. Frequencies
    are 10000^(-i / (width / 4)). This is the table of MoCo v3 and MAE, column first.
    """
    if width % 4:
        raise ConfigError(f"sine-cosine positions need a width divisible by 4, not {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(coordinate: Tensor) -> Tensor:
        angle = coordinate.flatten()[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return torch.cat([encode(column), encode(row)], dim=1).float()


def resize_positions(positions: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Patch positions (1, L, D) of one grid interpolated bicubically to another, as DINO and MAE do."""
    if grid == target:
        return positions
    table = positions.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=target, mode="bicubic", antialias=False, align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zeroes a residual branch (B, ...) for a share ``rate`` of the images (Huang et al., 2016)."""
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


def spread_drop_path(blocks: Any, rate: float) -> None:
    """Gives blocks stochastic depth that rises linearly from 0 at the first to ``rate`` at the last."""
    for number, block in enumerate(blocks):
        block.drop_path = rate * number / max(len(blocks) - 1, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over heads (B, H, L, d); a share ``drop`` of the weights is dropped.

    Vaswani et al. (2017), Sec. 3.2. On a CPU in bfloat16 the weights are written out: at 17 to 257 tokens torch's
    fused operator takes about twice as long there (``benchmark/speed/pretrain_step.py``), and it has no dropout.
    """
    explicit = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or drop > 0)
    if not explicit or q.shape[-2] * k.shape[-2] > LARGEST_EXPLICIT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    weights = (scores if bias is None else scores + bias).softmax(-1).to(v.dtype)
    return dropout(weights, drop) @ v


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Zeroes a share ``rate`` of the entries and scales up the others (Srivastava et al., 2014).

    On a CPU torch spends several times as long on drawing such a mask as here, where each entry takes 16 bits of
    a 64-bit draw; the share is then a multiple of 2^-16.
    """
    if not training or rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    cut = round(rate * 2**16)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= cut - 2**15
    return x * (keep.to(x.dtype) * (2**16 / (2**16 - cut)))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the Gaussian's distribution function (Hendrycks and Gimpel, 2016), not its tanh approximation."""
    if torch.compiler.is_compiling() and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return _GELU.apply(x)
    return F.gelu(x)


class _GELU(torch.autograd.Function):
    """GELU whose derivative is computed with the value, from the same exponential, and kept.

    Compiled for a CPU, GELU and its gradient otherwise take a fifth of a training step. Phi comes from formula
    7.1.26 of Abramowitz and Stegun, 1.5e-7 off at most: bfloat16 rounds 10,000 times as coarsely.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        z = x.float()
        bell = torch.exp(-0.5 * z * z)
        t = 1 / (1 + 0.3275911 / math.sqrt(2) * z.abs())
        series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        tail = 0.5 * t * series * bell  # Phi(-|x|)
        phi = torch.where(z < 0, tail, 1 - tail)
        ctx.save_for_backward((phi + z * bell / math.sqrt(2 * math.pi)).to(x.dtype))
        return (z * phi).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * derivative


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to tokens (B, L, D) by a convolution whose stride is its size."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"width {width} is not a multiple of the {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        q, k, v = self.qkv(x).reshape(b, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, length, d))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens (B, N, D) to a memory (B, M, E); norms are left to the block."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"width {width} is not a multiple of the {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class ViT(nn.Module):
    """Patch embedding, positions, class token, blocks and a final norm.

    ``embed`` and ``forward`` are separate so that a method can hide, drop or replace tokens in between.
    """

    pos_embed: Tensor

    def __init__(self, image_size: int, shape: ViTShape) -> None:
        super().__init__()
        if min(image_size, shape.patch_size, shape.width, shape.depth) < 1:
            raise ConfigError(f"a ViT of {shape} for images of {image_size} pixels has nothing to compute")
        if image_size % shape.patch_size:
            raise ConfigError(
                f"image size {image_size} is not a multiple of the patch size {shape.patch_size}"
            )
        self.shape = shape
        self.grid = (image_size // shape.patch_size,) * 2
        self.patch_embed = PatchEmbed(shape.patch_size, 3, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        table = sincos_positions(shape.width, *self.grid)
        self.register_buffer("pos_embed", torch.cat([torch.zeros(1, shape.width), table])[None])
        self.blocks = nn.ModuleList(
            [Block(shape.width, shape.heads, shape.mlp_ratio) for _ in range(shape.depth)]
        )
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=1e-6)

    @property
    def tokens(self) -> int:
        """Patches of a training image, the class token not counted."""
        return self.grid[0] * self.grid[1]

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to patch tokens (B, L, D) with positions, interpolated where the grid differs."""
        p = self.shape.patch_size
        target = (images.shape[2] // p, images.shape[3] // p)
        return self.patch_embed(images) + resize_positions(self.pos_embed[:, 1:], self.grid, target)

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) with the class token in front: (B, 1 + L, D)."""
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, L, D), of any subset, to normed outputs (B, 1 + L, D), class token first."""
        x = self.with_class_token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ViTEncoder(nn.Module):
    """A ViT as protocols see it (``mimbench.encoder.Encoder``)."""

    readouts = {
        "class": "class token after the final norm",
        "mean": "mean of patch tokens after the final norm",
        "finetune": "mean of patch tokens of the last block, then a fresh norm",
    }

    def __init__(self, vit: ViT, input: InputSpec, pool: Literal["class", "mean", "finetune"]) -> None:
        super().__init__()
        self.vit = vit
        self.input = input
        self.pool = pool
        self.readout = self.readouts[pool]
        self.name = vit.shape.name
        self.dim = vit.shape.width
        self.depth = vit.shape.depth
        self.stride = vit.shape.patch_size
        self.fc_norm: nn.Module = nn.LayerNorm(self.dim, eps=1e-6) if pool == "finetune" else nn.Identity()

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``. A layer's map is the output of that block, before the final norm."""
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)

        def as_map(tokens: Tensor) -> Tensor:
            return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), self.dim, *grid)

        x = self.vit.with_class_token(self.vit.embed(images))
        kept = {}
        for number, block in enumerate(self.vit.blocks):
            x = block(x)
            if number in layers:
                kept[number] = as_map(x)
        normed = self.vit.norm(x)
        pooled = normed[:, 0] if self.pool == "class" else normed[:, 1:].mean(1)
        return Features(self.fc_norm(pooled), as_map(normed), tuple(kept[n] for n in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> ViTEncoder:
        """A copy with MAE's fine-tuning readout: the pretraining norm goes, a new one follows the mean.

        ``drop_path`` rises linearly from 0 at the first block to its value at the last.
        """
        tuned = ViTEncoder(copy.deepcopy(self.vit), self.input, "finetune")
        tuned.vit.norm = nn.Identity()
        spread_drop_path(tuned.vit.blocks, drop_path)
        return tuned.requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("vit.")
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1
