"""Any image encoder of timm (Wightman, 2019), with the weights that its authors published.

Nothing is trained: ``--method timm:NAME`` scores a published encoder by every protocol beside our own trainings.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimbench import compat
from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError, MimbenchError, UnknownName
from mimbench.fit import Recipe

LISTED = re.compile(r"\w+(\.[\w.-]+)?", re.ASCII)  # a model of timm's, with the tag of its weights
HUB = re.compile(r"hf[-_]hub:[\w.-]+/[\w.-]+(@[\w.-]+)?", re.ASCII)  # weights that are not in its list


@dataclass(frozen=True)
class Config:
    """Which model, and at which size of input."""

    name: str = ""  # as timm writes it, with the tag of its weights: "vit_small_patch16_224.dino"
    pretrained: bool = True  # published weights, downloaded by timm; else random ones
    image_size: int | None = None  # side of the input, in pixels; none: the size it was trained at
    recipe: Recipe = Recipe(epochs=0)  # nothing is trained


def create(config: Config, drop_path: float = 0.0) -> Any:
    """The timm model without its classifier. Raises MimbenchError for an unknown name or a failed download."""
    if not config.name:
        raise ConfigError("the method 'timm' needs a model", "Write --method timm:vit_small_patch16_224.dino")
    compat.torchvision()  # timm imports it
    import timm

    base = config.name.partition(".")[0]
    if not HUB.fullmatch(config.name) and not (LISTED.fullmatch(config.name) and timm.is_model(base)):
        raise UnknownName("timm model", base, timm.list_models())
    options: dict[str, Any] = {"num_classes": 0}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if base.startswith(("vit_", "test_vit", "deit", "eva", "beit")):
        options["dynamic_img_size"] = True
    try:
        return timm.create_model(config.name, pretrained=config.pretrained, **options)
    except TypeError as fault:
        raise ConfigError(f"timm cannot build '{config.name}' for images of any size: {fault}") from None
    except Exception as fault:  # what huggingface_hub and requests raise has no common parent
        reason = str(fault).strip().partition("\n")[0] or type(fault).__name__
        raise MimbenchError(
            f"timm could not provide '{config.name}': {reason}",
            "Check the name and the connection, or give the file with --weights",
        ) from None


class TimmEncoder(nn.Module):
    """A timm model as protocols see it (``mimbench.encoder.Encoder``)."""

    def __init__(self, net: Any, config: Config) -> None:
        super().__init__()
        facts = net.pretrained_cfg
        self.net, self.config = net, config
        self.name = config.name
        self.dim: int = net.num_features
        if getattr(net, "head_hidden_size", self.dim) != self.dim:
            raise ConfigError(f"'{config.name}' pools to another width than its feature map has")
        self.depth = len(net.feature_info)
        self.stride: int = net.feature_info[-1]["reduction"]
        self.input = InputSpec(config.image_size or facts["input_size"][-1], facts["mean"], facts["std"])
        self.readout = "what timm gives its classifier"

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``; layers are blocks of a ViT and stages of a CNN."""
        wanted = sorted(set(layers)) or [self.depth - 1]
        final, maps = self.net.forward_intermediates(images, indices=wanted, output_fmt="NCHW")
        pooled = self.net.forward_head(final, pre_logits=True)
        if final.ndim == 3:
            grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
            tokens = final[:, getattr(self.net, "num_prefix_tokens", 0) :]
            patches = tokens.transpose(1, 2).unflatten(2, grid)
        else:
            patches = (
                final.permute(0, 3, 1, 2) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else final
            )
        kept = dict(zip(wanted, maps, strict=True))
        return Features(pooled, patches, tuple(kept[number] for number in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> TimmEncoder:
        """A trainable copy, with stochastic depth as timm spreads it."""
        if drop_path:
            net = create(Config(self.config.name, pretrained=False), drop_path)
            net.load_state_dict(self.net.state_dict())
        else:
            net = copy.deepcopy(self.net)
        return TimmEncoder(net, self.config).requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        """The depth that timm's own rule for layer-wise decay gives it."""
        from timm.models._manipulate import group_parameters

        matcher = self.net.group_matcher(coarse=False)
        return group_parameters(self.net, matcher, reverse=True)[parameter.removeprefix("net.")]


class Model(nn.Module):
    """The encoder alone."""

    needs = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.net = create(config)

    def encoder(self) -> TimmEncoder:
        """The model with its published way to pool."""
        return TimmEncoder(self.net, self.config)
