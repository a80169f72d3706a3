"""The tokenizer of BEiT v2, vector-quantised knowledge distillation (VQ-KD), and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment, config
from mimbench.data import Batch
from mimbench.encoder import Encoder, normalise, resize
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.vit import Block, PatchEmbed, ViT, ViTShape
from mimbench.models.vq import Quantiser, perplexity

RECIPE = Recipe(
    epochs=100,
    batch_size=512,  # 64 on each of 8 GPUs
    base_lr=5e-5,
    lr_batch=128,  # run_vqkd_training.py scales the rate, though not its end
    betas=(0.9, 0.99),
    weight_decay=1e-4,
    warmup_epochs=10,
    min_lr=2.5e-6,  # 1e-5 after scaling
    precision="bf16",
)


@dataclass(frozen=True)
class TokenizerConfig:
    """The authors' tokenizer with a DINO teacher (``vqkd_encoder_base_decoder_1x768x12_dino``, TOKENIZER.md)."""

    encoder: ViTShape = ViTShape()  # from pixels to codes; the decoder has its width and heads
    decoder_depth: int = 1  # blocks from codes to features (3 in the tokenizer of the main results)
    codes: int = 8192  # entries of the codebook
    code_width: int = 32  # channels of a code
    decay: float = 0.99  # of the moving averages that codes are
    revive: float = 0.0  # share of an even use below which a code is moved to where vectors are; 0: never
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, share of the image
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        config.check(self, "tokenizer", positive=("decoder_depth",), share=("decay", "revive"))


def network(side: int, shape: ViTShape, channels: int) -> ViT:
    """A ViT with learned positions for maps (B, channels, side, side), initialised as the authors' ones."""
    vit = ViT(side, shape)
    vit.patch_embed = PatchEmbed(shape.patch_size, channels, shape.width)
    vit.pos_embed = nn.Parameter(torch.zeros_like(vit.pos_embed))
    initialise(vit)
    for table in (vit.pos_embed, vit.cls_token):
        nn.init.trunc_normal_(table, std=0.02)
    for number, block in enumerate(vit.blocks, 1):
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data /= math.sqrt(2 * number)
    return vit


def head(width: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a tanh between."""
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))
    initialise(layers)
    return layers


def initialise(model: nn.Module) -> None:
    """Matrices from N(0, 0.02), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class Tokenizer(nn.Module):
    """Image patches to codes, from which a decoder can tell what a frozen teacher makes of the patches.

    Images enter with pixels in [0, 1]. The loss is the mean of 1 - cosine to the teacher's features, plus the
    commitment loss. The teacher is given by ``guide`` and no part of the state dict, since only training reads it.
    """

    needs = ()

    def __init__(self, config: TokenizerConfig, image_size: int, teacher_width: int, flip: bool) -> None:
        super().__init__()
        self.config, self.image_size, self.flip = config, image_size, flip
        shape = config.encoder
        self.encoder = network(image_size, shape, 3)
        self.grid = self.encoder.grid
        self.to_code = head(shape.width, config.code_width)
        self.quantise = Quantiser(config.codes, config.code_width, config.decay, config.revive)
        pixel = replace(shape, patch_size=1, depth=config.decoder_depth)
        self.decoder = network(self.grid[0], pixel, config.code_width)
        self.to_feature = head(shape.width, teacher_width)
        self.teacher: tuple[Encoder, ...] = ()  # a tuple hides a module from the state dict

    def guide(self, teacher: Encoder) -> None:
        """Sets the teacher, which is in evaluation mode and on the device that trains."""
        self.teacher = (teacher,)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image, without colour jitter."""
        scale, flip = self.config.crop_scale, 0.5 * self.flip
        return {"images": augment.crop_and_flip(batch, self.image_size, scale, generator, flip_p=flip)}

    def encode(self, images: Tensor) -> Tensor:
        """Vectors (B, C, h, w) to quantise, in float32, of images (B, 3, H, W) in [0, 1]."""
        features = self.encoder(self.encoder.embed(2 * images - 1))[:, 1:]
        with torch.autocast(images.device.type, enabled=False):
            return self.to_code(features.float()).transpose(1, 2).unflatten(2, self.grid)

    def decode(self, codes: Tensor) -> Tensor:
        """Features (B, L, E) from codes (B, C, h, w)."""
        return self.to_feature(self.decoder(self.decoder.embed(codes))[:, 1:])

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's normed patch features (B, L, E), each image resized and normalised as the teacher expects.

        Where the teacher's grid is another one, its features are resized to the tokenizer's.
        """
        if not self.teacher:
            raise ConfigError("the tokenizer has no teacher to learn from", "Set teacher=run:mae")
        (teacher,) = self.teacher
        size = teacher.input.size
        features = teacher(normalise(resize(images, (size, size)), teacher.input)).patches.float()
        if features.shape[2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1].

        Logs the share of the codes that the batch uses, and how many in even use its use comes to (perplexity).
        """
        codes, numbers, commitment = self.quantise(self.encode(images).permute(0, 2, 3, 1))
        pred = self.decode(codes.permute(0, 3, 1, 2))
        distance = (1 - F.cosine_similarity(pred.float(), self.target(images), dim=-1)).mean()
        used = torch.zeros(self.config.codes, device=images.device).index_fill(0, numbers.flatten(), 1.0)
        return {
            "loss": distance + commitment,
            "distance": distance,
            "commitment": commitment,
            "used": used.mean(),
            "perplexity": perplexity(numbers, self.config.codes),
            "pred": pred,
        }

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The codes' numbers (B, L), raster order, of images (B, 3, H, W) in [0, 1]."""
        z = self.encode(images).permute(0, 2, 3, 1).flatten(1, 2)
        with torch.autocast(images.device.type, enabled=False):
            return self.quantise.nearest(z)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Class tokens and positions do not decay (authors' code); the rest follows the usual rule."""
        tables = [p for vit in (self.encoder, self.decoder) for p in (vit.cls_token, vit.pos_embed)]
        rest = [p for p in self.parameters() if all(p is not table for table in tables)]
        return [{"params": tables, "weight_decay": 0.0}, {"params": rest}]
