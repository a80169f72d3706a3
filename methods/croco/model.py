"""The networks of CroCo: an encoder without a class token, and a decoder that looks at a second image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mimbench.encoder import Features
from mimbench.errors import ConfigError
from mimbench.models.mae import DecoderShape, take
from mimbench.models.vit import (
    MLP,
    Attention,
    Block,
    ViT,
    ViTEncoder,
    ViTShape,
    attention,
    drop_path,
    resize_positions,
    sincos_positions,
)

Kind = Literal["sincos", "rope"]


def rotary_angles(grid: tuple[int, int], channels: int, base: float) -> Tensor:
    """Angles (L, channels) of 2-D RoPE for a head's channels, patches in raster order (CroCo v2).

    The first half of the channels tells the row, the second the column. With q = channels / 4, channels i and
    i + q of a half are a pair, turned by base^(-i / q) for each row or column.
    """
    if channels % 4:
        raise ConfigError(f"rotary positions need heads whose width is divisible by 4, not {channels}")
    quarter = channels // 4
    frequencies = base ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    return (place[:, :, None] * frequencies).repeat(1, 1, 2).flatten(1).float()


def rotate(x: Tensor, turn: Tensor | None) -> Tensor:
    """Queries or keys (B, H, L, d) turned by ``turn``: cosines and sines of their angles (2, ..., L, d)."""
    if turn is None:
        return x
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    across = torch.stack([-second, first], dim=-2).flatten(-3)
    return (x * turn[0] + across * turn[1]).to(x.dtype)


class Positions(nn.Module):
    """Where a patch is: a fixed table added to the tokens (CroCo), or a turn of queries and keys (v2)."""

    table: Tensor
    angles: Tensor

    def __init__(self, kind: Kind, grid: tuple[int, int], width: int, heads: int, base: float) -> None:
        super().__init__()
        self.kind, self.grid, self.channels, self.base = kind, grid, width // heads, base
        if kind == "sincos":
            self.register_buffer("table", sincos_positions(width, *grid)[None])
        else:
            self.register_buffer("angles", rotary_angles(grid, self.channels, base), persistent=False)

    def add(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, D) of all patches with their positions, interpolated where the grid differs."""
        return tokens + resize_positions(self.table, self.grid, grid) if self.kind == "sincos" else tokens

    def turn(self, grid: tuple[int, int], chosen: Tensor | None = None) -> Tensor | None:
        """What ``rotate`` takes for all patches, or for those that ``chosen`` (B, n) names; None if nothing turns."""
        if self.kind == "sincos":
            return None
        angles = self.angles
        if grid != self.grid:
            angles = rotary_angles(grid, self.channels, self.base).to(angles.device)
        if chosen is not None:
            angles = angles[chosen].unsqueeze(1)  # (B, 1, n, d): the same for all heads
        return torch.stack([angles.cos(), angles.sin()])


class SelfAttention(Attention):
    """Multi-head self-attention whose queries and keys may be turned."""

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = attention(rotate(q, turn), rotate(k, turn), v)
        return self.proj(found.transpose(1, 2).flatten(2))


class EncoderBlock(Block):
    """A ViT's block around it."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__(shape.width, shape.heads, shape.mlp_ratio)
        self.attn = SelfAttention(shape.width, shape.heads)

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x), turn), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class Backbone(ViT):
    """The siamese encoder: a ViT without a class token."""

    def __init__(self, image_size: int, shape: ViTShape, kind: Kind, base: float) -> None:
        super().__init__(image_size, shape)
        del self.cls_token, self.pos_embed
        self.positions = Positions(kind, self.grid, shape.width, shape.heads, base)
        self.blocks = nn.ModuleList([EncoderBlock(shape) for _ in range(shape.depth)])

    def forward(  # type: ignore[override]
        self, images: Tensor, chosen: Tensor | None = None, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Normed tokens (B, L, D) of images (B, 3, H, W), and the raw outputs of the blocks ``layers``.

        With ``chosen`` (B, n) the encoder sees those patches alone: (B, n, D), in that order.
        """
        grid = (images.shape[2] // self.shape.patch_size, images.shape[3] // self.shape.patch_size)
        x = self.positions.add(self.patch_embed(images), grid)
        if chosen is not None:
            x = take(x, chosen)
        turn = self.positions.turn(grid, chosen)
        kept = {}
        for number, block in enumerate(self.blocks):
            x = block(x, turn)
            if number in layers:
                kept[number] = x
        return self.norm(x), [kept[n] for n in layers]


class Encoder(ViTEncoder):
    """What protocols see: all patches of an image, and their mean, as there is no class token."""

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        size = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        tokens, kept = self.vit(images, layers=layers)
        maps = [x.transpose(1, 2).unflatten(2, size) for x in (tokens, *kept)]
        return Features(self.fc_norm(tokens.mean(1)), maps[0], tuple(maps[1:]))

    def for_finetuning(self, drop_path: float = 0.0) -> Encoder:
        """A copy with MAE's fine-tuning readout; the paper fine-tunes for dense tasks only."""
        return Encoder(super().for_finetuning(drop_path).vit, self.input, "finetune").requires_grad_(True)


class CrossAttention(nn.Module):
    """From the tokens of one image to those of the other, both (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = nn.Linear(width, width)
        self.projk = nn.Linear(width, width)
        self.projv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, turn: Tensor | None) -> Tensor:
        q, k, v = self.projq(x), self.projk(memory), self.projv(memory)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        found = attention(rotate(q, turn), rotate(k, turn), v)
        return self.proj(found.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """The masked image looks at itself, then at the other image; the tokens of the latter never change."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = SelfAttention(shape.width, shape.heads)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.norm_y = nn.LayerNorm(shape.width, eps=1e-6)  # of the other image; every block has its own
        self.cross_attn = CrossAttention(shape.width, shape.heads)
        self.norm3 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = MLP(shape.width, int(shape.width * shape.mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, turn: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), turn)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(memory), turn)
        return x + self.mlp(self.norm3(x))


class Decoder(nn.Module):
    """From the visible patches of one image and all patches of the other to the pixels of the first."""

    def __init__(self, shape: DecoderShape, encoder: Backbone) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.shape.width, shape.width)  # for both images
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = nn.ModuleList([CrossBlock(shape) for _ in range(shape.depth)])
        places = encoder.positions
        self.positions = Positions(places.kind, encoder.grid, shape.width, shape.heads, places.base)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.pred = nn.Linear(shape.width, encoder.shape.patch_size**2 * 3)

    def forward(self, latent: Tensor, chosen: Tensor, memory: Tensor) -> Tensor:
        """Pixels (B, L, p*p*3) from latents (B, n, D) of the patches ``chosen`` (B, n) and (B, L, D) of the other."""
        grid = self.positions.grid
        visible, memory = self.embed(latent), self.positions.add(self.embed(memory), grid)
        hidden = self.mask_token.to(visible.dtype).expand(*memory.shape[:2], -1)
        x = hidden.scatter(1, chosen[..., None].expand_as(visible), visible)
        x, turn = self.positions.add(x, grid), self.positions.turn(grid)
        for block in self.blocks:
            x = block(x, memory, turn)
        return self.pred(self.norm(x))
