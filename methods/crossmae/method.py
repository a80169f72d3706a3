"""Rethinking Patch Dependence for Masked Autoencoders: CrossMAE (Fu et al., TMLR 2025, arXiv 2401.14391).

MAE whose decoder has no self-attention. A mask token reads the encoded patches by cross-attention and
nothing else, so it is decoded alone and only some of the hidden patches need decoding. Each decoder
block reads a learned mixture of its own of all the feature maps of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimbench import augment
from mimbench.data import Batch
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.mae import initialise, standardise, take, visible_patches
from mimbench.models.vit import (
    MLP,
    Attention,
    CrossAttention,
    ViT,
    ViTEncoder,
    ViTShape,
    patchify,
    sincos_positions,
)

RECIPE = Recipe(
    epochs=800,
    batch_size=4096,
    base_lr=1.5e-4,  # before the factor that ``Config.scale_lr`` adds
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    precision="bf16",
)


@dataclass(frozen=True)
class Decoder:
    """Blocks that read the encoder's feature maps by cross-attention."""

    width: int = 512  # channels of a mask token (authors' code; 256 for ViT-S)
    depth: int = 12  # blocks (authors' command; ablated in Table 3)
    heads: int = 16  # attention heads per block (authors' code; 8 for ViT-S)
    self_attention: bool = False  # whether mask tokens also attend to each other (ablated in Table 3)


@dataclass(frozen=True)
class Config:
    """The setting of the authors' command for ViT-B/16."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    decoder: Decoder = Decoder()  # discarded after pretraining
    mask_ratio: float = 0.75  # share of all patches that the encoder does not see
    prediction_ratio: float = 0.25  # share of ALL patches that are decoded (Table 1: also 0.75)
    mixed_blocks: tuple[int, ...] | None = None  # encoder blocks, from 0, that are mixed; none: all (Table 3)
    mix_input: bool = True  # mixes in what enters the first block (authors' command)
    normalise_target: bool = True  # each patch by its own mean and deviation (authors' command)
    scale_lr: bool = True  # lr times prediction_ratio / mask_ratio (Table 10, authors' main_pretrain.py)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, share of the image (authors' code)
    flip: bool = True  # random horizontal flip (Table 10)
    pool: Literal["class", "mean"] = "class"  # what frozen probes read (default of the authors' probe)
    recipe: Recipe = RECIPE  # Table 10


class DecoderBlock(nn.Module):
    """Pre-norm cross-attention and MLP. Without self-attention no token can tell which others are there."""

    def __init__(self, decoder: Decoder, memory_width: int, mlp_ratio: float) -> None:
        super().__init__()
        width = decoder.width
        if decoder.self_attention:
            self.norm0 = nn.LayerNorm(width, eps=1e-6)
            self.self_attn = Attention(width, decoder.heads)
        self.mixes_tokens = decoder.self_attention
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, memory_width, decoder.heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Mask tokens (B, N, D) that look at the normed memory (B, 1 + keep, E)."""
        if self.mixes_tokens:
            x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Encoder on visible patches, cross-attention decoder on a share of the hidden ones, squared error on these."""

    needs = ()

    decoder_pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape, decoder = config.backbone, config.decoder
        self.backbone = ViT(config.image_size, shape)
        # No norm follows the encoder in pretraining, so probes get one that has nothing to learn.
        self.backbone.norm = nn.LayerNorm(shape.width, eps=1e-6, elementwise_affine=False)
        self.keep, self.ignore, self.predict = self.count_patches()
        self.mixed = self.find_mixed_blocks()
        if decoder.depth < 1:
            raise ConfigError(f"decoder.depth = {decoder.depth}: with no block nothing reads the encoder")

        # One weight for each pair of decoder block and feature map, shared by all tokens and channels.
        self.mixture = nn.Linear(config.mix_input + len(self.mixed), decoder.depth, bias=False)
        self.dec_norms = nn.ModuleList([nn.LayerNorm(shape.width, eps=1e-6) for _ in range(decoder.depth)])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        table = sincos_positions(decoder.width, *self.backbone.grid)
        self.register_buffer("decoder_pos_embed", torch.cat([torch.zeros(1, decoder.width), table])[None])
        self.decoder_blocks = nn.ModuleList(
            [DecoderBlock(decoder, shape.width, shape.mlp_ratio) for _ in range(decoder.depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, shape.patch_size**2 * 3)
        initialise(self)  # the mixture too: in the authors' code that overwrites the paper's N(0, 1 / maps)

    def count_patches(self) -> tuple[int, int, int]:
        """How many patches are seen, how many are neither seen nor decoded, and how many are decoded."""
        total, hidden, decoded = self.backbone.tokens, self.config.mask_ratio, self.config.prediction_ratio
        keep = visible_patches(total, hidden)
        if not 0 < decoded <= hidden:
            raise ConfigError(
                f"prediction_ratio = {decoded} is a share of all patches, so it lies above 0 and is at most "
                f"mask_ratio = {hidden}"
            )
        ignore = int(total * (hidden - decoded))  # both counts are cut off as in the authors' code
        if keep + ignore == total:
            raise ConfigError(f"prediction_ratio = {decoded} decodes none of {total} patches")
        return keep, ignore, total - keep - ignore

    def find_mixed_blocks(self) -> list[int]:
        """The encoder blocks whose outputs are mixed, in their order; blocks after the last get no gradient."""
        depth, chosen = self.config.backbone.depth, self.config.mixed_blocks
        if chosen is None:
            return list(range(depth))
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= block < depth for block in chosen):
            raise ConfigError(
                f"mixed_blocks = {list(chosen)} should name some of the encoder's blocks 0 to {depth - 1}, each once"
            )
        return sorted(chosen)

    def parameter_groups(self, recipe: Recipe) -> Iterable[dict[str, Any]]:
        """All in one group. The loss of a few patches varies more, so the rate falls with their share."""
        config = self.config
        factor = config.prediction_ratio / config.mask_ratio if config.scale_lr else 1.0
        return [{"params": list(self.parameters()), "lr_scale": factor}]

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, and the noise that ranks its patches."""
        size, scale, flip = self.config.image_size, self.config.crop_scale, 0.5 * self.config.flip
        images = augment.crop_and_flip(batch, size, scale, generator, flip_p=flip)
        noise = torch.rand(len(batch), self.backbone.tokens, generator=generator, device=images.device)
        return {"images": normalise(images, self.input), "noise": noise}

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """The feature maps to mix (B, maps, 1 + keep, D), none of them normed: the input, then outputs of blocks."""
        x = self.backbone.with_class_token(take(self.backbone.embed(images), visible))
        maps = [x] if self.config.mix_input else []
        for number, block in enumerate(self.backbone.blocks):
            x = block(x)
            if number in self.mixed:
                maps.append(x)
        return torch.stack(maps, dim=1)

    def mix(self, maps: Tensor) -> Tensor:
        """What each decoder block will read (B, decoder depth, 1 + keep, D): sums of the maps, weighted freely."""
        return (self.mixture.weight @ maps.flatten(2)).unflatten(2, maps.shape[2:])

    def decode(self, memory: Tensor, places: Tensor) -> Tensor:
        """Predicted pixels (B, N, p*p*C) of the patches at ``places`` (B, N), each from its position alone."""
        x = self.mask_token + self.decoder_pos_embed[0, 1:][places]
        for block, norm, mixed in zip(self.decoder_blocks, self.dec_norms, memory.unbind(1), strict=True):
            x = block(x, norm(mixed))
        return self.decoder_pred(self.decoder_norm(x))

    def target(self, images: Tensor, places: Tensor) -> Tensor:
        """The pixels to regress (B, N, p*p*C), each patch standardised by its unbiased variance."""
        target = take(patchify(images, self.config.backbone.patch_size), places)
        return standardise(target) if self.config.normalise_target else target

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and noise (B, L); the lowest are seen, the highest decoded."""
        order = noise.argsort(dim=1)
        rank = order.argsort(dim=1)
        visible = order[:, : self.keep]
        places = order[:, -self.predict :].sort(dim=1).values  # raster order, as in the authors' code
        maps = self.encode(images, visible)
        memory = self.mix(maps)
        pred = self.decode(memory, places)
        target = self.target(images, places)
        return {
            "loss": (pred - target).square().mean(),
            "pred": pred,
            "target": target,
            "mask": rank >= self.keep,
            "predicted": rank >= self.keep + self.ignore,
            "maps": maps,
            "memory": memory,
            "ids_restore": rank,
        }

    def encoder(self) -> ViTEncoder:
        """The ViT on full images."""
        return ViTEncoder(self.backbone, self.input, self.config.pool)
