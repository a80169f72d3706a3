"""BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (Peng et al., 2022, arXiv 2208.06366).

Masked patches are classified instead of regressed: their classes are the codes of a tokenizer, which was trained
beforehand so that a frozen teacher's features, not pixels, can be told from its codes (``model.py``). Mask tokens
enter a ViT with one relative position bias for all blocks, and a linear layer predicts the codes.

Patch aggregation: the final class token and the patches of an early layer go through two more blocks, from which
the same layer predicts the same codes. What the early patches lack, the class token has to bring.

Worth an ablation: ``--set aggregation=false``, and ``--set tokenizer.codes=64``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment
from mimbench import config as settings
from mimbench.augment.masks import block_masks
from mimbench.data import Batch
from mimbench.encoder import Encoder, InputSpec, normalise
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.beit import Block, RelativeViT, RelativeViTEncoder
from mimbench.models.mae import take
from mimbench.models.vit import ViTEncoder, ViTShape
from mimbench.models.vq import Tokenised, fit_on_codes, perplexity

from .model import Tokenizer, TokenizerConfig

RECIPE = Recipe(
    epochs=1600,  # or 300, then with betas of 0.9 and 0.98 and without drop_path
    batch_size=2048,
    base_lr=1.5e-3,
    lr_batch=0,  # the rate is not scaled
    betas=(0.9, 0.999),
    weight_decay=0.05,
    warmup_epochs=10,  # from 0: the authors' option warmup_lr never reaches the schedule
    min_lr=1e-5,
    clip_norm=3.0,
    precision="bf16",
)


@dataclass(frozen=True)
class Config:
    """The authors' command for ViT-B/16 (PRETRAINING.md); other sources are files of their code."""

    image_size: int = 224  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder
    layer_scale: float = 0.1  # initial value of the per-channel branch scales; 1e-5 for ViT-L
    drop_path: float = 0.1  # stochastic depth at the last block
    hidden: int = 75  # patches of each image that are hidden, of 196
    smallest_block: int = 16  # least patches of a block to hide (run_beitv2_pretraining.py)
    aggregation: bool = True  # whether the class token is pretrained by the second prediction
    early_layer: int = 9  # blocks after which patches are taken for it; 21 for ViT-L
    aggregation_depth: int = 2  # blocks of it, discarded after training
    teacher: str = "timm:vit_base_patch16_224.dino"  # teaches the tokenizer: run:SLUG, timm:NAME, a file
    teacher_backbone: ViTShape = ViTShape()  # the teacher's shape; of a timm model only the width counts
    tokenizer: TokenizerConfig = TokenizerConfig()  # gives the codes to predict, and says how it is trained
    tokenizer_weights: str = ""  # a file of tokenizer weights, instead of a teacher
    jitter: float = 0.4  # strength for brightness, contrast and saturation (datasets.py)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image
    flip: bool = True  # random horizontal flip (datasets.py)
    recipe: Recipe = RECIPE  # of the second stage; the tokenizer has its own

    def __post_init__(self) -> None:
        settings.check(
            self,
            "config",
            positive=("hidden", "smallest_block", "early_layer", "aggregation_depth"),
            not_negative=("jitter",),
        )
        depth, patch = self.backbone.depth, self.backbone.patch_size
        if self.early_layer > depth:
            raise ConfigError(
                f"early_layer = {self.early_layer} is beyond the {depth} blocks of the backbone",
                "The paper takes patches at three quarters of the depth",
            )
        if self.tokenizer.encoder.patch_size != patch:
            raise ConfigError(
                f"the tokenizer's patches of {self.tokenizer.encoder.patch_size} pixels are not the backbone's "
                f"of {patch}",
                f"Set tokenizer.encoder.patch_size={patch}",
            )
        if bool(self.teacher) == bool(self.tokenizer_weights):
            both = self.teacher and self.tokenizer_weights
            raise ConfigError(
                "a tokenizer is trained by a teacher or read from tokenizer_weights, but "
                + ("both are given" if both else "neither is given"),
                "Write --set teacher= beside tokenizer_weights" if both else "Write --set teacher=run:mae",
            )


class Model(Tokenised):
    """Mask tokens at the input, a linear classifier of codes, the aggregation blocks, and the frozen tokenizer.

    Raises ConfigError for a number of patches that cannot be hidden and sizes that do not fit, and CheckpointError
    for a file that holds no such tokenizer.
    """

    needs = ()
    tokenizer: Tokenizer

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size)
        shape = config.backbone
        width = config.teacher_backbone.width
        tokenizer = Tokenizer(config.tokenizer, config.image_size, width, config.flip)
        self.grid = tokenizer.grid
        if config.hidden >= math.prod(self.grid):
            raise ConfigError(
                f"hidden = {config.hidden} leaves none of the {math.prod(self.grid)} patches visible",
                "The paper hides 38 % of them",
            )
        self.backbone = RelativeViT(config.image_size, shape, config.layer_scale, config.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.head = nn.Linear(shape.width, config.tokenizer.codes)
        last = config.early_layer + config.aggregation_depth
        rates = torch.linspace(0, config.drop_path, max(shape.depth, last)).tolist()
        self.aggregate = nn.ModuleList(
            [Block(shape, config.layer_scale, rate) for rate in rates[config.early_layer : last]]
            if config.aggregation
            else []
        )
        self.initialise()
        self.take_tokenizer(tokenizer, config.tokenizer_weights)

    def initialise(self) -> None:
        """As the backbone; the aggregation blocks count on from the early layer."""
        for table in (self.mask_token, self.head.weight, *self.aggregate.parameters()):
            if table.ndim > 1:
                nn.init.trunc_normal_(table, std=0.02, a=-0.02, b=0.02)
        for layer in self.aggregate.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.bias)
        for number, block in enumerate(self.aggregate, self.config.early_layer + 1):
            assert isinstance(block, Block)
            block.attn.proj.weight.data /= math.sqrt(2 * number)
            block.mlp.fc2.weight.data /= math.sqrt(2 * number)

    def load_teacher(self, encoder: Encoder) -> None:
        """Takes the encoder that the tokenizer learns from. Raises ConfigError for one of another shape."""
        wanted = self.config.teacher_backbone
        if isinstance(encoder, ViTEncoder):
            fits, found = encoder.vit.shape == wanted, str(encoder.vit.shape)
        else:
            fits, found = encoder.dim == wanted.width, f"{encoder.name} of width {encoder.dim}"
        if not fits:
            raise ConfigError(
                f"the teacher is {found}, but teacher_backbone is {wanted}",
                "Set teacher_backbone to the shape of the teacher",
            )
        self.tokenizer.guide(encoder)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop with changed colours per image, which both networks see, and the blocks to hide."""
        config = self.config
        images = augment.simclr_view(
            *(batch, config.image_size, config.crop_scale, generator),
            jitter=(config.jitter, config.jitter, config.jitter, 0.0),
            jitter_p=float(config.jitter > 0),
            grey_p=0.0,
            blur_p=0.0,
            flip_p=0.5 * config.flip,
            interpolation="bicubic",
        )
        mask = block_masks(len(batch), self.grid, config.hidden, config.smallest_block, generator)
        return {"images": normalise(images, self.input), "mask": mask}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The codes (B, L) of normalised images (B, 3, H, W), which the tokenizer sees as pixels."""
        std, mean = (torch.tensor(v, device=images.device) for v in (self.input.std, self.input.mean))
        return self.tokenizer.tokens(images * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and masks (B, L), True for the ``hidden`` patches of each."""
        return self.predict(images, mask, self.tokens(images))

    def predict(self, images: Tensor, mask: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The same with given codes (B, L).

        ``pred`` and ``pred_cls`` (B * hidden, codes) list the hidden patches image by image in raster order.
        """
        config, backbone = self.config, self.backbone
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        hidden = order[:, : config.hidden]
        labels = tokens.gather(1, hidden).flatten()
        x = torch.where(mask.bool()[..., None], self.mask_token, backbone.patch_embed(images))
        latent, (early, last) = backbone(x, self.grid, (config.early_layer - 1, config.backbone.depth - 1))
        logits, loss = self.classify(latent, hidden, labels)
        outputs = {
            "loss": loss,
            "loss_main": loss,
            "accuracy": (logits.argmax(-1) == labels).float().mean(),
            "perplexity": perplexity(tokens, config.tokenizer.codes),  # of the whole batch
            "pred": logits,
            "latent": latent,
            "mask": mask,
        }
        if config.aggregation:
            x, bias = torch.cat([last[:, :1], early[:, 1:]], dim=1), backbone.rel_pos_bias(self.grid)
            for block in self.aggregate:
                x = block(x, bias)
            latent = backbone.norm(x)
            logits, second = self.classify(latent, hidden, labels)
            outputs |= {"loss": loss + second, "loss_cls": second, "pred_cls": logits, "latent_cls": latent}
        return outputs

    def classify(self, latent: Tensor, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B * hidden, codes) of the hidden patches, and their mean cross-entropy with the labels."""
        logits = self.head(take(latent[:, 1:], hidden)).float().flatten(0, 1)
        return logits, F.cross_entropy(logits, labels)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The class token does not decay (authors' code); the rest follows the usual rule."""
        token = self.backbone.cls_token
        rest = [p for p in self.parameters() if p is not token]
        return [{"params": [token], "weight_decay": 0.0}, {"params": rest}]

    def encoder(self) -> RelativeViTEncoder:
        """The ViT on full images."""
        return RelativeViTEncoder(self.backbone, self.input)


pretrain = fit_on_codes  # the tokenizer first
