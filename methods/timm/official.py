"""timm's own checkpoints: the classifier, which is not scored, is left out."""

from __future__ import annotations

from torch import Tensor

from .method import Config

CLASSIFIERS = ("head.weight", "head.bias", "fc.weight", "fc.bias", "classifier.weight", "classifier.bias")


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """timm's names to ours."""
    return {f"net.{name}": value for name, value in state_dict.items() if name not in CLASSIFIERS}
